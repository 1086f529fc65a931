"""
What is stored just before the frontier, made ready to go on: the bytes to compare with what the server
sends again, the indexer in the midst of its record, the half-filled window.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cloudsave.engines.dialect_api import Dialect, LogIndexer
from cloudsave.errors import IntegrityError, LogConflict, LogDamaged
from cloudsave.logs.ledger import Step, file_begin
from cloudsave.logs.writer import LogArchive, Window, WriterStart
from cloudsave.model.identity import SourceIdentity
from cloudsave.model.ledger import Ledger
from cloudsave.model.position import Position

OVERLAP_BYTES = 64 << 10
"""Stored log before the last record that is asked for again and compared, with what follows."""
_PAGE_BYTES = 8192
_INDEXES_MAX = 64
"""Limit: stored objects looked through for the last record."""


class Overlap:
    """
    Stored bytes [first, last) of a branch, compared with what the server sends again. Fewer bytes than that
    are stored of a log file that was ended before it was full.
    """

    def __init__(self, branch: str, first: int, last: int, stored: bytes) -> None:
        self.first = first
        self.last = last
        self._branch = branch
        self._stored = stored

    def strip(self, offset: int, data: bytes) -> bytes:
        """The part of `data` (log from `offset` on) that is new. Raises: LogConflict."""
        if offset >= self.last:
            return data
        known = self._stored[offset - self.first : offset - self.first + len(data)]
        if data[: len(known)] != known:
            differing = next(n for n, (a, b) in enumerate(zip(known, data, strict=False)) if a != b)
            raise LogConflict(
                f"log of branch {self._branch} on the server differs from the stored log",
                detail=f"The first difference is at {offset + differing:#x}.",
                hints=[
                    "was the server put back to an older state, or is it another copy of the cluster?",
                    "a server that was restored must be promoted to a new timeline",
                ],
            )
        if offset + len(data) > self.first + len(self._stored) and offset + len(known) < self.last:
            raise LogConflict(
                f"log of branch {self._branch} on the server is longer than the stored log",
                detail=f"It goes on at {offset + len(known):#x}, where a stored log file ends.",
                hints=["was the server put back to an older state, or is it another copy of the cluster?"],
            )
        return data[len(known) :]


@dataclass(frozen=True, slots=True)
class Resume:
    """All that streaming a step needs."""

    stream_from: int
    overlap: Overlap
    start: WriterStart
    log_file_bytes: int | None
    """Log may go on at a multiple of this without what is before it; None: at the next byte only."""

    def check_skip(self, end: int, offset: int) -> None:
        """Raises: LogDamaged where no log file can have ended at `end` if log goes on at `offset`."""
        if self.log_file_bytes and offset == file_begin(end, self.log_file_bytes) + self.log_file_bytes:
            return
        raise LogDamaged(
            "server left out log",
            detail=f"After {end:#x} of branch {self.start.branch} it went on at {offset:#x}.",
        )


class Resumer:
    """Makes steps ready, for one connected server."""

    def __init__(
        self, archive: LogArchive, dialect: Dialect, identity: SourceIdentity, *, window_size: int
    ) -> None:
        self._archive = archive
        self._dialect = dialect
        self._identity = identity
        self._window_size = window_size
        self._skips = identity.log_file_bytes if identity.ragged_log else None

    def prepare(self, step: Step, ledger: Ledger, *, available: int = 0) -> Resume:
        """
        Make `step` ready: log before the frontier is asked for again and compared, but for what is before
        `available`, which the server has recycled. Where nothing is left of it, the indexer still checks that
        records continue what is stored.
        """
        if not step.resumed:
            begin = file_begin(step.frontier, self._identity.log_file_bytes)
            start = WriterStart(step.branch, begin, self._indexer(step.branch, begin), Window())
            return Resume(begin, Overlap(step.branch, begin, begin, b""), start, self._skips)
        range_begin = next(a for a, b in ledger.ranges(step.branch) if a < step.frontier <= b)
        # From the last record on, so that the first new one must name it, or complete it.
        boundary = self._last_record(step, ledger, range_begin)
        # From before it: what follows it may be padding, the same on every server.
        compare_from = boundary
        if not self._identity.ragged_log:
            compare_from = max(range_begin, (boundary - OVERLAP_BYTES) // _PAGE_BYTES * _PAGE_BYTES)
        compare_from = min(max(compare_from, available), step.frontier)
        at = min(compare_from, boundary)
        indexer, known = self._indexer(step.branch, boundary), []
        for part in self._stored(step, ledger, at):
            if at + len(part) > boundary:
                indexer.feed(part[max(0, boundary - at) :])
            known.append(part[max(0, compare_from - at) :])
            at += len(part)
        indexer.take()
        start = WriterStart(step.branch, step.frontier, indexer, self._window(step, ledger, range_begin))
        overlap = Overlap(step.branch, compare_from, step.frontier, b"".join(known))
        return Resume(compare_from, overlap, start, self._skips)

    def _indexer(self, branch: str, offset: int) -> LogIndexer:
        return self._dialect.indexer(
            Position(branch, offset),
            log_file_bytes=self._identity.log_file_bytes,
            system_identifier=self._identity.system_identifier,
        )

    def _stored(self, step: Step, ledger: Ledger, low: int) -> Iterator[memoryview]:
        """The stored log of [low, frontier), one object after the other, without a copy of them all."""
        cover = ledger.cover([(step.branch, 0, None)], low, step.frontier)
        if not cover.complete:
            raise IntegrityError(
                f"log of branch {step.branch} is not stored where it must be",
                detail=f"Bytes from {cover.end:#x} are missing before {step.frontier:#x}.",
            )
        for extent in cover.extents:
            begin = extent.segment.first
            log = memoryview(self._archive.read_log(extent.segment))
            yield log[extent.first - begin : extent.last - begin]

    def _last_record(self, step: Step, ledger: Ledger, range_begin: int) -> int:
        """
        The begin of the last record before the frontier; before it where that is cut off, the end of the one
        before it. Where none is known, the begin of the log file.
        """
        end, complete = step.frontier, 0
        for _ in range(_INDEXES_MAX):
            segment = ledger.cover([(step.branch, 0, None)], end - 1, end).extents[0].segment
            index = self._archive.log_index(segment)
            if segment.last <= step.frontier:
                complete = max(complete, index.records_end)
            last = index.record_last
            if last is not None and range_begin <= last < step.frontier:
                return complete if max(range_begin, 1) <= complete < last else last
            end = segment.first
            if end <= range_begin:
                break
        return max(range_begin, file_begin(step.frontier - 1, self._identity.log_file_bytes))

    def _window(self, step: Step, ledger: Ledger, range_begin: int) -> Window:
        """The stored part of the window that the frontier lies in, where it is stored in whole pieces."""
        begin = step.frontier - step.frontier % self._window_size
        if begin == step.frontier or begin < range_begin:
            return Window()
        cover = ledger.cover([(step.branch, 0, None)], begin, step.frontier)
        pieces = [one.segment for one in cover.extents]
        whole = all((one.first, one.last) == (one.segment.first, one.segment.last) for one in cover.extents)
        if not whole:
            return Window()
        return Window(
            begin,
            [self._archive.read_log(piece) for piece in pieces],
            [self._archive.log_index(piece) for piece in pieces],
        )
