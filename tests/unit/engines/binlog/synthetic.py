"""Binlog events made by hand, as MySQL and MariaDB write them."""

from __future__ import annotations

import struct
import zlib

from cloudsave.engines.binlog.format_event import (
    FORMAT,
    HEADER,
    HEADER_BYTES,
    MAGIC,
    MARIADB_GTID,
    MYSQL_GTID,
    QUERY,
    ROTATE,
    XID,
)

TIME = 1_795_665_944
UUID = bytes.fromhex("a43a2c1be94e11f1a47902fc00000001")


def event(kind: int, body: bytes, begin: int, *, flags: int = 0, end: int | None = None) -> bytes:
    """An event that begins at a place of its file; `end` is what its header says of the end."""
    length = HEADER_BYTES + len(body) + 4
    said = begin + length if end is None else end
    content = HEADER.pack(TIME, kind, 11, length, said, flags) + body
    return content + struct.pack("<I", zlib.crc32(content))


class File:
    """A binlog file that grows by transactions."""

    def __init__(self, *, checksums: int = 1) -> None:
        self.content = bytearray(MAGIC)
        self.transactions: list[tuple[int, int, int]] = []
        """Begin, end and number of each."""
        body = struct.pack("<H50sIB", 4, b"9.7.4", TIME, 19) + bytes(40) + bytes([checksums])
        self.add(FORMAT, body)

    def add(self, kind: int, body: bytes, **options: int) -> None:
        self.content += event(kind, body, len(self.content), **options)

    def mysql(self, number: int, *, instant_us: int, rows: bytes = b"rows") -> None:
        begin = len(self.content)
        parts = (QUERY, _query(b"BEGIN")), (19, rows), (XID, bytes(8))
        rest = sum(HEADER_BYTES + 4 + len(body) for _, body in parts)
        head = b"\0" + UUID + struct.pack("<qBqq", number, 2, 0, number) + instant_us.to_bytes(7, "little")
        length = HEADER_BYTES + len(head) + 3 + 4 + 4 + rest
        self.add(MYSQL_GTID, head + b"\xfc" + struct.pack("<HI", length, 90704))
        for kind, body in parts:
            self.add(kind, body)
        self.transactions.append((begin, len(self.content), number))

    def mariadb(self, number: int, *, rows: bytes = b"rows", standalone: bool = False) -> None:
        begin = len(self.content)
        self.add(MARIADB_GTID, struct.pack("<QIB6x", number, 0, int(standalone)))
        if standalone:
            self.add(QUERY, _query(b"CREATE TABLE t (i INT)"))
        else:
            self.add(19, rows, end=0)
            self.add(XID, bytes(8))
        self.transactions.append((begin, len(self.content), number))

    def rotate(self, name: bytes) -> None:
        self.add(ROTATE, struct.pack("<Q", 4) + name)


def _query(text: bytes) -> bytes:
    return struct.pack("<IIBHH", 1, 0, 1, 0, 3) + b"abc" + b"d\0" + text
