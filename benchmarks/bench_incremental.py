"""
Increments of a 1.5 GB pgbench database with 1 % of its pages changed, and with none; pgBackRest in turns.

Both have the same changes to store, compress with zstd level 1, encrypt and check pages. cloudsave's log is
captured all the time, as its users have it, and each of its backups waits until its log is stored;
pgBackRest is not made to archive or wait. Stored bytes are without log on both sides. A ratio is taken
within a round. Goals: wall at most 0.2 x and bytes at most 0.3 x of pgBackRest's; with no change at most
0.1 x of its wall.

    python benchmarks/bench_incremental.py [--rounds 5] [--increments 200]

With --increments so many are taken one after the other, ours alone: how long a restore of the first and of
the last one takes (goal: within 1.25 x), and what is stored (goal: at most 1.2 x of the full and the changed
pages, compressed).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import dataset
from benchmarks.measure import (
    RESULTS,
    Cost,
    Spread,
    machine,
    plain,
    ratios,
    spreads,
    tree_bytes,
    wait_for_quiet,
)
from benchmarks.ours import Ours
from benchmarks.pgbackrest import PgBackRest, contestants

PROCESSES = 2
WORK = dataset.ROOT / "work"
ROWS = 950
"""Rows updated: each changes its heap page and, with no room there, a page of the key's index."""
ROWS_ALL = dataset.PGBENCH_SCALE * 100_000
KINDS = ("changed", "unchanged")
RESTORES = 3
Tool = Ours | PgBackRest


def change(server: dataset.Server) -> None:
    """Update rows all over the large table."""
    server.sql(
        "update pgbench_accounts set abalance = abalance + 1 where aid in"
        f" (select 1 + floor(random() * {ROWS_ALL})::int from generate_series(1, {ROWS}))"
    )


class Rounds:
    """What each tool needs for each kind of backup, round by round."""

    def __init__(self, tools: Sequence[Tool]) -> None:
        self.tools = tools
        self.costs: dict[str, dict[str, list[Cost]]] = {t.name: {kind: [] for kind in KINDS} for t in tools}
        self.stored: dict[str, dict[str, list[int]]] = {t.name: {kind: [] for kind in KINDS} for t in tools}

    def run(self, server: dataset.Server, count: int) -> None:
        """Round 0 warms up and does not count; the order turns from round to round."""
        for number in range(count + 1):
            change(server)
            turn = number % len(self.tools)
            order = [*self.tools[turn:], *self.tools[:turn]]
            for kind in KINDS:
                for tool in order:
                    self._one(tool, kind, number)

    def _one(self, tool: Tool, kind: str, number: int) -> None:
        os.sync()
        wait_for_quiet()
        before = tool.stored_for_backups()
        cost = tool.backup_again()
        stored = tool.stored_for_backups() - before
        label = "warm-up" if number == 0 else f"round {number}"
        print(
            f"{label:8} {kind:10} {tool.name:18} {cost.wall_seconds:.2f} s wall {cost.cpu_seconds:.2f} s CPU"
            f" {stored / 1e6:.2f} MB (others {cost.others_cpu_seconds:.1f} s)",
            flush=True,
        )
        if number:
            self.costs[tool.name][kind].append(cost)
            self.stored[tool.name][kind].append(stored)

    def results(self) -> dict[str, object]:
        """All that is worth keeping."""
        ours, *peers = self.tools
        return {
            "machine": machine(),
            "versions": {tool.name: tool.version() for tool in self.tools},
            "options": {tool.name: tool.options for tool in self.tools},
            "figures": {
                name: {kind: plain(spreads(runs)) for kind, runs in kinds.items()}
                for name, kinds in self.costs.items()
            },
            "stored_bytes": self.stored,
            "ratios": {
                peer.name: {
                    kind: plain(
                        {
                            **ratios(self.costs[ours.name][kind], self.costs[peer.name][kind]),
                            "stored_bytes": self._stored_ratio(ours.name, peer.name, kind),
                        }
                    )
                    for kind in KINDS
                }
                for peer in peers
            },
            "runs": {
                name: {kind: [asdict(cost) for cost in runs] for kind, runs in kinds.items()}
                for name, kinds in self.costs.items()
            },
        }

    def _stored_ratio(self, ours: str, peer: str, kind: str) -> Spread:
        pairs = zip(self.stored[ours][kind], self.stored[peer][kind], strict=True)
        return Spread.of([mine / max(1, theirs) for mine, theirs in pairs])


def restore_seconds(ours: Ours, backup_id: str) -> float:
    """The best of some restores: what else the machine does can only make one slower."""
    seconds = []
    for _ in range(RESTORES):
        target = WORK / "restored"
        target.mkdir(mode=0o700)
        os.sync()
        wait_for_quiet()
        seconds.append(ours.restore(target, backup_id).wall_seconds)
        shutil.rmtree(target)
    return min(seconds)


def many_increments(server: dataset.Server, ours: Ours, count: int) -> dict[str, object]:
    """A full backup, then `count` increments with 1 % of the pages changed before each."""
    full_bytes = ours.stored_for_backups()
    first = ours.backup_ids()[0]
    packs_before = ours.stored_by("packs")
    seconds_first = restore_seconds(ours, first)
    walls = []
    for number in range(1, count + 1):
        change(server)
        walls.append(ours.backup_again().wall_seconds)
        if number % 20 == 0:
            print(f"{number} increments, {ours.stored_for_backups() / 1e6:.0f} MB", flush=True)
    pages_bytes = ours.stored_by("packs") - packs_before
    seconds_last = restore_seconds(ours, ours.backup_ids()[-1])
    stored = ours.stored_for_backups()
    return {
        "increments": count,
        "full_bytes": full_bytes,
        "changed_pages_bytes": pages_bytes,
        "stored_bytes": stored,
        "stored_ratio": round(stored / (full_bytes + pages_bytes), 3),
        "restore_seconds": [seconds_first, seconds_last],
        "restore_ratio": round(seconds_last / seconds_first, 3),
        "wall_seconds_first_and_last_ten": [sum(walls[:10]) / 10, sum(walls[-10:]) / 10],
    }


def show(result: dict[str, object]) -> None:
    """Medians, and ours by theirs with the spread."""
    of_ours = result["ratios"]
    assert isinstance(of_ours, dict)
    for peer, kinds in of_ours.items():
        for kind, figures in kinds.items():
            said = ", ".join(
                f"{figure} x{spread['median']:.3f} ({spread['least']:.3f} to {spread['greatest']:.3f})"
                for figure, spread in figures.items()
            )
            print(f"ours by {peer}, {kind}: {said}")


def main() -> int:
    """Measure and print; the results also go to benchmarks/results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--increments", type=int, default=0)
    parser.add_argument("--major", type=int, default=15)
    options = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    RESULTS.mkdir(exist_ok=True)
    with dataset.running(options.major, large=False) as server:
        print(f"{tree_bytes(server.data / 'base') / 1e6:.0f} MB of files")
        ours = Ours(server, WORK, workers=PROCESSES)
        ours.prepare()
        with ours.capturing():
            ours.backup_again()
            if options.increments:
                result = many_increments(server, ours, options.increments)
                print(json.dumps(result, indent=1))
                name = "increments.json"
            else:
                tools: list[Tool] = [ours, *contestants(server, WORK, processes=PROCESSES)[-1:]]
                for tool in tools[1:]:
                    tool.prepare()
                    tool.backup_again()
                rounds = Rounds(tools)
                rounds.run(server, options.rounds)
                result = rounds.results()
                show(result)
                name = "incremental.json"
    (RESULTS / name).write_text(json.dumps(result, indent=1) + "\n")
    shutil.rmtree(WORK)
    return 0


if __name__ == "__main__":
    sys.exit(main())
