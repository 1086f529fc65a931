"""
From a stream of log bytes to durable log objects: cut, index, put, acknowledge.

Receiving goes on while one thread indexes, seals and puts. Invariant: log is acknowledged only after its
object's put has returned; else the server could recycle log that a crash of ours would lose.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from cloudsave.engines.dialect_api import LogIndexer
from cloudsave.logs.status import CaptureOptions
from cloudsave.model.changes import LogChanges, sorted_changes
from cloudsave.model.log import Commits, LogHole, LogIndex, LogSegment
from cloudsave.model.position import Position


class LogArchive(Protocol):
    """What capture needs of a lineage in the repository (`repository.lineage.Lineage`)."""

    id: str

    def put_log(self, segment: LogSegment, parts: Sequence[bytes], index: LogIndex) -> None:
        """Store a stretch of log; durable when it returns. Raises: LogConflict, StoreError."""

    def logs(self) -> list[LogSegment]:
        """All stored stretches."""

    def log_index(self, segment: LogSegment) -> LogIndex:
        """What a stored stretch contains."""

    def read_log(self, segment: LogSegment) -> bytes:
        """The bytes of a stored stretch."""

    def put_history(self, branch: str, content: bytes) -> None:
        """Store a branch's raw history file. Raises: LogConflict."""

    def histories(self) -> dict[str, bytes]:
        """Raw history files by branch."""

    def claim_origin(self, begin: Position, origin: bytes) -> None:
        """Record with which bytes a branch began. Raises: LogConflict where it began with others."""

    def put_hole(self, hole: LogHole) -> None:
        """Record lost log."""

    def holes(self) -> list[LogHole]:
        """Recorded holes."""


@dataclass(frozen=True, slots=True)
class _Job:
    """One object to be made."""

    first: int
    last: int
    parts: tuple[bytes, ...]
    complete_until_us: int
    padding_bytes: int = 0

    @property
    def size_bytes(self) -> int:
        return self.last - self.first - self.padding_bytes


@dataclass(slots=True)
class Window:
    """
    The stretch between two multiples of the object size that is being filled: its pieces so far, for one
    object of the whole when it was stored in several. `begin` is None when the first bytes are not at hand.
    """

    begin: int | None = None
    parts: list[bytes] | None = None
    indexes: list[LogIndex] | None = None


@dataclass(frozen=True, slots=True)
class WriterStart:
    """Where writing begins. `indexer` is ready for the byte at `offset`; `window` holds what is before it."""

    branch: str
    offset: int
    indexer: LogIndexer
    window: Window


def segment_of(branch: str, first: int, last: int, index: LogIndex) -> LogSegment:
    """The segment of a stretch with the earliest and the latest instant of its commits."""
    if not index.commits:
        return LogSegment(branch, first, last)
    instants = index.commits.instants
    return LogSegment(branch, first, last, int(instants.min()), int(instants.max()))


def merged_index(indexes: Sequence[LogIndex]) -> LogIndex:
    """The index of adjacent stretches taken as one."""
    firsts = [one.record_first for one in indexes if one.record_first is not None]
    lasts = [one.record_last for one in indexes if one.record_last is not None]
    return LogIndex(
        commits=Commits.joined([one.commits for one in indexes]),
        restore_points=tuple(point for one in indexes for point in one.restore_points),
        record_first=firsts[0] if firsts else None,
        record_last=lasts[-1] if lasts else None,
        records_end=max(one.records_end for one in indexes),
        complete_until_us=indexes[-1].complete_until_us,
        changes=_merged_changes(indexes),
        padding_bytes=indexes[-1].padding_bytes,
    )


def _merged_changes(indexes: Sequence[LogIndex]) -> LogChanges | None:
    """None where some were not noted, or a record that crosses from one stretch to the next was not seen."""
    parts = [one.changes for one in indexes if one.changes is not None]
    if len(parts) < len(indexes):
        return None
    if any(after.seen_from > before.records_end for before, after in zip(indexes, parts[1:], strict=False)):
        return None
    return LogChanges(parts[0].seen_from, sorted_changes(np.concatenate([part.rows for part in parts])))


def window_bytes(log_file_bytes: int, options: CaptureOptions) -> int:
    """
    Objects end at multiples of this: a power of two, so that none crosses the end of a log file, whose size
    is one too.
    """
    limit = min(log_file_bytes, options.object_bytes_max)
    return 1 << (limit.bit_length() - 1)


class LogWriter:
    """
    Writes the log of one branch from `start` on. One thread appends; an own thread indexes and puts.

    `durable(end, bytes)` is called by the own thread after each put.
    """

    def __init__(
        self,
        archive: LogArchive,
        start: WriterStart,
        *,
        window_size: int,
        options: CaptureOptions,
        durable: Callable[[int, int], None],
    ) -> None:
        self.end = start.offset
        """End of the log that was appended."""
        self._archive = archive
        self._indexer = start.indexer
        self._branch = start.branch
        self._window = start.window
        self._window_size = window_size
        self._options = options
        self._durable = durable
        self._first = start.offset
        self._parts: list[bytes] = []
        self._first_at = 0.0
        self._complete_until_us = 0
        self._state = threading.Condition()
        self._jobs: deque[_Job] = deque()
        self._queued_bytes = 0
        self._closing = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="log-put", daemon=True)
        self._thread.start()

    # ---- receiving side

    def append(self, data: bytes, now: float) -> None:
        """Take bytes that follow the last ones; `now` is monotonic."""
        view = memoryview(data)
        while view:
            room = self._window_size - self.end % self._window_size
            piece = view[:room]
            if not self._parts:
                self._first_at = now
            self._parts.append(data if len(piece) == len(data) else bytes(piece))
            self.end += len(piece)
            view = view[len(piece) :]
            if self.end % self._window_size == 0:
                self.cut()

    def skip_to(self, offset: int) -> None:
        """Nothing stands before `offset` any more: the log file ended before it was full."""
        missing_bytes = offset - self.end
        self.end = offset
        self._hand_over(missing_bytes)

    def note_complete(self, instant_us: int) -> None:
        """Every commit acknowledged before the instant (0: unknown) is in what was appended so far."""
        self._complete_until_us = instant_us or self._complete_until_us

    def cut_if_due(self, now: float) -> None:
        """
        Cut an object when its first byte is old enough; where somebody waits for every byte, as soon as none
        waits to be stored, so that all that comes meanwhile is stored together.
        """
        waited_for = self._options.synchronous and not self._jobs
        if self._parts and (waited_for or now - self._first_at >= self._options.object_age_seconds):
            self.cut()

    def cut(self) -> None:
        """Hand what is at hand to the putting thread."""
        if not self._parts:
            return
        self._hand_over()

    def _hand_over(self, padding_bytes: int = 0) -> None:
        job = _Job(self._first, self.end, tuple(self._parts), self._complete_until_us, padding_bytes)
        self._first, self._parts = self.end, []
        with self._state:
            self._jobs.append(job)
            self._queued_bytes += job.size_bytes
            self._state.notify_all()

    def wait_for_room(self, seconds: float) -> bool:
        """Wait while too much is queued; False when there still is no room. Raises what the put raised."""
        with self._state:
            self._state.wait_for(
                lambda: self._error is not None or self._queued_bytes < self._options.queue_bytes_max, seconds
            )
            self._raise_error()
            return self._queued_bytes < self._options.queue_bytes_max

    def finish(self) -> None:
        """Store all that was appended and end the thread. Raises what a put raised."""
        self.cut()
        with self._state:
            self._closing = True
            self._state.notify_all()
        self._thread.join()
        with self._state:
            self._raise_error()

    def abort(self) -> None:
        """Drop what is queued and end the thread; a put that runs is waited for."""
        with self._state:
            self._jobs.clear()
            self._closing = True
            self._state.notify_all()
        self._thread.join()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    # ---- putting side

    def _work(self) -> None:
        try:
            while (job := self._next_job()) is not None:
                self._store(job)
                with self._state:
                    self._queued_bytes -= job.size_bytes
                    self._state.notify_all()
        except BaseException as error:  # noqa: BLE001 - handed to the receiving thread, which raises it
            with self._state:
                self._error = error
                self._jobs.clear()
                self._state.notify_all()

    def _next_job(self) -> _Job | None:
        with self._state:
            self._state.wait_for(lambda: self._jobs or self._closing)
            return self._jobs.popleft() if self._jobs else None

    def _store(self, job: _Job) -> None:
        for part in job.parts:
            self._indexer.feed(part)
        taken = self._indexer.take()
        index = replace(taken, complete_until_us=job.complete_until_us, padding_bytes=job.padding_bytes)
        self._archive.put_log(segment_of(self._branch, job.first, job.last, index), job.parts, index)
        self._durable(job.last, job.size_bytes)
        self._fill_window(job, index)

    def _fill_window(self, job: _Job, index: LogIndex) -> None:
        """When a whole window was stored in pieces, store it once more as one, for restores and listings."""
        window = self._window
        if job.first % self._window_size == 0:
            window.begin, window.parts, window.indexes = job.first, [], []
        if window.begin is None or window.parts is None or window.indexes is None:
            return
        window.parts.extend(job.parts)
        window.indexes.append(index)
        if job.last % self._window_size:
            return
        if len(window.indexes) > 1:
            whole = merged_index(window.indexes)
            segment = segment_of(self._branch, window.begin, job.last, whole)
            self._archive.put_log(segment, window.parts, whole)
        window.begin, window.parts, window.indexes = None, None, None
