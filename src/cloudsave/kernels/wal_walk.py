"""
The walk over consecutive bytes of PostgreSQL's WAL, cut anywhere: pages, records, and what is wanted of them.

    page header, every 8192 bytes, host order
    0    2   u16 magic, one per major version
    2    2   u16 flags: 1 begins with the rest of a record, 2 long header, 4 no full page images needed,
             8 the record before was never finished and is overwritten
    4    4   u32 timeline
    8    8   u64 address (LSN) of the page
    16   4   u32 bytes that remain of the record that continues here
    20   4   padding
    24   8   u64 system identifier       \\
    32   4   u32 bytes of a segment       | only in the first page of a segment (long header)
    36   4   u32 bytes of a page: 8192   /

    record, begins at a multiple of 8, continues behind the header of the next page
    0    4   u32 length, all included
    4    4   u32 transaction id
    8    8   u64 LSN of the record before
    16   1   u8 info: the high half is the operation
    17   1   u8 resource manager: 0 XLOG, 1 transactions
    20   4   u32 CRC-32C of the bytes from 24 on and then of bytes 0 to 19
    24   ..  fragment headers (253: u16 origin, 252: u32 top transaction, 255: u8 main data length,
             254: u32 main data length; 0 to 32: a block, which the records of the list below do not have;
             wal_changes.py reads them), then, after the blocks' data, the main data

    main data
    commit               i64 time, and where info has bit 0x80: u32 parts present, then the parts in order:
                         1 database (8 bytes), 2 sub-transactions (count, 4 each), 4 relations (count, 12),
                         256 dropped statistics (count, 12; 16 since version 18), 8 invalidations (count,
                         16), 16 two-phase: u32 transaction id, 128 its name, 32 origin (16)
    restore point        i64 time, 64 bytes of name
    end of recovery      i64 time, u32 new timeline, u32 old timeline
    shutdown checkpoint  u64 redo LSN, u32 new timeline, u32 old timeline
    overwrite            u64 LSN of the record that was never finished
    switch               nothing; the next record is in the next segment

Times are microseconds since 2000-01-01 UTC. Validity: see `StopReason`.
Source: PostgreSQL src/include/access/{xlog_internal.h, xlogrecord.h, xact.h}, xlogreader.c, xactdesc.c.

`NativeWalk` (in C) and `TwinWalk` do the same; tests hold them equal.
"""

from __future__ import annotations

import ctypes
import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

import numpy as np
import numpy.typing as npt

from cloudsave.kernels.checksums import crc32c
from cloudsave.kernels.native import NativeKernels, WalState
from cloudsave.kernels.wal_changes import changes_of, main_data
from cloudsave.model.changes import CHANGE_TYPE, EVERYTHING, Change, sorted_changes

Buffer = bytes | bytearray | memoryview

WAL_PAGE_BYTES = 8192
SHORT_HEADER_BYTES = 24
LONG_HEADER_BYTES = 40
MAGIC_BY_MAJOR = {14: 0xD10D, 15: 0xD110, 16: 0xD113, 17: 0xD116, 18: 0xD118}
RECORD_BYTES_MAX = 1020 << 20
"""Source: XLogRecordMaxSize."""
EVENT_TYPE = np.dtype([("start", "<u8"), ("end", "<u8"), ("time", "<i8"), ("xid", "<u4"), ("kind", "<u4")])
"""One commit, restore point or timeline change (time: the timeline before, xid: the new one)."""

_NONE = (1 << 64) - 1
RECORD_HEADER_BYTES = 24
_NAME_BYTES = 64
_EVENTS_MAX = 4096
GATHER_BYTES_MIN = 8192
_CHANGES_MAX = 1 << 15
"""Entries of the table in which changes gather, a power of two; it is emptied when half of it is used."""
KNOWN_MAGICS = frozenset(MAGIC_BY_MAJOR.values())
_LAST_MAGIC_WITH_SHORT_STATISTICS = 0xD116

PAGE_HEAD = struct.Struct("<HHIQI4x")
_PAGE_TAIL = struct.Struct("<QII")
RECORD_HEAD = struct.Struct("<IIQBB2xI")
_I64 = struct.Struct("<q")
_U64 = struct.Struct("<Q")
_U32 = struct.Struct("<I")
_TIMELINES = struct.Struct("<8xII")


class EventKind(IntEnum):
    """Values of `kind`."""

    COMMIT = 1
    RESTORE_POINT = 2
    TIMELINE = 3


class StopReason(IntEnum):
    """Why bytes do not continue the log; all but CONTENT can also mean that it ends there."""

    NONE = 0
    NO_RECORD = 1
    """A length of zero where a record should begin: how the log of a running server ends."""
    LENGTH = 2
    """A record shorter than its header or longer than the server allows."""
    PREVIOUS = 3
    """The record does not name the one before it."""
    CRC = 4
    MAGIC = 5
    """A page header of no known version, or of another one than before."""
    ADDRESS = 6
    """The page header names another place: a recycled file."""
    TIMELINE = 7
    """The timeline goes backwards, or beyond the one that is read."""
    PAGE_HEADER = 8
    """Unknown flags, a long header in the wrong place, or other sizes."""
    SYSTEM = 9
    """The system identifier of another cluster."""
    CONTINUATION = 10
    """A page that does not continue the record before it, or continues one that ended."""
    CONTENT = 11
    """The CRC fits, but the content of a commit or the like cannot be understood."""


@dataclass(frozen=True, slots=True)
class WalkStart:
    """
    Where a walk begins and what it demands. `position` is a record boundary or the first byte of a page;
    the rest of a record that begins earlier is skipped. 0 stands for "any".
    """

    position: int
    segment_bytes: int
    system_identifier: int = 0
    timeline_max: int = 0
    check_crc: bool = True
    collect_changes: bool = False

    def __post_init__(self) -> None:
        size, in_page = self.segment_bytes, self.position % WAL_PAGE_BYTES
        if not 1 << 20 <= size <= 1 << 30 or size & (size - 1):
            raise ValueError(f"a WAL segment cannot have {size} bytes")
        header = SHORT_HEADER_BYTES if (self.position - in_page) % size else LONG_HEADER_BYTES
        if self.position < 0 or self.position % 8 or 0 < in_page < header:
            raise ValueError(f"no record begins at {self.position:#x}")


class Walk(Protocol):
    """
    The state of a walk. `None` for a position: there is none. Positions are LSNs.

    `record_first` and `record_last` are those of the records that began since `forget`; `complete_start` is
    the begin of the last complete record, which names `complete_previous` as the one before it;
    `records_end` is the end of the last complete record (a segment switch ends with its segment), or of what
    was skipped at the begin; None before. All records that begin at `seen_from` or later were seen whole;
    None while the rest of a record that began before the walk is skipped.
    """

    @property
    def position(self) -> int: ...
    @property
    def record_first(self) -> int | None: ...
    @property
    def record_last(self) -> int | None: ...
    @property
    def complete_start(self) -> int | None: ...
    @property
    def complete_previous(self) -> int | None: ...
    @property
    def records_end(self) -> int | None: ...
    @property
    def seen_from(self) -> int | None: ...
    @property
    def record_count(self) -> int: ...
    @property
    def timeline(self) -> int: ...
    @property
    def magic(self) -> int: ...
    @property
    def stop_reason(self) -> StopReason: ...
    @property
    def stop_position(self) -> int: ...

    def walk(self, data: Buffer) -> tuple[npt.NDArray[np.void], list[bytes]]:
        """
        Go over the next bytes: events, and the names of the restore points among them.

        Once `stop_reason` is set nothing more is read.
        """

    def forget(self) -> None:
        """Forget `record_first` and `record_last`."""

    def take_changes(self) -> npt.NDArray[np.void]:
        """
        What the records completed since the last call changed (CHANGE_TYPE), each once, in the order of
        `sorted_changes`; nothing where the walk does not collect changes.
        """


class NativeWalk:
    """`Walk` in C."""

    def __init__(self, start: WalkStart, kernels: NativeKernels) -> None:
        self._kernels = kernels
        self._events = np.empty(_EVENTS_MAX, EVENT_TYPE)
        self._gather = np.empty(GATHER_BYTES_MIN, np.uint8)
        self._changes = np.zeros(_CHANGES_MAX if start.collect_changes else 0, CHANGE_TYPE)
        self._drained: list[npt.NDArray[np.void]] = []
        self._state = WalState(
            position=start.position,
            segment_bytes=start.segment_bytes,
            system_identifier=start.system_identifier,
            timeline_max=start.timeline_max,
            check_crc=int(start.check_crc),
            record_first=_NONE,
            record_last=_NONE,
            complete_start=_NONE,
            complete_previous=_NONE,
            records_end=_NONE,
            overwritten=_NONE,
            seen_from=start.position,
        )

    position = property(lambda self: int(self._state.position))
    record_first = property(lambda self: _optional(self._state.record_first))
    record_last = property(lambda self: _optional(self._state.record_last))
    complete_start = property(lambda self: _optional(self._state.complete_start))
    complete_previous = property(lambda self: _optional(self._state.complete_previous))
    records_end = property(lambda self: _optional(self._state.records_end))
    seen_from = property(lambda self: _optional(self._state.seen_from))
    record_count = property(lambda self: int(self._state.record_count))
    timeline = property(lambda self: int(self._state.timeline))
    magic = property(lambda self: int(self._state.magic))
    stop_reason = property(lambda self: StopReason(self._state.stop_reason))
    stop_position = property(lambda self: int(self._state.stop_position))

    def walk(self, data: Buffer) -> tuple[npt.NDArray[np.void], list[bytes]]:
        """See `Walk.walk`."""
        octets = np.frombuffer(data, np.uint8)
        address, left = octets.ctypes.data, len(octets)
        parts: list[npt.NDArray[np.void]] = []
        names: list[bytes] = []
        count = ctypes.c_size_t()
        answer = _Answer.EVENTS_FULL
        while answer not in (_Answer.FED, _Answer.STOPPED):
            answer = self._kernels.wal_walk(
                ctypes.byref(self._state),
                address,
                left,
                self._gather.ctypes.data,
                len(self._gather),
                self._events.ctypes.data,
                len(self._events),
                ctypes.byref(count),
                self._changes.ctypes.data if len(self._changes) else None,
                len(self._changes),
            )
            address, left = address + self._state.consumed, left - self._state.consumed
            if count.value:
                parts.append(self._events[: count.value].copy())
            if answer == _Answer.NAME:
                names.append(bytes(self._state.name))
            elif answer == _Answer.GATHER_MORE:
                self._gather = grown(self._gather, int(self._state.gather_need))
            elif answer == _Answer.CHANGES_FULL:
                self._drain()
        return (np.concatenate(parts) if parts else np.empty(0, EVENT_TYPE)), names

    def forget(self) -> None:
        """See `Walk.forget`."""
        self._state.record_first = self._state.record_last = _NONE

    def take_changes(self) -> npt.NDArray[np.void]:
        """See `Walk.take_changes`."""
        self._drain()
        drained, self._drained = self._drained, []
        if self._state.changes_lost:
            drained.append(np.array([EVERYTHING], CHANGE_TYPE))
            self._state.changes_lost = 0
        return sorted_changes(np.concatenate(drained)) if drained else np.empty(0, CHANGE_TYPE)

    def _drain(self) -> None:
        if self._state.changes_used:
            self._drained.append(self._changes[self._changes["kind"] != 0])
            self._changes[:] = 0
            self._state.changes_used = 0


def grown(gather: npt.NDArray[np.uint8], need: int) -> npt.NDArray[np.uint8]:
    """The buffer of records that cross pages, with its bytes, twice as large and no smaller than `need`."""
    larger = np.empty(max(2 * len(gather), need), np.uint8)
    larger[: len(gather)] = gather
    return larger


class _Answer(IntEnum):
    """What cs_wal_walk came back for; kernels.c explains."""

    FED = 0
    EVENTS_FULL = 1
    NAME = 2
    GATHER_MORE = 3
    STOPPED = 4
    CHANGES_FULL = 5


def _optional(position: int) -> int | None:
    return None if position == _NONE else position


class WalkStopped(Exception):
    """Ends a walk, or a pass over facts, of a twin."""

    def __init__(self, reason: StopReason, position: int) -> None:
        super().__init__(reason, position)
        self.reason = reason
        self.position = position


class TwinWalk:
    """`Walk` in Python."""

    def __init__(self, start: WalkStart) -> None:
        self.position = start.position
        self.record_first: int | None = None
        self.record_last: int | None = None
        self.complete_start: int | None = None
        self.complete_previous: int | None = None
        self.records_end: int | None = None
        self.seen_from: int | None = start.position
        self.record_count = 0
        self.timeline = 0
        self.magic = 0
        self.stop_reason = StopReason.NONE
        self.stop_position = 0
        self._start = start
        self._began = False
        self._page = bytearray()
        """A page header that has come in part."""
        self._record = bytearray()
        """The record under way, padding included."""
        self._record_start = 0
        self._length = 0
        self._skip = 0
        """Bytes left of a record that began before the walk did."""
        self._switched = False
        self._overwritten: int | None = None
        self._events: list[tuple[int, int, int, int, int]] = []
        self._names: list[bytes] = []
        self._changes: set[Change] = set()

    def walk(self, data: Buffer) -> tuple[npt.NDArray[np.void], list[bytes]]:
        """See `Walk.walk`."""
        view = memoryview(data).cast("B")
        self._events, self._names = [], []
        try:
            while view and not self.stop_reason:
                taken = self._step(view)
                view = view[taken:]
        except WalkStopped as stop:
            self.stop_reason, self.stop_position = stop.reason, stop.position
        return np.array(self._events, EVENT_TYPE), self._names

    def forget(self) -> None:
        """See `Walk.forget`."""
        self.record_first = self.record_last = None

    def take_changes(self) -> npt.NDArray[np.void]:
        """See `Walk.take_changes`."""
        changes, self._changes = self._changes, set()
        return sorted_changes(np.array(sorted(changes), CHANGE_TYPE))

    def _step(self, view: memoryview) -> int:
        """Take what belongs together from the front of `view`; returns its size."""
        size = self._start.segment_bytes
        if self._switched:
            taken = min(size - self.position % size, len(view))
            self.position += taken
            if self.position % size == 0:
                self._switched = False
                self.records_end = self.position
            return taken
        wanted = self._header_wanted()
        if wanted:
            part = view[:wanted]
            self._page += part
            self.position += len(part)
            if len(part) == wanted:
                header, self._page = bytes(self._page), bytearray()
                self._take_page_header(header, self.position - len(header))
            return len(part)
        self._began = True
        room = view[: WAL_PAGE_BYTES - self.position % WAL_PAGE_BYTES]
        if self._skip or self._pads():
            return self._take_skipped(room)
        return self._take_record_bytes(room)

    def _header_wanted(self) -> int:
        in_page = self.position % WAL_PAGE_BYTES
        if in_page != len(self._page):
            return 0
        first = (self.position - in_page) % self._start.segment_bytes == 0
        return max(0, (LONG_HEADER_BYTES if first else SHORT_HEADER_BYTES) - in_page)

    # ---- page headers

    def _take_page_header(self, header: bytes, address: int) -> None:
        reason = self._check_page_header(header, address)
        if reason:
            raise WalkStopped(reason, address)
        _, flags, _, _, remaining = PAGE_HEAD.unpack_from(header)
        continues, overwrites = bool(flags & 1), bool(flags & 8)
        under_way = bool(self._record or self._skip)
        if overwrites and not continues:
            if self._record:
                self._overwritten = self._record_start
            self._record, self._skip = bytearray(), 0
        elif under_way:
            if (
                not continues
                or remaining == 0
                or remaining != (self._skip or self._length - len(self._record))
            ):
                raise WalkStopped(StopReason.CONTINUATION, address)
        elif continues:
            if self._began or not 0 < remaining <= RECORD_BYTES_MAX:
                raise WalkStopped(StopReason.CONTINUATION, address)
            self._skip = remaining
            self.seen_from = None
        self._began = True

    def _check_page_header(self, header: bytes, address: int) -> StopReason:
        magic, flags, timeline, named, _ = PAGE_HEAD.unpack_from(header)
        first = len(header) == LONG_HEADER_BYTES
        if magic not in KNOWN_MAGICS or (self.magic and magic != self.magic):
            return StopReason.MAGIC
        if flags & ~15 or first != bool(flags & 2):
            return StopReason.PAGE_HEADER
        if named != address:
            return StopReason.ADDRESS
        highest = self._start.timeline_max
        if timeline == 0 or timeline < self.timeline or (highest and timeline > highest):
            return StopReason.TIMELINE
        if first:
            system, segment_bytes, page_bytes = _PAGE_TAIL.unpack_from(header, SHORT_HEADER_BYTES)
            if self._start.system_identifier and system != self._start.system_identifier:
                return StopReason.SYSTEM
            if (segment_bytes, page_bytes) != (self._start.segment_bytes, WAL_PAGE_BYTES):
                return StopReason.PAGE_HEADER
        self.magic, self.timeline = magic, timeline
        return StopReason.NONE

    # ---- records

    def _pads(self) -> bool:
        """Only the padding is left of the record that began before the walk did."""
        return self.position % 8 != 0 and not self._record

    def _take_skipped(self, room: memoryview) -> int:
        padded = -(-(self.position + self._skip) // 8) * 8 - self.position
        taken = min(padded, len(room))
        self.position += taken
        self._skip = max(0, self._skip - taken)
        if self._skip == 0 and self.position % 8 == 0:
            self.records_end = self.seen_from = self.position
        return taken

    def _take_record_bytes(self, room: memoryview) -> int:
        if not self._record:
            self._record_start = self.position
        before = len(self._record)
        if before < RECORD_HEADER_BYTES:
            taken = min(RECORD_HEADER_BYTES - before, len(room))
            self._record += room[:taken]
            self._take_record_header(before)
        else:
            taken = min(-(-self._length // 8) * 8 - before, len(room))
            self._record += room[:taken]
        self.position += taken
        if len(self._record) >= RECORD_HEADER_BYTES and len(self._record) == -(-self._length // 8) * 8:
            self._finish_record()
        return taken

    def _take_record_header(self, before: int) -> None:
        """Look at what of the header has come; `before` is how much had been looked at."""
        start = self._record_start
        if before < 4 <= len(self._record):
            (self._length,) = _U32.unpack_from(self._record)
            if self._length == 0:
                raise WalkStopped(StopReason.NO_RECORD, start)
            if not RECORD_HEADER_BYTES <= self._length <= RECORD_BYTES_MAX:
                raise WalkStopped(StopReason.LENGTH, start)
            self.record_first = start if self.record_first is None else self.record_first
            self.record_last = start
        if len(self._record) == RECORD_HEADER_BYTES:
            previous = RECORD_HEAD.unpack_from(self._record)[2]
            fits = previous < start if self.complete_start is None else previous == self.complete_start
            if not fits:
                raise WalkStopped(StopReason.PREVIOUS, start)

    def _finish_record(self) -> None:
        record, start = bytes(self._record[: self._length]), self._record_start
        _, xid, previous, info, manager, crc = RECORD_HEAD.unpack_from(record)
        if self._start.check_crc:
            body = crc32c(record[RECORD_HEADER_BYTES:], kernels=None)
            if crc32c(record[:20], body, kernels=None) != crc:
                raise WalkStopped(StopReason.CRC, start)
        if manager == 1 and info & 0x70 in (0x00, 0x30):
            self._take_commit(record, info, xid)
        elif manager == 0 and info & 0xF0 in (0x00, 0x70, 0x90, 0xD0):
            self._take_log_record(record, info & 0xF0)
        if self._start.collect_changes:
            self._changes |= changes_of(record, self.magic)
        self._overwritten = None
        self.complete_start, self.complete_previous = start, previous
        self.record_count += 1
        self._record = bytearray()
        if manager == 0 and info & 0xF0 == 0x40 and self.position % self._start.segment_bytes:
            self._switched = True
        else:
            self.records_end = self.position

    # ---- what records say

    def _note(self, kind: EventKind, time: int, xid: int) -> None:
        self._events.append((self._record_start, self.position, time, xid, kind))

    def _take_commit(self, record: bytes, info: int, xid: int) -> None:
        data = self._main_data(record, size_min=8)
        if info & 0x70 == 0x30:
            found = self._prepared_xid(data) if info & 0x80 else None
            if found is None:
                raise WalkStopped(StopReason.CONTENT, self._record_start)
            xid = found
        self._note(EventKind.COMMIT, _I64.unpack_from(data)[0], xid)

    def _take_log_record(self, record: bytes, operation: int) -> None:
        sizes_min = {0x70: 8 + _NAME_BYTES, 0xD0: 0}
        data = self._main_data(record, size_min=sizes_min.get(operation, 16))
        if operation == 0xD0:
            if len(data) < 8 or self._overwritten not in (None, _U64.unpack_from(data)[0]):
                raise WalkStopped(StopReason.CONTINUATION, self._record_start)
        elif operation == 0x70:
            self._note(EventKind.RESTORE_POINT, _I64.unpack_from(data)[0], 0)
            self._names.append(data[8 : 8 + _NAME_BYTES])
        else:
            new, old = _TIMELINES.unpack_from(data)
            if new != old:
                self._note(EventKind.TIMELINE, old, new)

    def _main_data(self, record: bytes, *, size_min: int) -> bytes:
        body = main_data(record)
        if body is None or len(body) < size_min:
            raise WalkStopped(StopReason.CONTENT, self._record_start)
        return body

    def _prepared_xid(self, data: bytes) -> int | None:
        """The transaction of COMMIT PREPARED; while no page header told the version, the fitting layout's."""
        if len(data) < 12 or not _U32.unpack_from(data, 8)[0] & 16:
            return None
        if self.magic:
            short = self.magic <= _LAST_MAGIC_WITH_SHORT_STATISTICS
            return _twophase_xid(data, 12 if short else 16, exact=False)
        found = _twophase_xid(data, 12, exact=True)
        return _twophase_xid(data, 16, exact=True) if found is None else found


def _twophase_xid(data: bytes, statistic_bytes: int, *, exact: bool) -> int | None:
    (parts,) = _U32.unpack_from(data, 8)
    at = 12 + (8 if parts & 1 else 0)
    for part, item_bytes in ((2, 4), (4, 12), (256, statistic_bytes), (8, 16)):
        if parts & part:
            if at + 4 > len(data):
                return None
            at += 4 + _U32.unpack_from(data, at)[0] * item_bytes
    end = at + 4
    if end > len(data):
        return None
    if exact:
        if parts & 128:
            name_end = data.find(b"\0", end)
            end = len(data) + 1 if name_end < 0 else name_end + 1
        if end + (16 if parts & 32 else 0) != len(data):
            return None
    found: int = _U32.unpack_from(data, at)[0]
    return found


def begin_walk(start: WalkStart, kernels: NativeKernels | None) -> Walk:
    """A walk in C, or in Python where `kernels` is None."""
    return TwinWalk(start) if kernels is None else NativeWalk(start, kernels)
