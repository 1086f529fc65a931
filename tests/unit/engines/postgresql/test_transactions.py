"""Rows of the log are put together to transactions, whatever batches they come in."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudsave.engines.postgresql import transactions
from cloudsave.engines.postgresql.transactions import TransactionFold
from cloudsave.kernels.wal_facts import FACT_TYPE, FactKind
from cloudsave.model.found import DESTRUCTIVE, ChangeKind, SearchQuery, TransactionEnd

TABLE = 16_384
ALL = SearchQuery(0, 1 << 60, DESTRUCTIVE, rows_min=10)
Row = tuple[int, ...]


class Rows:
    """Rows in log order, each at its own place."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def add(
        self,
        kind: FactKind,
        xid: int,
        *,
        value: int = 0,
        relation: int = 0,
        count: int = 1,
        database: int = 5,
    ) -> None:
        self.rows.append((len(self.rows) + 1, value, xid, kind, 1663, database, relation, count))

    def delete(self, xid: int, count: int, relation: int = TABLE) -> None:
        self.add(FactKind.DELETE, xid, relation=relation, count=count)

    def commit(self, xid: int, *children: int, kind: FactKind = FactKind.COMMIT) -> None:
        for child in children:
            self.add(FactKind.CHILD, child, relation=xid)
        self.add(kind, xid, value=len(self.rows))

    def folded(self, query: SearchQuery = ALL, cuts: tuple[int, ...] = ()) -> TransactionFold:
        fold = TransactionFold(query, epoch_us=0)
        # A record is never cut: its rows come together.
        firsts = [n for n, row in enumerate(self.rows) if n == 0 or self.rows[n - 1][3] != FactKind.CHILD]
        places = sorted({0, len(self.rows), *(firsts[cut % len(firsts)] for cut in cuts)})
        for low, high in itertools.pairwise(places):
            fold.add(np.array(self.rows[low:high], FACT_TYPE))
        return fold


def counts(fold: TransactionFold) -> dict[int, list[int]]:
    return {one.xid: [fact.count for fact in one.facts] for one in fold.ended}


def busy_rows() -> Rows:
    rows = Rows()
    rows.delete(1, 5)
    rows.delete(2, 9)
    rows.delete(11, 4)
    rows.delete(1, 5)
    rows.delete(12, 90)
    rows.commit(12, kind=FactKind.ABORT)
    rows.delete(3, 50)
    rows.commit(1)
    rows.delete(2, 3)
    rows.commit(2, 11)
    rows.commit(3, kind=FactKind.ABORT)
    rows.delete(4, 20)
    rows.commit(5)
    return rows


@given(st.tuples(st.integers(0, 30), st.integers(0, 30), st.integers(0, 30)))
def test_rows_are_added_up_over_batches_and_sub_transactions(cuts: tuple[int, ...]) -> None:
    fold = busy_rows().folded(cuts=cuts)
    assert counts(fold) == {1: [10], 2: [16]}
    assert fold.ended[1].members == (2, 11)
    assert [(one.xid, one.end) for one in fold.open()] == [(4, TransactionEnd.OPEN)]


def test_what_was_rolled_back_is_told_where_it_is_wanted() -> None:
    fold = busy_rows().folded(SearchQuery(0, 1 << 60, DESTRUCTIVE, 10, aborted=True))
    assert {one.xid for one in fold.ended if one.end is TransactionEnd.ABORTED} == {3, 12}


def test_too_few_rows_of_each_relation_are_not_enough_together() -> None:
    rows = Rows()
    rows.delete(1, 9)
    rows.delete(1, 9, TABLE + 1)
    rows.add(FactKind.UPDATE, 1, relation=TABLE, count=100)
    rows.commit(1)
    assert counts(rows.folded()) == {}


def test_a_span_takes_both_of_its_ends() -> None:
    rows = Rows()
    for xid in (1, 2, 3):
        rows.delete(xid, 10)
        rows.commit(xid)
    instants = [row[1] for row in rows.rows if row[3] == FactKind.COMMIT]
    fold = rows.folded(SearchQuery(instants[0], instants[1], DESTRUCTIVE, 10))
    assert set(counts(fold)) == {1, 2}


def test_changes_of_definitions_and_files_are_always_enough() -> None:
    rows = Rows()
    rows.delete(1, 1, 1249)
    rows.commit(1)
    rows.add(FactKind.FILE_DROPPED, 2, relation=TABLE)
    rows.commit(2)
    rows.delete(3, 1, 2619)  # statistics define nothing
    rows.commit(3)
    rows.add(FactKind.DATABASE_DROPPED, 4)
    rows.commit(4)
    assert set(counts(rows.folded())) == {1, 2, 4}


def test_a_moved_catalogue_is_a_catalogue() -> None:
    rows = Rows()
    rows.delete(1, 1, 20_000)
    rows.commit(1)
    fold = TransactionFold(ALL, epoch_us=0)
    fold.move({(5, 20_000): 1249})
    fold.add(np.array(rows.rows, FACT_TYPE))
    assert set(counts(fold)) == {1}


def test_transactions_that_a_crash_ended_are_not_under_way() -> None:
    rows = Rows()
    rows.delete(100, 20)
    rows.delete(103, 20)
    rows.add(FactKind.PREPARE, 103)
    rows.add(FactKind.HORIZON, 103, relation=105)
    fold = rows.folded()
    assert [(one.xid, one.end) for one in fold.open()] == [(103, TransactionEnd.PREPARED)]


def test_what_has_no_transaction_is_nobodys() -> None:
    rows = Rows()
    rows.add(FactKind.FILE_CUT, 0, relation=TABLE)
    rows.commit(0)
    fold = rows.folded()
    assert (fold.ended, fold.open()) == ([], [])


def test_one_transaction_is_found_by_a_part_of_it() -> None:
    rows = busy_rows()
    for wanted in (2, 11, (7 << 32) + 2):
        query = SearchQuery(0, 1 << 60, frozenset(ChangeKind), 1, transaction=wanted)
        assert set(counts(rows.folded(query))) == {2}


def test_more_than_can_be_kept_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transactions, "ENDED_MAX", 1)
    assert busy_rows().folded().overflowed


def test_many_rows_of_open_transactions_are_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transactions, "CARRIED_ROWS_MAX", 8)
    rows = Rows()
    for _ in range(100):
        rows.delete(1, 3)
        rows.delete(2, 2, TABLE + 1)
    fold = rows.folded(cuts=tuple(range(0, 200, 7)))
    assert [[fact.count for fact in one.facts] for one in fold.open()] == [[300], [200]]
