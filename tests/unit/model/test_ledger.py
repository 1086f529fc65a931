"""The ledger against a set of bytes."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from cloudsave.model.ledger import Ledger
from cloudsave.model.log import LogSegment

segments_of_one_branch = st.lists(
    st.tuples(st.integers(0, 40), st.integers(1, 12)).map(lambda pair: LogSegment("1", pair[0], sum(pair))),
    max_size=12,
)


@given(segments_of_one_branch, st.integers(0, 45), st.integers(0, 45))
def test_cover_agrees_with_a_set_of_bytes(segments: list[LogSegment], first: int, length: int) -> None:
    stored = {byte for one in segments for byte in range(one.first, one.last)}
    last = first + length
    cover = Ledger(segments).cover([("1", 0, None)], first, last)
    missing = next((byte for byte in range(first, last) if byte not in stored), None)
    assert cover.complete == (missing is None)
    assert cover.end == (last if missing is None else missing)
    cursor = first
    for extent in cover.extents:
        assert extent.first == cursor < extent.last
        assert extent.segment.first <= extent.first < extent.last <= extent.segment.last
        cursor = extent.last
    assert cursor == cover.end


@given(segments_of_one_branch)
def test_ranges_are_the_maximal_runs(segments: list[LogSegment]) -> None:
    stored = {byte for one in segments for byte in range(one.first, one.last)}
    ranges = Ledger(segments).ranges("1")
    assert {byte for first, last in ranges for byte in range(first, last)} == stored
    assert all(earlier[1] < later[0] for earlier, later in itertools.pairwise(ranges))


def test_cover_uses_as_few_segments_as_possible() -> None:
    small = [LogSegment("1", n, n + 1) for n in range(10)]
    large = [LogSegment("1", 0, 5), LogSegment("1", 4, 10)]
    cover = Ledger(small + large).cover([("1", 0, None)], 0, 10)
    assert [extent.segment for extent in cover.extents] == large


def test_a_path_takes_no_log_of_the_parent_from_after_the_switch() -> None:
    path = [("1", 0, 15), ("2", 15, None)]
    ledger = Ledger([LogSegment("1", 0, 40), LogSegment("2", 20, 30)])
    cover = ledger.cover(path, 0, 30)
    assert not cover.complete
    assert (cover.branch, cover.end) == ("2", 15)


def test_log_that_a_branch_copied_from_its_parent_serves_for_the_parent() -> None:
    path = [("1", 0, 15), ("2", 15, None)]
    ledger = Ledger([LogSegment("1", 0, 10), LogSegment("2", 10, 30)])
    cover = ledger.cover(path, 0, 30)
    assert cover.complete
    assert [(one.segment.branch, one.first, one.last) for one in cover.extents] == [
        ("1", 0, 10),
        ("2", 10, 15),
        ("2", 15, 30),
    ]


def test_a_path_of_the_parent_never_uses_the_child() -> None:
    ledger = Ledger([LogSegment("1", 0, 10), LogSegment("2", 10, 30)])
    cover = ledger.cover([("1", 0, None)], 0, 12)
    assert (cover.complete, cover.end) == (False, 10)


def test_frontier_and_furthest_differ_at_a_hole() -> None:
    ledger = Ledger([LogSegment("1", 0, 10), LogSegment("1", 12, 20)])
    assert ledger.frontier("1", 3) == 10
    assert ledger.frontier("1", 11) == 11
    assert ledger.furthest("1") == 20
    assert ledger.branches() == ("1",)
