"""Writes WAL as a server does, from records described in a line each, for tests to cut and damage."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

from cloudsave.kernels.checksums import crc32c
from cloudsave.kernels.wal_walk import (
    LONG_HEADER_BYTES,
    MAGIC_BY_MAJOR,
    SHORT_HEADER_BYTES,
    WAL_PAGE_BYTES,
)

SEGMENT_BYTES = 1 << 20
SYSTEM = 0x6543_2109_8765_4321


@dataclass(frozen=True)
class Image:
    """A full page image; `packed`: 0, or a power of two for a way of compression."""

    content: bytes
    hole: bool
    packed: int


@dataclass(frozen=True)
class Block:
    """A block that a record names."""

    relation: tuple[int, int, int]
    number: int
    fork: int = 0
    data: bytes = b""
    image: Image | None = None


@dataclass
class WalWriter:
    """Log from `start` (the begin of a segment) on, in `log`."""

    start: int = 16 << 20
    timeline: int = 1
    major: int = 18
    log: bytearray = field(default_factory=bytearray)
    records: list[tuple[int, int]] = field(default_factory=list)
    """Begin and end of each."""
    commits: list[tuple[int, int, int, int]] = field(default_factory=list)
    """Begin, end, time and transaction of each."""
    previous: int = 0

    @property
    def end(self) -> int:
        """LSN of the next byte."""
        return self.start + len(self.log)

    def page_header(self, *, remaining: int = 0, flags: int = 0) -> None:
        """Begin a page."""
        first = self.end % SEGMENT_BYTES == 0
        flags |= (1 if remaining else 0) | (2 if first else 0)
        magic = MAGIC_BY_MAJOR[self.major]
        header = struct.pack("<HHIQI4x", magic, flags, self.timeline, self.end, remaining)
        if first:
            header += struct.pack("<QII", SYSTEM, SEGMENT_BYTES, WAL_PAGE_BYTES)
        assert len(header) == (LONG_HEADER_BYTES if first else SHORT_HEADER_BYTES)
        self.log += header

    def record(self, manager: int, info: int, main: bytes, *, xid: int = 0, fragments: bytes = b"") -> None:
        """Append a record whose main data is `main`, behind other fragment headers and their payload."""
        if len(main) < 256:
            body = fragments + bytes([255, len(main)]) + main
        else:
            body = fragments + b"\xfe" + struct.pack("<I", len(main)) + main
        self.raw_record(manager, info, body if main else fragments, xid=xid)

    def raw_record(self, manager: int, info: int, body: bytes, *, xid: int = 0) -> None:
        """Append a record of any body."""
        if self.end % WAL_PAGE_BYTES == 0:
            self.page_header()
        begin = self.end
        head = struct.pack("<IIQBB2x", 24 + len(body), xid, self.previous, info, manager)
        crc = crc32c(head, crc32c(body))
        left = memoryview(head + struct.pack("<I", crc) + body)
        while left:
            if self.end % WAL_PAGE_BYTES == 0:
                self.page_header(remaining=len(left))
            room = WAL_PAGE_BYTES - self.end % WAL_PAGE_BYTES
            self.log += left[:room]
            left = left[room:]
        self.log += bytes(-self.end % 8)
        self.records.append((begin, self.end))
        self.previous = begin

    def commit(self, xid: int, time: int) -> None:
        """A plain commit."""
        self.record(1, 0x00, struct.pack("<q", time), xid=xid)
        self.commits.append((*self.records[-1], time, xid))

    def commit_prepared(
        self, xid: int, time: int, *, name: bytes | None = b"gid", statistics: int = 0
    ) -> None:
        """A commit of two phases with every part that a commit can have."""
        item = 16 if self.major >= 18 else 12
        parts = 1 | 2 | 4 | 8 | 16 | 32 | (128 if name is not None else 0) | (256 if statistics else 0)
        data = struct.pack("<qI", time, parts) + bytes(8)
        data += struct.pack("<I", 700) + bytes(2800) + struct.pack("<I", 2) + bytes(24)
        if statistics:
            data += struct.pack("<I", statistics) + b"\xaa" * (item * statistics)
        data += struct.pack("<I", 3) + bytes(48) + struct.pack("<I", xid)
        data += b"" if name is None else name + b"\0"
        self.record(1, 0x30 | 0x80, data + bytes(16), fragments=b"\xfd\x01\x00")
        self.commits.append((*self.records[-1], time, xid))

    def restore_point(self, name: bytes, time: int) -> None:
        """A named restore point."""
        self.record(0, 0x70, struct.pack("<q", time) + name.ljust(64, b"\0"))

    def switch(self) -> None:
        """End the segment."""
        self.raw_record(0, 0x40, b"")
        self.log += bytes(-self.end % SEGMENT_BYTES)
        begin, _ = self.records[-1]
        self.records[-1] = (begin, self.end)

    def blocks(
        self,
        blocks: Sequence[Block],
        main: bytes = b"",
        *,
        manager: int = 10,
        info: int = 0,
        before: bytes = b"",
    ) -> None:
        """A record that names blocks; `before`: other fragment headers."""
        headers, payload, relation = before, b"", None
        for number, block in enumerate(blocks):
            same = block.relation == relation
            flags = (
                block.fork
                | (0x10 if block.image else 0)
                | (0x20 if block.data else 0)
                | (0x80 if same else 0)
            )
            headers += struct.pack("<BBH", number, flags, len(block.data))
            if block.image:
                hole, packed = block.image.hole, block.image.packed
                kind = (2 if packed else 0) | 4 if self.major == 14 else (packed << 2) | 2
                headers += struct.pack("<HHB", len(block.image.content), 100, kind | (1 if hole else 0))
                headers += struct.pack("<H", 50) if hole and packed else b""
                payload += block.image.content
            if not same:
                headers += struct.pack("<III", *block.relation)
            headers += struct.pack("<I", block.number)
            payload += block.data
            relation = block.relation
        if main:
            headers += bytes([255, len(main)]) if len(main) < 256 else b"\xfe" + struct.pack("<I", len(main))
        self.raw_record(manager, info, headers + payload + main)

    def noise(self, size: int) -> None:
        """A record of no interest with `size` bytes of main data."""
        self.record(10, 0x20, bytes(n * 7 % 251 for n in range(size)), xid=5)


def eventful_log(major: int = 18, *, start: int = 16 << 20) -> WalWriter:
    """A log with all kinds of records, over three segments."""
    wal = WalWriter(start=start, major=major)
    for number in range(60):
        wal.noise(number * 13)
        wal.commit(1000 + number, 5_000_000 + number)
    wal.restore_point(b"a point", 6_000_000)
    wal.noise(40_000)
    wal.commit_prepared(2000, 6_500_000, statistics=2)
    wal.commit_prepared(2001, 6_600_000, name=None, statistics=3)
    wal.record(1, 0x20, struct.pack("<q", 1), xid=9)
    wal.switch()
    wal.commit(3000, 7_000_000)
    wal.noise((1 << 20) - 9000)
    wal.record(0, 0x90, struct.pack("<qIII", 7_500_000, 1, 1, 0))
    wal.noise(30_000)
    wal.commit(3001, 8_000_000)
    return wal
