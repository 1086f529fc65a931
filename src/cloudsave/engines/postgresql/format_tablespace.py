"""
Tablespaces that log makes: replay puts them where they were on the source, whatever the restore has remapped.

    record of resource manager 5, operation 0; its main data
    0    4    u32 oid
    4    ..   path, zero-terminated; empty for a tablespace in place

Source: PostgreSQL src/include/commands/tablespace.h; tblspc_redo() in tablespace.c. For the frame of a
record see `kernels.wal_walk`.
"""

from __future__ import annotations

import struct

import numpy as np

from cloudsave.kernels.checksums import crc32c
from cloudsave.kernels.wal_walk import LONG_HEADER_BYTES, SHORT_HEADER_BYTES, WAL_PAGE_BYTES

RECORD_BYTES_MAX = 2048
"""Limit: such a record has a path of less than 1024 bytes."""
_HEAD_BYTES = 24
_MARK_AT = 16
_MARK = np.uint64(0x0500)
_MARK_MASK = np.uint64(0xFFFFFFF0)
"""Of the word at 16: info (but for its low flags), resource manager and two bytes of padding."""
_HEAD = struct.Struct("<I16xI")
_OID = struct.Struct("<I")
_FRAGMENT_BYTES = {253: 3, 252: 5}


def tablespaces_made(log: bytes | bytearray, *, until: int, log_file_bytes: int) -> dict[str, str]:
    """
    Oid and path of each tablespace that a record makes which begins in the first `until` bytes of `log`;
    tablespaces in place are left out.

    `log` begins with a log file. A record that it holds in part is not found.
    """
    whole = len(log) // WAL_PAGE_BYTES * WAL_PAGE_BYTES
    words = np.frombuffer(log, "<u8", whole // 8)
    found = {}
    for hit in np.flatnonzero((words & _MARK_MASK) == _MARK).tolist():
        record, begin = _record_around(log, hit * 8, log_file_bytes)
        made = _made(record) if begin < until else None
        if made is not None and made[1]:
            found[made[0]] = made[1]
    return found


def _record_around(log: bytes | bytearray, place: int, log_file_bytes: int) -> tuple[bytes, int]:
    """The record whose mark is at `place` and what follows it, without page headers; where it begins."""
    first = max(0, place // WAL_PAGE_BYTES - 1)
    payload = bytearray()
    places = []
    for page in range(first, first + 3):
        begin = page * WAL_PAGE_BYTES
        header = SHORT_HEADER_BYTES if begin % log_file_bytes else LONG_HEADER_BYTES
        part = log[begin + header : begin + WAL_PAGE_BYTES]
        places.append((len(payload), begin + header, len(part)))
        payload += part
    mark = next((at + place - begin for at, begin, size in places if begin <= place < begin + size), 0)
    at = mark - _MARK_AT
    if at < 0:
        return b"", place  # in a page header, or of a record that began in the file before
    begin = next(begin + at - start for start, begin, size in places if start <= at < start + size)
    return bytes(payload[at : at + RECORD_BYTES_MAX]), begin


def _made(record: bytes) -> tuple[str, str] | None:
    """Oid and path, where `record` begins with such a record whose CRC fits."""
    if len(record) < _HEAD_BYTES:
        return None
    length, crc = _HEAD.unpack_from(record)
    record = record[:length]
    if not _HEAD_BYTES < length == len(record):
        return None
    if crc32c(record[:20], crc32c(record[_HEAD_BYTES:])) != crc:
        return None
    at = _HEAD_BYTES
    while at < length and record[at] in _FRAGMENT_BYTES:
        at += _FRAGMENT_BYTES[record[at]]
    at += 2 if record[at : at + 1] == b"\xff" else 5
    if at + _OID.size > length:
        return None
    path = record[at + _OID.size :].partition(b"\0")[0].decode("utf-8", "surrogateescape")
    return str(_OID.unpack_from(record, at)[0]), path
