"""Log that is stored twice is read from where it can be read."""

from __future__ import annotations

import pytest

from cloudsave.errors import IntegrityError, StoreUnavailable
from cloudsave.model.log import LogSegment
from cloudsave.repository.log_copies import COPIES_MAX, reading_copies

LOG = bytes(range(200))


def segment(first: int, last: int, branch: str = "00000001") -> LogSegment:
    return LogSegment(branch, first, last)


WHOLE = segment(0, 200)
PIECES = (segment(0, 70), segment(70, 130), segment(120, 200))


def reader(damaged: set[LogSegment]):  # type: ignore[no-untyped-def]
    """Reads from LOG; damaged segments raise."""

    def read(one: LogSegment) -> bytes:
        if one in damaged:
            raise IntegrityError(f"object of {one.first} is damaged")
        return LOG[one.first : one.last]

    return read


def test_the_bytes_of_a_damaged_object_come_from_its_pieces() -> None:
    read = reading_copies(reader({WHOLE}), (WHOLE, *PIECES))
    assert read(WHOLE) == LOG
    assert read(PIECES[1]) == LOG[70:130]


def test_the_bytes_of_a_damaged_piece_come_from_the_whole() -> None:
    read = reading_copies(reader({PIECES[1]}), (WHOLE, *PIECES))
    assert read(PIECES[1]) == LOG[70:130]


def test_copies_that_are_damaged_too_are_passed_over() -> None:
    junk = tuple(segment(0, 300 + number) for number in range(20))
    read = reading_copies(reader({WHOLE, *junk}), (WHOLE, *junk, *PIECES))
    assert read(WHOLE) == LOG
    assert read(junk[0].__class__("00000001", 0, 200)) == LOG


@pytest.mark.parametrize("left", [PIECES[:2], PIECES[1:], (segment(0, 200, "00000002"),), ()])
def test_what_nothing_else_holds_is_an_error(left: tuple[LogSegment, ...]) -> None:
    with pytest.raises(IntegrityError, match="object of 0 is damaged"):
        reading_copies(reader({WHOLE}), (WHOLE, *left))(WHOLE)


def test_not_more_copies_are_tried_than_is_sane() -> None:
    junk = tuple(segment(0, 300 + number) for number in range(COPIES_MAX + 5))
    with pytest.raises(IntegrityError):
        reading_copies(reader({WHOLE, *junk}), (WHOLE, *junk, *PIECES))(WHOLE)


def test_a_store_that_is_away_is_no_damage() -> None:
    def read(one: LogSegment) -> bytes:
        raise StoreUnavailable("away")

    with pytest.raises(StoreUnavailable):
        reading_copies(read, (WHOLE, *PIECES))(WHOLE)
