"""
Watches a running capture from outside of its threads, so that one which hangs is alarmed too.

One thread talks to the source and the repository and may block; the other judges, once a second, and never
waits for anything. A silent archiver is alarmed `ALARM_SECONDS` after the first commit that it missed, at the
latest one canary later.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from cloudsave.clock import Clock
from cloudsave.engines.watch_api import SourceWatch
from cloudsave.errors import CloudsaveError
from cloudsave.logs.canary import CanaryMeter
from cloudsave.logs.status import CaptureStatus

LOOK_SECONDS = 1.0
ALARM_SECONDS = 30.0
"""Age of the oldest commit that is not durable, from which on it is an alarm; or twice the objective."""
FACTS_SECONDS = 60.0
"""How often slow facts are asked for."""

_log = logging.getLogger("cloudsave.logs.watch")


@dataclass(frozen=True, slots=True)
class Facts:
    """What takes a request to know; None: not known."""

    retained_bytes: int | None = None
    """Log that the source keeps for capture."""
    backup_at: float | None = None
    """When the newest base backup was finished, in seconds since 1970."""
    free_bytes: int | None = None
    """Room for the repository."""
    verified_at: float | None = None
    """When all that is stored was last found sound, in seconds since 1970."""
    unsound: bool | None = None
    """Whether the last verification found something wrong; None: there was none."""


@dataclass(frozen=True, slots=True)
class Sight:
    """What is seen at one moment."""

    status: CaptureStatus | None
    rpo_seconds: float | None
    """Measured by a canary; None: there was none yet."""
    alarm: str
    """What is wrong, in a sentence without numbers that change; empty: nothing."""
    facts: Facts = field(default_factory=Facts)

    @property
    def events(self) -> tuple[str, str]:
        """What a person is to be told of when it changes: the alarm, and what capture itself has seen."""
        return self.alarm, self.status.alarm if self.status else ""


@dataclass(frozen=True, slots=True)
class WatchOptions:
    """How to watch."""

    slot: str
    canary_seconds: float
    """Between two canaries; 0: none."""
    rpo_seconds: float

    @property
    def alarm_seconds(self) -> float:
        """From which age on it is an alarm."""
        return max(ALARM_SECONDS, 2 * self.rpo_seconds)


class Watcher:
    """
    Order: begin, `observe` as capture's observer, then stop. `look` gets each second's sight.

    Args:
        look: Called by one thread, once a second; must not block.
        facts: The slow facts but for the source's; called by the thread that may block.
    """

    def __init__(
        self,
        source: SourceWatch,
        options: WatchOptions,
        *,
        look: Callable[[Sight], None],
        facts: Callable[[], Facts],
        clock: Clock,
    ) -> None:
        self._source = source
        self._options = options
        self._look = look
        self._ask = facts
        self._clock = clock
        self._lock = threading.Lock()
        self._meter = CanaryMeter()
        self._status: CaptureStatus | None = None
        self._heard_at = clock.monotonic()
        self._answered_at = clock.monotonic()
        self._trouble = ""
        self._facts = Facts()
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=work, name=name, daemon=True)
            for name, work in (("watch-ask", self._asking), ("watch-judge", self._judging))
        ]

    def begin(self) -> None:
        """Start both threads."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End. A question that blocks is left behind. Never raises."""
        self._stop.set()
        self._threads[1].join()

    def observe(self, status: CaptureStatus) -> None:
        """Capture's word."""
        now = self._clock.monotonic()
        with self._lock:
            self._status, self._heard_at = status, now
            if status.branch:
                self._meter.durable(status.branch, status.durable, now)

    def sight(self) -> Sight:
        """What is seen now."""
        now = self._clock.monotonic()
        with self._lock:
            rpo = self._meter.rpo_seconds(now)
            return Sight(self._status, rpo, self._alarm(rpo, now), self._facts)

    def _alarm(self, rpo_seconds: float | None, now: float) -> str:
        limit, status = self._options.alarm_seconds, self._status
        if rpo_seconds is not None and rpo_seconds > limit:
            return f"commits are not durable after more than {limit:.0f} s: is the archiver silent?"
        if now - self._heard_at > limit:
            return f"capture has said nothing for more than {limit:.0f} s"
        if self._options.canary_seconds and now - self._answered_at > limit + self._options.canary_seconds:
            reason = f": {self._trouble}" if self._trouble else ""
            return f"the source does not answer the watch{reason}"
        if status is not None and status.seconds_behind > limit:
            return f"log is not known to be durable after more than {limit:.0f} s"
        return ""

    # ---- threads

    def _judging(self) -> None:
        while not self._stop.is_set():
            try:
                self._look(self.sight())
            except Exception:  # noqa: BLE001 - the watch must outlive whatever it tells
                _log.exception("what was seen could not be told")
            self._stop.wait(LOOK_SECONDS)

    def _asking(self) -> None:
        facts_at = -FACTS_SECONDS
        every = self._options.canary_seconds or FACTS_SECONDS
        while not self._stop.is_set():
            try:
                self._beat()
                # The slot is made by the capture that has just begun.
                unknown = self._facts.retained_bytes is None
                if unknown or self._clock.monotonic() - facts_at >= FACTS_SECONDS:
                    facts_at = self._clock.monotonic()
                    self._learn()
                self._trouble = ""
            except CloudsaveError as error:
                self._trouble = error.message
                _log.warning("the watch could not ask: %s", error.message)
            self._stop.wait(every)
        self._source.close()

    def _beat(self) -> None:
        if not self._options.canary_seconds:
            return
        begun = self._clock.monotonic()
        offset = self._source.beat()
        with self._lock:
            self._answered_at = self._clock.monotonic()
            if offset is not None:
                self._meter.committed(offset, begun)

    def _learn(self) -> None:
        retained = self._source.retained_bytes(self._options.slot)
        others = self._ask()
        with self._lock:
            self._facts = replace(others, retained_bytes=retained)
