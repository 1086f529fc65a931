"""
The tar archives of BASE_BACKUP, parsed as they arrive.

| offset | size | field                                              |
|-------:|-----:|----------------------------------------------------|
|      0 |  100 | name, NUL-terminated unless full                   |
|    100 |    8 | mode, octal text                                   |
|    124 |   12 | size, octal text, or base 256 when byte 124 is 0x80|
|    136 |   12 | modification time, as size                         |
|    148 |    8 | checksum: sum of all bytes, itself taken as spaces |
|    156 |    1 | type: "0" or NUL file, "2" symbolic link, "5" directory |
|    157 |  100 | link target                                        |
|    257 |    5 | "ustar"                                            |
|    345 |  155 | name prefix                                        |

A header is 512 bytes, contents are padded to 512. Two zero blocks end an archive; servers before
PostgreSQL 15 leave them to the client. PostgreSQL refuses names over 99 bytes instead of writing extended
headers, so that any other type is an error here.
Valid: the checksum fits, numbers parse, the name is relative and without "..".
Source: PostgreSQL src/port/tar.c tarCreateHeader(), src/backend/backup/basebackup.c.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cloudsave.errors import IntegrityError

BLOCK_BYTES = 512
FILE_BYTES_MAX = 1 << 50
"""Limit: no file of a backup is larger; a header that says so is damaged."""
_ZERO_BLOCK = bytes(BLOCK_BYTES)

FILE, LINK, DIRECTORY = "file", "link", "directory"
_TYPES = {b"0": FILE, b"\0": FILE, b"2": LINK, b"5": DIRECTORY}


@dataclass(frozen=True, slots=True)
class TarMember:
    """A header."""

    path: str
    type: str
    mode: int
    size_bytes: int
    modified_seconds: int
    link_target: str


TarEvent = TarMember | memoryview
"""A member, or the next bytes of the contents of the last member."""


def parse_header(block: bytes) -> TarMember:
    """One header of 512 bytes. Raises: IntegrityError."""
    stored = _number(block[148:156])
    if sum(block[:148]) + 32 * 8 + sum(block[156:]) != stored:
        raise _damaged("a header's checksum does not fit")
    kind = _TYPES.get(block[156:157])
    if kind is None:
        raise _damaged(f"a member has the unknown type {block[156:157]!r}")
    prefix, name = _text(block[345:500]), _text(block[:100])
    path = (f"{prefix}/{name}" if prefix else name).rstrip("/")
    path = path.removeprefix("./")
    if path.startswith("/") or ".." in path.split("/"):
        raise _damaged(f"a member has the path {path!r}")
    size = _number(block[124:136]) if kind == FILE else 0
    if size > FILE_BYTES_MAX:
        raise _damaged(f"member {path!r} claims {size} bytes")
    return TarMember(
        path=path,
        type=kind,
        mode=_number(block[100:108]) & 0o7777,
        size_bytes=size,
        modified_seconds=_number(block[136:148]),
        link_target=_text(block[157:257]) if kind == LINK else "",
    )


class TarParser:
    """Takes an archive in pieces of any size; memory is one header."""

    def __init__(self) -> None:
        self._header = bytearray()
        self._contents_left = 0
        self._padding_left = 0
        self._ended = False

    def feed(self, data: memoryview) -> Iterator[TarEvent]:
        """
        What the next bytes of the archive hold. Views refer to `data`. To be consumed before the next feed.

        Raises: IntegrityError.
        """
        place = 0
        while place < len(data):
            if self._contents_left:
                taken = min(self._contents_left, len(data) - place)
                self._contents_left -= taken
                yield data[place : place + taken]
                place += taken
            elif self._padding_left:
                taken = min(self._padding_left, len(data) - place)
                self._padding_left -= taken
                place += taken
            else:
                taken = min(BLOCK_BYTES - len(self._header), len(data) - place)
                self._header += data[place : place + taken]
                place += taken
                if len(self._header) == BLOCK_BYTES:
                    member = self._take_header()
                    if member is not None:
                        yield member

    def finish(self) -> None:
        """The archive is over. Raises: IntegrityError where it was cut off."""
        if self._contents_left or self._padding_left or self._header:
            raise _damaged("it ends in the middle of a member")

    def _take_header(self) -> TarMember | None:
        block = bytes(self._header)
        self._header.clear()
        if block == _ZERO_BLOCK:
            self._ended = True
            return None
        if self._ended:
            raise _damaged("a member follows the end mark")
        member = parse_header(block)
        self._contents_left = member.size_bytes
        self._padding_left = -member.size_bytes % BLOCK_BYTES
        return member


def _number(field: bytes) -> int:
    """An octal number, or base 256 where the high bit of the first byte is set."""
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    digits = field.rstrip(b"\0 ").lstrip(b" ")
    if digits.strip(b"01234567"):
        raise _damaged(f"a header has the number {field!r}")
    return int(digits or b"0", 8)


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _damaged(what: str) -> IntegrityError:
    return IntegrityError("base backup stream is damaged", detail=f"In its tar archive {what}.")
