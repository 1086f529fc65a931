"""
How old the oldest commit is that is not durable, measured by commits of our own. Pure.

A canary is committed in the source at a known moment and awaited in the repository. Nothing the server or
capture say of themselves counts: only that the log behind the canary is durable.
"""

from __future__ import annotations

from collections import deque

OUTSTANDING_MAX = 10_000
"""Limit: canaries that are awaited at once; a day of one each nine seconds."""


class CanaryMeter:
    """Not thread-safe. Moments are of the monotonic clock."""

    def __init__(self) -> None:
        self._awaited: deque[tuple[float, int]] = deque(maxlen=OUTSTANDING_MAX)
        self._lag: float | None = None
        self._branch = ""
        self._durable = 0

    def committed(self, offset: int, now: float) -> None:
        """A canary was committed at `now`; the log that holds it ends at `offset`."""
        if len(self._awaited) == OUTSTANDING_MAX:
            del self._awaited[1]  # the oldest is the one that tells the age
        self._awaited.append((now, offset))
        self._settle(now)

    def durable(self, branch: str, offset: int, now: float) -> None:
        """The log of `branch` is durable up to `offset`. On another branch the awaited ones may be lost."""
        if branch != self._branch:
            self._branch = branch
            self._awaited.clear()
        self._durable = offset
        self._settle(now)

    def rpo_seconds(self, now: float) -> float | None:
        """How much would be lost with the source now; None while no canary has been committed."""
        if self._awaited:
            return max(now - self._awaited[0][0], self._lag or 0.0)
        return self._lag

    def _settle(self, now: float) -> None:
        while self._awaited and self._awaited[0][1] <= self._durable:
            self._lag = now - self._awaited.popleft()[0]
