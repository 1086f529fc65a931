"""Records that make tablespaces, wherever they lie in the log."""

from __future__ import annotations

import struct

import pytest

from cloudsave.engines.postgresql.format_tablespace import tablespaces_made
from cloudsave.kernels.checksums import crc32c

FILE = 1 << 20
PAGE = 8192


def record(oid: int, path: str, *, operation: int = 0) -> bytes:
    """A whole record of the tablespace manager."""
    body = struct.pack("<I", oid) + path.encode() + b"\0"
    size = struct.pack("<BB", 255, len(body)) if len(body) < 256 else struct.pack("<BI", 254, len(body))
    main = size + body
    head = struct.pack("<IIQBB2x", 24 + len(main), 7, 99, operation, 5)
    return head + struct.pack("<I", crc32c(head, crc32c(main))) + main


def log_with(payload: bytes, *, at: int) -> bytes:
    """A log file with `payload` from `at` on, page headers between."""
    log = bytearray(FILE)
    for octet in payload:
        if at % PAGE == 0:
            log[at : at + 24] = b"\x11" * 24
            at += 24 if at % FILE else 40
        log[at] = octet
        at += 1
    return bytes(log)


@pytest.mark.parametrize("at", [40, 4096, PAGE - 8, PAGE - 16, PAGE - 24, PAGE - 32, 3 * PAGE - 48])
@pytest.mark.parametrize("path", ["/a", "/" + "long" * 200])
def test_record_is_found_also_across_pages(at: int, path: str) -> None:
    log = log_with(record(16384, path), at=at)
    assert tablespaces_made(log, until=at + 1, log_file_bytes=FILE) == {"16384": path}
    assert tablespaces_made(log, until=at, log_file_bytes=FILE) == {}


def test_what_is_no_such_record_is_not_found() -> None:
    whole = record(16384, "/a")
    damaged = whole[:-2] + b"b" + whole[-1:]
    for other in (damaged, record(16384, "/a", operation=16), record(16384, ""), whole[:30]):
        assert tablespaces_made(log_with(other, at=40), until=FILE, log_file_bytes=FILE) == {}
