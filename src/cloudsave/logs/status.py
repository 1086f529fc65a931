"""What capture is told and what it says of itself."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

MIB = 1 << 20
_SAMPLE_SECONDS = 0.1
"""How often the end of the server's log is noted, for the measure of lag."""
_SAMPLES_MAX = 36_000
"""Limit: notes kept; an hour of them. Then the measure of lag becomes coarser, not smaller."""


@dataclass(frozen=True, slots=True)
class CaptureOptions:
    """How capture works. The defaults fit continuous capture through a permanent slot."""

    object_age_seconds: float = 1.0
    """A log object is cut when its first byte is this old: the wanted recovery point objective."""
    object_bytes_max: int = 16 * MIB
    """A log object is cut at multiples of this and at the ends of log files."""
    queue_bytes_max: int = 64 * MIB
    """Limit: log that is received and not yet stored; the whole memory of capture is about twice this."""
    lag_alarm_seconds: float = 15.0
    """The recovery point objective counts as breached when the durable log is this far behind."""
    synchronous: bool = False
    """Commits wait until their log is durable: objects are cut at once, however small."""
    salvage: bool = True
    """After the server removed log, look for the oldest that it still has; else go on at the slot."""
    running_patience_seconds: float = 5.0
    """How long a slot in use at the start is waited for: a killed capture leaves it after a moment."""


class CaptureState(StrEnum):
    """Where capture stands."""

    CONNECTING = "connecting"
    STREAMING = "streaming"
    BEHIND = "behind"
    STALLED = "stalled"
    HOLE = "hole"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class CaptureStatus:
    """What an observer sees."""

    state: CaptureState
    branch: str
    received: int
    """End of the log that was received."""
    durable: int
    """End of the log that is durable in the repository, on `branch`."""
    server_end: int
    """End of the log on the server when it last spoke."""
    seconds_behind: float
    """Age of the oldest moment whose log is not known to be durable; grows while the server is silent."""
    rpo_breached: bool
    objects: int
    bytes_stored: int
    holes: int
    last_error: str = ""
    alarm: str = ""
    """Something that a person must see: a hole, a lost slot, a second line of history."""

    @property
    def bytes_behind(self) -> int:
        """Log on the server that is not durable yet."""
        return max(0, self.server_end - self.durable)


Observer = Callable[[CaptureStatus], None]
"""
Called from the thread that captures and, as soon as log has become durable, from the one that stores it;
never by both at once.
"""


class LagMeter:
    """
    Measures lag where it counts: the time since the end of the server's log, as it then was, is durable.

    Under load the durable end never meets the server's end of the same moment; so the server's end is noted
    with the time, and each note is ticked off when the durable end has passed it.
    """

    def __init__(self, now: float) -> None:
        self._proved_at = now
        self._notes: deque[tuple[int, float]] = deque(maxlen=_SAMPLES_MAX)

    def restart(self) -> None:
        """Forget the notes: they belong to another branch."""
        self._notes.clear()

    def server_is_at(self, end: int, now: float) -> None:
        """The server said that its log ends at `end`."""
        if not self._notes or now - self._notes[-1][1] >= _SAMPLE_SECONDS:
            self._notes.append((end, now))

    def durable_is_at(self, end: int) -> None:
        """All log before `end` is durable."""
        while self._notes and self._notes[0][0] <= end:
            self._proved_at = max(self._proved_at, self._notes.popleft()[1])

    def seconds_behind(self, now: float) -> float:
        """Since when nothing is proved to be durable."""
        return max(0.0, now - self._proved_at)
