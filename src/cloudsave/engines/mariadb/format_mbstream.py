"""
Chunks of an mbstream, the stream that mariadb-backup writes.

    0     8    "XBSTCK01"
    8     1    u8 flags (1: a reader that does not know the type may pass over the chunk)
    9     1    u8 type: "P" bytes of a file, "E" end of a file
    10    4    u32 length of the path
    14    ..   path, relative to the data directory
    type P only, integers little-endian:
    ..    8    u64 length of the payload
    +8    8    u64 place of the payload in the file
    +16   4    u32 zlib crc32 of the payload
    +20   ..   payload

Validity: chunks of a file come in order and without gaps, those of several files in turns; a file that ended
does not come again. mariadb-backup writes no other type (sparse chunks are XtraBackup's).
Source: measured on mariadb-backup 10.11.18 and 11.8; MariaDB extra/mariabackup/xbstream.h.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from cloudsave.errors import EngineError

MAGIC = b"XBSTCK01"
HEAD = struct.Struct("<8sBcI")
PAYLOAD_HEAD = struct.Struct("<QQI")
PATH_BYTES_MAX = 4096
PAYLOAD_BYTES_MAX = 64 << 20
"""Limit: the program fills 10 MiB."""
PAYLOAD, END = b"P", b"E"


@dataclass(frozen=True, slots=True)
class ChunkHead:
    """The fixed begin of a chunk."""

    kind: bytes
    path_bytes: int


@dataclass(frozen=True, slots=True)
class PayloadHead:
    """What precedes the bytes of a file."""

    length: int
    offset: int
    checksum: int


def parse_head(data: bytes | bytearray | memoryview) -> ChunkHead:
    """The first HEAD.size bytes of a chunk. Raises: EngineError."""
    try:
        magic, _, kind, path_bytes = HEAD.unpack(data)
    except struct.error as error:
        raise malformed(f"a chunk is cut off ({error})") from error
    if magic != MAGIC:
        raise malformed("a chunk does not begin as one")
    if kind not in (PAYLOAD, END):
        raise malformed(f"a chunk has the unknown type {kind!r}")
    if not 0 < path_bytes <= PATH_BYTES_MAX:
        raise malformed(f"a path has {path_bytes} bytes")
    return ChunkHead(kind, path_bytes)


def parse_path(data: bytes | bytearray | memoryview) -> str:
    """The path of a chunk, which leads nowhere but into the data directory. Raises: EngineError."""
    path = bytes(data).decode("utf-8", "surrogateescape").removeprefix("./")
    if "\0" in path or any(part in ("", ".", "..") for part in path.split("/")):
        raise malformed(f"a path leads outside of the data directory: {path!r}")
    return path


def parse_payload_head(data: bytes | bytearray | memoryview) -> PayloadHead:
    """The PAYLOAD_HEAD.size bytes behind the path. Raises: EngineError."""
    try:
        head = PayloadHead(*PAYLOAD_HEAD.unpack(data))
    except struct.error as error:
        raise malformed(f"a chunk is cut off ({error})") from error
    if head.length > PAYLOAD_BYTES_MAX:
        raise malformed(f"a chunk claims {head.length} bytes")
    return head


def malformed(why: str) -> EngineError:
    """The stream is not what it should be."""
    return EngineError(
        "stream of mariadb-backup is damaged",
        detail=f"On its way, {why}.",
        hints=["is another program's output in between, such as a wrapper's?"],
    )
