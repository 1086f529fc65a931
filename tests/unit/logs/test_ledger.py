"""Decisions over the ledger against sets of bytes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudsave.errors import EngineUnavailable, LogConflict
from cloudsave.logs.ledger import (
    Step,
    check_server_reaches,
    first_missing,
    next_step,
    unrecorded_gaps,
    younger_branches,
)
from cloudsave.model.history import Ancestry, BranchPoint
from cloudsave.model.ledger import Ledger
from cloudsave.model.log import LogHole, LogSegment
from cloudsave.model.position import Position

FILE = 16
PIECES = st.lists(st.tuples(st.integers(0, 90), st.integers(1, 20)), max_size=10)


def segments(branch: str, pieces: list[tuple[int, int]]) -> list[LogSegment]:
    return [LogSegment(branch, first, first + length) for first, length in pieces]


def holes(branch: str, pieces: list[tuple[int, int]]) -> list[LogHole]:
    return [LogHole(branch, first, first + length, "test") for first, length in pieces]


def bytes_of(pieces: list[tuple[int, int]]) -> set[int]:
    return {byte for first, length in pieces for byte in range(first, first + length)}


@given(PIECES, PIECES)
def test_the_first_missing_byte_is_neither_durable_nor_recorded_as_lost(
    stored: list[tuple[int, int]], lost: list[tuple[int, int]]
) -> None:
    missing = first_missing(Ledger(segments("1", stored)), holes("1", lost), [("1", 0, None)])
    if not stored:
        assert missing is None
        return
    known = bytes_of(stored) | bytes_of(lost)
    oldest = min(bytes_of(stored))
    assert missing == Position("1", next(n for n in range(oldest, 500) if n not in known))


@given(PIECES, PIECES)
def test_gaps_without_a_record_are_exactly_the_bytes_nobody_explains(
    stored: list[tuple[int, int]], lost: list[tuple[int, int]]
) -> None:
    gaps = unrecorded_gaps(Ledger(segments("1", stored)), holes("1", lost), "1")
    found = {byte for first, last in gaps for byte in range(first, last)}
    have, explained = bytes_of(stored), bytes_of(lost)
    if not have:
        assert found == set()
        return
    unexplained = set(range(min(have), max(have))) - have - explained
    # A gap is reported from its first unexplained byte to its end.
    assert unexplained <= found
    assert not found & have


@given(PIECES, st.integers(0, 100))
def test_a_step_ends_where_durable_log_follows(stored: list[tuple[int, int]], fresh: int) -> None:
    step = next_step(Ledger(segments("1", stored)), [], [("1", 0, None)], fresh=fresh, log_file_bytes=FILE)
    have = bytes_of(stored)
    if not have:
        assert step == Step("1", fresh - fresh % FILE, None, resumed=False)
        return
    later = {byte for byte in have if byte > step.frontier}
    assert step.frontier not in have
    assert step.frontier - 1 in have
    assert step.resumed
    assert step.end == (min(later) if later else None)


def test_a_child_is_begun_at_its_first_file_once_the_parent_reaches_it() -> None:
    path = [("1", 0, 40), ("2", 40, None)]
    for parent_end in (32, 35, 40, 47):
        ledger = Ledger(segments("1", [(0, parent_end)]))
        step = next_step(ledger, [], path, fresh=99, log_file_bytes=FILE)
        assert step == Step("2", 32, None, resumed=False), parent_end


def test_a_parent_is_completed_first() -> None:
    path = [("1", 0, 40), ("2", 40, None)]
    step = next_step(Ledger(segments("1", [(0, 31)])), [], path, fresh=99, log_file_bytes=FILE)
    assert step == Step("1", 31, 40, resumed=True)


def test_a_child_goes_on_where_its_own_log_ends() -> None:
    path = [("1", 0, 40), ("2", 40, None)]
    for child_length in (3, 12, 20):
        ledger = Ledger([*segments("1", [(0, 33)]), *segments("2", [(32, child_length)])])
        step = next_step(ledger, [], path, fresh=99, log_file_bytes=FILE)
        assert step == Step("2", 32 + child_length, None, resumed=True)


def test_a_child_captured_from_later_on_is_not_begun_again() -> None:
    path = [("1", 0, 40), ("2", 40, None)]
    step = next_step(Ledger(segments("2", [(64, 20)])), [], path, fresh=99, log_file_bytes=FILE)
    assert step == Step("2", 84, None, resumed=True)


def test_two_switches_in_one_file_go_straight_to_the_youngest() -> None:
    path = [("1", 0, 40), ("2", 40, 44), ("3", 44, None)]
    step = next_step(Ledger(segments("1", [(0, 36)])), [], path, fresh=99, log_file_bytes=FILE)
    assert step == Step("3", 32, None, resumed=False)


def test_a_recorded_hole_at_a_childs_begin_is_passed() -> None:
    path = [("1", 0, 40), ("2", 40, None)]
    ledger = Ledger([*segments("1", [(0, 30)]), *segments("2", [(48, 10)])])
    lost = [LogHole("1", 30, 40, "gone"), LogHole("2", 32, 48, "gone")]
    step = next_step(ledger, lost, path, fresh=99, log_file_bytes=FILE)
    assert step == Step("2", 58, None, resumed=True)


def test_a_lost_first_file_of_a_child_takes_the_end_of_its_parent_along() -> None:
    path = [("1", 0, 40), ("2", 40, 44), ("3", 44, None)]
    ledger = Ledger(segments("1", [(0, 30)]))
    lost = [LogHole("1", 30, 32, "gone"), LogHole("3", 32, 64, "gone")]
    step = next_step(ledger, lost, path, fresh=99, log_file_bytes=FILE)
    assert step == Step("3", 64, None, resumed=False)


def test_a_hole_that_reaches_beyond_the_switch_hides_nothing_of_the_child() -> None:
    """A standby that lagged was promoted within what is recorded as lost of its primary's log."""
    path = [("1", 0, 50), ("2", 50, None)]
    ledger = Ledger([*segments("1", [(0, 30), (64, 20)]), *segments("2", [(64, 10)])])
    lost = [LogHole("1", 30, 64, "gone")]
    assert first_missing(ledger, lost, path) == Position("2", 50)
    step = next_step(ledger, lost, path, fresh=99, log_file_bytes=FILE)
    assert step == Step("2", 48, 64, resumed=False)
    lost.append(LogHole("2", 48, 64, "gone"))
    assert first_missing(ledger, lost, path) == Position("2", 74)


def test_a_server_must_reach_what_is_stored() -> None:
    step = Step("1", 50, None, resumed=True)
    check_server_reaches(step, Position("1", 50), replica=False)
    with pytest.raises(LogConflict):
        check_server_reaches(step, Position("1", 49), replica=False)
    with pytest.raises(EngineUnavailable):
        check_server_reaches(step, Position("1", 49), replica=True)


def test_descendants_are_younger() -> None:
    ancestry = Ancestry(
        {"2": (BranchPoint("1", 40),), "3": (BranchPoint("1", 40), BranchPoint("2", 50)), "4": ()}
    )
    assert younger_branches(ancestry, "1") == ("2", "3")
    assert younger_branches(ancestry, "3") == ()
