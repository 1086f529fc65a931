"""Page images come back as the page was, and what is malformed is refused, never a crash."""

from __future__ import annotations

import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from cloudsave.kernels.page_images import lz4, page_of, pglz
from cloudsave.kernels.wal_facts import Block


def block(image: bytes | None, *, begin: int = 0, hole: int = 0, compression: str = "") -> Block:
    return Block((1663, 5, 1259), 0, 7, False, image, begin, hole, compression, b"")


def test_a_hole_is_filled_with_zeros() -> None:
    page = page_of(block(b"a" * 24 + b"b" * 168, begin=24, hole=8000))
    assert page == b"a" * 24 + bytes(8000) + b"b" * 168


def test_pglz_copies_and_literals() -> None:
    # "abc", then 6 bytes from 3 before, then 18 + 20 bytes from 1 before.
    data = bytes([0b00011000]) + b"abc" + bytes([3, 3, 15, 1, 20])
    assert pglz(data, 100) == b"abcabcabc" + b"c" * 38
    assert pglz(data, 11) == b"abcabcabccc"


def test_lz4_literals_and_copies() -> None:
    # 3 literals and 6 bytes from 3 before; then 17 literals and the end.
    data = bytes([0x32]) + b"xyz" + bytes([3, 0]) + bytes([0xF0, 2]) + b"k" * 17
    assert lz4(data, 100) == b"xyzxyzxyz" + b"k" * 17


def test_zstd_is_opened() -> None:
    plain = bytes(range(256)) * 32
    assert page_of(block(zstandard.compress(plain), compression="zstd")) == plain


def test_an_image_of_another_length_is_refused() -> None:
    assert page_of(block(b"short")) is None
    assert page_of(block(None)) is None
    assert page_of(block(b"a" * 192, begin=500, hole=8000)) is None


@settings(max_examples=400, deadline=None)
@given(
    st.binary(max_size=300),
    st.integers(0, 65_535),
    st.integers(0, 65_535),
    st.sampled_from(["", "pglz", "lz4", "zstd"]),
)
def test_anything_is_a_page_or_refused(image: bytes, begin: int, hole: int, compression: str) -> None:
    page = page_of(block(image, begin=begin, hole=hole, compression=compression))
    assert page is None or len(page) == 8192
