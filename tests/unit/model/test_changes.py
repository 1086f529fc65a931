"""Unions of changed blocks say "unchanged" only of what no change names."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cloudsave.model.changes import (
    ANY,
    CHANGE_BLOCK,
    CHANGE_FROM,
    CHANGE_TYPE,
    EVERYTHING,
    SPAN_BLOCKS,
    SPANS_MAX,
    Change,
    ChangedBlocks,
    StorageKey,
    sorted_changes,
)

TABLE = (1663, 5, 16384)
small = st.integers(0, 2)
blocks = st.one_of(st.integers(0, 40), st.integers(SPAN_BLOCKS - 20, SPAN_BLOCKS + 20))
changes = st.tuples(small, small, small, blocks, st.sampled_from([CHANGE_BLOCK, CHANGE_FROM])) | st.tuples(
    st.sampled_from([0, ANY]), st.sampled_from([0, ANY]), st.just(ANY), st.just(0), st.just(CHANGE_FROM)
)


def rows(*values: Change) -> np.ndarray[tuple[int], np.dtype[np.void]]:
    return sorted_changes(np.array(list(values), CHANGE_TYPE))


@settings(max_examples=200, deadline=None)
@given(st.lists(changes, max_size=30), st.lists(changes, max_size=30))
def test_a_block_is_unchanged_exactly_when_no_change_names_it(
    first: list[Change], more: list[Change]
) -> None:
    union = ChangedBlocks()
    for part in (first, more):
        union.add(rows(*part))
    for key in ((0, 0, 0), (1, 2, 0), (0, 1, 1)):
        for begin, count in ((0, 50), (7, 3), (SPAN_BLOCKS - 10, 25), (SPAN_BLOCKS, 30)):
            wanted = [not any(names(c, key, begin + n) for c in first + more) for n in range(count)]
            assert union.unchanged(StorageKey(key, begin), count).tolist() == wanted


def names(change: Change, key: tuple[int, int, int], block: int) -> bool:
    *mine, at, kind = change
    fits = all(wanted in (ANY, one) for wanted, one in zip(mine, key, strict=True))
    return fits and (block == at if kind == CHANGE_BLOCK else block >= at)


@settings(max_examples=100, deadline=None)
@given(st.lists(changes, max_size=40))
def test_sorting_keeps_each_change_once(found: list[Change]) -> None:
    wanted = sorted(set(found), key=lambda change: (change[4], *change[:4]))
    assert [tuple(row) for row in rows(*found).tolist()] == wanted


def test_everything_is_changed_once_that_is_said() -> None:
    union = ChangedBlocks()
    union.add(rows((*TABLE, 3, CHANGE_BLOCK)))
    assert not union.everything
    assert union.unchanged(StorageKey(TABLE, 0), 5).sum() == 4
    union.add(rows(EVERYTHING))
    assert union.everything
    assert union.unchanged(StorageKey(TABLE, 0), 5).sum() == 0


def test_more_changes_than_are_kept_make_everything_changed() -> None:
    union = ChangedBlocks()
    union.add(rows(*((1663, 5, n, 0, CHANGE_BLOCK) for n in range(SPANS_MAX))))
    assert not union.everything
    union.add(rows((1663, 5, SPANS_MAX, 0, CHANGE_BLOCK)))
    assert union.everything
