"""Rows and pages of catalogues as a server writes them."""

from __future__ import annotations

import struct


def columns(name: str = "orders", *, oid: int = 16_384, file: int = 16_384, major: int = 18) -> bytes:
    """A row of pg_class."""
    row = struct.pack("<I64sI", oid, name.encode(), 2200).ljust(88, b"\0") + struct.pack("<II", file, 0)
    row = row.ljust(118 if major >= 18 else 114, b"\0") + b"pr"
    return row + b"the columns behind".ljust(40, b".")


def page(*rows: bytes) -> bytes:
    """A heap page of rows, the first at line 1."""
    content = bytearray(8192)
    upper = 8192
    for number, row in enumerate(rows):
        item = struct.pack("<18xHHBx", 30, 0x0800, 24) + row
        upper -= (len(item) + 7) // 8 * 8
        content[upper : upper + len(item)] = item
        struct.pack_into("<I", content, 24 + 4 * number, upper | 1 << 15 | len(item) << 17)
    struct.pack_into("<HHH", content, 12, 24 + 4 * len(rows), upper, 8192)
    return bytes(content)
