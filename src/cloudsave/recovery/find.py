"""
Searches the stored log for what transactions did, and says to where a restore is "just before it".

Only log is read whose commits may lie in the wanted span, and before it as much as the transactions need that
were under way when it begins: back to a point where the log itself says that none of them had begun. Rows of
catalogues that the log does not tell are looked for further back, up to the last checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from cloudsave.engines.search_api import Horizon, LogReading, LogSearch
from cloudsave.errors import LogNotStored
from cloudsave.model.found import (
    ChangeKind,
    FoundTransaction,
    RelationName,
    SearchQuery,
    TransactionEnd,
)
from cloudsave.model.ledger import Extent, Ledger, Stretch
from cloudsave.model.log import Commit
from cloudsave.model.ranges import RecoverableRange
from cloudsave.model.target import Target, TargetKind
from cloudsave.recovery.history import BackupSummary, History, IndexReader
from cloudsave.recovery.reach import Reach, instant_text
from cloudsave.repository.lineage import Lineage
from cloudsave.repository.log_copies import reading_copies
from cloudsave.repository.reader import BackupReader
from cloudsave.telemetry import Progress

LAST_US = 1 << 62
"""Later than any instant: the end of a span that has none."""
LOOK_BACK_BYTES_MAX = 1 << 30
"""Limit: log read before the span, for transactions that were under way, and again for catalogues' rows."""
LOOK_BACK_OBJECTS_MAX = 4096
"""Limit: the same, where log objects are small."""
LOOK_BACK_STEP_MAX = 8
"""Limit: log objects read at once for catalogues' rows."""
READ_AHEAD_BYTES_MAX = 128 << 20
"""Limit: log that is fetched before it is needed."""
BACKUPS_ASKED_MAX = 4
"""Limit: base backups that are asked for names."""
MAPS_FROM_BACKUPS = 2
"""So many of them tell which files the catalogues have, before the log is read."""
COMMITS_MAX = 20_000
"""Limit: transactions that a search by the index alone shows."""


@dataclass(frozen=True, slots=True)
class Unsearched:
    """A part of the span of which nothing can be said; `last` is None at the end of the stored log."""

    branch: str
    first: int
    last: int | None
    text: str


@dataclass(frozen=True, slots=True)
class Hit:
    """A transaction that was searched for, with whether the state before it can be restored."""

    found: FoundTransaction
    branch: str
    reachable: bool


@dataclass(slots=True)
class SearchResult:
    """The answer to a search."""

    branch: str
    hits: list[Hit] = field(default_factory=list)
    """By position."""
    under_way: list[Hit] = field(default_factory=list)
    """Transactions that had not ended where the log that was read ends."""
    unsearched: list[Unsearched] = field(default_factory=list)
    shortcomings: list[str] = field(default_factory=list)
    log_bytes: int = 0
    """Log that was read."""
    names: Sequence[RelationName] = ()
    """Known relations; filled where a relation was asked for that is in no hit."""

    @property
    def whole(self) -> bool:
        """Whether what is not here did not happen."""
        return not self.unsearched and not self.shortcomings


@dataclass(frozen=True, slots=True)
class FindContext:
    """What a search works with."""

    lineage: Lineage
    search: LogSearch
    history: History
    indexes: IndexReader
    progress: Progress
    workers: int = 2


@dataclass(frozen=True, slots=True)
class Filters:
    """Which of the found transactions are shown, by name; "" where it does not matter."""

    relation: str = ""
    """A name, with its schema or without."""
    file: str = ""
    """Tablespace/database/file, or the last alone."""
    database: str = ""

    def take(self, found: FoundTransaction) -> bool:
        """Whether one of the changes is of what is wanted."""
        if not (self.relation or self.file or self.database):
            return True
        return any(self._takes(change.relation, change.text) for change in found.changes)

    def _takes(self, relation: RelationName | None, text: str) -> bool:
        if relation is None:
            # A database or a schema; its name is in the text.
            return not self.relation and not self.file and f"database {self.database}" in text
        if self.database and relation.database != self.database:
            return False
        if self.file:
            return relation.file == self.file or relation.file.rpartition("/")[2] == self.file
        return not self.relation or self.names(relation)

    def names(self, relation: RelationName) -> bool:
        """Whether `relation` is called so."""
        return self.relation in (relation.name, f"{relation.schema}.{relation.name}")


# ---- what to read: pure


@dataclass(frozen=True, slots=True)
class Run:
    """Stored log without a hole: extents that touch."""

    extents: tuple[Extent, ...]

    @property
    def first(self) -> int:
        """Where it begins."""
        return self.extents[0].first

    @property
    def last(self) -> int:
        """Where it ends."""
        return self.extents[-1].last


def stored_runs(ledger: Ledger, path: Sequence[Stretch]) -> list[Run]:
    """The stored log of a path, cut at its holes."""
    begins = sorted(
        {first for branch, _, end in path for first, _ in ledger.ranges(branch) if end is None or first < end}
    )
    runs: list[Run] = []
    covered = -1
    for begin in begins:
        if begin < covered or begin < 0:
            continue
        cover = ledger.cover(path, begin, None)
        if cover.extents:
            runs.append(Run(cover.extents))
            covered = cover.end
    return runs


def span_of(run: Run, query: SearchQuery) -> tuple[int, int] | None:
    """
    The numbers [low, high) of the extents of a run that may hold commits of the query's span; None: none may.

    Instants do not ascend along the log, so all between the first and the last one count.
    """
    inside = [
        number
        for number, extent in enumerate(run.extents)
        if extent.segment.commit_last_us >= query.first_us
        and 0 < extent.segment.commit_first_us <= query.last_us
    ]
    if not inside:
        return None
    # Behind its last commit there may be transactions that are still under way.
    ends_later = query.last_us >= _instants(run)[1]
    return inside[0], len(run.extents) if ends_later else inside[-1] + 1


def unsearched_of(
    runs: Sequence[Run], query: SearchQuery, path: Sequence[Stretch], text: Callable[[int], str]
) -> Iterator[Unsearched]:
    """What of the query's span is not in the runs: before them and between them."""
    spans = [_instants(run) for run in runs]
    earliest = min((first for first, _ in spans if first), default=0)
    if query.first_us and earliest and query.first_us < earliest:
        where = f"log before {text(runs[0].first)} ({instant_text(earliest)}) is not stored"
        yield Unsearched(_branch_at(path, runs[0].first), 0, runs[0].first, where)
    for number in range(1, len(runs)):
        before = max((last for _, last in spans[:number]), default=0)
        after = min((first for first, _ in spans[number:] if first), default=0)
        if before <= query.last_us and (not after or after >= query.first_us):
            first, last = runs[number - 1].last, runs[number].first
            when = f"between {instant_text(before)} and {instant_text(after)}"
            where = f"the log has a hole from {text(first)} to {text(last)}, {when}"
            yield Unsearched(_branch_at(path, first), first, last, where)


def _instants(run: Run) -> tuple[int, int]:
    """The earliest and the latest instant of a run's commits, by its objects' names; 0: it has none."""
    firsts = [one.segment.commit_first_us for one in run.extents if one.segment.commit_first_us]
    return min(firsts, default=0), max((one.segment.commit_last_us for one in run.extents), default=0)


def _branch_at(path: Sequence[Stretch], offset: int) -> str:
    for branch, begin, end in path:
        if begin <= offset and (end is None or offset < end):
            return branch
    return path[-1][0]


# ---- the search


def find(query: SearchQuery, branch: str | None, filters: Filters, context: FindContext) -> SearchResult:
    """
    Search the stored log of a branch, by default the one that a restore would follow.

    Raises: LogNotStored where nothing of the span is stored; TargetUnreachable for a branch that is not
    known; IntegrityError, StoreError.
    """
    reach = Reach(Target(TargetKind.LATEST, branch=branch), context.history, context.indexes)
    runs = stored_runs(reach.ledger, reach.path)
    result = SearchResult(reach.branch)
    result.unsearched = list(unsearched_of(runs, query, reach.path, reach.text))
    spans = [(run, span) for run in runs if (span := span_of(run, query)) is not None]
    known_us = _known_until(runs, context.indexes)
    if query.first_us > known_us or (not spans and not any(_overlaps(run, query) for run in runs)):
        raise _not_stored(runs, reach)
    if known_us < query.last_us < LAST_US:
        end = runs[-1].last
        where = f"the stored log ends at {reach.text(end)} and is known up to {instant_text(known_us)}"
        result.unsearched.append(Unsearched(reach.branch, end, None, where))
    ranges = reach.ranges()
    parts = [_Part(run, *span, query, reach, context) for run, span in spans]
    for part in [one for one in parts if one.narrow()] or parts:
        for one in part.search(result, filters):
            hit = Hit(one, reach.position(one.offset).branch, _is_reachable(ranges, one.stop_offset))
            open_ones = one.end in (TransactionEnd.OPEN, TransactionEnd.PREPARED)
            (result.under_way if open_ones else result.hits).append(hit)
    result.hits.sort(key=lambda hit: hit.found.offset)
    return result


def _known_until(runs: Sequence[Run], indexes: IndexReader) -> int:
    """An instant up to which the stored log is known to hold all commits."""
    if not runs:
        return 0
    latest = max(_instants(run)[1] for run in runs)
    return max(latest, indexes(runs[-1].extents[-1].segment).complete_until_us)


def _overlaps(run: Run, query: SearchQuery) -> bool:
    """Whether the query's span reaches into that of a run, though there is no commit in both."""
    first, _ = _instants(run)
    return bool(first) and first <= query.last_us


def _not_stored(runs: Sequence[Run], reach: Reach) -> LogNotStored:
    spans = [span for span in map(_instants, runs) if span[0]]
    stored = f"The stored log of branch {reach.branch} has no commit."
    if spans:
        first, last = min(one for one, _ in spans), max(one for _, one in spans)
        stored = f"Commits are stored from {instant_text(first)} to {instant_text(last)}."
    return LogNotStored(
        "no log of that time is stored",
        detail=stored,
        hints=["`cloudsave ranges NAME` shows what is stored", "is the zone of the times right?"],
    )


def _is_reachable(ranges: Sequence[RecoverableRange], offset: int) -> bool:
    return any(one.begin.offset <= offset <= one.end.offset for one in ranges)


class BackupFiles:
    """`StoredFiles` of a base backup."""

    def __init__(self, reader: BackupReader) -> None:
        self._reader = reader
        self._numbers = {
            entry.path: number for number, entry in enumerate(reader.manifest.files) if not entry.outside
        }

    def paths(self) -> Collection[str]:
        """See `StoredFiles.paths`."""
        return self._numbers.keys()

    def read(self, path: str) -> bytes:
        """See `StoredFiles.read`."""
        return self._reader.read_file(self._numbers[path]) if path in self._numbers else b""


@dataclass(slots=True)
class _Part:
    """The search of one run's extents [low, high)."""

    run: Run
    low: int
    high: int
    query: SearchQuery
    reach: Reach
    context: FindContext

    def search(self, result: SearchResult, filters: Filters) -> Sequence[FoundTransaction]:
        """What is found; adds to what the result says about the search."""
        if self.query.kinds == {ChangeKind.COMMIT} and self.query.transaction is None:
            return self._commits(result)
        begin, number = self._begin(result)
        reading = self.context.search.begin(self.query, begin)
        backups = self._backups()
        for backup in backups[:MAPS_FROM_BACKUPS]:
            reading.learn(self._files(backup))
        self._feed(reading, range(number, self.high), begin, result)
        self._look_for_rows(reading, number, begin, result)
        for backup in backups:
            if not reading.lacks_names():
                break
            reading.learn(self._files(backup))
        result.shortcomings += reading.shortcomings()
        found = [one for one in reading.found() if filters.take(one)]
        if filters.relation and not found:
            reading.learn(self._files(backups[0]), everything=True)
            result.names = [*result.names, *reading.names()]
        return found

    def _commits(self, result: SearchResult) -> list[FoundTransaction]:
        """All commits of the span, by the index alone."""
        found: list[FoundTransaction] = []
        for commit in self._indexed():
            known = found[-1].offset if found else -1
            if commit.offset > known and self.query.first_us <= commit.instant_us <= self.query.last_us:
                if len(found) == COMMITS_MAX:
                    result.shortcomings.append(
                        f"more than {COMMITS_MAX} commits; the later ones are not shown"
                    )
                    break
                end = TransactionEnd.COMMITTED
                at, instant_us = commit.offset, commit.instant_us
                found.append(FoundTransaction(commit.transaction, end, at, instant_us, at, ()))
        return found

    def _indexed(self) -> Iterator[Commit]:
        for extent in self.run.extents[self.low : self.high]:
            for commit in self.context.indexes(extent.segment).commits:
                if extent.first < commit.end_offset and commit.offset < extent.last:
                    yield commit

    def narrow(self) -> bool:
        """Whether one transaction is wanted and the index shows its commit; then only its extent is read."""
        wanted = self.query.transaction
        if wanted is None:
            return False
        for number in range(self.low, self.high):
            commits = self.context.indexes(self.run.extents[number].segment).commits
            if (commits.rows[3] == wanted & 0xFFFFFFFF).any():
                self.low, self.high = number, number + 1
                return True
        return False

    # ---- log before the span

    def _begin(self, result: SearchResult) -> tuple[int, int]:
        """
        Where to begin to read so that all of each transaction is read which ends in the span: a record
        boundary, and the number of its extent.
        """
        later: Horizon | None = None
        first_end = self._first_end()
        read_bytes = 0
        for number in range(self.low, -1, -1):
            extent = self.run.extents[number]
            begin = self._record_first(number)
            if begin is None:
                continue
            found = self.context.search.horizons(self._log(extent, begin), begin)
            read_bytes += extent.last - begin
            for horizon in reversed(found):
                if horizon.offset <= first_end:
                    later = later or horizon
                    if self.context.search.reaches(horizon, later):
                        result.log_bytes += read_bytes
                        return begin, number
            if read_bytes > LOOK_BACK_BYTES_MAX or self.low - number > LOOK_BACK_OBJECTS_MAX:
                break
        result.log_bytes += read_bytes
        for first in range(number, self.high):
            begin = self._record_first(first)
            if begin is not None:
                if self.query.first_us or self.query.transaction is not None:
                    self._say_cut(first, result)
                return begin, first
        raise LogNotStored("no record of the log of that time is stored")

    def _first_end(self) -> int:
        """Where the first transaction that can be wanted ends, as far as the index tells."""
        query, extent = self.query, self.run.extents[self.low]
        wanted = None if query.transaction is None else query.transaction & 0xFFFFFFFF
        for commit in self.context.indexes(extent.segment).commits:
            if commit.instant_us >= query.first_us and wanted in (None, commit.transaction):
                return commit.offset
        return extent.last

    def _say_cut(self, number: int, result: SearchResult) -> None:
        where = self.reach.text(self.run.extents[number].first)
        result.shortcomings.append(
            f"transactions that began before {where} may have done more than is shown: log from before there"
            " was not read"
        )

    def _record_first(self, number: int) -> int | None:
        """The first record boundary of an extent."""
        extent = self.run.extents[number]
        first = self.context.indexes(extent.segment).record_first
        return first if first is not None and extent.segment.first <= first < extent.last else None

    def _look_for_rows(self, reading: LogReading, number: int, begin: int, result: SearchResult) -> None:
        """Read further back while catalogues' rows are unknown, in steps that double."""
        low, step, read_bytes = number, 1, 0
        while low > 0 and read_bytes < LOOK_BACK_BYTES_MAX and reading.lacks_earlier():
            low, step = max(0, low - step), min(2 * step, LOOK_BACK_STEP_MAX)
            earlier = next(
                (first for one in range(low, number) if (first := self._record_first(one)) is not None), None
            )
            if earlier is None:
                continue
            extents = self.run.extents[low : number + 1]
            log = b"".join(self._log(extent, earlier, until=begin) for extent in extents)
            reading.feed_earlier(log, earlier)
            read_bytes += len(log)
            result.log_bytes += len(log)
            begin, number = earlier, low

    # ---- reading

    def _log(self, extent: Extent, begin: int, *, until: int | None = None) -> memoryview:
        log = memoryview(self.context.lineage.read_log(extent.segment))
        return _part_of(extent, log, begin, until)

    def _feed(self, reading: LogReading, numbers: range, begin: int, result: SearchResult) -> None:
        extents = [self.run.extents[number] for number in numbers]
        progress = self.context.progress
        total = sum(extent.last - extent.first for extent in extents)
        progress.begin("search log", bytes_total=total)
        for extent, log in read_ahead(extents, self.context):
            part = _part_of(extent, log, begin)
            reading.feed(part)
            result.log_bytes += len(part)
            progress.advance(extent.last - extent.first)
        progress.finish()
        self._finish_record(reading, numbers.stop, result)

    def _finish_record(self, reading: LogReading, number: int, result: SearchResult) -> None:
        """The last record may end in the log that follows; it may be the commit that is looked for."""
        for following in range(number, len(self.run.extents)):
            until = self._record_first(following)
            extent = self.run.extents[following]
            if until is not None and until <= extent.first:
                return
            part = self._log(extent, extent.first, until=until)
            reading.feed(part)
            result.log_bytes += len(part)
            if until is not None:
                return

    def _files(self, backup: BackupSummary) -> BackupFiles:
        lineage = self.context.lineage
        return BackupFiles(BackupReader(lineage, lineage.manifest(backup.backup_id)))

    def _backups(self) -> list[BackupSummary]:
        """Base backups to take names from: the last ones before the span, then the first after it."""
        begin = self.run.extents[self.low].last
        before = [one for one in self.reach.backups if one.start.offset <= begin]
        after = [one for one in reversed(self.reach.backups) if one.start.offset > begin]
        return [*before, *after][:BACKUPS_ASKED_MAX]


def _part_of(extent: Extent, log: memoryview, begin: int, until: int | None = None) -> memoryview:
    first = extent.segment.first
    end = extent.last if until is None else min(until, extent.last)
    return log[max(begin, extent.first) - first : max(end, begin, extent.first) - first]


def read_ahead(extents: Sequence[Extent], context: FindContext) -> Iterator[tuple[Extent, memoryview]]:
    """The log of extents in order, fetched and opened by threads while the caller works."""
    read = reading_copies(context.lineage.read_log, context.history.segments)
    with ThreadPoolExecutor(context.workers, thread_name_prefix="find") as pool:
        waiting: list[tuple[Extent, Future[bytes]]] = []
        ahead_bytes, following = 0, 0
        try:
            while following < len(extents) or waiting:
                while following < len(extents) and (not waiting or ahead_bytes < READ_AHEAD_BYTES_MAX):
                    extent = extents[following]
                    waiting.append((extent, pool.submit(read, extent.segment)))
                    ahead_bytes += extent.segment.last - extent.segment.first
                    following += 1
                extent, log = waiting.pop(0)
                content = log.result()
                ahead_bytes -= len(content)
                yield extent, memoryview(content)
        finally:
            for _, log in waiting:
                log.cancel()
