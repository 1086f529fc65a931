"""
Reads binlog from event to event, checks each, and notes the transactions.

What capture and recovery call a record is here a transaction with all its events, or an event outside of any;
the magic of a file belongs to its first event. Log can be followed from the begin of each.
"""

from __future__ import annotations

from cloudsave.engines.binlog.format_event import (
    CHECKSUM_CRC32,
    FORMAT,
    HEADER_BYTES,
    MAGIC,
    MARIADB_GTID,
    MYSQL_ANONYMOUS,
    MYSQL_GTID,
    MYSQL_TAGGED_GTID,
    ROTATE,
    STOP,
    Header,
    checksum_is_right,
    ends_transaction,
    format_checksum,
    parse_gtid,
    parse_header,
)
from cloudsave.engines.binlog.position import format_offset, number_of, offset_of, place_of
from cloudsave.errors import LogDamaged
from cloudsave.kernels.binlog import COMMITS_MAX, NOWHERE, walk
from cloudsave.kernels.native import BinlogState, NativeKernels, native
from cloudsave.model.log import Commit, Commits, LogIndex
from cloudsave.model.position import Position

_GTIDS = (MYSQL_GTID, MYSQL_ANONYMOUS, MYSQL_TAGGED_GTID, MARIADB_GTID)


class BinlogIndexer:
    """
    `LogIndexer` of a binlog, from the begin of a record on. Bytes that are not in a file are left out. Plain
    events are taken by a kernel where there is one; with `kernels` None all are taken here.
    """

    def __init__(self, start: Position, *, kernels: NativeKernels | None = native) -> None:
        self._kernels = kernels
        self._state = BinlogState(offset=start.offset, first=NOWHERE, last=NOWHERE)
        self._rest = bytearray()
        """What lies behind the state's offset."""
        self._commits: list[Commits] = []
        self._single: list[Commit] = []
        """Later than those in `_commits`."""

    def feed(self, data: bytes | memoryview) -> None:
        """See `LogIndexer.feed`; after the last event of a file comes the magic of the next one."""
        # Whole events are read where they are; only what is left over is copied.
        if self._rest:
            self._rest += data
            whole: bytes | bytearray | memoryview = self._rest
        else:
            whole = data
        with memoryview(whole) as view:
            taken = self._take_events(view)
            rest = bytearray(view[taken:])
        self._rest = rest

    def take(self) -> LogIndex:
        """See `LogIndexer.take`."""
        self._gather_single()
        state = self._state
        index = LogIndex(
            commits=Commits.joined(self._commits),
            record_first=None if state.first == NOWHERE else state.first,
            record_last=None if state.last == NOWHERE else state.last,
            records_end=state.records_end,
        )
        self._commits = []
        state.first = state.last = NOWHERE
        return index

    def _take_events(self, view: memoryview) -> int:
        """Read all events that are complete; how many bytes they take."""
        cursor = 0
        while True:
            commits, taken = walk(self._state, view[cursor:], kernels=self._kernels)
            if len(commits):
                self._gather_single()
                self._commits.append(Commits(commits.T))
            cursor += taken
            if len(commits) == COMMITS_MAX:
                continue
            alone = self._take_event(view[cursor:])
            if not alone:
                return cursor
            cursor += alone

    def _take_event(self, view: memoryview) -> int:
        """Read one event; how many bytes it takes, 0 where it is not complete."""
        lead = self._magic_bytes(view)
        if lead is None or len(view) < lead + HEADER_BYTES:
            return 0
        header = parse_header(view, lead)
        if len(view) < lead + header.length:
            return 0
        state = self._state
        if lead and place_of(state.offset):
            # A server that crashed may have left the events of a transaction that was never acknowledged.
            state.open = 0
            state.offset = offset_of(number_of(state.offset) + 1, 0)
        event = view[lead : lead + header.length]
        self._check(event, header, lead)
        self._note(event, header, state.offset + lead + header.length)
        state.offset += lead + header.length
        return lead + header.length

    def _gather_single(self) -> None:
        if self._single:
            self._commits.append(Commits.of(self._single))
            self._single = []

    def _magic_bytes(self, view: memoryview) -> int | None:
        """4 where the magic of a file comes next, 0 where an event does, None where more must be seen."""
        if place_of(self._state.offset) == 0:
            if len(view) >= len(MAGIC) and view[: len(MAGIC)] != MAGIC:
                raise self._damaged("The file does not begin as a binlog does")
            return len(MAGIC)
        if view[: len(MAGIC)] != MAGIC[: len(view)]:
            return 0
        # An event of a certain second begins with the same four bytes; a file begins with a FORMAT event.
        begin = len(MAGIC)
        if len(view) < begin + HEADER_BYTES:
            return None
        kind, length = view[begin + 4], int.from_bytes(view[begin + 9 : begin + 13], "little")
        if kind != FORMAT or not HEADER_BYTES < length < 1024:
            return 0
        if len(view) < begin + length:
            return None
        return begin if checksum_is_right(view[begin : begin + length]) else 0

    def _check(self, event: memoryview, header: Header, lead: int) -> None:
        """Raises: LogDamaged."""
        if not checksum_is_right(event):
            raise self._damaged(f"The checksum of an event of type {header.kind} is wrong")
        place = place_of(self._state.offset) + lead + header.length
        inside = self._state.open and header.end == 0
        if header.end != place and not inside:
            raise self._damaged(f"An event that ends at {place} says that it ends at {header.end}")
        if header.kind == FORMAT and format_checksum(event) != CHECKSUM_CRC32:
            raise self._damaged("The file was written without checksums")

    def _note(self, event: memoryview, header: Header, end: int) -> None:
        state = self._state
        if header.kind in _GTIDS:
            self._open()
            gtid = parse_gtid(event, header)
            state.number, state.instant_us = gtid.number, gtid.instant_us
            state.length, state.standalone, state.open = gtid.length, gtid.standalone, 1
        elif not state.open or header.kind in (ROTATE, STOP, FORMAT):
            self._open()
            state.records_end = end
        if state.open and self._ends(event, header, end):
            self._single.append(Commit(state.begin, end, state.instant_us, state.number))
            state.open = 0
            state.records_end = end

    def _ends(self, event: memoryview, header: Header, end: int) -> bool:
        if length := self._state.length:
            return bool(end - self._state.begin >= length)
        return ends_transaction(event, header, standalone=bool(self._state.standalone))

    def _open(self) -> None:
        """A record begins; one that was open has come to no end, and is none."""
        state = self._state
        state.open = 0
        state.begin = state.last = state.offset
        if state.first == NOWHERE:
            state.first = state.offset

    def _damaged(self, what: str) -> LogDamaged:
        return LogDamaged(
            f"binlog is damaged at {format_offset(self._state.offset)}",
            detail=f"{what}.",
            hints=["does the server read it? `mysqlbinlog --verify-binlog-checksum` tells"],
        )
