"""
Backup, next backup and restore of a cluster of 100,000 small files: what a file costs, in time and memory.

The files are copies of the only page of a small table, under names of relations that the server does not
know: it leaves them alone, a backup reads, checks and stores each. Bound: to open, read and close so many
files, and to make them, each measured alone by one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import dataset
from benchmarks.measure import RESULTS, Cost, machine, wait_for_quiet
from benchmarks.ours import Ours

WORK = dataset.ROOT / "files"
FIRST_NODE = 10_000_000
"""Above the file nodes that the server of the benchmark ever makes."""


@contextmanager
def many_files(server: dataset.Server, count: int) -> Iterator[None]:
    """So many relations of one page, for a while."""
    server.sql("drop table if exists one_page; create table one_page as select 1 as x; checkpoint")
    model = server.data / server.sql("select pg_relation_filepath('one_page')").strip()
    content, owner = model.read_bytes(), model.stat()
    places = [model.parent / str(FIRST_NODE + number) for number in range(count)]
    try:
        for place in places:
            place.write_bytes(content)
            place.chmod(0o600)
            os.chown(place, owner.st_uid, owner.st_gid)
        yield
    finally:
        for place in places:
            place.unlink(missing_ok=True)


def bounds(folder: Path, count: int) -> dict[str, float]:
    """Seconds to make, and to read, so many files of a page."""
    folder.mkdir(parents=True)
    page = bytes(8192)
    begin = time.perf_counter()
    for number in range(count):
        (folder / str(number)).write_bytes(page)
    made = time.perf_counter()
    for number in range(count):
        (folder / str(number)).read_bytes()
    read = time.perf_counter()
    shutil.rmtree(folder)
    return {"make_seconds": round(made - begin, 2), "read_seconds": round(read - made, 2)}


def measure(server: dataset.Server, *, workers: int) -> dict[str, Cost]:
    """A full backup, one that finds all stored, and a restore."""
    ours = Ours(server, WORK, workers=workers)
    ours.prepare()
    target = WORK / "restored"
    target.mkdir(mode=0o700)
    wait_for_quiet()
    costs = {"backup": ours.backup()}
    wait_for_quiet()
    costs["next backup"] = ours.backup_again()
    wait_for_quiet()
    costs["restore"] = ours.restore(target)
    return costs


def main() -> int:
    """Measure and print; the result also goes to benchmarks/results."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--major", type=int, default=15)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    with dataset.running(options.major, scale=1, large=False) as server, many_files(server, options.files):
        costs = measure(server, workers=options.workers)
    least = bounds(WORK / "bound", options.files)
    shutil.rmtree(WORK)
    for name, cost in costs.items():
        print(
            f"{name:12} {cost.wall_seconds:.1f} s wall, {cost.cpu_seconds:.1f} s CPU, {cost.peak_mb:.0f} MB,"
            f" {cost.cpu_seconds / options.files * 1e6:.0f} us of CPU a file"
            f" (others {cost.others_cpu_seconds:.1f} s)"
        )
    print(f"bounds: {least}")
    RESULTS.mkdir(exist_ok=True)
    result = {
        "machine": machine(),
        "files": options.files,
        "workers": options.workers,
        "bounds": least,
        "runs": {
            name: {
                "wall_seconds": round(cost.wall_seconds, 2),
                "cpu_seconds": round(cost.cpu_seconds, 2),
                "others_cpu_seconds": round(cost.others_cpu_seconds, 2),
                "peak_mb": round(cost.peak_mb),
            }
            for name, cost in costs.items()
        },
    }
    (RESULTS / "files.json").write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
