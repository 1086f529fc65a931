"""Synthetic log in a repository, cut into objects as a test wants it, and the search of it."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from tests.unit.engines.postgresql.synthetic_catalogue import columns, page
from tests.unit.kernels.synthetic_heap import (
    PG_CLASS,
    TABLE,
    Image,
    block,
    delete,
    end,
    record,
    running,
)
from tests.unit.kernels.synthetic_wal import SEGMENT_BYTES, SYSTEM, WalWriter
from tests.unit.repository.samples import (
    REPOSITORY_KEY,
    SeededClock,
    draft_manifest,
    open_writer,
    store_files,
)

from cloudsave.engines.postgresql.dialect import PostgresDialect
from cloudsave.engines.postgresql.format_wal import EPOCH_US
from cloudsave.engines.registry import log_search
from cloudsave.model.found import DESTRUCTIVE, ChangeKind, SearchQuery
from cloudsave.model.log import LogIndex, LogSegment
from cloudsave.model.position import Position
from cloudsave.recovery.find import LAST_US, Filters, FindContext, SearchResult, find
from cloudsave.recovery.history import IndexReader, read_history
from cloudsave.repository.crypto import LineageKeys
from cloudsave.repository.lineage import Lineage
from cloudsave.store.memory import MemoryStore
from cloudsave.telemetry import NoProgress

LINEAGE = f"postgresql-{SYSTEM}"
BRANCH, SECOND_BRANCH = "00000001", "00000002"
DIALECT = PostgresDialect()
SECOND = 1_000_000
BEGIN_S = 800_000_000
"""Of the log's first commit, since 2000."""


def time(seconds: float) -> int:
    """A commit's time in the log."""
    return int((BEGIN_S + seconds) * SECOND)


def instant(seconds: float) -> int:
    """The same since 1970."""
    return time(seconds) + EPOCH_US


@dataclass
class Site:
    """A log that is stored in objects as it is cut."""

    wal: WalWriter = field(default_factory=WalWriter)
    cuts: list[int] = field(default_factory=list)
    promoted: int | None = None
    """Where the second branch begins."""
    lineage: Lineage = field(
        default_factory=lambda: Lineage(
            MemoryStore(), LineageKeys.derive(REPOSITORY_KEY, LINEAGE), clock=SeededClock(1)
        )
    )

    def cut(self) -> None:
        """End a log object here."""
        self.cuts.append(self.wal.end)

    def promote(self) -> None:
        """Go on, on a second branch."""
        self.cut()
        self.promoted = self.wal.end
        self.wal.timeline = 2

    def store(self, *, without: Sequence[int] = (), files: dict[str, bytes] | None = None) -> None:
        """Store the log, but for the objects `without`, and a backup of `files` at its begin."""
        _write_backup(self.lineage, files or {"PG_VERSION": b"18\n"})
        indexer = DIALECT.indexer(
            Position(SECOND_BRANCH, self.wal.start),
            log_file_bytes=SEGMENT_BYTES,
            system_identifier=str(SYSTEM),
        )
        if self.promoted is not None:
            line = f"1\t{self.promoted >> 32:X}/{self.promoted & 0xFFFFFFFF:X}\tpromoted\n"
            self.lineage.put_history(SECOND_BRANCH, line.encode())
        places = [self.wal.start, *self.cuts, self.wal.end]
        for number, (first, last) in enumerate(itertools.pairwise(places)):
            if first == last:
                continue
            part = bytes(self.wal.log[first - self.wal.start : last - self.wal.start])
            indexer.feed(part)
            index = indexer.take()
            if number not in without:
                self._put(first, last, part, index)

    def _put(self, first: int, last: int, part: bytes, index: LogIndex) -> None:
        instants = index.commits.instants.tolist()
        branch = BRANCH if self.promoted is None or first < self.promoted else SECOND_BRANCH
        segment = LogSegment(branch, first, last, min(instants, default=0), max(instants, default=0))
        known = replace(index, complete_until_us=instant(1000) if last == self.wal.end else 0)
        self.lineage.put_log(segment, [part], known)

    def find(
        self,
        first_s: float = 0,
        last_s: float | None = None,
        *,
        filters: Filters | None = None,
        kinds: frozenset[ChangeKind] = DESTRUCTIVE,
        transaction: int | None = None,
    ) -> SearchResult:
        """Search, from seconds after the begin on."""
        history = read_history(self.lineage, DIALECT)
        context = FindContext(
            lineage=self.lineage,
            search=log_search("postgresql", server_version="18.6", log_file_bytes=SEGMENT_BYTES),
            history=history,
            indexes=IndexReader(self.lineage, DIALECT, log_file_bytes=SEGMENT_BYTES),
            progress=NoProgress(),
        )
        last_us = LAST_US if last_s is None else instant(last_s)
        first_us = instant(first_s) if first_s else 0
        query = SearchQuery(first_us, last_us, kinds, 10, transaction)
        return find(query, None, filters or Filters(), context)


def _write_backup(lineage: Lineage, files: dict[str, bytes]) -> None:
    writer = open_writer(lineage, "B1")
    try:
        writer.open()
        store_files(writer, files)
        writer.settle()
        writer.drain()
        writer.commit(replace(draft_manifest("B1"), lineage=LINEAGE, log_file_bytes=SEGMENT_BYTES))
    finally:
        writer.abort()


def filler(site: Site, first: int, last: int) -> None:
    """A commit in each second of [first, last), each in an object of its own."""
    for second in range(first, last):
        site.cut()
        site.wal.noise(3000)
        site.wal.commit(1000 + second, time(second))


def long_transaction(*, horizons: bool = True) -> Site:
    """Transaction 5 deletes at second 1 and at second 8, and commits at second 9."""
    site = Site()
    filler(site, 0, 1)
    if horizons:
        running(site.wal, oldest=5, following=5)
    for _ in range(30):
        delete(site.wal, 5)
    filler(site, 1, 3)
    if horizons:
        running(site.wal, oldest=5, following=900)
    filler(site, 3, 8)
    delete(site.wal, 5)
    end(site.wal, 5, time(9))
    filler(site, 10, 12)
    return site


def accident(site: Site) -> None:
    """Table "orders" is dropped at second 6; the image of its row's page is from second 1."""
    whole = page(columns("orders"), columns("other", oid=16_390, file=16_390))
    (upper,) = struct.unpack_from("<H", whole, 14)
    image = Image(whole[:32] + whole[upper:], 32, upper - 32)
    filler(site, 0, 1)
    running(site.wal, oldest=5, following=5)
    main = struct.pack("<IHBB", 4, 2, 0, 0)
    record(site.wal, 10, 0x10, xid=4, main=main, blocks=[block(0, PG_CLASS, image=image)])
    end(site.wal, 4, time(1), dropped=[(1663, 5, 16_390)])
    filler(site, 2, 5)
    running(site.wal, oldest=5, following=5)
    delete(site.wal, 5, PG_CLASS, line=1)
    end(site.wal, 5, time(6), dropped=[TABLE])
    filler(site, 7, 9)
