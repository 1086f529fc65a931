"""A clock that moves only when told to, or when someone sleeps."""

from __future__ import annotations

import random
import threading
from datetime import UTC, datetime, timedelta

from cloudsave.clock import Clock


class FakeClock(Clock):
    """Starts at a fixed instant; sleeping advances it at once. Random bytes follow the seed."""

    def __init__(self, *, seed: int = 1, start_utc: datetime = datetime(2026, 11, 21, tzinfo=UTC)) -> None:
        self.sleeps: list[float] = []
        self._start_utc = start_utc
        self._elapsed_seconds = 0.0
        self._random = random.Random(seed)
        self._lock = threading.Lock()

    def now(self) -> datetime:
        """The start plus what has passed."""
        return self._start_utc + timedelta(seconds=self._elapsed_seconds)

    def monotonic(self) -> float:
        """Seconds since the start."""
        return self._elapsed_seconds

    def advance(self, seconds: float) -> None:
        """Let time pass without anyone sleeping."""
        with self._lock:
            self._elapsed_seconds += seconds

    def sleep(self, seconds: float) -> None:
        """Record the pause and let it pass."""
        self.sleeps.append(seconds)
        self.advance(seconds)

    def random_bytes(self, count: int) -> bytes:
        """Bytes of the seeded sequence."""
        with self._lock:
            return self._random.randbytes(count)
