"""The only source of time and randomness, so that a simulation can replace both."""

from __future__ import annotations

import os
import time
from datetime import UTC, datetime


class Clock:
    """Wall clock, monotonic clock, sleep and random bytes of one process."""

    def now(self) -> datetime:
        """Current instant, aware, UTC."""
        return datetime.now(UTC)

    def monotonic(self) -> float:
        """Seconds from an arbitrary start; never steps backwards."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Pause the calling thread."""
        time.sleep(seconds)

    def random_bytes(self, count: int) -> bytes:
        """Cryptographically strong random bytes."""
        return os.urandom(count)


SYSTEM_CLOCK = Clock()
