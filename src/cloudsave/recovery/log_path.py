"""
The log of one path of history, from one backup's start as far as it is durable without a hole, and the
questions that planning asks of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from cloudsave.model.ledger import Extent, Ledger, Stretch
from cloudsave.model.log import Commit, LogIndex, RestorePoint
from cloudsave.recovery.history import Indexes

INDEX_OVERHANG_BYTES = 1 << 24
"""Limit: a record listed with the segment in which it ends begins at most this much before that segment."""


@dataclass(frozen=True, slots=True)
class Tail:
    """The end of a path's durable log: its last complete record is [record, end)."""

    record: int | None
    end: int


class LogPath:
    """Durable log from `first` on along `stretches`. Offsets are of the path; they never overlap."""

    def __init__(self, ledger: Ledger, stretches: Sequence[Stretch], *, first: int, indexes: Indexes) -> None:
        cover = ledger.cover(stretches, first, None)
        self.first = first
        self.extents = cover.extents
        self.end = cover.end
        self.end_branch = cover.branch
        self._indexes = indexes

    def index(self, extent: Extent) -> LogIndex:
        """The index of an extent's segment."""
        return self._indexes(extent.segment)

    def _commits_of(self, extent: Extent, *, begin: int, end: int) -> Iterator[Commit]:
        # A record that crosses into the next segment may be listed with either of the two.
        for commit in self.index(extent).commits:
            if extent.first < commit.end_offset <= self.end and begin <= commit.offset < min(
                end, extent.last
            ):
                yield commit

    def commits(
        self, begin: int, end: int | None = None, *, wanted: Callable[[Extent], bool] = lambda _: True
    ) -> Iterator[Commit]:
        """Complete commits that begin in [begin, end), in log order, from the extents that are `wanted`."""
        seen = -1
        limit = self.end if end is None else end
        for extent in self.extents:
            if extent.last <= begin or extent.first >= limit + INDEX_OVERHANG_BYTES or not wanted(extent):
                continue
            for commit in self._commits_of(extent, begin=begin, end=limit):
                if commit.offset > seen:
                    seen = commit.offset
                    yield commit

    def restore_points(self, begin: int, *, name: str) -> Iterator[RestorePoint]:
        """Complete restore points called `name` that begin at or after `begin`, in log order."""
        seen = -1
        for extent in self.extents:
            if extent.last <= begin:
                continue
            for point in self.index(extent).restore_points:
                inside = extent.first < point.end_offset <= self.end and begin <= point.offset < extent.last
                if inside and point.name == name and point.offset > seen:
                    seen = point.offset
                    yield point

    def first_commit_beyond(self, begin: int, instant_us: int, *, inclusive: bool) -> Commit | None:
        """
        The first commit in log order at or after `begin` whose instant is > `instant_us` (inclusive) or >=
        it.
        """
        commits = self.commits(begin, wanted=lambda extent: _may_reach(extent, instant_us))
        return next((one for one in commits if is_beyond(one.instant_us, instant_us, inclusive)), None)

    def latest_instant(self, begin: int, end: int) -> int:
        """The latest instant of the commits that begin in [begin, end); 0 where there is none."""
        inside = [one for one in self.extents if one.last > begin and one.first < end + INDEX_OVERHANG_BYTES]
        found = 0
        for extent in sorted(inside, key=_name_latest, reverse=True):
            latest = _name_latest(extent)
            if latest == 0 or latest <= found:
                break
            commits = self._commits_of(extent, begin=begin, end=end)
            found = max(found, max((one.instant_us for one in commits), default=0))
        return found

    def last_commit_before(self, end: int, *, begin: int) -> Commit | None:
        """The last commit in log order that begins in [begin, end)."""
        for extent in reversed(self.extents):
            if extent.first >= end + INDEX_OVERHANG_BYTES or extent.segment.commit_last_us == 0:
                continue
            if extent.last <= begin:
                return None
            found = list(self._commits_of(extent, begin=begin, end=end))
            if found:
                return found[-1]
        return None

    def first_commit(self, begin: int) -> Commit | None:
        """The first commit in log order at or after `begin`."""
        return next(self.commits(begin, wanted=lambda extent: extent.segment.commit_last_us != 0), None)

    def complete_until_us(self) -> int:
        """An instant such that every commit acknowledged before it is in this log; 0 where unknown."""
        known = self.latest_instant(self.first, self.end) if self.extents else 0
        for extent in reversed(self.extents):
            if extent.last != extent.segment.last:
                break  # cut at a switch: the segment's word is about log that is not on this path
            instant_us = self.index(extent).complete_until_us
            if instant_us:
                return max(known, instant_us)
        return known

    def tail(self) -> Tail:
        """The last complete record. Every record before it is complete as well."""
        end = self._records_end()
        for extent in reversed(self.extents):
            if extent.first >= end:
                continue
            record = self._indexes.last_record(extent.segment, end)
            if record is not None and extent.first <= record < extent.last:
                return Tail(record, end)
        return Tail(None, end)

    def _records_end(self) -> int:
        for extent in reversed(self.extents):
            index = self.index(extent)
            if extent.last != extent.segment.last and index.records_end >= extent.last:
                return extent.last  # a switch point is a record boundary
            if extent.first < index.records_end <= extent.last:
                return index.records_end
        return self.first

    def begins_record(self, offset: int) -> bool:
        """Whether a record begins at `offset`."""
        return any(
            self._indexes.begins(extent.segment, offset)
            for extent in self.extents
            if extent.first <= offset < extent.last
        )

    def record_after(self, offset: int) -> int | None:
        """
        An offset by which a record that begins at or after `offset` is complete in this log, so that replay
        can stop there; None: there is none.
        """
        begin: int | None = None
        for extent in self.extents:
            if extent.last <= offset:
                continue
            index = self.index(extent)
            if begin is None:
                begin = _known_begin(index, extent, offset)
            if begin is None and self._ends_with_record_after(offset, extent):
                return extent.last
            if begin is not None and begin < index.records_end:
                return min(extent.last, max(index.records_end, begin))
        return None

    def _ends_with_record_after(self, offset: int, extent: Extent) -> bool:
        """
        Whether an extent that is cut at a switch, which is a record boundary, ends with a record that begins
        at or after `offset`: its index tells of the last record of the whole segment, on the next branch.
        """
        if extent.last == extent.segment.last:
            return False
        record = self._indexes.last_record(extent.segment, extent.last)
        return record is not None and record >= max(offset, extent.first)


def is_beyond(instant_us: int, limit_us: int, inclusive: bool) -> bool:
    """Whether a commit of `instant_us` is to be left out by a time target."""
    return instant_us > limit_us if inclusive else instant_us >= limit_us


def _name_latest(extent: Extent) -> int:
    """No commit of the extent is later."""
    return extent.segment.commit_last_us


def _may_reach(extent: Extent, instant_us: int) -> bool:
    latest = _name_latest(extent)
    return latest != 0 and latest >= instant_us


def _known_begin(index: LogIndex, extent: Extent, offset: int) -> int | None:
    """The begin of some record at or after `offset` in this extent, if the index shows one."""
    for begin in (index.record_first, index.record_last):
        if begin is not None and max(offset, extent.first) <= begin < extent.last:
            return begin
    return None
