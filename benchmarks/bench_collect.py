"""
What garbage collection and retention cost: 1,000 backups that name 100,000 packs and maps, in a directory.

Manifests and maps are real, packs are empty objects: neither command reads a pack. Every backup names the
packs of the last 300 and adds 90 packs and 10 maps. Prints seconds of wall time and of CPU, and the memory
that it took.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, timedelta
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.unit.repository.samples import draft_manifest, lineage_on, sample_log

from cloudsave.engines.postgresql.dialect import PostgresDialect
from cloudsave.model.retention import RetentionRules
from cloudsave.repository.collect import CollectRequest, collect
from cloudsave.repository.lineage import Lineage
from cloudsave.retention.expire import plan_expiry, run_expiry
from cloudsave.retention.history import HistoryReader
from cloudsave.store.posix import PosixStore

DAY_US = 86400 * 1_000_000
PACKS_EACH, MAPS_EACH = 90, 10
NAMED_BACKUPS = 300


def fill(root: Path, backups: int) -> Lineage:
    """The repository. Packs and maps are put past the store's syncs, which are not what is measured."""
    lineage = lineage_on(PosixStore(root))
    for number in range(4):
        segment, log, index = sample_log(number << 24, 1 << 20)
        lineage.put_log(segment, [log], index)
    for kind in ("packs", "maps"):
        (root / lineage.root / kind).mkdir(parents=True)
    packs: list[str] = []
    for number in range(backups):
        mine = [f"{number + 1:08x}-{pack:08x}" for pack in range(PACKS_EACH)]
        maps = [f"{number + 1:08x}-{one:08x}" for one in range(MAPS_EACH)]
        for kind, names in (("packs", mine), ("maps", maps)):
            for name in names:
                (root / lineage.root / kind / name).write_bytes(b"")
        packs = (packs + mine)[-PACKS_EACH * NAMED_BACKUPS :]
        backup_id = f"2026{number // 25 % 12 + 1:02d}{number % 25 + 1:02d}T{number // 300:06d}Z-0000"
        draft = draft_manifest(backup_id)
        us = draft.finished_us + number * DAY_US
        lineage.put_record_json(
            f"pins/{backup_id}", {"generation": number + 1, "parents": [], "adopts": [], "created_utc": ""}
        )
        lineage.put_manifest(
            replace(draft, packs=tuple(packs), maps=tuple(maps), started_us=us, finished_us=us)
        )
    return lineage


def measured(what: str, work: Callable[[], object]) -> None:
    """Run and print."""
    wall, cpu = time.monotonic(), time.process_time()
    found = work()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    wall, cpu = time.monotonic() - wall, time.process_time() - cpu
    print(f"{what:<34} {wall:7.2f} s wall {cpu:7.2f} s CPU {peak:6d} MiB peak   {found}", flush=True)


def _expired(lineage: Lineage, reader: HistoryReader, rules: RetentionRules) -> int:
    """How many backups went."""
    return len(run_expiry(lineage, reader, plan_expiry(reader, rules)).backups)


def main() -> None:
    """Fill, look, expire, collect."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backups", type=int, default=1000)
    parser.add_argument("--root", type=Path, help="where to put the repository for the time of the run")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.root) as folder:
        lineage = fill(Path(folder), options.backups)
        rules = RetentionRules(last=options.backups // 2)
        reader = HistoryReader(lineage, PostgresDialect(), UTC)
        dry = CollectRequest(timedelta(days=1), dry_run=True)
        measured("gc --dry-run", lambda: collect(lineage, dry).packs)
        measured(
            "expire --dry-run",
            lambda: len(plan_expiry(HistoryReader(lineage, PostgresDialect(), UTC), rules).remove),
        )
        reader = HistoryReader(lineage, PostgresDialect(), UTC)
        measured("expire", lambda: _expired(lineage, reader, rules))
        measured("gc", lambda: collect(lineage, CollectRequest(timedelta(days=1))).packs)
        measured("gc with nothing to do", lambda: collect(lineage, CollectRequest(timedelta(days=1))).packs)


if __name__ == "__main__":
    main()
