"""
Puts the rows of the pass over the log together to transactions.

A transaction's rows come before its end, under its own id and under those of its sub-transactions, which the
record of its end names. Rows that belong to no end yet are carried on. Nearly all transactions are small and
wanted by nobody: they are passed over in whole arrays, and objects are made only of those that may be wanted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from cloudsave.engines.postgresql.format_catalogue import CATALOGUES, FIRST_NORMAL_OID, LARGE_OBJECTS
from cloudsave.kernels.wal_facts import FACT_TYPE, FactKind
from cloudsave.model.found import ChangeKind, SearchQuery, TransactionEnd

ENDED_MAX = 20_000
"""Limit: transactions kept that may be wanted; the search says when there were more."""
CARRIED_ROWS_MAX = 1 << 20
"""Limit: rows of open transactions before those of one relation are added up."""
_DEFINING = np.array(sorted(CATALOGUES), np.uint32)
_COUNTED = (FactKind.INSERT, FactKind.UPDATE, FactKind.DELETE)
_ROW_KINDS = {
    ChangeKind.INSERT: FactKind.INSERT,
    ChangeKind.UPDATE: FactKind.UPDATE,
    ChangeKind.DELETE: FactKind.DELETE,
}
_GROUPED = ["xid", "kind", "tablespace", "database", "relation"]


@dataclass(frozen=True, slots=True)
class Fact:
    """Rows of a transaction that are alike, added up."""

    kind: FactKind
    start: int
    value: int
    tablespace: int
    database: int
    relation: int
    count: int


@dataclass(slots=True)
class LoggedTransaction:
    """A transaction of the log; `start` is that of its end, or of its first row where it has not ended."""

    xid: int
    end: TransactionEnd
    start: int
    time_us: int
    """Since 2000; 0 where it has not ended."""
    members: tuple[int, ...]
    """Itself and its sub-transactions."""
    facts: list[Fact] = field(default_factory=list)
    prepared: bool = False
    """It ended by COMMIT PREPARED or ROLLBACK PREPARED."""


class TransactionFold:
    """Takes rows in log order. Times of the query count from 2000 here."""

    def __init__(self, query: SearchQuery, *, epoch_us: int) -> None:
        self.ended: list[LoggedTransaction] = []
        self.overflowed = False
        """More than ENDED_MAX were found."""
        self._query = query
        self._first_us, self._last_us = query.first_us - epoch_us, query.last_us - epoch_us
        self._all = query.transaction is not None or ChangeKind.COMMIT in query.kinds
        self._row_kinds = np.array(
            [_ROW_KINDS[kind] for kind in query.kinds if kind in _ROW_KINDS], np.uint32
        )
        self._carried = np.empty(0, FACT_TYPE)
        self._prepared: set[int] = set()
        self._moved: dict[int, int] = {}

    def move(self, moved: Mapping[tuple[int, int], int]) -> None:
        """Catalogues whose file has another number than their oid: (database, file) to the oid."""
        self._moved = {file: oid for (_, file), oid in moved.items()}

    def add(self, rows: npt.NDArray[np.void]) -> None:
        """The next rows."""
        kinds = rows["kind"]
        self._prepared.update(rows["xid"][kinds == FactKind.PREPARE].tolist())
        # What has no transaction, such as a file cut by recovery, is nobody's accident.
        new = rows[(kinds <= FactKind.DATABASE_DROPPED) & (rows["xid"] != 0)]
        changes = np.concatenate([self._carried, new])
        at = np.flatnonzero((kinds == FactKind.COMMIT) | (kinds == FactKind.ABORT))
        ends = rows[at]
        self._prepared.difference_update(ends["xid"].tolist())
        children = np.flatnonzero(kinds == FactKind.CHILD)
        # The rows of sub-transactions stand in front of that of the end which names them.
        xids = np.concatenate([ends["xid"], rows["xid"][children]])
        numbers = np.concatenate([np.arange(len(at)), np.searchsorted(at, children)])
        order = np.argsort(xids, kind="stable")
        xids, numbers = xids[order], numbers[order]
        place = np.searchsorted(xids, changes["xid"])
        ended = place < len(xids)
        ended[ended] = xids[place[ended]] == changes["xid"][ended]
        self._carry(changes[~ended], rows[kinds == FactKind.HORIZON])
        self._take(ends, numbers[place[ended]], changes[ended], rows[children])

    def open(self) -> list[LoggedTransaction]:
        """The transactions that have not ended; sub-transactions for themselves, since nothing names them."""
        found = []
        for xid, facts in _grouped(self._carried).items():
            end = TransactionEnd.PREPARED if xid in self._prepared else TransactionEnd.OPEN
            found.append(LoggedTransaction(xid, end, min(one.start for one in facts), 0, (xid,), facts))
        return [one for one in found if self._is_wanted(one)]

    def _carry(self, rows: npt.NDArray[np.void], horizons: npt.NDArray[np.void]) -> None:
        """Keep rows without an end, but for those of transactions that a crash has ended."""
        if len(horizons) and len(rows):
            last = horizons[-1]
            gone = (rows["xid"] - last["xid"]).astype(np.int32) < 0
            rows = rows[~(gone & (rows["start"] < last["start"]))]
        if len(rows) > CARRIED_ROWS_MAX:
            rows = _added_up(rows)
        self._carried = rows

    def _take(
        self,
        ends: npt.NDArray[np.void],
        numbers: npt.NDArray[np.int64],
        changes: npt.NDArray[np.void],
        children: npt.NDArray[np.void],
    ) -> None:
        """Make objects of the ended transactions that may be wanted."""
        inside = (ends["value"] >= self._first_us) & (ends["value"] <= self._last_us)
        if not self._query.aborted:
            inside &= ends["kind"] == FactKind.COMMIT
        if self._query.transaction is not None:
            inside &= self._named(ends["xid"], children)
        candidates = np.flatnonzero(inside & self._may_be_wanted(len(ends), numbers, changes))
        if not len(candidates):
            return
        kept = np.isin(numbers, candidates)
        numbers, changes = numbers[kept], changes[kept]
        order = np.argsort(numbers, kind="stable")
        numbers, changes = numbers[order], changes[order]
        members: dict[int, list[int]] = {}
        for child, parent in children[["xid", "relation"]].tolist():
            members.setdefault(parent, []).append(child)
        for number in candidates.tolist():
            low, high = np.searchsorted(numbers, [number, number + 1])
            start, time, xid, kind, _, _, _, phases = ends[number].tolist()
            end = TransactionEnd.COMMITTED if kind == FactKind.COMMIT else TransactionEnd.ABORTED
            facts = _facts_of(changes[low:high], xid)
            parts = (xid, *members.get(xid, ()))
            one = LoggedTransaction(xid, end, start, time, parts, facts, prepared=phases > 1)
            if not self._is_wanted(one):
                continue
            if len(self.ended) == ENDED_MAX:
                self.overflowed = True
                return
            self.ended.append(one)

    def _named(self, xids: npt.NDArray[np.uint32], children: npt.NDArray[np.void]) -> npt.NDArray[np.bool_]:
        """The transaction that the query names, by its own id or by that of a sub-transaction."""
        wanted = (self._query.transaction or 0) & 0xFFFFFFFF
        parents = children["relation"][children["xid"] == wanted]
        named: npt.NDArray[np.bool_] = (xids == wanted) | np.isin(xids, parents)
        return named

    def _may_be_wanted(
        self, count: int, numbers: npt.NDArray[np.int64], changes: npt.NDArray[np.void]
    ) -> npt.NDArray[np.bool_]:
        """Of `count` ends, those whose rows, all relations together, are enough or change definitions."""
        if self._all:
            return np.ones(count, np.bool_)
        counted = changes["kind"] <= FactKind.DELETE
        special = ~counted | self._defines(changes)
        found = np.zeros(count, np.bool_)
        found[numbers[special]] = True
        rows = counted & np.isin(changes["kind"], self._row_kinds)
        totals = np.bincount(numbers[rows], weights=changes["count"][rows], minlength=count)
        if len(self._row_kinds):
            found |= totals >= self._query.rows_min
        return found

    def _defines(self, changes: npt.NDArray[np.void]) -> npt.NDArray[np.bool_]:
        """Which rows are of a catalogue that defines things."""
        moved = [file for file, oid in self._moved.items() if CATALOGUES.get(oid)]
        low: npt.NDArray[np.bool_] = np.isin(changes["relation"], _DEFINING)
        return low | np.isin(changes["relation"], np.array(moved, np.uint32)) if moved else low

    def _is_wanted(self, one: LoggedTransaction) -> bool:
        if self._all:
            return True
        for fact in one.facts:
            if fact.kind not in _COUNTED or CATALOGUES.get(self._moved.get(fact.relation, fact.relation)):
                return True
            if fact.kind in self._row_kinds and fact.count >= self._query.rows_min and is_data(fact.relation):
                return True
        return False


def is_data(relation: int) -> bool:
    """Whether a file holds users' rows."""
    return relation >= FIRST_NORMAL_OID or relation == LARGE_OBJECTS


def _facts_of(rows: npt.NDArray[np.void], xid: int) -> list[Fact]:
    """Those of one transaction and its sub-transactions."""
    own = rows.copy()
    own["xid"] = xid
    return _grouped(own).get(xid, [])


def _grouped(rows: npt.NDArray[np.void]) -> dict[int, list[Fact]]:
    """Facts by transaction id; counted rows of one relation are one fact."""
    found: dict[int, dict[tuple[int, ...], Fact]] = {}
    for start, value, xid, kind, tablespace, database, relation, count in _plain(rows):
        single = 0 if kind in _COUNTED else start
        facts = found.setdefault(xid, {})
        key = (kind, tablespace, database, relation, single)
        known = facts.get(key)
        first, total = (known.start, known.count + count) if known else (start, count)
        facts[key] = Fact(FactKind(kind), first, value, tablespace, database, relation, total)
    return {xid: list(facts.values()) for xid, facts in found.items()}


def _plain(rows: npt.NDArray[np.void]) -> Iterable[tuple[int, ...]]:
    plain: list[tuple[int, ...]] = rows.tolist()
    return plain


def _added_up(rows: npt.NDArray[np.void]) -> npt.NDArray[np.void]:
    """Counted rows of one transaction and relation as one row; the others as they are."""
    counted = rows["kind"] <= FactKind.DELETE
    keys, first, inverse = np.unique(rows[counted][_GROUPED], return_index=True, return_inverse=True)
    sums = rows[counted][first]
    totals = np.bincount(inverse.ravel(), weights=rows["count"][counted], minlength=len(keys))
    sums["count"] = np.minimum(totals, (1 << 32) - 1).astype(np.uint32)
    joined: npt.NDArray[np.void] = np.concatenate([sums, rows[~counted]])
    return joined[np.argsort(joined["start"], kind="stable")]
