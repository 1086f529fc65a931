"""
A page of a PostgreSQL data file, 8192 bytes, host order (little-endian).

    0    4   u32 high half of the LSN just behind the record that last changed the page
    4    4   u32 low half of it
    8    2   u16 checksum, 1 to 65535; any value in a cluster without page checksums
    10   2   u16 flags; only the three lowest bits are used
    12   2   u16 lower: end of the line pointers
    14   2   u16 upper: begin of the tuples; 0 in a page that was never initialised, which is all zero
    16   2   u16 special: begin of the access method's own space; a multiple of 8
    18   2   u16 page size, its low byte the layout version 4: 0x2004
    20   4   u32 oldest transaction that could be pruned

The checksum covers the page (its own two bytes taken as zero) and the number of the block within the whole
relation: 131,072 blocks to a file of 1 GiB. Files without pages (pg_control, configuration, commit log) have
no checksums.
Validity: 24 <= lower <= upper <= special <= 8192, or all bytes are zero; the checksum where the cluster has
them.
Source: PostgreSQL src/include/storage/{bufpage.h, checksum_impl.h}. The check itself: `kernels.pages`.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

PAGE_BYTES = 8192
PAGE_HEADER_BYTES = 24
RELATION_FILE_BLOCKS = 131_072
"""Blocks of a relation in one file (1 GiB)."""
LAYOUT_VERSION = 4
_HEADER = struct.Struct("<IIHHHHHHI")


@dataclass(frozen=True, slots=True)
class PageHeader:
    """The header of one page."""

    lsn: int
    checksum: int
    flags: int
    lower: int
    upper: int
    special: int
    page_bytes: int
    layout_version: int
    prune_xid: int

    @classmethod
    def parse(cls, page: bytes | bytearray | memoryview) -> Self:
        """The header at the front of `page`, whatever it says. Raises: ValueError for less than a header."""
        if len(page) < PAGE_HEADER_BYTES:
            raise ValueError(f"{len(page)} bytes are no page header")
        high, low, checksum, flags, lower, upper, special, size, prune_xid = _HEADER.unpack_from(page)
        return cls(
            lsn=high << 32 | low,
            checksum=checksum,
            flags=flags,
            lower=lower,
            upper=upper,
            special=special,
            page_bytes=size & 0xFF00,
            layout_version=size & 0xFF,
            prune_xid=prune_xid,
        )

    @property
    def is_new(self) -> bool:
        """The page was never initialised."""
        return self.upper == 0


def page_lsns(pages: bytes | bytearray | memoryview) -> npt.NDArray[np.uint64]:
    """The LSN of each whole page."""
    count = len(pages) // PAGE_BYTES
    rows = np.frombuffer(pages, "<u4", count * (PAGE_BYTES // 4)).reshape(count, -1)
    halves = rows[:, :2].astype(np.uint64)
    return halves[:, 0] << np.uint64(32) | halves[:, 1]


def block_in_relation(segment_number: int, offset_bytes: int) -> int:
    """Number of the block at `offset_bytes` of the file `<relation>.<segment_number>` (0: no suffix)."""
    return segment_number * RELATION_FILE_BLOCKS + offset_bytes // PAGE_BYTES
