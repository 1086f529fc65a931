"""
Peak resident size of `cloudsave backup` on clusters of 0.3 to 16 GB: it must not grow with the data.

Bound: Python with its imports, 64 MB for the key derivation, and per worker a frame, a pack of 32 MB in the
making and buffers; what grows with the data is 8 bytes of fingerprint and map per page (0.1 %).
Ends with 1 if one is above the limit.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import dataset
from benchmarks.measure import RESULTS, machine, tree_bytes
from benchmarks.ours import Ours

LIMIT_MB = 400.0
CLUSTERS = {"small": (20, False), "medium": (100, True), "large": (350, True), "huge": (1000, True)}
"""Scale of pgbench, and whether text and uuids are added."""
WORK = dataset.ROOT / "memory"


def measure(name: str, *, major: int, workers: int) -> dict[str, float | int | str]:
    """One backup and one restore of one cluster."""
    scale, large = CLUSTERS[name]
    with dataset.running(major, scale=scale, large=large) as server:
        ours = Ours(server, WORK, workers=workers)
        ours.prepare()
        backup = ours.backup()
        again = ours.backup_again()
        target = WORK / "restored"
        target.mkdir(mode=0o700)
        restore = ours.restore(target)
        result: dict[str, float | int | str] = {
            "cluster": name,
            "data_bytes": tree_bytes(server.data / "base"),
            "workers": workers,
            "backup_peak_mb": round(backup.peak_mb, 1),
            "next_backup_peak_mb": round(again.peak_mb, 1),
            "restore_peak_mb": round(restore.peak_mb, 1),
        }
    shutil.rmtree(WORK)
    return result


def main() -> int:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--clusters", default=",".join(CLUSTERS))
    parser.add_argument("--major", type=int, default=15)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)) + 1)
    options = parser.parse_args()
    results = []
    for name in options.clusters.split(","):
        shutil.rmtree(WORK, ignore_errors=True)
        WORK.mkdir(parents=True)
        result = measure(name, major=options.major, workers=options.workers)
        print(", ".join(f"{key} {value}" for key, value in result.items()), flush=True)
        results.append(result)
    RESULTS.mkdir(exist_ok=True)
    content = {"machine": machine(), "limit_mb": LIMIT_MB, "runs": results}
    (RESULTS / "memory.json").write_text(json.dumps(content, indent=1) + "\n")
    worst = max(float(value) for result in results for key, value in result.items() if key.endswith("_mb"))
    print(f"limit {LIMIT_MB:.0f} MB: {'kept' if worst <= LIMIT_MB else 'BROKEN'}, worst {worst:.0f} MB")
    return 0 if worst <= LIMIT_MB else 1


if __name__ == "__main__":
    sys.exit(main())
