"""Page headers and block numbers."""

from __future__ import annotations

import struct

import pytest

from cloudsave.engines.postgresql.format_page import PAGE_BYTES, PageHeader, block_in_relation, page_lsns


def test_header_is_read() -> None:
    page = struct.pack("<IIHHHHHHI", 0x16, 0xB374D848, 77, 4, 100, 7000, 8176, 0x2004, 9).ljust(PAGE_BYTES)
    assert PageHeader.parse(page) == PageHeader(
        lsn=0x16B374D848,
        checksum=77,
        flags=4,
        lower=100,
        upper=7000,
        special=8176,
        page_bytes=PAGE_BYTES,
        layout_version=4,
        prune_xid=9,
    )
    assert not PageHeader.parse(page).is_new
    assert PageHeader.parse(bytes(PAGE_BYTES)).is_new
    assert page_lsns(page + bytes(PAGE_BYTES) + b"tail").tolist() == [0x16B374D848, 0]


def test_less_than_a_header_is_refused() -> None:
    with pytest.raises(ValueError, match="no page header"):
        PageHeader.parse(bytes(23))


def test_blocks_are_counted_over_all_files_of_a_relation() -> None:
    assert block_in_relation(0, 8192 * 3) == 3
    assert block_in_relation(2, 8192) == 2 * 131_072 + 1
