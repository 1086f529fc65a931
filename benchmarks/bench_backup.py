"""
Full backup and restore of one 3 GB cluster, cloudsave and pgBackRest in turns; prints medians and ratios.

All compress with zstd level 1, encrypt, check pages, sync what they write, and compute in the same number of
processes or threads. A ratio is taken within a round; medians and spread are over the rounds after a warm-up.
Bounds: a backup cannot be faster than zstd alone on the same cores, a restore not than the disk takes bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import bounds, dataset
from benchmarks.measure import (
    RESULTS,
    Cost,
    machine,
    plain,
    ratios,
    ratios_of_least,
    spreads,
    tree_bytes,
    wait_for_quiet,
)
from benchmarks.ours import Ours
from benchmarks.pgbackrest import PgBackRest, contestants

PROCESSES = 2
WORK = dataset.ROOT / "work"
Costs = dict[str, dict[str, list[Cost]]]
KINDS = ("backup", "restore")


def measure(tools: list[Ours | PgBackRest], rounds: int) -> Costs:
    """Every tool in each round; round 0 warms the caches and does not count."""
    costs: Costs = {tool.name: {kind: [] for kind in KINDS} for tool in tools}
    for number in range(rounds + 1):
        for tool in tools:
            tool.prepare()
            os.sync()
            wait_for_quiet()
            cost = {"backup": tool.backup()}
            target = WORK / "restored"
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir(mode=0o700)
            os.sync()
            wait_for_quiet()
            cost["restore"] = tool.restore(target)
            shutil.rmtree(target)
            label = "warm-up" if number == 0 else f"round {number}"
            said = ", ".join(
                f"{kind} {one.wall_seconds:.2f} s wall {one.cpu_seconds:.2f} s CPU {one.peak_mb:.0f} MB"
                f" (others {one.others_cpu_seconds:.1f} s{f', {one.adopted} adopted' if one.adopted else ''})"
                for kind, one in cost.items()
            )
            print(f"{label:8} {tool.name:18} {said}", flush=True)
            for kind in KINDS if number else ():
                costs[tool.name][kind].append(cost[kind])
    return costs


def results(server: dataset.Server, tools: list[Ours | PgBackRest], costs: Costs) -> dict[str, object]:
    """All that is worth keeping."""
    ours, *peers = tools
    return {
        "machine": machine(),
        "versions": {tool.name: tool.version() for tool in tools},
        "options": {tool.name: tool.options for tool in tools},
        "server": server.run("postgres", "--version").strip(),
        "data_bytes": tree_bytes(server.data / "base"),
        "stored_bytes": {tool.name: tool.stored_bytes() for tool in tools},
        "figures": {
            name: {kind: plain(spreads(runs)) for kind, runs in kinds.items()}
            for name, kinds in costs.items()
        },
        "ratios": {
            peer.name: {kind: plain(ratios(costs[ours.name][kind], costs[peer.name][kind])) for kind in KINDS}
            for peer in peers
        },
        "ratios_of_least": {
            peer.name: {
                kind: ratios_of_least(costs[ours.name][kind], costs[peer.name][kind]) for kind in KINDS
            }
            for peer in peers
        },
        "bounds": {
            "zstd_1_mb_per_second": round(bounds.compress_mb_per_second(server.data, threads=PROCESSES)),
            "direct_write_mb_per_second": round(bounds.write_mb_per_second(WORK)),
        },
        "runs": {
            name: {kind: [asdict(cost) for cost in runs] for kind, runs in kinds.items()}
            for name, kinds in costs.items()
        },
    }


def show(result: dict[str, object]) -> None:
    """Medians, and ours by theirs with the spread."""
    figures, of_ours, of_least = result["figures"], result["ratios"], result["ratios_of_least"]
    assert isinstance(figures, dict)
    assert isinstance(of_ours, dict)
    assert isinstance(of_least, dict)
    data = int(str(result["data_bytes"])) / 1e6
    print(f"\n{result['server']}, {data:.0f} MB; stored bytes {result['stored_bytes']}")
    bound = result["bounds"]
    assert isinstance(bound, dict)
    print(f"bound of a backup: {data / bound['zstd_1_mb_per_second']:.2f} s (zstd alone)")
    print(f"bound of a restore: {data / bound['direct_write_mb_per_second']:.2f} s (writing alone)")
    for kind in KINDS:
        for figure in ("wall_seconds", "cpu_seconds", "peak_mb"):
            line = f"{kind:8}{figure:13}"
            for name, kinds in figures.items():
                line += f"  {name} {kinds[kind][figure]['median']:.2f}"
                if name in of_ours:
                    ratio = of_ours[name][kind][figure]
                    line += f" (x{ratio['median']:.2f}, {ratio['least']:.2f} to {ratio['greatest']:.2f}; "
                    line += f"best by best x{of_least[name][kind][figure]:.2f})"
            print(line)


def main() -> int:
    """Measure and print; the results also go to benchmarks/results."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--major", type=int, default=15)
    parser.add_argument(
        "--workers", type=int, default=PROCESSES, help="threads of ours and processes of theirs"
    )
    options = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    with dataset.running(options.major) as server:
        ours = Ours(server, WORK, workers=options.workers)
        tools: list[Ours | PgBackRest] = [ours, *contestants(server, WORK, processes=options.workers)]
        result = results(server, tools, measure(tools, options.rounds))
    RESULTS.mkdir(exist_ok=True)
    name = "backup.json" if options.workers == PROCESSES else f"backup-{options.workers}-workers.json"
    (RESULTS / name).write_text(json.dumps(result, indent=1) + "\n")
    show(result)
    shutil.rmtree(WORK)
    return 0


if __name__ == "__main__":
    sys.exit(main())
