"""`LogSearch` of PostgreSQL: the pass over the log, the catalogues' history and the names, put together."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence

from cloudsave.engines.postgresql.catalogue_history import CatalogueHistory
from cloudsave.engines.postgresql.description import Describer
from cloudsave.engines.postgresql.format_wal import EPOCH_US, format_lsn
from cloudsave.engines.postgresql.names import BY_LOG, NameBook, database_folders, relation_maps
from cloudsave.engines.postgresql.transactions import ENDED_MAX, LoggedTransaction, TransactionFold
from cloudsave.engines.search_api import Horizon, LogReading, StoredFiles
from cloudsave.errors import LogDamaged, UnsupportedVersion
from cloudsave.kernels.native import NativeKernels, native
from cloudsave.kernels.wal_facts import FactKind, Facts, FactsPass, FactsStart, begin_facts
from cloudsave.kernels.wal_walk import MAGIC_BY_MAJOR
from cloudsave.model.found import ChangeKind, FoundTransaction, RelationName, SearchQuery, TransactionEnd

RECORDS_BYTES_MAX = 128 << 20
"""Limit: records of naming catalogues kept in memory. Names of what was changed later come from backups."""
_Record = tuple[int, bytes]


class PostgresLogSearch:
    """See `LogSearch`."""

    def __init__(
        self, server_version: str, *, log_file_bytes: int, kernels: NativeKernels | None = native
    ) -> None:
        self._major = _major_of(server_version)
        self._log_file_bytes = log_file_bytes
        self._kernels = kernels

    def horizons(self, log: bytes | memoryview, offset: int) -> Sequence[Horizon]:
        """See `LogSearch.horizons`."""
        walk = self.facts_pass(offset, ())
        found = []
        for facts in feed(walk, log):
            rows = facts.rows[facts.rows["kind"] == FactKind.HORIZON]
            found += [
                Horizon(start, oldest, following)
                for start, oldest, following in rows[["start", "xid", "relation"]].tolist()
            ]
        return found

    def reaches(self, earlier: Horizon, later: Horizon) -> bool:
        """See `LogSearch.reaches`; transaction ids go round."""
        return (later.oldest_running - earlier.next) & 0xFFFFFFFF < 1 << 31

    def begin(self, query: SearchQuery, offset: int) -> LogReading:
        """See `LogSearch.begin`."""
        return PostgresLogReading(self, query, offset, major=self._major)

    def facts_pass(self, offset: int, watched: Collection[int]) -> FactsPass:
        """The pass over log from `offset` on."""
        magic = MAGIC_BY_MAJOR[self._major]
        return begin_facts(FactsStart(offset, self._log_file_bytes, magic, tuple(watched)), self._kernels)


def _major_of(server_version: str) -> int:
    """Raises: UnsupportedVersion where nobody knows the format of its log."""
    found = re.match(r"\d+", server_version)
    major = int(found[0]) if found else 0
    if major not in MAGIC_BY_MAJOR:
        raise UnsupportedVersion(
            f"cannot search log of PostgreSQL {server_version}",
            detail=f"The formats of {min(MAGIC_BY_MAJOR)} to {max(MAGIC_BY_MAJOR)} are known.",
            hints=["is there a newer release of cloudsave?"],
        )
    return major


class PostgresLogReading:
    """See `LogReading`."""

    def __init__(self, search: PostgresLogSearch, query: SearchQuery, offset: int, *, major: int) -> None:
        self._search = search
        self._query = query
        self._offset = offset
        self._walk: FactsPass | None = None
        self._fold = TransactionFold(query, epoch_us=EPOCH_US)
        self._history = CatalogueHistory(major)
        self._base = CatalogueHistory(major)
        """The relation maps of the backup; the history begins with them."""
        self._names = NameBook(major)
        self._describer = Describer(self._history, self._names, query.rows_min)
        self._records: list[_Record] = []
        self._record_bytes = 0
        self._followed = False

    def learn(self, files: StoredFiles, *, everything: bool = False) -> None:
        """See `LogReading.learn`."""
        if self._walk is None:
            for database, mapping in relation_maps(files):
                self._base.follow_map(database, mapping)
            self._names.learn_databases(files)
        databases = {oid for one in self._transactions() for oid in self._describer.unnamed(one)}
        if everything:
            databases |= {oid for _, oid in database_folders(files)}
        self._names.learn_relations(files, databases)

    def feed(self, log: bytes | memoryview) -> None:
        """See `LogReading.feed`."""
        if self._walk is None:
            self._walk = self._search.facts_pass(self._offset, self._base.watched())
            self._fold.move(self._base.moved)
        for facts in feed(self._walk, log):
            self._keep(facts, self._records)
            if self._moves(facts):
                self._walk.watch(self._base.watched())
                self._fold.move(self._base.moved)
            self._fold.add(facts.rows)
        self._followed = False

    def _moves(self, facts: Facts) -> bool:
        """Follow the relation map's record, which is the last of a part if any is."""
        if not facts.records or facts.records[-1][17] != 7:
            return False
        self._base.apply(0, facts.records[-1])
        return True

    def _keep(self, facts: Facts, kept: list[_Record]) -> None:
        starts = facts.rows["start"][facts.rows["kind"] == FactKind.RECORD].tolist()
        for start, record in zip(starts, facts.records, strict=True):
            if self._record_bytes >= RECORDS_BYTES_MAX:
                return
            self._record_bytes += len(record)
            kept.append((start, record))

    def feed_earlier(self, log: bytes | memoryview, offset: int) -> None:
        """See `LogReading.feed_earlier`."""
        walk = self._search.facts_pass(offset, self._base.watched())
        earlier: list[_Record] = []
        for facts in feed(walk, log):
            self._keep(facts, earlier)
        self._records[:0] = earlier
        self._followed = False

    def lacks_earlier(self) -> bool:
        """See `LogReading.lacks_earlier`."""
        self._follow()
        if self._record_bytes >= RECORDS_BYTES_MAX:
            return False
        return any(self._describer.unknown(one) for one in self._transactions())

    def lacks_names(self) -> bool:
        """See `LogReading.lacks_names`."""
        self._follow()
        return any(True for one in self._transactions() for _ in self._describer.unnamed(one))

    def found(self) -> Sequence[FoundTransaction]:
        """See `LogReading.found`."""
        self._follow()
        found = [self._found(one) for one in self._transactions()]
        return [one for one in found if self._is_wanted(one)]

    def shortcomings(self) -> Sequence[str]:
        """See `LogReading.shortcomings`."""
        found = []
        if self._fold.overflowed:
            found.append(f"more than {ENDED_MAX} transactions were found; the later ones are not shown")
        if self._record_bytes >= RECORDS_BYTES_MAX:
            found.append("there are too many changes of catalogues to name all relations by the log")
        return found

    def names(self) -> Sequence[RelationName]:
        """See `LogReading.names`."""
        self._follow()
        return list(self._names.all_names())

    def _transactions(self) -> list[LoggedTransaction]:
        return [*self._fold.ended, *self._fold.open()]

    def _follow(self) -> None:
        """Go through the kept records, from the earliest on."""
        if self._followed:
            return
        history = CatalogueHistory(self._history.major)
        history.moved.update(self._base.moved)
        for start, record in self._records:
            history.apply(start, record)
        history.learn_images()
        self._history = self._describer.history = history
        for (database, _, _), row in history.rows.items():
            self._names.add(database, row, by=BY_LOG)
        self._followed = True

    def _found(self, one: LoggedTransaction) -> FoundTransaction:
        stop, notes = self._describer.stop_of(one)
        return FoundTransaction(
            transaction=one.xid,
            end=one.end,
            offset=one.start,
            instant_us=one.time_us + EPOCH_US if one.time_us else 0,
            stop_offset=stop,
            changes=self._describer.describe(one),
            notes=notes,
        )

    def _is_wanted(self, one: FoundTransaction) -> bool:
        if self._query.transaction is not None:
            return one.end not in (TransactionEnd.OPEN, TransactionEnd.PREPARED) or (
                one.transaction == self._query.transaction & 0xFFFFFFFF
            )
        if ChangeKind.COMMIT in self._query.kinds:
            return True
        return bool({change.kind for change in one.changes} & self._query.kinds)


def feed(walk: FactsPass, log: bytes | memoryview) -> Iterator[Facts]:
    """The facts of a stretch, in parts. Raises: LogDamaged."""
    yield from walk.feed(log)
    if walk.stop_reason:
        raise LogDamaged(
            f"stored log cannot be understood at {format_lsn(walk.stop_position)}",
            detail=f"Reason: {walk.stop_reason.name.lower().replace('_', ' ')}.",
            offset=walk.stop_position,
        )
