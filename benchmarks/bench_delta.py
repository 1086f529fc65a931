"""
Restores of one 3 GB cluster over a directory that is there, next to fresh ones: with nothing changed, one
page in a hundred, and every page.

Bounds: with nothing changed reading alone; with everything changed a fresh restore and the samples. A ratio
is taken within a round, delta by fresh.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import bounds, dataset
from benchmarks.measure import RESULTS, Cost, machine, plain, ratios, spreads, tree_bytes, wait_for_quiet
from benchmarks.ours import Ours

PAGE_BYTES = 8192
WORK = dataset.ROOT / "work-delta"
SHARES = {"nothing": 0.0, "one page in a hundred": 0.01, "every page": 1.0}


def change(directory: Path, share: float) -> None:
    """Change one byte of that share of the pages of all relations, and leave none of it in the cache."""
    chance = random.Random(1)
    for path in bounds.relation_files(directory) if share else ():
        with path.open("r+b") as file:
            pages = range(path.stat().st_size // PAGE_BYTES)
            for page in pages if share == 1.0 else chance.sample(pages, int(len(pages) * share)):
                file.seek(page * PAGE_BYTES + 4000)
                file.write(bytes([page % 251 + 1]) * 8)
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(ours: Ours, rounds: int) -> dict[str, list[Cost]]:
    """A fresh restore and one over each kind of change, in each round; round 0 does not count."""
    costs: dict[str, list[Cost]] = {name: [] for name in ("fresh", *SHARES)}
    target = WORK / "restored"
    for number in range(rounds + 1):
        shutil.rmtree(target, ignore_errors=True)
        for name, runs in costs.items():
            if name != "fresh":
                change(target, SHARES[name])
            os.sync()
            wait_for_quiet()
            cost = ours.restore(target, delta=name != "fresh")
            label = "warm-up" if number == 0 else f"round {number}"
            print(
                f"{label:8} {name:22} {cost.wall_seconds:.2f} s wall {cost.cpu_seconds:.2f} s CPU", flush=True
            )
            if number:
                runs.append(cost)
    return costs


def main() -> int:
    """Measure and print; the results also go to benchmarks/results."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    with dataset.running() as server:
        ours = Ours(server, WORK, workers=options.workers)
        ours.prepare()
        ours.backup()
        costs = measure(ours, options.rounds)
        result = {
            "machine": machine(),
            "version": ours.version(),
            "data_bytes": tree_bytes(server.data / "base"),
            "figures": {name: plain(spreads(runs)) for name, runs in costs.items()},
            "ratios": {name: plain(ratios(costs[name], costs["fresh"])) for name in SHARES},
            "runs": {name: [asdict(cost) for cost in runs] for name, runs in costs.items()},
        }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "delta.json").write_text(json.dumps(result, indent=1) + "\n")
    for name in SHARES:
        ratio = ratios(costs[name], costs["fresh"])
        line = ", ".join(
            f"{key} x{one.median:.2f} ({one.least:.2f} to {one.greatest:.2f})" for key, one in ratio.items()
        )
        print(f"{name:22} {line}")
    shutil.rmtree(WORK)
    return 0


if __name__ == "__main__":
    sys.exit(main())
