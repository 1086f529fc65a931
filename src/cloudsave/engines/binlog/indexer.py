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
    Gtid,
    Header,
    checksum_is_right,
    ends_transaction,
    format_checksum,
    parse_gtid,
    parse_header,
)
from cloudsave.engines.binlog.position import format_offset, number_of, offset_of, place_of
from cloudsave.errors import LogDamaged
from cloudsave.model.log import Commit, LogIndex
from cloudsave.model.position import Position

_GTIDS = (MYSQL_GTID, MYSQL_ANONYMOUS, MYSQL_TAGGED_GTID, MARIADB_GTID)


class BinlogIndexer:
    """`LogIndexer` of a binlog, from the begin of a record on. Bytes that are not in a file are left out."""

    def __init__(self, start: Position) -> None:
        self._offset = start.offset
        """Of the first byte of `_rest`."""
        self._rest = bytearray()
        self._gtid: Gtid | None = None
        self._begin = 0
        """Of the record that is open; valid while `_gtid` is set."""
        self._records_end = 0
        self._first: int | None = None
        self._last: int | None = None
        self._commits: list[Commit] = []

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
        index = LogIndex(
            commits=tuple(self._commits),  # type: ignore[arg-type]
            record_first=self._first,
            record_last=self._last,
            records_end=self._records_end,
        )
        self._commits = []
        self._first = self._last = None
        return index

    def _take_events(self, view: memoryview) -> int:
        """Read all events that are complete; how many bytes they take."""
        cursor = 0
        while True:
            lead = self._magic_bytes(view[cursor:])
            if lead is None or len(view) - cursor < lead + HEADER_BYTES:
                return cursor
            header = parse_header(view, cursor + lead)
            if len(view) - cursor < lead + header.length:
                return cursor
            if lead and place_of(self._offset):
                self._begin_next_file()
            event = view[cursor + lead : cursor + lead + header.length]
            self._check(event, header, lead)
            self._note(event, header, self._offset + lead + header.length)
            self._offset += lead + header.length
            cursor += lead + header.length

    def _magic_bytes(self, view: memoryview) -> int | None:
        """4 where the magic of a file comes next, 0 where an event does, None where more must be seen."""
        if place_of(self._offset) == 0:
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

    def _begin_next_file(self) -> None:
        if self._gtid is not None:
            # A server that crashed may have left the events of a transaction that was never acknowledged.
            self._gtid = None
        self._offset = offset_of(number_of(self._offset) + 1, 0)

    def _check(self, event: memoryview, header: Header, lead: int) -> None:
        """Raises: LogDamaged."""
        if not checksum_is_right(event):
            raise self._damaged(f"The checksum of an event of type {header.kind} is wrong")
        place = place_of(self._offset) + lead + header.length
        inside = self._gtid is not None and header.end == 0
        if header.end != place and not inside:
            raise self._damaged(f"An event that ends at {place} says that it ends at {header.end}")
        if header.kind == FORMAT and format_checksum(event) != CHECKSUM_CRC32:
            raise self._damaged("The file was written without checksums")

    def _note(self, event: memoryview, header: Header, end: int) -> None:
        if header.kind in _GTIDS:
            self._open(self._offset)
            self._gtid = parse_gtid(event, header)
        elif self._gtid is None or header.kind in (ROTATE, STOP, FORMAT):
            self._open(self._offset)
            self._records_end = end
        if (gtid := self._gtid) is not None and self._ends(event, header, end, gtid):
            self._commits.append(Commit(self._begin, end, gtid.instant_us, gtid.number))
            self._gtid = None
            self._records_end = end

    def _ends(self, event: memoryview, header: Header, end: int, gtid: Gtid) -> bool:
        if gtid.length:
            return end - self._begin >= gtid.length
        return ends_transaction(event, header, standalone=gtid.standalone)

    def _open(self, offset: int) -> None:
        """A record begins; one that was open has come to no end, and is none."""
        self._gtid = None
        self._begin = offset
        self._first = offset if self._first is None else self._first
        self._last = offset

    def _damaged(self, what: str) -> LogDamaged:
        return LogDamaged(
            f"binlog is damaged at {format_offset(self._offset)}",
            detail=f"{what}.",
            hints=["does the server read it? `mysqlbinlog --verify-binlog-checksum` tells"],
        )
