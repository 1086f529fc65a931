"""Progress on stderr: a bar on a terminal, a line each 10 seconds in a pipe, JSON lines when asked for."""

from __future__ import annotations

import json
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, TextIO

from cloudsave.cli.formats import format_duration, format_rate, format_size
from cloudsave.clock import Clock
from cloudsave.config.redact import redact
from cloudsave.telemetry import NoProgress, Progress

if TYPE_CHECKING:
    from rich.progress import Progress as RichBar
    from rich.progress import TaskID

LINE_INTERVAL_SECONDS = 10.0
JSON_INTERVAL_SECONDS = 1.0
BAR_INTERVAL_SECONDS = 0.1


class _Phase:
    """How far a phase is. All numbers are of this phase alone."""

    def __init__(self, label: str, bytes_total: int | None, begun: float) -> None:
        self.label = label
        self.bytes_total = bytes_total
        self.bytes_done = 0
        self.begun = begun
        self.shown = begun

    def rate(self, now: float) -> float:
        return self.bytes_done / max(now - self.begun, 1e-3)

    def seconds_left(self, now: float) -> float | None:
        rate = self.rate(now)
        if self.bytes_total is None or rate <= 0:
            return None
        return max(self.bytes_total - self.bytes_done, 0) / rate


class PhasedProgress:
    """The common part: counts under a lock and shows now and then. A failing stderr stops no backup."""

    def __init__(self, stderr: TextIO, clock: Clock, *, interval_seconds: float) -> None:
        self._stderr = stderr
        self._clock = clock
        self._interval_seconds = interval_seconds
        self._lock = threading.RLock()
        self._phase: _Phase | None = None

    def begin(self, label: str, *, bytes_total: int | None) -> None:
        """A phase begins; one that was not finished ends."""
        with self._lock:
            self.finish()
            self._phase = _Phase(label, bytes_total, self._clock.monotonic())
            self._begin(self._phase)

    def advance(self, bytes_done: int) -> None:
        """Count, and show if the last time is long enough ago."""
        with self._lock:
            phase = self._phase
            if phase is None:
                return
            phase.bytes_done += bytes_done
            now = self._clock.monotonic()
            if now - phase.shown >= self._interval_seconds:
                phase.shown = now
                self._show(phase, now)

    def note(self, text: str) -> None:
        """A sentence at once."""
        with self._lock:
            self._note(redact(text))

    def finish(self) -> None:
        """Show the end of the phase, if there is one."""
        with self._lock:
            phase, self._phase = self._phase, None
            if phase is not None:
                self._end(phase, self._clock.monotonic())

    def abandon(self) -> None:
        """The command is over; a phase that is still open has failed, so nothing is said of its end."""
        with self._lock:
            self._phase = None
            self._clear()

    def _begin(self, phase: _Phase) -> None:
        """A phase has begun."""

    def _clear(self) -> None:
        """Take away what is shown for a while only."""

    def _show(self, phase: _Phase, now: float) -> None:
        """The phase has advanced."""

    def _end(self, phase: _Phase, now: float) -> None:
        """The phase is over."""
        self._write(
            f"{phase.label}: {format_size(phase.bytes_done)} in {format_duration(now - phase.begun)}, "
            f"{format_rate(phase.rate(now))}"
        )

    def _note(self, text: str) -> None:
        self._write(text)

    def _write(self, text: str) -> None:
        with suppress(OSError, ValueError):
            self._stderr.write(text + "\n")
            self._stderr.flush()


class LineProgress(PhasedProgress):
    """One line each 10 seconds, for logs and pipes."""

    def __init__(self, stderr: TextIO, clock: Clock) -> None:
        super().__init__(stderr, clock, interval_seconds=LINE_INTERVAL_SECONDS)

    def _show(self, phase: _Phase, now: float) -> None:
        of = "" if phase.bytes_total is None else f" of {format_size(phase.bytes_total)}"
        left = phase.seconds_left(now)
        about = "" if left is None else f", about {format_duration(left)} left"
        self._write(
            f"{phase.label}: {format_size(phase.bytes_done)}{of}, {format_rate(phase.rate(now))}{about}"
        )


class JsonProgress(PhasedProgress):
    """One JSON object per line, at most one each second and one at the end of each phase."""

    def __init__(self, stderr: TextIO, clock: Clock) -> None:
        super().__init__(stderr, clock, interval_seconds=JSON_INTERVAL_SECONDS)

    def _show(self, phase: _Phase, now: float, *, done: bool = False) -> None:
        left = phase.seconds_left(now)
        facts = {
            "label": phase.label,
            "bytes_done": phase.bytes_done,
            "bytes_total": phase.bytes_total,
            "bytes_per_second": round(phase.rate(now)),
            "seconds_left": None if left is None else round(left, 1),
            "done": done,
        }
        self._write(json.dumps({"progress": facts}))

    def _end(self, phase: _Phase, now: float) -> None:
        self._show(phase, now, done=True)

    def _note(self, text: str) -> None:
        self._write(json.dumps({"note": text}))


class BarProgress(PhasedProgress):
    """A bar with bytes, rate and time left, which vanishes at the end of the phase."""

    def __init__(self, stderr: TextIO, clock: Clock) -> None:
        super().__init__(stderr, clock, interval_seconds=BAR_INTERVAL_SECONDS)
        self._bar: RichBar | None = None
        self._task: TaskID | None = None

    def _begin(self, phase: _Phase) -> None:
        from rich.console import Console
        from rich.markup import escape
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )
        from rich.progress import Progress as Bar

        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(file=self._stderr),
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._task = self._bar.add_task(escape(phase.label), total=phase.bytes_total)
        self._bar.start()

    def _show(self, phase: _Phase, now: float) -> None:  # noqa: ARG002 - the bar has a clock of its own
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=phase.bytes_done)

    def _clear(self) -> None:
        if self._bar is not None:
            with suppress(OSError):
                self._bar.stop()
            self._bar = None

    def _end(self, phase: _Phase, now: float) -> None:
        self._clear()
        super()._end(phase, now)

    def _note(self, text: str) -> None:
        if self._bar is None:
            self._write(text)
        else:
            self._bar.console.print(text, markup=False, highlight=False)


def choose_progress(*, mode: str, silent: bool, stderr: TextIO, clock: Clock) -> Progress:
    """
    The progress for `mode`: `auto`, `json` or `off`.

    `silent` is said by --quiet, and by --json, whose stderr must hold nothing but JSON unless asked for.
    """
    if mode == "json":
        return JsonProgress(stderr, clock)
    if mode == "off" or silent:
        return NoProgress()
    return BarProgress(stderr, clock) if stderr.isatty() else LineProgress(stderr, clock)
