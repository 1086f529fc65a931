"""
Continuous capture of a source's log: a state machine that never skips log in silence.

Rules, each with what its breach would cost:
- The source's identity is checked at each connect; else a foreign log would be mixed into the history.
- Capture goes on at the oldest log that is missing in the repository, never at "now"; else a hole would open
  at each reconnect. What was stored before the frontier is asked for again and compared.
- A parent branch is completed before its child is begun; a branch's history is stored before its first log.
- A branch's first record is compared before any log of it is stored; else two servers that were promoted to
  the same branch number would be mixed.
- Log that the server has removed is recorded as a hole, with its cause, and alarmed.
- Log is acknowledged only when its object is durable.
Everything is planned anew from the repository's own listing at each connect: there is no other state.
"""

from __future__ import annotations

import logging
import threading
from contextlib import closing
from dataclasses import replace

from cloudsave.clock import Clock
from cloudsave.engines.api import LogSource
from cloudsave.engines.dialect_api import Dialect
from cloudsave.errors import (
    CaptureRunning,
    CloudsaveError,
    EngineUnavailable,
    ForeignSystem,
    LogRemoved,
    SlotLost,
    StoreError,
    StoreFull,
)
from cloudsave.logs.branches import Branches
from cloudsave.logs.ledger import (
    Step,
    check_server_reaches,
    file_begin,
    next_step,
    younger_branches,
)
from cloudsave.logs.resume import Resume, Resumer
from cloudsave.logs.status import CaptureOptions, CaptureState, CaptureStatus, LagMeter, Observer
from cloudsave.logs.writer import LogArchive, LogWriter, window_bytes
from cloudsave.model.engine_facts import BranchEnd, LogChunk, LogHead
from cloudsave.model.history import Ancestry
from cloudsave.model.ledger import Ledger
from cloudsave.model.log import LogHole
from cloudsave.model.position import Position

BACKOFF_SECONDS_FIRST = 0.5
BACKOFF_SECONDS_MAX = 30.0
"""Limit: the longest pause between two connects."""
PROBE_CHUNKS_MAX = 25
"""Limit: signs of life without log after which the server is taken to have the log that was asked for."""
REPORT_SECONDS = 0.5
"""How often the observer hears that nothing has changed."""
_BEHIND_BYTES = 64 << 20
"""More log than this behind the server is called being behind."""

_log = logging.getLogger("cloudsave.logs.capture")


def run_capture(
    source: LogSource,
    lineage: LogArchive,
    dialect: Dialect,
    options: CaptureOptions,
    *,
    stop: threading.Event,
    clock: Clock,
    observer: Observer,
) -> None:
    """
    Capture until `stop` is set; then store what is at hand and return.

    Trouble that may pass (the server or the store is away) is waited out with growing pauses. What a person
    must decide is raised. Raises: ForeignSystem, LogConflict, IntegrityError, CaptureRunning,
    PermissionMissing, StoreError that is not retryable.
    """
    Capture(source, lineage, dialect, options, clock=clock, observer=observer).run(stop)


class Capture:
    """One run of capture. `run` belongs to one thread."""

    def __init__(
        self,
        source: LogSource,
        lineage: LogArchive,
        dialect: Dialect,
        options: CaptureOptions,
        *,
        clock: Clock,
        observer: Observer,
    ) -> None:
        self._source = source
        self._archive = lineage
        self._dialect = dialect
        self._options = options
        self._clock = clock
        self._observer = observer
        self._stop = threading.Event()
        self._connected_once = False
        self._started_at = clock.monotonic()
        self._reported_at = 0.0
        self._meter = LagMeter(self._started_at)
        self._lock = threading.Lock()
        self._observing = threading.Lock()
        self._status = CaptureStatus(
            CaptureState.CONNECTING,
            branch="",
            received=0,
            durable=0,
            server_end=0,
            seconds_behind=0.0,
            rpo_breached=False,
            objects=0,
            bytes_stored=0,
            holes=0,
        )

    def run(self, stop: threading.Event) -> None:
        """See `run_capture`."""
        self._stop = stop
        failures = 0
        try:
            while not stop.is_set():
                stored = self._status.bytes_stored
                try:
                    self._session()
                    failures = 0
                except CloudsaveError as error:
                    self._judge(error)
                    failures = 0 if self._status.bytes_stored > stored else failures + 1
                self._source.close()
                if not stop.is_set():
                    self._pause(failures)
        finally:
            self._source.close()
        self._report(CaptureState.STOPPED)

    def _judge(self, error: CloudsaveError) -> None:
        """Return when the run should go on after `error`; else raise it."""
        if isinstance(error, SlotLost):
            self._alarm(f"{error.message}; a new slot is made")
            self._source.replace_slot()
            return
        if isinstance(error, CaptureRunning):
            patient = self._clock.monotonic() - self._started_at < self._options.running_patience_seconds
            if not (self._connected_once or patient):
                raise error
        elif not (error.retryable or isinstance(error, StoreFull)):
            raise error
        state = CaptureState.STALLED if isinstance(error, StoreError) else CaptureState.CONNECTING
        _log.warning("capture is interrupted: %s (%s)", error.message, error.detail)
        self._report(state, last_error=error.message)

    def _pause(self, failures: int) -> None:
        """Exponential back-off with jitter; ends early when stopped."""
        longest = min(BACKOFF_SECONDS_MAX, BACKOFF_SECONDS_FIRST * 2 ** min(failures, 10))
        jitter = 0.5 + self._clock.random_bytes(1)[0] / 512
        until = self._clock.monotonic() + longest * jitter
        while not self._stop.is_set() and (left := until - self._clock.monotonic()) > 0:
            self._clock.sleep(min(0.2, left))
            self._report_if_due()

    # ---- one connection

    def _session(self) -> None:
        """Connect and stream step by step until stopped. Raises what ended it."""
        self._report(CaptureState.CONNECTING)
        head = self._source.connect()
        self._connected_once = True
        if head.identity.lineage != self._archive.id:
            raise ForeignSystem(
                "server is not the one that this log belongs to",
                detail=f"It is {head.identity.lineage}; the log is of {self._archive.id}.",
                hints=["does the URL lead to another cluster than before?"],
            )
        if head.slot_created:
            _log.warning("a replication slot was created for %s", self._archive.id)
        branches = Branches(self._source, self._archive, self._dialect)
        new_server = head.slot_created and self._options.salvage
        previous: Step | None = None
        while not self._stop.is_set():
            ancestry = branches.ancestry(head.current.branch)
            self._alarm_of_younger(ancestry, head.current.branch)
            step = self._plan(head, ancestry)
            branches.confirm_origins(head, ancestry, self._ledger, new_server=new_server)
            if step == previous:
                raise EngineUnavailable(
                    "could not get further with the log",
                    detail=f"Branch {step.branch} did not advance from {step.frontier:#x}.",
                )
            previous = step
            head = self._run_step(head, step)

    def _alarm_of_younger(self, ancestry: Ancestry, branch: str) -> None:
        younger = younger_branches(ancestry, branch)
        if younger and self._status.branch != branch:
            self._alarm(
                f"the server is on branch {branch}, but the repository knows younger history"
                f" ({', '.join(younger)}): is this server a demoted one, or was a copy promoted?"
            )

    def _plan(self, head: LogHead, ancestry: Ancestry) -> Step:
        self._ledger = Ledger(self._archive.logs())
        step = next_step(
            self._ledger,
            self._archive.holes(),
            ancestry.lineage_of(head.current.branch),
            fresh=head.current.offset if head.slot_offset is None else head.slot_offset,
            log_file_bytes=head.identity.log_file_bytes,
        )
        check_server_reaches(step, head.current, replica=head.identity.role == "replica")
        return step

    def _run_step(self, head: LogHead, step: Step) -> LogHead:
        """Stream one step; the head as it is known afterwards."""
        resumer = Resumer(
            self._archive,
            self._dialect,
            head.identity,
            window_size=window_bytes(head.identity.log_file_bytes, self._options),
        )
        try:
            try:
                return self._stream(head, step, resumer.prepare(step, self._ledger))
            except LogRemoved:
                if not step.resumed:
                    raise
            # Only the log before the frontier may be gone: that is durable.
            return self._stream(head, step, resumer.prepare(step, self._ledger, available=step.frontier))
        except LogRemoved as error:
            self._record_hole(head, step, error)
            return head

    def _stream(self, head: LogHead, step: Step, resume: Resume) -> LogHead:
        """Receive, write and acknowledge; returns at the end of the step, of the branch, or when stopped."""
        writer = LogWriter(
            self._archive,
            resume.start,
            window_size=window_bytes(head.identity.log_file_bytes, self._options),
            options=self._options,
            durable=lambda end, size: self._made_durable(Position(step.branch, end), size),
        )
        self._meter.restart()
        frontier = resume.start.offset
        if self._options.synchronous:
            # Commits may wait for log that an earlier run stored and was killed before it could say so.
            self._source.acknowledge(Position(step.branch, frontier))
        state = CaptureState.HOLE if self._status.state == CaptureState.HOLE else CaptureState.STREAMING
        self._report(state, branch=step.branch, received=frontier, durable=frontier)
        ended: BranchEnd | None = None
        try:
            with closing(self._source.stream(Position(step.branch, resume.stream_from))) as events:
                for event in events:
                    if isinstance(event, BranchEnd):
                        ended = event
                        break
                    self._receive(writer, resume, event)
                    if self._stop.is_set() or (step.end is not None and writer.end >= step.end):
                        break
                # Stored before the stream is left, so that the acknowledgement still reaches the server.
                writer.finish()
        except BaseException:
            writer.abort()
            raise
        self._report(self._status.state)
        if ended is None:
            return head
        _log.warning("branch %s ended at %#x, next is %s", ended.branch, ended.end_offset, ended.next_branch)
        return replace(head, current=Position(ended.next_branch, ended.end_offset))

    def _receive(self, writer: LogWriter, resume: Resume, chunk: LogChunk) -> None:
        now = self._clock.monotonic()
        if chunk.data:
            data = resume.overlap.strip(chunk.offset, chunk.data)
            if data:
                if (begin := chunk.offset + len(chunk.data) - len(data)) > writer.end:
                    resume.check_skip(writer.end, begin)
                    writer.skip_to(begin)
                writer.append(data, now)
        writer.note_complete(chunk.complete_until_us)
        writer.cut_if_due(now)
        with self._lock:
            if chunk.server_end:
                self._meter.server_is_at(chunk.server_end, now)
                self._meter.durable_is_at(self._status.durable)
            self._status = replace(
                self._status,
                received=writer.end,
                server_end=max(chunk.server_end, self._status.server_end),
            )
        while not writer.wait_for_room(REPORT_SECONDS):
            self._report(CaptureState.STALLED, last_error="the store takes log slower than it comes")
            if self._stop.is_set():
                return
        self._report_if_due()

    def _made_durable(self, position: Position, size_bytes: int) -> None:
        """Called by the putting thread, after the put."""
        with self._lock:
            self._meter.durable_is_at(position.offset)
            self._status = replace(
                self._status,
                durable=position.offset,
                objects=self._status.objects + 1,
                bytes_stored=self._status.bytes_stored + size_bytes,
            )
        self._tell()
        self._source.acknowledge(position)

    # ---- lost log

    def _record_hole(self, head: LogHead, step: Step, error: LogRemoved) -> None:
        """The server removed log from the step's frontier on: record what is lost, and say so."""
        size = head.identity.log_file_bytes
        first = step.frontier
        held = head.slot_offset if head.slot_offset is not None else head.current.offset
        limit = file_begin(held if step.end is None else step.end, size)
        if step.end is not None and limit <= first:
            limit = step.end
        last = self._oldest_available(step.branch, first, limit, size) if self._options.salvage else limit
        if last <= first:
            raise EngineUnavailable(
                "could not find out which log the server still has", detail=error.detail
            ) from error
        self._archive.put_hole(LogHole(step.branch, first, last, f"{error.message}: {error.detail}"))
        with self._lock:
            self._status = replace(self._status, holes=self._status.holes + 1)
        self._alarm(
            f"log of branch {step.branch} from {first:#x} to {last:#x} is lost for good: the server removed"
            " it before it was captured; take a base backup"
        )
        self._report(CaptureState.HOLE)

    def _oldest_available(self, branch: str, first: int, limit: int, size: int) -> int:
        """The begin of the oldest log file after `first` that the server still has; `limit` if none."""
        low = file_begin(first, size) // size
        high = -(-limit // size)
        while high - low > 1:
            middle = (low + high) // 2
            if self._has(Position(branch, middle * size)):
                high = middle
            else:
                low = middle
        return min(high * size, limit)

    def _has(self, position: Position) -> bool:
        try:
            with closing(self._source.stream(position)) as events:
                for number, event in enumerate(events):
                    if isinstance(event, BranchEnd) or event.data or number >= PROBE_CHUNKS_MAX:
                        return True
        except LogRemoved:
            return False
        return True

    # ---- being seen

    def _alarm(self, text: str) -> None:
        _log.error("%s", text)
        with self._lock:
            self._status = replace(self._status, alarm=text)
        self._report(self._status.state)

    def _report_if_due(self) -> None:
        if self._clock.monotonic() - self._reported_at >= REPORT_SECONDS:
            self._report(self._status.state)

    def _report(self, state: CaptureState, **changes: str | int) -> None:
        """Tell the observer; `changes` are fields of the status."""
        now = self._clock.monotonic()
        self._reported_at = now
        with self._lock:
            lag = self._meter.seconds_behind(now)
            breached = lag > self._options.lag_alarm_seconds
            status = replace(self._status, **changes)  # type: ignore[arg-type]
            if state in (CaptureState.STREAMING, CaptureState.BEHIND, CaptureState.HOLE):
                late = breached or status.bytes_behind > _BEHIND_BYTES
                caught_up = status.server_end > 0 and status.bytes_behind == 0
                if state != CaptureState.HOLE or caught_up:
                    state = CaptureState.BEHIND if late else CaptureState.STREAMING
            self._status = replace(status, state=state, seconds_behind=lag, rpo_breached=breached)
        self._tell()

    def _tell(self) -> None:
        with self._observing:
            self._observer(self._status)
