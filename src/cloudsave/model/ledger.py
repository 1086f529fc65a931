"""
The arithmetic of stored log: which ranges are durable, how far a history can be followed, and with which
stored segments. Pure; everything comes from segment names.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from cloudsave.model.log import LogSegment

Stretch = tuple[str, int, int | None]
"""(branch, begin offset, end offset or None): one step of a path, as `Ancestry.lineage_of` gives them."""


@dataclass(frozen=True, slots=True)
class Extent:
    """The bytes [first, last) of a path, to be read from `segment` (which may hold more than that)."""

    segment: LogSegment
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Cover:
    """
    Extents that touch, in path order, from the offset asked for up to `end`.

    `complete` says whether all that was asked for is covered; if not, the byte at `end` of `branch` is the
    first one missing.
    """

    extents: tuple[Extent, ...]
    branch: str
    end: int
    complete: bool


def read_extents(read: Callable[[LogSegment], bytes], extents: Iterable[Extent]) -> bytes:
    """The bytes of extents that touch; `read` gets those of a segment."""
    parts: list[bytes] = []
    for extent in extents:
        begin = extent.segment.first
        parts.append(read(extent.segment)[extent.first - begin : extent.last - begin])
    return b"".join(parts)


@dataclass(slots=True)
class _BranchLog:
    """The segments of one branch by begin, with the furthest reaching one of each prefix."""

    firsts: list[int] = field(default_factory=list)
    furthest: list[LogSegment] = field(default_factory=list)

    def add(self, segment: LogSegment) -> None:
        """Append; segments come in the order of their begin."""
        best = self.furthest[-1] if self.furthest else segment
        self.firsts.append(segment.first)
        self.furthest.append(segment if segment.last >= best.last else best)

    def best_at(self, offset: int) -> LogSegment | None:
        """Of the segments that hold `offset`, the one that reaches furthest."""
        count = bisect_right(self.firsts, offset)
        if count == 0 or self.furthest[count - 1].last <= offset:
            return None
        return self.furthest[count - 1]

    def next_begin(self, offset: int) -> int | None:
        """The begin of the first segment that begins after `offset`."""
        count = bisect_right(self.firsts, offset)
        return self.firsts[count] if count < len(self.firsts) else None


class Ledger:
    """The durable log of all branches of one lineage. Segments may overlap and come in any order."""

    def __init__(self, segments: Iterable[LogSegment]) -> None:
        self._branches: dict[str, _BranchLog] = {}
        for segment in sorted(segments, key=lambda one: (one.branch, one.first, one.last)):
            if segment.last > segment.first:
                self._branches.setdefault(segment.branch, _BranchLog()).add(segment)

    def branches(self) -> tuple[str, ...]:
        """The branches of which any log is durable, sorted."""
        return tuple(sorted(self._branches))

    def ranges(self, branch: str) -> tuple[tuple[int, int], ...]:
        """The maximal durable ranges [first, last) of a branch, in order."""
        log = self._branches.get(branch)
        found: list[tuple[int, int]] = []
        if log is None:
            return ()
        begin: int | None = log.firsts[0]
        while begin is not None:
            end = self.frontier(branch, begin)
            found.append((begin, end))
            begin = log.next_begin(end)
        return tuple(found)

    def frontier(self, branch: str, offset: int) -> int:
        """The end of the durable range that holds `offset` on this very branch; `offset` where none does."""
        log = self._branches.get(branch)
        while log is not None and (segment := log.best_at(offset)) is not None:
            offset = segment.last
        return offset

    def furthest(self, branch: str) -> int:
        """The end of the last durable byte of a branch, holes or not; 0 where there is none."""
        log = self._branches.get(branch)
        return log.furthest[-1].last if log else 0

    def cover(self, path: Sequence[Stretch], first: int, last: int | None) -> Cover:
        """
        The fewest segments that hold [first, last) of a path (None: as far as the log goes), up to the first
        byte that is missing.

        Log that a later branch of the path keeps from before its own begin is its parent's log by
        definition, so it serves for the parent too. The reverse is never true.
        """
        extents: list[Extent] = []
        cursor = first
        for number, (branch, begin, stretch_end) in enumerate(path):
            if stretch_end is not None and stretch_end <= cursor:
                continue
            if begin > cursor:
                return Cover(tuple(extents), branch, cursor, complete=False)
            names = [step[0] for step in path[number:]]
            end = stretch_end if last is None or (stretch_end is not None and stretch_end < last) else last
            cursor = self._follow(names, cursor, end, extents)
            if end is None or cursor < end:
                return Cover(tuple(extents), branch, cursor, complete=False)
            if last is not None and cursor >= last:
                return Cover(tuple(extents), branch, cursor, complete=True)
        return Cover(tuple(extents), path[-1][0], cursor, complete=last is not None and cursor >= last)

    def _follow(self, names: Sequence[str], cursor: int, end: int | None, extents: list[Extent]) -> int:
        """Append extents from `cursor` to `end` at most; the first name is preferred. The end reached."""
        while end is None or cursor < end:
            # Log from after `end` is not this stretch's, so no segment counts for more than `end`.
            best: LogSegment | None = None
            reach = cursor
            for name in names:
                log = self._branches.get(name)
                candidate = log.best_at(cursor) if log else None
                if candidate is None:
                    continue
                candidate_reach = candidate.last if end is None else min(candidate.last, end)
                if candidate_reach > reach:
                    best, reach = candidate, candidate_reach
            if best is None:
                return cursor
            extents.append(Extent(best, cursor, reach))
            cursor = reach
        return cursor
