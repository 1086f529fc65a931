"""
What a clone changed while it was copied: a file of the backup that is applied to the others when they are
restored.

    0     8    "CSCLONE1"
    8     ..   records, integers little-endian
    0     1    u8 kind: "W" bytes of a file, "S" its size, "E" the end
    1     2    u16 length of the path
    3     8    u64 place in the file, or its size
    11    4    u32 bytes that follow the path
    15    ..   path, bytes

Validity: records are applied in order; without its end the file is not complete.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from cloudsave.errors import IntegrityError

MAGIC = b"CSCLONE1"
RECORD = struct.Struct("<cHQI")
WRITE, SIZE, END = b"W", b"S", b"E"
PATH_BYTES_MAX = 4096
DATA_BYTES_MAX = 64 << 20


@dataclass(frozen=True, slots=True)
class Change:
    """`data` at `offset` of the file at `path`; None: `offset` is its size."""

    path: str
    offset: int
    data: bytes | None


def encode_write(path: str, offset: int, data: bytes | memoryview) -> bytes:
    """A record of bytes."""
    name = path.encode("utf-8", "surrogateescape")
    return RECORD.pack(WRITE, len(name), offset, len(data)) + name + data


def encode_size(path: str, size_bytes: int) -> bytes:
    """A record of a size."""
    name = path.encode("utf-8", "surrogateescape")
    return RECORD.pack(SIZE, len(name), size_bytes, 0) + name


def encode_end() -> bytes:
    """The last record."""
    return RECORD.pack(END, 0, 0, 0)


def read_changes(file: BinaryIO) -> Iterator[Change]:
    """All changes, in order. Raises: IntegrityError where they are not complete."""
    if file.read(len(MAGIC)) != MAGIC:
        raise _damaged("it does not begin as one")
    while True:
        kind, path_bytes, offset, length = RECORD.unpack(_exactly(file, RECORD.size))
        if kind == END:
            if file.read(1):
                raise _damaged("something follows its end")
            return
        if kind not in (WRITE, SIZE) or path_bytes > PATH_BYTES_MAX or length > DATA_BYTES_MAX:
            raise _damaged(f"it has a record of kind {kind!r} that is impossible")
        path = _exactly(file, path_bytes).decode("utf-8", "surrogateescape")
        if any(part in ("", ".", "..") for part in path.split("/")) or "\0" in path:
            raise _damaged(f"a path leads outside: {path!r}")
        yield Change(path, offset, _exactly(file, length) if kind == WRITE else None)


def _exactly(file: BinaryIO, count: int) -> bytes:
    data = file.read(count)
    if len(data) != count:
        raise _damaged("it is cut off")
    return data


def _damaged(why: str) -> IntegrityError:
    return IntegrityError("changes of a clone are damaged", detail=f"They cannot be read: {why}.")
