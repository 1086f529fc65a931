"""
PostgreSQL's write-ahead log: positions, file names, and the walk over its records.

An LSN counts bytes of log; its text form is two hexadecimal numbers, "16/B374D848". The log is cut into
segments (files) of 2^20 to 2^30 bytes; a file is named by 24 hexadecimal digits: timeline, high part and low
part of the segment's number, where a high part holds 2^32 / segment size segments. The layout of pages and
records stands in `kernels.wal_walk`, which reads them.
Source: PostgreSQL src/include/access/xlog_internal.h.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import numpy.typing as npt

from cloudsave.errors import ForeignSystem, LogDamaged
from cloudsave.kernels.native import NativeKernels, native
from cloudsave.kernels.wal_walk import (
    MAGIC_BY_MAJOR,
    EventKind,
    StopReason,
    WalkStart,
    begin_walk,
)
from cloudsave.model.changes import LogChanges
from cloudsave.model.log import Commits, LogIndex, RestorePoint, us_from_instant
from cloudsave.model.position import Position

EPOCH_US = us_from_instant(datetime(2000, 1, 1, tzinfo=UTC))
"""The server's epoch in microseconds since 1970."""
LSN_MAX = (1 << 64) - 1
_LSN = re.compile(r"([0-9A-Fa-f]{1,8})/([0-9A-Fa-f]{1,8})")
_SEGMENT_NAME = re.compile(r"([0-9A-F]{8})([0-9A-F]{8})([0-9A-F]{8})")
_MAJOR_BY_MAGIC = {magic: major for major, magic in MAGIC_BY_MAJOR.items()}
_FAULTS = {
    StopReason.NO_RECORD: "there is no record",
    StopReason.LENGTH: "a record has an impossible length",
    StopReason.PREVIOUS: "a record does not follow the one before it",
    StopReason.CRC: "the CRC of a record does not fit",
    StopReason.MAGIC: "a page header is of no known server version, or of another one than before",
    StopReason.ADDRESS: "a page header names another place in the log",
    StopReason.TIMELINE: "the timeline of a page does not fit",
    StopReason.PAGE_HEADER: "a page header is wrong",
    StopReason.SYSTEM: "a page header names another cluster",
    StopReason.CONTINUATION: "a page does not continue the record before it",
    StopReason.CONTENT: "the content of a record cannot be understood",
}


def parse_lsn(text: str) -> int:
    """An LSN from its text form. Raises: ValueError."""
    found = _LSN.fullmatch(text)
    if found is None:
        raise ValueError(f"{text!r} is no LSN")
    return int(found[1], 16) << 32 | int(found[2], 16)


def format_lsn(lsn: int) -> str:
    """The text form of an LSN, as the server prints it."""
    if not 0 <= lsn <= LSN_MAX:
        raise ValueError(f"{lsn} is no LSN")
    return f"{lsn >> 32:X}/{lsn & 0xFFFFFFFF:X}"


def segment_name(timeline: int, lsn: int, *, segment_bytes: int) -> str:
    """The name of the file that holds the byte at `lsn`."""
    high, low = divmod(lsn // segment_bytes, (1 << 32) // segment_bytes)
    return f"{timeline:08X}{high:08X}{low:08X}"


def parse_segment_name(name: str, *, segment_bytes: int) -> tuple[int, int] | None:
    """Timeline and first LSN of the file called `name`; None where it is not a segment's name."""
    found = _SEGMENT_NAME.fullmatch(name)
    per_high = (1 << 32) // segment_bytes
    if found is None or int(found[3], 16) >= per_high or not int(found[1], 16):
        return None
    return int(found[1], 16), (int(found[2], 16) * per_high + int(found[3], 16)) * segment_bytes


@dataclass(frozen=True, slots=True)
class WalRestorePoint:
    """A named restore point; `time_us` counts from 2000-01-01."""

    start: int
    end: int
    time_us: int
    name: str


@dataclass(frozen=True, slots=True)
class TimelineChange:
    """The first record of a new timeline: an end of recovery, or the shutdown checkpoint in its place."""

    start: int
    end: int
    timeline: int
    previous_timeline: int


@dataclass(frozen=True, slots=True)
class WalFeed:
    """
    What a piece of log completed.

    `commits` has the columns start and end (LSNs of the record and of what follows it), time (microseconds
    since 2000-01-01 of the server's clock) and xid.
    """

    commits: npt.NDArray[np.void]
    restore_points: tuple[WalRestorePoint, ...]
    timeline_changes: tuple[TimelineChange, ...]


@dataclass(frozen=True, slots=True)
class WalEnd:
    """Where the log stops to be valid, and why."""

    position: int
    reason: StopReason

    def __str__(self) -> str:
        return f"at {format_lsn(self.position)} {_FAULTS[self.reason]}"


class WalWalker:
    """
    Follows the records in consecutive bytes of log, fed in pieces cut anywhere.

    Nothing is reported that its record's CRC does not cover. Memory: one record of the kinds reported.
    """

    def __init__(
        self,
        start: WalkStart,
        *,
        stop_at_invalid: bool = False,
        kernels: NativeKernels | None = native,
    ) -> None:
        """
        `stop_at_invalid`: bytes that do not continue the log are its end, told by `end`, as in a segment that
        is still being written; else they are an error. `kernels` None: the Python twin.
        """
        self._walk = begin_walk(start, kernels)
        self._start = start
        self._stop_at_invalid = stop_at_invalid

    def feed(self, data: bytes | bytearray | memoryview) -> WalFeed:
        """
        Walk over the next bytes; after the end they are ignored.

        Raises: LogDamaged, ForeignSystem.
        """
        events, names = self._walk.walk(data)
        if self.end is not None and not self._stop_at_invalid:
            self._refuse(self.end)
        kinds = events["kind"]
        points = zip(_rows(events[kinds == EventKind.RESTORE_POINT]), names, strict=True)
        changes = _rows(events[kinds == EventKind.TIMELINE])
        return WalFeed(
            commits=events[kinds == EventKind.COMMIT],
            restore_points=tuple(
                WalRestorePoint(start, end, time, _text(name)) for (start, end, time, _, _), name in points
            ),
            timeline_changes=tuple(
                TimelineChange(start, end, new, old) for start, end, old, new, _ in changes
            ),
        )

    def _refuse(self, end: WalEnd) -> None:
        where, wanted = format_lsn(end.position), self._start.system_identifier
        if end.reason is StopReason.SYSTEM:
            raise ForeignSystem(
                "log is of another cluster",
                detail=f"The page at {where} does not have system identifier {wanted}.",
                hints=["does another server write to this archive, or was the source replaced?"],
            )
        raise LogDamaged(
            f"log is damaged at {where}", detail=f"At {where} {_FAULTS[end.reason]}.", offset=end.position
        )

    @property
    def end(self) -> WalEnd | None:
        """Where valid log ended; None while it goes on."""
        reason = self._walk.stop_reason
        return WalEnd(self._walk.stop_position, reason) if reason else None

    @property
    def position(self) -> int:
        """LSN of the next byte to be fed."""
        return self._walk.position

    @property
    def record_first(self) -> int | None:
        """The first record that began since `forget`, complete or not."""
        return self._walk.record_first

    @property
    def record_last(self) -> int | None:
        """The last record that began since `forget`, complete or not."""
        return self._walk.record_last

    def forget(self) -> None:
        """Forget `record_first` and `record_last`."""
        self._walk.forget()

    @property
    def complete_start(self) -> int | None:
        """The begin of the last complete record."""
        return self._walk.complete_start

    @property
    def complete_previous(self) -> int | None:
        """The record that the last complete one names as its predecessor."""
        return self._walk.complete_previous

    @property
    def records_end(self) -> int | None:
        """
        The end of the last complete record, from which a new walker can go on; None before one is known.

        A switch record ends with its segment, once that is complete.
        """
        return self._walk.records_end

    @property
    def seen_from(self) -> int | None:
        """All records that begin here or later were seen whole; None while it is not known."""
        return self._walk.seen_from

    def take_changes(self) -> npt.NDArray[np.void]:
        """What the records since the last call changed, where the start asks for it; see `model.changes`."""
        return self._walk.take_changes()

    @property
    def record_count(self) -> int:
        """Complete records so far."""
        return self._walk.record_count

    @property
    def timeline(self) -> int:
        """Timeline of the last page header; 0 before there was one."""
        return self._walk.timeline

    @property
    def server_major(self) -> int | None:
        """Major version of the server that wrote the log; None before a page header told it."""
        return _MAJOR_BY_MAGIC.get(self._walk.magic)


class WalIndexer:
    """`LogIndexer` of PostgreSQL's log."""

    def __init__(
        self,
        start: Position,
        *,
        log_file_bytes: int,
        system_identifier: str,
        kernels: NativeKernels | None = native,
    ) -> None:
        begin = WalkStart(
            start.offset,
            log_file_bytes,
            system_identifier=int(system_identifier),
            timeline_max=int(start.branch, 16),
            collect_changes=True,
        )
        self._walker = WalWalker(begin, kernels=kernels)
        self._seen_from: int | None = None
        """Of the records that the next `take` speaks of, the first that was seen; None: the walk's first."""
        self._begin = start.offset if start.offset % log_file_bytes else 0
        self._fed: list[WalFeed] = []

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """See `LogIndexer.feed`."""
        self._fed.append(self._walker.feed(data))

    def take(self) -> LogIndex:
        """
        See `LogIndexer.take`. `records_end` is 0 while it is not known, which can only be where the indexer
        began at the start of a log file.
        """
        fed, self._fed = self._fed, []
        walker = self._walker
        index = LogIndex(
            commits=Commits.joined([_columns(feed.commits) for feed in fed]),
            restore_points=tuple(
                RestorePoint(point.start, point.end, point.time_us + EPOCH_US, point.name)
                for feed in fed
                for point in feed.restore_points
            ),
            record_first=walker.record_first,
            record_last=walker.record_last,
            records_end=self._begin if walker.records_end is None else walker.records_end,
            changes=self._take_changes(),
        )
        walker.forget()
        return index

    def _take_changes(self) -> LogChanges:
        walker = self._walker
        seen_from = walker.seen_from if self._seen_from is None else self._seen_from
        if seen_from is None:
            return LogChanges(walker.position, walker.take_changes())
        self._seen_from = seen_from if walker.records_end is None else max(seen_from, walker.records_end)
        return LogChanges(seen_from, walker.take_changes())


def _rows(events: npt.NDArray[np.void]) -> Iterable[tuple[int, int, int, int, int]]:
    """Events as plain numbers: start, end, time, xid, kind."""
    rows: list[tuple[int, int, int, int, int]] = events.tolist()
    return rows


def _columns(events: npt.NDArray[np.void]) -> Commits:
    """Commit events with their times since 1970."""
    rows = np.empty((4, len(events)), np.int64)
    rows[0], rows[1], rows[3] = events["start"], events["end"], events["xid"]
    rows[2] = events["time"] + EPOCH_US
    return Commits(rows)


def _text(name: bytes) -> str:
    """A name from its zero-terminated bytes; the database's encoding is unknown here, mostly it is UTF-8."""
    return name.partition(b"\0")[0].decode("utf-8", "replace")
