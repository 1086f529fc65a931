"""The stream of mariadb-backup: files out of chunks, and nothing that is not one."""

from __future__ import annotations

import io
import struct
import zlib

import pytest

from cloudsave.engines.mariadb.backup_program import _next_chunk
from cloudsave.engines.mariadb.format_mbstream import HEAD, MAGIC, PAYLOAD_HEAD, parse_path
from cloudsave.errors import EngineError


def payload(path: bytes, offset: int, data: bytes, *, checksum: int | None = None) -> bytes:
    crc = zlib.crc32(data) if checksum is None else checksum
    return HEAD.pack(MAGIC, 0, b"P", len(path)) + path + PAYLOAD_HEAD.pack(len(data), offset, crc) + data


def end(path: bytes) -> bytes:
    return HEAD.pack(MAGIC, 0, b"E", len(path)) + path


def test_chunks_are_taken_one_after_the_other() -> None:
    stream = io.BytesIO(payload(b"./d/t.ibd", 0, b"abc") + payload(b"ibdata1", 7, b"") + end(b"d/t.ibd"))
    found = [_next_chunk(stream) for _ in range(4)]
    told = [None if one is None else (one.path, one.offset, one.data) for one in found]
    assert told == [("d/t.ibd", 0, b"abc"), ("ibdata1", 7, b""), ("d/t.ibd", 0, None), None]


@pytest.mark.parametrize(
    "content",
    [
        b"mariadb-backup: warning",
        payload(b"a", 0, b"abc", checksum=1),
        payload(b"a", 0, b"abc")[:-1],
        end(b"a")[:-1],
        HEAD.pack(MAGIC, 0, b"S", 1) + b"a",
        HEAD.pack(MAGIC, 0, b"E", 1 << 20),
        HEAD.pack(MAGIC, 0, b"P", 1) + b"a" + struct.pack("<QQI", 1 << 40, 0, 0),
    ],
)
def test_what_is_no_chunk_is_refused(content: bytes) -> None:
    with pytest.raises(EngineError, match="stream of mariadb-backup is damaged"):
        _next_chunk(io.BytesIO(content))


@pytest.mark.parametrize("path", [b"/etc/passwd", b"../up", b"d/../../up", b"d//t", b"", b"d/\0"])
def test_a_path_leads_nowhere_else(path: bytes) -> None:
    with pytest.raises(EngineError):
        parse_path(path)
