"""
Events of a binlog, of MySQL and MariaDB.

    file: 4 bytes FE 62 69 6E, then events without gaps
    event header, 19 bytes, integers little-endian
    0     4    u32 time, seconds since 1970
    4     1    u8 type
    5     4    u32 server id
    9     4    u32 length of the event, header and checksum included
    13    4    u32 place in the file where the event ends; MariaDB since 11: 0 within a transaction
    17    2    u16 flags (1 in use, only in a FORMAT event; 0x20 made for the connection, in no file)
    ...        body
    -4    4    u32 zlib crc32 of all before

    GTID of MySQL (33; 34 is one without a GTID), after the header
    0     1    u8 flags
    1     16   uuid
    17    8    i64 number
    25    1    u8 2
    26    16   i64 last committed, i64 sequence number
    42    7    commit instant, microseconds since 1970; with bit 55 the one of the original server follows
    ..    1-9  length of the whole transaction, this event included

    GTID of MySQL with a tag (42): fields, each behind its number, all integers of variable length
    GTID of MariaDB (162), after the header: u64 number, u32 domain, u8 flags (1: no COMMIT follows)

Validity: an event ends where its header says, and its checksum is right. A FORMAT event is stored with the
in-use flag cleared, as its checksum was computed; servers send it so.
Source: MySQL libs/mysql/binlog/event/control_events.h; MariaDB sql/log_event.h; both manuals.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

from cloudsave.errors import LogDamaged

MAGIC = b"\xfebin"
HEADER = struct.Struct("<IBIIIH")
HEADER_BYTES = 19
CHECKSUM_BYTES = 4
EVENT_BYTES_MAX = (1 << 30) + (1 << 20)
"""Limit: the servers' own for max_allowed_packet, and what an event may add to it."""
QUERY, STOP, ROTATE, FORMAT, XID, EXECUTE_LOAD_QUERY = 2, 3, 4, 15, 16, 18
HEARTBEAT, HEARTBEAT_V2, XA_PREPARE = 27, 41, 38
MYSQL_GTID, MYSQL_ANONYMOUS, MYSQL_TAGGED_GTID = 33, 34, 42
MARIADB_GTID, MARIADB_QUERY_COMPRESSED = 162, 165
ARTIFICIAL = 0x20
CHECKSUM_CRC32 = 1
_STANDALONE = 1
_COMMIT_US_BITS = 55
_MYSQL_GTID_BYTES = 42
_QUERY_HEAD = struct.Struct("<IIBHH")
_FORMAT_HEAD = struct.Struct("<H50sI")


@dataclass(frozen=True, slots=True)
class Header:
    """The header of an event. `end` is a place in the file (0: none)."""

    time: int
    kind: int
    server_id: int
    length: int
    end: int
    flags: int


@dataclass(frozen=True, slots=True)
class Gtid:
    """
    What begins a transaction. `length` is that of all its events together, 0 where unknown; `standalone`: it
    ends with its only statement and not with a commit.
    """

    text: str
    """As the server prints it; "" for a transaction without one."""
    number: int
    instant_us: int
    length: int = 0
    standalone: bool = False


def parse_header(data: bytes | bytearray | memoryview, offset: int = 0) -> Header:
    """The header at `offset`. Raises: LogDamaged where its length is impossible."""
    header = Header(*HEADER.unpack_from(data, offset))
    if not HEADER_BYTES + CHECKSUM_BYTES <= header.length <= EVENT_BYTES_MAX:
        raise LogDamaged("binlog is damaged", detail=f"An event claims a length of {header.length} bytes.")
    return header


def checksum_is_right(event: bytes | bytearray | memoryview) -> bool:
    """Whether an event's last four bytes are the checksum of what is before."""
    view = memoryview(event)
    return zlib.crc32(view[:-CHECKSUM_BYTES]) == int.from_bytes(view[-CHECKSUM_BYTES:], "little")


def format_checksum(event: bytes | memoryview) -> int:
    """The checksum algorithm that a FORMAT event announces (its last byte before its own checksum)."""
    return event[-CHECKSUM_BYTES - 1]


def format_version(event: bytes | memoryview) -> str:
    """The server version that a FORMAT event names."""
    _, version, _ = _FORMAT_HEAD.unpack_from(event, HEADER_BYTES)
    return bytes(version).rstrip(b"\0").decode("ascii", "replace")


def rotate_target(event: bytes | memoryview) -> tuple[str, int]:
    """The file that a ROTATE event names, and the place in it."""
    (place,) = struct.unpack_from("<Q", event, HEADER_BYTES)
    return bytes(event[HEADER_BYTES + 8 : -CHECKSUM_BYTES]).decode("utf-8", "surrogateescape"), place


def parse_gtid(event: bytes | memoryview, header: Header) -> Gtid:
    """A GTID event of any kind. Raises: LogDamaged."""
    try:
        if header.kind == MARIADB_GTID:
            number, domain, flags = struct.unpack_from("<QIB", event, HEADER_BYTES)
            text = f"{domain}-{header.server_id}-{number}"
            return Gtid(text, number, header.time * 1_000_000, standalone=bool(flags & _STANDALONE))
        if header.kind == MYSQL_TAGGED_GTID:
            return _parse_tagged(memoryview(event)[HEADER_BYTES:-CHECKSUM_BYTES])
        return _parse_mysql(memoryview(event)[HEADER_BYTES:-CHECKSUM_BYTES], header)
    except (struct.error, IndexError, ValueError) as error:
        raise LogDamaged("binlog is damaged", detail=f"A GTID event is malformed: {error}.") from error


def ends_transaction(event: bytes | memoryview, header: Header, *, standalone: bool) -> bool:
    """Whether this event is the last one of a transaction, where no length tells it (MariaDB)."""
    if header.kind in (XID, XA_PREPARE):
        return True
    if header.kind in (MARIADB_QUERY_COMPRESSED, EXECUTE_LOAD_QUERY):
        return standalone
    return header.kind == QUERY and (standalone or query_text(event) in (b"COMMIT", b"ROLLBACK"))


def query_text(event: bytes | memoryview) -> bytes:
    """The statement of a QUERY event."""
    _, _, database_bytes, _, status_bytes = _QUERY_HEAD.unpack_from(event, HEADER_BYTES)
    begin = HEADER_BYTES + _QUERY_HEAD.size + status_bytes + database_bytes + 1
    return bytes(event[begin:-CHECKSUM_BYTES])


def _parse_mysql(body: memoryview, header: Header) -> Gtid:
    uuid = bytes(body[1:17]).hex()
    (number,) = struct.unpack_from("<q", body, 17)
    text = f"{_with_dashes(uuid)}:{number}" if header.kind == MYSQL_GTID else ""
    immediate = int.from_bytes(body[_MYSQL_GTID_BYTES : _MYSQL_GTID_BYTES + 7], "little")
    cursor = _MYSQL_GTID_BYTES + 7
    if immediate >> _COMMIT_US_BITS:
        immediate &= (1 << _COMMIT_US_BITS) - 1
        cursor += 7
    return Gtid(text, number, immediate, _packed_integer(body, cursor))


def _with_dashes(uuid: str) -> str:
    return "-".join((uuid[:8], uuid[8:12], uuid[12:16], uuid[16:20], uuid[20:]))


def _packed_integer(body: memoryview, offset: int) -> int:
    """Source: MySQL manual, client/server protocol, length-encoded integer."""
    first = body[offset]
    width = {252: 2, 253: 3, 254: 8}.get(first, 0)
    return int.from_bytes(body[offset + 1 : offset + 1 + width], "little") if width else first


class _Fields:
    """Integers of variable length: as many ones as the first byte ends with, so many bytes follow."""

    def __init__(self, body: memoryview) -> None:
        self._body = body
        self.cursor = 0

    def unsigned(self) -> int:
        first = self._body[self.cursor]
        more = (~first & (first + 1)).bit_length() - 1
        end = self.cursor + 1 + more
        raw = self._body[self.cursor + 1 : end] if more == 8 else self._body[self.cursor : end]
        if end > len(self._body):
            raise IndexError("it ends within a number")
        self.cursor = end
        return int.from_bytes(raw, "little") >> (0 if more == 8 else more + 1)

    def signed(self) -> int:
        value = self.unsigned()
        return ~(value >> 1) if value & 1 else value >> 1

    def raw(self, count: int) -> bytes:
        self.cursor += count
        return bytes(self._body[self.cursor - count : self.cursor])


def _parse_tagged(body: memoryview) -> Gtid:
    """Source: MySQL Gtid_event::define_fields(), libs/mysql/binlog/event/control_events.h."""
    fields = _Fields(body)
    for _ in range(3):  # version of the format, size of the message, last field that may not be ignored
        fields.unsigned()
    uuid, tag = "", ""
    numbers: dict[int, int] = {}
    while fields.cursor < len(body):
        field = fields.unsigned()
        if field == 1:
            uuid = _with_dashes(bytes(fields.unsigned() for _ in range(16)).hex())
        elif field == 3:
            tag = fields.raw(fields.unsigned()).decode("ascii")
        elif field in (2, 4, 5):
            numbers[field] = fields.signed()
        else:
            numbers[field] = fields.unsigned()
    number = numbers[2]
    return Gtid(f"{uuid}:{tag}:{number}", number, numbers[6], numbers[8])
