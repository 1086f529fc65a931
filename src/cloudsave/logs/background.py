"""
Capture beside other work: the log that makes a base backup consistent is captured while the backup runs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

from cloudsave.clock import Clock
from cloudsave.engines.api import LogSource
from cloudsave.engines.dialect_api import Dialect
from cloudsave.errors import BackupLogLost, BackupNotCovered
from cloudsave.logs.capture import run_capture
from cloudsave.logs.ledger import lost_within, unrecorded_gaps
from cloudsave.logs.status import CaptureOptions, CaptureState, CaptureStatus, Observer
from cloudsave.logs.tail import store_tail
from cloudsave.logs.writer import LogArchive
from cloudsave.model.engine_facts import LogAtHand, SlotState
from cloudsave.model.ledger import Ledger
from cloudsave.model.position import Position

ONE_OFF = CaptureOptions(salvage=False, running_patience_seconds=0.0)
"""For capture inside a base backup: log that was lost before it is recorded as such, not looked for."""
_START_SECONDS_MAX = 60.0
"""Limit: capture streams within this after it was started."""
COVER_SECONDS_MAX = 900.0
"""Limit: the log of a base backup is durable within this after its end."""
_LOOK_SECONDS = 1.0
"""A wait looks again after so long even when nothing was heard: the clock may have reached its deadline."""
LISTING_POLL_SECONDS = 1.0
"""How often the repository is asked whether another capture has got there: each time is a listing."""


def _ignore(_: CaptureStatus) -> None:
    """Nobody watches."""


class BackgroundCapture:
    """
    Capture in a thread of its own. Order: start (or begin), then await_durable at any time, then stop. As a
    context it starts on entry and stops on exit.
    """

    def __init__(
        self,
        source: LogSource,
        lineage: LogArchive,
        dialect: Dialect,
        options: CaptureOptions = ONE_OFF,
        *,
        clock: Clock,
        observer: Observer = _ignore,
    ) -> None:
        self._source = source
        self._lineage = lineage
        self._clock = clock
        self._observer = observer
        self._stop = threading.Event()
        self._news = threading.Event()
        self._status: CaptureStatus | None = None
        self._error: BaseException | None = None
        # Not `Thread.join`: interrupted by a signal, it takes a running thread for ended (CPython 3.11).
        self._done = threading.Event()
        self._done.set()
        self._run: Callable[[], None] = lambda: run_capture(
            source, lineage, dialect, options, stop=self._stop, clock=clock, observer=self._observe
        )
        self._thread = threading.Thread(target=self._work, name="log-capture", daemon=True)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave()
        if error is None:
            self._raise_error()

    def start(self) -> None:
        """
        Start, and return when log is being streamed: from then on the slot holds all log that follows.

        Raises: what ended capture, such as CaptureRunning; BackupNotCovered when it takes too long.
        """
        self.begin()
        streaming = (CaptureState.STREAMING, CaptureState.BEHIND, CaptureState.HOLE)
        self._await(
            lambda: self._status is not None and self._status.state in streaming,
            timeout_seconds=_START_SECONDS_MAX,
            what="capture of the log did not start",
        )

    def begin(self) -> None:
        """Start without waiting for anything."""
        self._done.clear()
        self._thread.start()

    def ended(self, *, wait_seconds: float) -> bool:
        """Whether capture has ended by itself, within a wait. Raises: what ended it."""
        done = self._done.wait(wait_seconds)
        self._raise_error()
        return done

    def await_durable(self, position: Position, *, timeout_seconds: float) -> None:
        """
        Return when all log before `position` is durable.

        Raises: BackupNotCovered, BackupLogLost where it never will be, what ended capture.
        """
        self._await(
            lambda: self._reached(position),
            timeout_seconds=timeout_seconds,
            what=f"log of branch {position.branch} up to {position.offset:#x} is not durable",
        )

    def stop(self) -> None:
        """Store what is at hand and end. Raises: what ended capture."""
        self.leave()
        self._raise_error()

    def leave(self) -> None:
        """Store what is at hand and end. Never raises."""
        self._stop.set()
        status = self._status
        if status is not None and status.branch:
            # Says nothing new; it wakes a stream that waits for log.
            self._source.acknowledge(Position(status.branch, status.durable))
        self._done.wait()

    def _reached(self, position: Position) -> bool:
        status = self._status
        if status is None:
            return False
        if status.branch == position.branch:
            return status.durable >= position.offset
        if durable_up_to(self._lineage, position):
            return True
        _refuse_lost(self._lineage, Position(position.branch, position.offset - 1), position.offset)
        return False

    def _await(self, condition: Callable[[], bool], *, timeout_seconds: float, what: str) -> None:
        deadline = self._clock.monotonic() + timeout_seconds
        while True:
            self._news.clear()
            if condition():
                return
            self._raise_error()
            if self._clock.monotonic() > deadline:
                last = self._status.last_error if self._status else ""
                raise BackupNotCovered(
                    f"could not capture the log that the backup needs: {what}",
                    detail=f"Waited {timeout_seconds:.0f} s. {last}".strip(),
                )
            self._news.wait(_LOOK_SECONDS)

    def _observe(self, status: CaptureStatus) -> None:
        self._status = status
        self._news.set()
        self._observer(status)

    def _work(self) -> None:
        try:
            self._run()
        except BaseException as error:  # noqa: BLE001 - raised by the thread that waits
            self._error = error
        finally:
            self._done.set()
            self._news.set()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error


def capture_until(
    source: LogSource,
    lineage: LogArchive,
    dialect: Dialect,
    position: Position,
    *,
    clock: Clock,
    timeout_seconds: float,
) -> None:
    """
    Capture until all log before `position` is durable. Raises: BackupNotCovered, what ended capture.
    """
    with BackgroundCapture(source, lineage, dialect, clock=clock) as capture:
        capture.await_durable(position, timeout_seconds=timeout_seconds)


def durable_up_to(lineage: LogArchive, position: Position) -> bool:
    """Whether the byte before `position` is durable on its branch, from a listing of the repository."""
    ledger = Ledger(lineage.logs())
    return ledger.frontier(position.branch, position.offset - 1) >= position.offset


def await_durable(
    lineage: LogArchive, start: Position, stop: Position, *, clock: Clock, timeout_seconds: float
) -> None:
    """
    Wait until all log of [start, stop) is in the repository, whoever captures it.

    Raises: BackupNotCovered; BackupLogLost at once where some of it is recorded as lost.
    """
    deadline = clock.monotonic() + timeout_seconds
    while True:
        reached = Ledger(lineage.logs()).frontier(start.branch, start.offset)
        if start.branch == stop.branch and reached >= stop.offset:
            return
        _refuse_lost(lineage, start, stop.offset)
        if clock.monotonic() > deadline:
            raise BackupNotCovered(
                "could not see the log that the backup needs in the repository",
                detail=f"Branch {start.branch} is durable from {start.offset:#x} to {reached:#x} only, after"
                f" {timeout_seconds:.0f} s; needed up to {stop.offset:#x} of branch {stop.branch}.",
                hints=["does `cloudsave logs capture` run for this source, and is it close behind?"],
            )
        clock.sleep(LISTING_POLL_SECONDS)


def _refuse_lost(lineage: LogArchive, start: Position, stop: int) -> None:
    """Raises: BackupLogLost where log of [start, stop) is recorded as lost, and not stored all the same."""
    hole = lost_within(Ledger(lineage.logs()), lineage.holes(), start, stop)
    if hole is not None:
        raise BackupLogLost(
            "cannot complete the backup: log that it needs is lost",
            detail=f"Branch {hole.branch} misses {hole.first:#x} to {hole.last:#x}: {hole.cause}.",
            hints=[
                "run the backup again: it begins after the hole",
                "does the server keep log for long enough (max_slot_wal_keep_size)?",
            ],
        )


class BackupLogCover:
    """
    Sees to the log of one base backup: relies on the capture that runs already, or runs one of its own.

    `slot_state` asks for the source's permanent slot: whoever is active there captures. `make_source` gives a
    log source through that slot, or where it is absent through a temporary one, so that nothing is left on
    the server.
    """

    def __init__(
        self,
        slot_state: Callable[[], SlotState],
        make_source: Callable[[SlotState], LogSource],
        lineage: LogArchive,
        dialect: Dialect,
        *,
        clock: Clock,
    ) -> None:
        self._slot_state = slot_state
        self._make_source = make_source
        self._lineage = lineage
        self._dialect = dialect
        self._clock = clock
        self._own: BackgroundCapture | None = None

    def begin(self) -> str:
        """Make sure that log from now on is captured; how, in a sentence."""
        state = self._slot_state()
        if state is SlotState.ACTIVE:
            return "the log is captured by the capture that runs already"
        source = self._make_source(state)
        self._own = BackgroundCapture(source, self._lineage, self._dialect, clock=self._clock)
        self._own.start()
        return "the log was captured for the time of the backup only"

    def fill(self, start: Position, stop: Position, at_hand: LogAtHand) -> bool:
        """Store what is missing of [start, stop) from the source's files; whether all is durable then."""
        return store_tail(self._lineage, self._dialect, at_hand, (start, stop), self._clock)

    def wait_until_durable(self, start: Position, stop: Position, at_hand: LogAtHand | None) -> None:
        """
        Return when all log of [start, stop) is in the repository; the source's own files help where they are
        `at_hand`. Raises: BackupNotCovered, BackupLogLost, what ended its own capture.
        """
        if self._own is not None:
            self._own.ended(wait_seconds=0.0)
        if at_hand is not None and self.fill(start, stop, at_hand) and not self._gap_left(start.branch):
            return
        if self._own is not None:
            self._own.await_durable(stop, timeout_seconds=COVER_SECONDS_MAX)
        await_durable(self._lineage, start, stop, clock=self._clock, timeout_seconds=COVER_SECONDS_MAX)

    def _gap_left(self, branch: str) -> bool:
        """
        Whether older log is missing that its own capture, which stores in order, will yet store or record as
        lost: nobody else would, before the next backup.
        """
        if self._own is None:
            return False
        ledger = Ledger(self._lineage.logs())
        return len(ledger.ranges(branch)) > 1 and bool(unrecorded_gaps(ledger, self._lineage.holes(), branch))

    def close(self) -> None:
        """Stop what `begin` started. Never raises."""
        own, self._own = self._own, None
        if own is not None:
            own.leave()
