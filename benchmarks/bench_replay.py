"""
Replay of a gigabyte of log: how long the server waits for its log.

While a server replays, its startup process is asked every few milliseconds what it waits for. It waits for
log while it runs the restore command: from the moment it asks for a file until it has it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psycopg

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import dataset
from benchmarks.measure import RESULTS, SOURCE, machine
from benchmarks.ours import Ours
from benchmarks.recovering import Recovery
from cloudsave.clock import SYSTEM_CLOCK
from cloudsave.engines.postgresql.target import PostgresTarget
from cloudsave.store.posix import PosixStore

WORK = dataset.ROOT / "work-replay"
SCALE = 20
SAMPLE_SECONDS = 0.004
_WAIT = "select wait_event from pg_stat_activity where backend_type = 'startup'"
_LSN = "select pg_wal_lsn_diff(pg_current_wal_lsn(), '0/0')::bigint"
_DURABLE = "select count(*) from pg_replication_slots where restart_lsn >= pg_current_wal_flush_lsn()"


class Watch:
    """What the startup process of a server waits for, in samples."""

    def __init__(self) -> None:
        self.waits: Counter[str] = Counter()
        self.seconds = 0.0
        self._begin = 0.0
        self._stop = threading.Event()

    def begin(self, target: PostgresTarget) -> Callable[[], None]:
        """Sample in the background; what is returned ends it."""
        thread = threading.Thread(target=self._sample, args=(target,), daemon=True)
        thread.start()

        def finish() -> None:
            self._stop.set()
            thread.join()

        return finish

    def _sample(self, target: PostgresTarget) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            try:
                with psycopg.connect(target.connection_url(), autocommit=True) as session:
                    self._sample_session(session)
            except psycopg.Error:
                continue

    def _sample_session(self, session: psycopg.Connection) -> None:
        self._begin = self._begin or time.perf_counter()
        while not self._stop.wait(SAMPLE_SECONDS):
            row = session.execute(_WAIT).fetchone()
            if row is None or row[0] == "RecoveryPause":
                break
            self.waits[row[0] or "computes"] += 1
            self.seconds = time.perf_counter() - self._begin


def produce(server: dataset.Server, config: Path, log_bytes: int) -> int:
    """Log after the backup, captured to its end; its size."""
    command = [sys.executable, "-m", "cloudsave", "--config", str(config), "logs", "capture", "bench"]
    begin = int(server.sql(_LSN))
    capture = subprocess.Popen(command, env={"PYTHONPATH": str(SOURCE), "PATH": "/usr/bin:/bin"}, stderr=-3)
    try:
        while int(server.sql(_LSN)) - begin < log_bytes:
            server.run("pgbench", "-n", "-c", "4", "-t", "5000", server.url)
            server.sql("update pgbench_accounts set abalance = abalance + 1 where aid % 4 = 0")
        while server.sql(_DURABLE) == "0":
            time.sleep(0.2)
    finally:
        capture.terminate()
        capture.wait()
    return int(server.sql(_LSN)) - begin


def main() -> int:
    """Measure and print; the results also go to benchmarks/results."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--megabytes", type=int, default=1000)
    options = parser.parse_args()
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    with dataset.running(scale=SCALE, large=False) as server:
        ours = Ours(server, WORK, workers=2)
        ours.prepare()
        ours.backup()
        log_bytes = produce(server, WORK / "cloudsave.toml", options.megabytes * 1_000_000)
        server.sql("select pg_drop_replication_slot(slot_name) from pg_replication_slots where not active")
    watch = Watch()
    store = PosixStore(ours.repository, clock=SYSTEM_CLOCK)
    recovery = Recovery(store, (WORK / "passphrase").read_text(), WORK / "restored", server.programs)
    recovery.run(watched=watch.begin)
    samples = sum(watch.waits.values())
    waited = watch.waits["RestoreCommand"] / samples
    result = {
        "machine": machine(),
        "version": ours.version(),
        "log_bytes": log_bytes,
        "replay_seconds": round(watch.seconds, 2),
        "seconds": recovery.seconds,
        "samples": dict(watch.waits.most_common()),
        "share_waiting_for_log": round(waited, 4),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "replay.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    shutil.rmtree(WORK)
    return 0


if __name__ == "__main__":
    sys.exit(main())
