"""
The pass over PostgreSQL's WAL that says what transactions did, in rows.

Pages, records and their frame are described in `wal_walk`. In front of the main data stand the fragment
headers, and between both the blocks' data in the same order:

    block
    0    1   u8 number, 0 to 32
    1    1   u8 flags: 0x0F fork, 0x10 an image, 0x20 data, 0x40 the page is made anew, 0x80 the relation of
             the block before
    2    2   u16 bytes of data
    ..   5   with an image: u16 its bytes, u16 where its hole begins, u8 how: 1 it has a hole; version 14: 2
             compressed, 4 to be applied; since 15: 2 to be applied, 4 pglz, 8 lz4, 16 zstd
    ..   2   with an image that is compressed and has a hole: u16 bytes of the hole
    ..   12  unless flag 0x80: u32 tablespace, u32 database, u32 relation
    ..   4   u32 number of the block

What of the records is read (manager, operation: main data):

    1 transactions    0x00 commit, 0x20 abort, 0x30 commit prepared, 0x40 abort prepared: see `wal_walk`;
                      0x10 prepare
    2 storage         0x10 file made: tablespace, database, relation, u32 fork
                      0x20 file cut: u32 blocks left, tablespace, database, relation, u32
    4 databases       0x10 (version 14) or 0x20 dropped: u32 database
    7 relation map    whole
    8 standby         0x10 running transactions: u32, u32, u8, u32 next id, u32 oldest that runs, u32
    9 heap            0x50 insert of many: u8, u16 rows at 2
    10 heap           0x00 insert, 0x10 delete (u8 flags at 7: 8 takes back a speculative insertion),
                      0x20 and 0x40 update, 0x30 truncate: u32 database, u32 relations, u8, their oids at 12
    0 log, 9, 10      whole where a block is of a watched relation

Source: PostgreSQL src/include/access/{xlogrecord.h, heapam_xlog.h, xact.h}, catalog/storage_xlog.h,
commands/dbcommands_xlog.h, storage/standbydefs.h.

`NativeFacts` (in C) and `TwinFacts` do the same; tests hold them equal.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

import numpy as np
import numpy.typing as npt

from cloudsave.kernels.native import NativeKernels
from cloudsave.kernels.wal_walk import (
    GATHER_BYTES_MIN,
    KNOWN_MAGICS,
    LONG_HEADER_BYTES,
    MAGIC_BY_MAJOR,
    PAGE_HEAD,
    RECORD_BYTES_MAX,
    RECORD_HEAD,
    RECORD_HEADER_BYTES,
    SHORT_HEADER_BYTES,
    WAL_PAGE_BYTES,
    Buffer,
    StopReason,
    WalkStopped,
    grown,
)

FACT_TYPE = np.dtype(
    [
        ("start", "<u8"),
        ("value", "<i8"),
        ("xid", "<u4"),
        ("kind", "<u4"),
        ("tablespace", "<u4"),
        ("database", "<u4"),
        ("relation", "<u4"),
        ("count", "<u4"),
    ]
)
"""One fact; `start` is the LSN of the (first) record. What the other columns hold, `FactKind` says."""
WATCHED_MAX = 64
"""Limit: relation numbers that can be watched."""
BLOCK_NUMBER_MAX = 32

_ROWS = 65_536
_BLOB_BYTES = 1 << 20
_CACHE_SIZE = 256
_MAGIC_14 = MAGIC_BY_MAJOR[14]
_MAGIC_18 = MAGIC_BY_MAJOR[18]
_U16 = struct.Struct("<H")
_U32 = struct.Struct("<I")
_I64 = struct.Struct("<q")
_THREE = struct.Struct("<III")


class FactKind(IntEnum):
    """Values of `kind`. Counted rows of one transaction and relation may come in several parts."""

    INSERT = 1
    """`count` rows were inserted into a relation by `xid`."""
    UPDATE = 2
    DELETE = 3
    TRUNCATE = 4
    """`relation` is an oid, not a file's number."""
    FILE_MADE = 5
    FILE_CUT = 6
    """`value` blocks are left."""
    FILE_DROPPED = 7
    """With the commit of `xid`."""
    DATABASE_DROPPED = 8
    CHILD = 9
    """`xid` is a sub-transaction of `relation`, and ends with it."""
    COMMIT = 10
    """`value` is the time, microseconds since 2000-01-01; `count` is 2 where it had been prepared."""
    ABORT = 11
    PREPARE = 12
    HORIZON = 13
    """At `start`, no transaction before `xid` runs, and none from `relation` on has begun."""
    RECORD = 14
    """A record that is wanted whole; those of a batch follow each other in `Facts.records`."""


@dataclass(frozen=True, slots=True)
class Facts:
    """Rows in log order, and the records of those of kind RECORD."""

    rows: npt.NDArray[np.void]
    records: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class FactsStart:
    """
    Where a pass begins: a record boundary or the first byte of a page (the rest of a record that began
    earlier is skipped), in the log of a server that writes pages of `magic`.
    """

    position: int
    segment_bytes: int
    magic: int
    watched: tuple[int, ...] = ()


class FactsPass(Protocol):
    """The state of a pass; see `StopReason` for why it may end."""

    @property
    def position(self) -> int: ...
    @property
    def stop_reason(self) -> StopReason: ...
    @property
    def stop_position(self) -> int: ...

    def feed(self, data: Buffer) -> Iterator[Facts]:
        """
        The facts of the next bytes, in parts; all must be taken. A part ends behind each record of the
        relation map, so that `watch` can follow it.
        """

    def watch(self, relations: Collection[int]) -> None:
        """From now on give the records of these relations whole. Raises: ValueError for too many."""


class FactsState(ctypes.Structure):
    """Mirror of cs_facts_state; wal_facts.c says what each field is."""

    _fields_ = (
        *(
            (name, ctypes.c_uint64)
            for name in ("position", "segment_bytes", "record_start", "consumed", "stop_position")
        ),
        *(
            (name, ctypes.c_uint32)
            for name in (
                "magic",
                "began",
                "page_have",
                "record_have",
                "record_length",
                "skip",
                "switched",
                "stop_reason",
                "gather_need",
                "watched_count",
            )
        ),
        ("watched", ctypes.c_uint32 * WATCHED_MAX),
        ("cache", ctypes.c_uint32 * _CACHE_SIZE),
        ("page_head", ctypes.c_uint8 * LONG_HEADER_BYTES),
    )


class _Answer(IntEnum):
    """What cs_wal_facts came back for."""

    FED = 0
    FULL = 1
    GATHER_MORE = 2
    WATCH = 3
    STOPPED = 4


class NativeFacts:
    """`FactsPass` in C."""

    def __init__(self, start: FactsStart, kernels: NativeKernels) -> None:
        self._kernels = kernels
        self._rows = np.empty(_ROWS, FACT_TYPE)
        self._blob = np.empty(_BLOB_BYTES, np.uint8)
        self._gather = np.empty(GATHER_BYTES_MIN, np.uint8)
        self._state = FactsState(
            position=start.position, segment_bytes=start.segment_bytes, magic=start.magic
        )
        self.watch(start.watched)

    position = property(lambda self: int(self._state.position))
    stop_reason = property(lambda self: StopReason(self._state.stop_reason))
    stop_position = property(lambda self: int(self._state.stop_position))

    def watch(self, relations: Collection[int]) -> None:
        """See `FactsPass.watch`."""
        numbers = _watchable(relations)
        self._state.watched_count = len(numbers)
        self._state.watched[: len(numbers)] = numbers

    def feed(self, data: Buffer) -> Iterator[Facts]:
        """See `FactsPass.feed`."""
        octets = np.frombuffer(data, np.uint8)
        address, left = octets.ctypes.data, len(octets)
        row_count, blob_bytes = ctypes.c_size_t(), ctypes.c_size_t()
        answer = _Answer.FULL
        while answer not in (_Answer.FED, _Answer.STOPPED):
            answer = _Answer(
                self._kernels.wal_facts(
                    ctypes.byref(self._state),
                    address,
                    left,
                    self._gather.ctypes.data,
                    len(self._gather),
                    self._rows.ctypes.data,
                    len(self._rows),
                    ctypes.byref(row_count),
                    self._blob.ctypes.data,
                    len(self._blob),
                    ctypes.byref(blob_bytes),
                )
            )
            address, left = address + self._state.consumed, left - self._state.consumed
            if row_count.value:
                yield self._facts(row_count.value)
            elif answer is _Answer.FULL:
                self._rows = np.empty(2 * len(self._rows), FACT_TYPE)
                self._blob = np.empty(2 * len(self._blob), np.uint8)
            if answer is _Answer.GATHER_MORE:
                self._gather = grown(self._gather, int(self._state.gather_need))

    def _facts(self, count: int) -> Facts:
        rows = self._rows[:count].copy()
        whole = rows[rows["kind"] == FactKind.RECORD]
        records = tuple(
            self._blob[begin : begin + length].tobytes()
            for begin, length in zip(whole["value"].tolist(), whole["count"].tolist(), strict=True)
        )
        return Facts(rows, records)


class TwinFacts:
    """`FactsPass` in Python."""

    def __init__(self, start: FactsStart) -> None:
        self.position = start.position
        self.stop_reason = StopReason.NONE
        self.stop_position = 0
        self._segment_bytes = start.segment_bytes
        self._magic = start.magic
        self._watched: frozenset[int] = frozenset()
        self._page = bytearray()
        self._record = bytearray()
        """The record under way, padding included."""
        self._record_start = 0
        self._length = 0
        self._skip = 0
        self._switched = False
        self._began = False
        self._rows: list[tuple[int, ...]] = []
        self._records: list[bytes] = []
        self._moved = False
        self.watch(start.watched)

    def watch(self, relations: Collection[int]) -> None:
        """See `FactsPass.watch`."""
        self._watched = frozenset(_watchable(relations))

    def feed(self, data: Buffer) -> Iterator[Facts]:
        """See `FactsPass.feed`."""
        view = memoryview(data).cast("B")
        while view and not self.stop_reason:
            self._rows, self._records, self._moved = [], [], False
            try:
                while view and not self._moved:
                    view = view[self._step(view) :]
            except WalkStopped as stop:
                self.stop_reason, self.stop_position = stop.reason, stop.position
            if self._rows:
                yield Facts(np.array(self._rows, FACT_TYPE), tuple(self._records))

    def _step(self, view: memoryview) -> int:
        size = self._segment_bytes
        wanted = 0 if self._switched else self._header_wanted()
        if wanted:
            part = view[:wanted]
            self._page += part
            self.position += len(part)
            if len(part) == wanted:
                header, self._page = bytes(self._page), bytearray()
                self._take_page_header(header, self.position - len(header))
            return len(part)
        if self._switched:
            taken = min(size - self.position % size, len(view))
            self.position += taken
            self._switched = self.position % size != 0
            return taken
        room = view[: WAL_PAGE_BYTES - self.position % WAL_PAGE_BYTES]
        self._began = True
        if self._skip or (self.position % 8 and not self._record):
            padded = -(-(self.position + self._skip) // 8) * 8 - self.position
            taken = min(padded, len(room))
            self.position += taken
            self._skip = max(0, self._skip - taken)
            return taken
        return self._take_bytes(room)

    def _header_wanted(self) -> int:
        in_page = self.position % WAL_PAGE_BYTES
        if in_page != len(self._page):
            return 0
        first = (self.position - in_page) % self._segment_bytes == 0
        return max(0, (LONG_HEADER_BYTES if first else SHORT_HEADER_BYTES) - in_page)

    def _take_page_header(self, header: bytes, address: int) -> None:
        magic, flags, _, named, remaining = PAGE_HEAD.unpack_from(header)
        if magic not in KNOWN_MAGICS or (self._magic and magic != self._magic):
            raise WalkStopped(StopReason.MAGIC, address)
        if named != address:
            raise WalkStopped(StopReason.ADDRESS, address)
        self._magic = magic
        continues = bool(flags & 1)
        if flags & 8 and not continues:
            self._record, self._length, self._skip = bytearray(), 0, 0
        elif self._record or self._skip:
            if not continues or remaining != (self._skip or self._length - len(self._record)):
                raise WalkStopped(StopReason.CONTINUATION, address)
        elif continues:
            if self._began or not 0 < remaining <= RECORD_BYTES_MAX:
                raise WalkStopped(StopReason.CONTINUATION, address)
            self._skip = remaining
        self._began = True

    def _take_bytes(self, room: memoryview) -> int:
        before = len(self._record)
        if not before:
            self._record_start = self.position
        total = -(-self._length // 8) * 8 if self._length else RECORD_HEADER_BYTES
        taken = min(total - before, len(room))
        self._record += room[:taken]
        self.position += taken
        if not self._length and len(self._record) >= 4:
            (length,) = _U32.unpack_from(self._record)
            if length == 0:
                raise WalkStopped(StopReason.NO_RECORD, self._record_start)
            if not RECORD_HEADER_BYTES <= length <= RECORD_BYTES_MAX:
                raise WalkStopped(StopReason.LENGTH, self._record_start)
            self._length = length
        if self._length and len(self._record) == -(-self._length // 8) * 8:
            record = bytes(self._record[: self._length])
            self._take_record(record)
            self._record, self._length = bytearray(), 0
            if record[17] == 0 and record[16] & 0xF0 == 0x40 and self.position % self._segment_bytes:
                self._switched = True
        return taken

    # ---- records

    def _put(
        self, kind: FactKind, xid: int, *, value: int = 0, relation: _Number = (0, 0, 0), count: int = 1
    ) -> None:
        self._rows.append((self._record_start, value, xid, kind, *relation, count))

    def _take_record(self, record: bytes) -> None:
        _, xid, _, info, manager, _ = RECORD_HEAD.unpack_from(record)
        operation = info & 0xF0
        if (
            manager not in (0, 1, 2, 4, 7, 8, 9, 10)
            or (manager == 0 and operation not in (0xA0, 0xB0))
            or (manager == 1 and info & 0x70 > 0x40)
            or (manager == 8 and operation != 0x10)
        ):
            return
        found = read_fragments(record, self._magic)
        if found is None:
            raise WalkStopped(StopReason.CONTENT, self._record_start)
        first = found.blocks[0].relation if found.blocks else (0, 0, 0)
        if manager == 7 or any(block.relation[2] in self._watched for block in found.blocks):
            begin = sum(map(len, self._records))
            self._put(FactKind.RECORD, xid, value=begin, relation=first, count=len(record))
            self._records.append(record)
            self._moved = manager == 7
        if manager == 1:
            self._take_end(info, xid, found.main)
        elif manager == 2:
            self._take_file(operation, xid, found.main)
        elif manager == 4:
            if operation == (0x10 if self._magic == _MAGIC_14 else 0x20):
                (database,) = self._unpack(_U32, found.main, 0)
                self._put(FactKind.DATABASE_DROPPED, xid, relation=(0, database, 0))
        elif manager == 8:
            following, oldest, _ = self._unpack(_THREE, found.main, 12)
            self._put(FactKind.HORIZON, oldest, relation=(0, 0, following))
        elif manager in (9, 10):
            self._take_heap(manager, info & 0x70, xid, found)

    def _unpack(self, form: struct.Struct, data: bytes, at: int) -> tuple[int, ...]:
        try:
            return form.unpack_from(data, at)
        except struct.error:
            raise WalkStopped(StopReason.CONTENT, self._record_start) from None

    def _take_heap(self, manager: int, operation: int, xid: int, found: Fragments) -> None:
        main = found.main
        if manager == 10 and operation == 0x30:
            database, count, _ = self._unpack(_THREE, main, 0)
            if count > (len(main) - 12) // 4:
                raise WalkStopped(StopReason.CONTENT, self._record_start)
            for number in range(count):
                (oid,) = _U32.unpack_from(main, 12 + 4 * number)
                self._put(FactKind.TRUNCATE, xid, relation=(0, database, oid))
            return
        if not found.blocks:
            return
        kind, count = None, 1
        if manager == 9:
            if operation == 0x50:
                (count,) = self._unpack(_U16, main, 2)
                kind = FactKind.INSERT
        elif operation == 0x10:
            self._unpack(_I64, main, 0)
            kind = None if main[7] & 8 else FactKind.DELETE
        else:
            kind = {0x00: FactKind.INSERT, 0x20: FactKind.UPDATE, 0x40: FactKind.UPDATE}.get(operation)
        if kind is not None:
            self._put(kind, xid, relation=found.blocks[0].relation, count=count)

    def _take_file(self, operation: int, xid: int, main: bytes) -> None:
        if operation == 0x10:
            *relation, fork = self._unpack(_FOUR, main, 0)
            if fork == 0:
                self._put(FactKind.FILE_MADE, xid, relation=(relation[0], relation[1], relation[2]))
        elif operation == 0x20:
            left, *relation, _ = self._unpack(_FIVE, main, 0)
            self._put(FactKind.FILE_CUT, xid, value=left, relation=(relation[0], relation[1], relation[2]))

    def _take_end(self, info: int, xid: int, main: bytes) -> None:
        operation = info & 0x70
        if operation == 0x10:
            self._put(FactKind.PREPARE, xid)
            return
        (time,) = self._unpack(_I64, main, 0)
        parts, at, where = 0, 8, (0, 0)
        if info & 0x80:
            (parts,) = self._unpack(_U32, main, 8)
            at = 12
        if parts & 1:
            database, tablespace = self._unpack(_TWO, main, at)
            where, at = (tablespace, database), at + 8
        arrays: dict[int, bytes] = {}
        statistic_bytes = 16 if self._magic >= _MAGIC_18 else 12
        for part, item_bytes in ((2, 4), (4, 12), (256, statistic_bytes), (8, 16)):
            if parts & part:
                (count,) = self._unpack(_U32, main, at)
                arrays[part] = main[at + 4 : at + 4 + count * item_bytes]
                at += 4 + count * item_bytes
        if at > len(main):
            raise WalkStopped(StopReason.CONTENT, self._record_start)
        if operation in (0x30, 0x40):
            if not parts & 16:
                raise WalkStopped(StopReason.CONTENT, self._record_start)
            (xid,) = self._unpack(_U32, main, at)
        for (child,) in _U32.iter_unpack(arrays.get(2, b"")):
            self._put(FactKind.CHILD, child, relation=(0, 0, xid))
        kind = FactKind.COMMIT if operation in (0x00, 0x30) else FactKind.ABORT
        if kind is FactKind.COMMIT:
            for relation in _THREE.iter_unpack(arrays.get(4, b"")):
                self._put(FactKind.FILE_DROPPED, xid, relation=relation)
        prepared = operation in (0x30, 0x40)
        self._put(kind, xid, value=time, relation=(*where, 0), count=2 if prepared else 1)


_Number = tuple[int, int, int]
_TWO = struct.Struct("<II")
_FOUR = struct.Struct("<IIII")
_FIVE = struct.Struct("<IIIII")


@dataclass(frozen=True, slots=True)
class Block:
    """One block that a record changes."""

    relation: _Number
    """Tablespace, database and relation number."""
    fork: int
    number: int
    made_anew: bool
    image: bytes | None
    """As stored, maybe compressed; None: there is none, or it is not to be applied."""
    hole_begin: int
    hole_bytes: int
    compression: str
    """"", "pglz", "lz4" or "zstd"."""
    data: bytes


@dataclass(frozen=True, slots=True)
class Fragments:
    """The parts of a record behind its header."""

    blocks: tuple[Block, ...]
    main: bytes


@dataclass(slots=True)
class _Head:
    """A block's fragment header."""

    flags: int
    data_bytes: int
    image_bytes: int = 0
    hole_begin: int = 0
    hole_bytes: int = 0
    how: int = 0
    relation: _Number = (0, 0, 0)
    number: int = 0


def read_fragments(record: bytes, magic: int) -> Fragments | None:
    """The parts of a whole record; None where it is malformed."""
    try:
        return _read_fragments(record, magic)
    except (struct.error, IndexError, ValueError):
        return None


def _read_fragments(record: bytes, magic: int) -> Fragments:
    at, payload, main_bytes = RECORD_HEADER_BYTES, 0, 0
    heads: list[_Head] = []
    relation: _Number | None = None
    while len(record) - at > payload:
        kind = record[at]
        at += 1
        if kind in (254, 255):
            main_bytes = record[at] if kind == 255 else _U32.unpack_from(record, at)[0]
            at += 1 if kind == 255 else 4
            payload += main_bytes
            break
        if kind in (252, 253):
            at += 4 if kind == 252 else 2
            if at > len(record):
                raise ValueError("cut")
            continue
        if kind > BLOCK_NUMBER_MAX:
            raise ValueError("no block")
        head, at = _read_head(record, at, magic)
        if not head.flags & 0x80:
            relation = _THREE.unpack_from(record, at)
            at += 12
        if relation is None:
            raise ValueError("no relation")
        head.relation = relation
        (head.number,) = _U32.unpack_from(record, at)
        at += 4
        payload += head.data_bytes + head.image_bytes
        heads.append(head)
    if len(record) - at != payload:
        raise ValueError("parts do not add up")
    blocks = []
    for head in heads:
        image = record[at : at + head.image_bytes]
        at += head.image_bytes
        blocks.append(_block(head, image, record[at : at + head.data_bytes], magic))
        at += head.data_bytes
    return Fragments(tuple(blocks), record[len(record) - main_bytes :] if main_bytes else b"")


def _read_head(record: bytes, at: int, magic: int) -> tuple[_Head, int]:
    """A block's header up to its relation, and where that stands."""
    head = _Head(record[at], _U16.unpack_from(record, at + 1)[0])
    at += 3
    if head.flags & 0x10:
        head.image_bytes, head.hole_begin, head.how = _IMAGE.unpack_from(record, at)
        at += 5
        compressed = head.how & (2 if magic == _MAGIC_14 else 0x1C)
        if head.how & 1:
            head.hole_bytes = WAL_PAGE_BYTES - head.image_bytes
            if compressed:
                (head.hole_bytes,) = _U16.unpack_from(record, at)
                at += 2
    return head, at


_IMAGE = struct.Struct("<HHB")


def _block(head: _Head, image: bytes, data: bytes, magic: int) -> Block:
    if magic == _MAGIC_14:
        applied, method = head.how & 4, "pglz" if head.how & 2 else ""
    else:
        applied = head.how & 2
        method = next((name for bit, name in _METHODS.items() if head.how & bit), "")
    return Block(
        relation=head.relation,
        fork=head.flags & 0x0F,
        number=head.number,
        made_anew=bool(head.flags & 0x40),
        image=image if head.flags & 0x10 and applied else None,
        hole_begin=head.hole_begin,
        hole_bytes=head.hole_bytes,
        compression=method,
        data=data,
    )


_METHODS = {4: "pglz", 8: "lz4", 16: "zstd"}


def _watchable(relations: Collection[int]) -> tuple[int, ...]:
    numbers = tuple(sorted(set(relations)))
    if len(numbers) > WATCHED_MAX:
        raise ValueError(f"{len(numbers)} relations are more than can be watched")
    return numbers


def begin_facts(start: FactsStart, kernels: NativeKernels | None) -> FactsPass:
    """A pass in C, or in Python where `kernels` is None."""
    return TwinFacts(start) if kernels is None else NativeFacts(start, kernels)
