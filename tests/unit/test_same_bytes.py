"""The comparison of long byte strings sees every difference, and tells it in a few words."""

from __future__ import annotations

import pytest

from tests.same_bytes import assert_same_bytes

CONTENT = bytes(range(256)) * 100


def test_equal_ones_are_equal() -> None:
    assert_same_bytes(CONTENT, bytes(CONTENT), "content")
    assert_same_bytes(b"", b"", "nothing")


@pytest.mark.parametrize("place", [0, 5001, len(CONTENT) - 1])
def test_one_other_byte_is_seen_and_its_place_is_told(place: int) -> None:
    other = bytearray(CONTENT)
    other[place] ^= 1
    with pytest.raises(AssertionError, match=f"content: 25600 bytes.* 1 of the .* from offset {place} on"):
        assert_same_bytes(bytes(other), CONTENT, "content")


@pytest.mark.parametrize(
    ("found", "expected"), [(CONTENT, CONTENT[:-1]), (CONTENT[:-1], CONTENT), (b"", b"a")]
)
def test_a_missing_end_is_seen(found: bytes, expected: bytes) -> None:
    with pytest.raises(AssertionError, match="its end"):
        assert_same_bytes(found, expected, "content")
