"""
Restore of a small database of 4,000 files from a store that is 50 ms away, replay included.

The store is a directory behind a wrapper that holds each request (each thousand names of a listing) for so
long. Bound: the requests that must follow one another (head, key, manifest, maps, packs, control file; then
log), each one delay.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import dataset
from benchmarks.measure import RESULTS, machine, tree_bytes
from benchmarks.ours import Ours
from benchmarks.recovering import Recovery
from cloudsave.clock import SYSTEM_CLOCK
from cloudsave.store.api import Buffer, ObjectInfo, ObjectStore, StoreCapabilities
from cloudsave.store.posix import PosixStore

TABLES = 1000
"""Each with an index, a TOAST table and its index: four files."""
NAMES_PER_REQUEST = 1000
WORK = dataset.ROOT / "work-latency"


class Delayed:
    """A store whose every request takes `seconds` longer; it counts them."""

    def __init__(self, store: ObjectStore, seconds: float) -> None:
        self._store = store
        self._seconds = seconds
        self._lock = threading.Lock()
        self.requests: Counter[str] = Counter()

    @property
    def url(self) -> str:
        """That of the wrapped store."""
        return self._store.url

    @property
    def capabilities(self) -> StoreCapabilities:
        """It is far away."""
        return replace(self._store.capabilities, distant=True)

    def _wait(self, kind: str) -> None:
        with self._lock:
            self.requests[kind] += 1
        time.sleep(self._seconds)

    def put(self, name: str, parts: Sequence[Buffer]) -> None:
        """Wait, then put."""
        self._wait("put")
        self._store.put(name, parts)

    def get(self, name: str) -> bytes:
        """Wait, then get."""
        self._wait("get")
        return self._store.get(name)

    def get_range(self, name: str, *, offset: int, length: int) -> Buffer:
        """Wait, then get."""
        self._wait("get_range")
        return self._store.get_range(name, offset=offset, length=length)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Wait for each thousand names."""
        for number, info in enumerate(self._store.list(prefix)):
            if number % NAMES_PER_REQUEST == 0:
                self._wait("list")
            yield info

    def delete(self, name: str) -> None:
        """Wait, then delete."""
        self._wait("delete")
        self._store.delete(name)


def fill(server: dataset.Server) -> None:
    """Many small tables."""
    create = "create table if not exists small_%s (id int primary key, body text)"
    insert = "insert into small_%s select g, repeat(md5(g::text || %L), 2) from generate_series(1, 400) g"
    server.sql(
        f"do $$ begin for n in 1..{TABLES} loop execute format('{create}', n);"
        f" execute format('{insert} on conflict do nothing', n, n); end loop; end $$"
    )
    server.sql("checkpoint")


def main() -> int:
    """Measure and print; the results also go to benchmarks/results."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--milliseconds", type=float, default=50.0)
    options = parser.parse_args()
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    with dataset.running(scale=1, large=False) as server:
        fill(server)
        ours = Ours(server, WORK, workers=2)
        ours.prepare()
        ours.backup()
        data_bytes = tree_bytes(server.data / "base")
    store = Delayed(PosixStore(ours.repository, clock=SYSTEM_CLOCK), options.milliseconds / 1000)
    os.sync()
    recovery = Recovery(store, (WORK / "passphrase").read_text(), WORK / "restored", server.programs)
    requests: dict[str, dict[str, int]] = {}

    def note(name: str) -> None:
        requests[name] = dict(store.requests)
        store.requests.clear()

    recovery.run(done=note)
    result = {
        "machine": machine(),
        "version": ours.version(),
        "milliseconds": options.milliseconds,
        "data_bytes": data_bytes,
        "stored_bytes": ours.stored_bytes(),
        "files": recovery.files,
        "log_objects": len(recovery.plan.segments) if recovery.plan else 0,
        "seconds": recovery.seconds,
        "total_seconds": round(sum(recovery.seconds.values()), 2),
        "requests": requests,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "restore-latency.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    shutil.rmtree(WORK)
    return 0


if __name__ == "__main__":
    sys.exit(main())
