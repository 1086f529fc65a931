"""
Reads everything that a base backup of a source would read, judges every page, and keeps nothing.

It is a base backup whose bytes go nowhere: the source is in backup mode meanwhile, so that a page that is
just being written is told from a damaged one by the same rule.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from cloudsave.clock import Clock
from cloudsave.engines.api import BackupSource
from cloudsave.errors import SourceUnreadable
from cloudsave.model.finding import Finding, Severity
from cloudsave.model.item import CorruptPage, Piece
from cloudsave.telemetry import Progress

READ_BYTES = 1 << 20
PIECES_PER_READER = 4
"""Limit: pieces that are being read or wait for a reader."""
PAGES_NAMED_MAX = 20
"""Limit: findings that name one page; the whole list is in `Scrubbed`."""
_SUBJECT = "pages"


@dataclass(frozen=True, slots=True)
class Scrubbed:
    """What reading all of a source has shown."""

    method: str
    """How it was read, as in a manifest."""
    files: int
    bytes_read: int
    seconds: float
    page_checksums: bool
    corrupt_pages: tuple[CorruptPage, ...]
    unreadable: tuple[str, ...]
    """Sentences about files that the operating system did not give."""
    notes: tuple[str, ...]


def scrub(
    source: BackupSource, *, page_checksums: bool, readers: int, clock: Clock, progress: Progress
) -> Scrubbed:
    """
    Read all of `source` with so many threads.

    Raises: what `source` raises, but for a file that cannot be read: that is a result.
    """
    begun_at = clock.monotonic()
    reading = _Reading(progress)
    try:
        begun = source.begin()
        progress.begin("check pages", bytes_total=begun.bytes_expected)
        reading.read_all(source, readers)
        stop = source.finish()
        progress.finish()
    finally:
        source.abort()
    return Scrubbed(
        method=begun.method,
        files=reading.files,
        bytes_read=reading.bytes_read,
        seconds=clock.monotonic() - begun_at,
        page_checksums=page_checksums,
        corrupt_pages=stop.corrupt_pages,
        unreadable=tuple(reading.unreadable),
        notes=begun.notes + stop.notes,
    )


def scrub_findings(result: Scrubbed) -> Iterator[Finding]:
    """What a scrub says about the source."""
    for sentence in result.unreadable:
        yield Finding(Severity.PROBLEM, _SUBJECT, sentence, "the server's disk or file system needs a look")
    pages = result.corrupt_pages
    for page in pages[:PAGES_NAMED_MAX]:
        yield Finding(Severity.PROBLEM, _SUBJECT, f"page {page.block} of {page.path}: {page.reason}")
    if pages:
        yield Finding(
            Severity.PROBLEM,
            _SUBJECT,
            f"{len(pages)} damaged pages in {len({page.path for page in pages})} files",
            "older backups may hold good copies: keep them; where is the damage from, disk or memory?",
        )
    judged = "checksum and header" if result.page_checksums else "header"
    if not (pages or result.unreadable):
        yield Finding(
            Severity.OK, _SUBJECT, f"all {result.files} files were read; every page's {judged} is right"
        )
    if not result.page_checksums:
        yield Finding(
            Severity.WARNING,
            _SUBJECT,
            "pages have no checksums: damage below their headers cannot be seen",
            "pg_checksums --enable gives them to a stopped server",
        )


class _Reading:
    """The readers and what they have found."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._buffers = threading.local()
        self._stopping = threading.Event()
        self.files = 0
        self.bytes_read = 0
        self.unreadable: list[str] = []

    def read_all(self, source: BackupSource, readers: int) -> None:
        """Every piece, once."""
        waiting: deque[Future[int]] = deque()
        with ThreadPoolExecutor(readers, thread_name_prefix="page-reader") as pool:
            try:
                for piece in source.pieces():
                    self.files += piece.offset == 0
                    waiting.append(pool.submit(self._read, piece))
                    if len(waiting) >= readers * PIECES_PER_READER:
                        self.bytes_read += waiting.popleft().result()
                while waiting:
                    self.bytes_read += waiting.popleft().result()
            finally:
                self._stopping.set()

    def _read(self, piece: Piece) -> int:
        try:
            return self._read_to_end(piece)
        finally:
            piece.close()

    def _read_to_end(self, piece: Piece) -> int:
        buffer = self._buffer()
        done = 0
        while done < piece.length and not self._stopping.is_set():
            want = min(len(buffer), piece.length - done)
            try:
                got = piece.read_into(buffer[:want], offset=done)
            except SourceUnreadable as error:
                self.unreadable.append(f"{error.message}: {error.detail}")
                break
            done += got
            self._progress.advance(got)
            if got < want:
                break
        return done

    def _buffer(self) -> memoryview:
        buffer: memoryview | None = getattr(self._buffers, "view", None)
        if buffer is None:
            buffer = self._buffers.view = memoryview(bytearray(READ_BYTES))
        return buffer
