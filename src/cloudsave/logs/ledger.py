"""
Where capture goes on: decisions over the ledger of durable log. Pure.

A branch's log begins at the begin of the log file that holds its switch point: the server's first file of a
new branch repeats the parent's log up to there, so that each branch's files are complete in themselves.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from cloudsave.errors import EngineUnavailable, LogConflict
from cloudsave.model.history import Ancestry
from cloudsave.model.ledger import Ledger, Stretch
from cloudsave.model.log import LogHole
from cloudsave.model.position import Position


@dataclass(frozen=True, slots=True)
class Step:
    """Stream `branch` from `frontier` on; to `end` where log follows that is durable or another branch's."""

    branch: str
    frontier: int
    end: int | None
    resumed: bool
    """Whether the log just before `frontier` is durable on this branch."""


def file_begin(offset: int, log_file_bytes: int) -> int:
    """The begin of the log file that holds `offset`."""
    return offset - offset % log_file_bytes


def first_missing(ledger: Ledger, holes: Sequence[LogHole], path: Sequence[Stretch]) -> Position | None:
    """
    The first byte along `path` after its oldest durable log that is neither durable nor recorded as lost;
    None where nothing of the path is durable.

    The first file of a branch repeats its parent's log: where it is lost, so is that.
    """
    cursor = _oldest(ledger, path)
    ends = {branch: end for branch, _, end in path}
    names = list(ends)
    while cursor is not None:
        cover = ledger.cover(path, cursor, None)
        holders = names[names.index(cover.branch) :]
        passed = [
            reach
            for hole in holes
            if hole.branch in holders
            # What is lost of a branch behind the switch is not what the next branch has there.
            and hole.first <= cover.end < (reach := _least(hole.last, ends[hole.branch]))
        ]
        if not passed:
            return Position(cover.branch, cover.end)
        cursor = max(passed)
    return None


def _least(offset: int, end: int | None) -> int:
    return offset if end is None else min(offset, end)


def next_step(
    ledger: Ledger, holes: Sequence[LogHole], path: Sequence[Stretch], *, fresh: int, log_file_bytes: int
) -> Step:
    """
    What to stream next to complete the log of `path`: the oldest log that is missing, never just "now".

    `fresh` is where to begin when nothing of the path is durable yet (what the slot holds).
    """
    missing = first_missing(ledger, holes, path)
    if missing is None:
        branch, begin, _ = path[-1]
        return Step(branch, file_begin(max(fresh, begin), log_file_bytes), None, resumed=False)
    number = next(number for number, stretch in enumerate(path) if stretch[0] == missing.branch)
    # The youngest branch whose own first file holds the missing byte: its file repeats all that is before.
    while number + 1 < len(path) and file_begin(path[number + 1][1], log_file_bytes) <= missing.offset:
        number += 1
    branch, begin, stretch_end = path[number]
    frontier = missing.offset
    first_file = file_begin(begin, log_file_bytes)
    if number > 0 and missing.offset < first_file + log_file_bytes:
        own = ledger.frontier(branch, first_file)
        if not any(hole.first <= own < hole.last for hole in _holes_of(holes, branch)):
            frontier = own
    following = [begin for begin, _ in ledger.ranges(branch) if begin > frontier]
    ends = [*following[:1], *([] if stretch_end is None else [stretch_end])]
    resumed = any(begin < frontier <= end for begin, end in ledger.ranges(branch))
    return Step(branch, frontier, min(ends) if ends else None, resumed)


def check_server_reaches(step: Step, current: Position, *, replica: bool) -> None:
    """
    The server must have all that is durable. Raises: EngineUnavailable (a standby that lags), LogConflict.
    """
    if step.branch != current.branch or current.offset >= step.frontier or not step.resumed:
        return
    detail = f"Its log ends at {current.offset:#x}; the repository holds log up to {step.frontier:#x}."
    if replica:
        raise EngineUnavailable("standby is behind the log that is stored", detail=detail)
    raise LogConflict(
        "server has less log than is stored of it",
        detail=detail,
        hints=["was the server put back to an older state without starting a new timeline?"],
    )


def younger_branches(ancestry: Ancestry, branch: str) -> tuple[str, ...]:
    """Branches that left `branch` or one of its descendants: the server is not on the newest history."""
    return tuple(
        sorted(
            child
            for child, points in ancestry.ancestors.items()
            if any(point.branch == branch for point in points)
        )
    )


def unrecorded_gaps(ledger: Ledger, holes: Sequence[LogHole], branch: str) -> list[tuple[int, int]]:
    """Stretches between durable ranges of a branch that no hole record explains."""
    gaps: list[tuple[int, int]] = []
    ranges = ledger.ranges(branch)
    for (_, gap_first), (gap_last, _) in itertools.pairwise(ranges):
        cursor = gap_first
        for hole in sorted(_holes_of(holes, branch), key=lambda one: one.first):
            if hole.first <= cursor < hole.last:
                cursor = hole.last
        if cursor < gap_last:
            gaps.append((cursor, gap_last))
    return gaps


def lost_within(ledger: Ledger, holes: Sequence[LogHole], first: Position, last: int) -> LogHole | None:
    """The first recorded hole of which some byte of [first, last) is not durable all the same."""
    for hole in sorted(_holes_of(holes, first.branch), key=lambda one: one.first):
        begin, end = max(hole.first, first.offset), min(hole.last, last)
        if begin < end and ledger.frontier(first.branch, begin) < end:
            return hole
    return None


def _holes_of(holes: Sequence[LogHole], branch: str) -> list[LogHole]:
    return [hole for hole in holes if hole.branch == branch]


def _oldest(ledger: Ledger, path: Sequence[Stretch]) -> int | None:
    for branch, _, end in path:
        ranges = ledger.ranges(branch)
        if ranges and (end is None or ranges[0][0] < end):
            return ranges[0][0]
    return None
