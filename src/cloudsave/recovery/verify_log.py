"""
Whether stored log is the log of one server: read through from record to record, and compared where stretches
overlap.

Capture checks the same where it goes on after a stop. This finds what got in beside that, such as log of two
servers that call a branch by the same name, and it proves that a server could replay all of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

from cloudsave.engines.dialect_api import Dialect
from cloudsave.errors import IntegrityError
from cloudsave.model.finding import Finding, Severity
from cloudsave.model.ledger import Ledger, read_extents
from cloudsave.model.log import LogSegment
from cloudsave.model.position import Position
from cloudsave.repository.lineage import Lineage
from cloudsave.telemetry import Progress

_HELD_SEGMENTS = 2
"""Stretches that are held in memory to be compared."""
_HINT = (
    "was log of two servers, or of a restored copy, stored as one? targets after it are unsafe: take a backup"
)


def read_log_through(
    lineage: Lineage,
    dialect: Dialect,
    segments: Sequence[LogSegment],
    *,
    log_file_bytes: int,
    progress: Progress,
) -> Iterator[Finding]:
    """
    Findings about the content of `segments`, all of which can be read; none for what is sound.

    Raises: StoreError.
    """
    ledger = Ledger(segments)
    reading = _Reading(lineage, dialect, ledger, log_file_bytes)
    ranges = [(branch, begin, end) for branch in ledger.branches() for begin, end in ledger.ranges(branch)]
    progress.begin("read log through", bytes_total=sum(end - begin for _, begin, end in ranges))
    for branch, begin, end in ranges:
        if trouble := reading.follow(branch, begin, end, progress):
            yield Finding(Severity.PROBLEM, f"branch {branch}", trouble, _HINT)
    for branch in ledger.branches():
        if trouble := reading.compare([one for one in segments if one.branch == branch]):
            yield Finding(Severity.PROBLEM, f"branch {branch}", trouble, _HINT)
    progress.finish()


class _Reading:
    def __init__(self, lineage: Lineage, dialect: Dialect, ledger: Ledger, log_file_bytes: int) -> None:
        self._lineage = lineage
        self._dialect = dialect
        self._ledger = ledger
        self._log_file_bytes = log_file_bytes
        self._read = lru_cache(maxsize=_HELD_SEGMENTS)(lineage.read_log)

    def follow(self, branch: str, begin: int, end: int, progress: Progress) -> str:
        """
        What is wrong with the records of a range, from the first log file on that begins in it; "" where each
        follows the one before it.
        """
        begin = -(-begin // self._log_file_bytes) * self._log_file_bytes
        if begin >= end:
            return ""
        indexer = self._dialect.indexer(
            Position(branch, begin),
            log_file_bytes=self._log_file_bytes,
            system_identifier=self._lineage.id.partition("-")[2],
        )
        for extent in self._ledger.cover([(branch, 0, None)], begin, end).extents:
            try:
                indexer.feed(read_extents(self._lineage.read_log, [extent]))
                indexer.take()
            except IntegrityError as error:
                return (
                    f"log cannot be replayed between {extent.first:#x} and {extent.last:#x}: {error.detail}"
                )
            progress.advance(extent.last - extent.first)
        return ""

    def compare(self, segments: Sequence[LogSegment]) -> str:
        """
        Where segments of one branch differ that hold the same log; "" where none do.

        The segment that reaches furthest of those before another one holds all that the two have in common.
        """
        before: LogSegment | None = None
        for segment in sorted(segments, key=lambda one: (one.first, one.last)):
            end = min(segment.last, before.last) if before else 0
            if before and segment.first < end:
                known = self._read(before)[segment.first - before.first : end - before.first]
                if self._read(segment)[: len(known)] != known:
                    return f"stretches of log differ that hold {segment.first:#x} to {end:#x} both"
            if before is None or segment.last > before.last:
                before = segment
        return ""
