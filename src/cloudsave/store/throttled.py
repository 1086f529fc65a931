"""A wrapper that holds a store to a number of bytes per second, which may change while it runs."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

from cloudsave.clock import Clock
from cloudsave.store.api import Buffer, ObjectInfo, ObjectStore, StoreCapabilities

BURST_SECONDS = 1.0
"""Limit: what was not used may be used later, up to this many seconds' worth."""
SLICE_SECONDS = 0.5
"""Limit: the longest sleep; a new rate takes effect after it."""
DEBT_IGNORED_SECONDS = 0.001
"""A shorter wait costs more than it holds back."""


class TokenBucket:
    """
    A budget of bytes that fills with time, shared by all threads.

    Whoever takes more than there is goes into debt at once and waits until it is paid, so that an operation
    may be larger than the burst and its size need not be known before.
    """

    def __init__(self, *, bytes_per_second: float | None, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._rate = _valid(bytes_per_second)
        self._balance = 0.0
        self._filled = clock.monotonic()

    def set_rate(self, bytes_per_second: float | None) -> None:
        """Change the rate, from now on; None: no limit."""
        with self._lock:
            self._fill()
            self._rate = _valid(bytes_per_second)

    def take(self, size_bytes: int) -> None:
        """Spend `size_bytes` and wait until the bucket is out of debt."""
        with self._lock:
            self._fill()
            self._balance -= size_bytes
        while (pause := self._debt_seconds()) >= DEBT_IGNORED_SECONDS:
            self._clock.sleep(min(pause, SLICE_SECONDS))

    def _debt_seconds(self) -> float:
        with self._lock:
            self._fill()
            return 0.0 if self._rate is None else -self._balance / self._rate

    def _fill(self) -> None:
        now = self._clock.monotonic()
        if self._rate is None:
            self._balance = 0.0
        else:
            earned = self._balance + (now - self._filled) * self._rate
            self._balance = min(earned, self._rate * BURST_SECONDS)
        self._filled = now


def _valid(bytes_per_second: float | None) -> float | None:
    if bytes_per_second is not None and bytes_per_second <= 0:
        raise ValueError("bytes_per_second must be positive, or None for no limit")
    return bytes_per_second


class Throttled:
    """Counts the bytes of puts and gets against one bucket; names and listings are free."""

    def __init__(self, store: ObjectStore, bucket: TokenBucket) -> None:
        self._store = store
        self.bucket = bucket

    @property
    def url(self) -> str:
        """That of the wrapped store."""
        return self._store.url

    @property
    def capabilities(self) -> StoreCapabilities:
        """Those of the wrapped store."""
        return self._store.capabilities

    def put(self, name: str, parts: Sequence[Buffer]) -> None:
        """Wait, then put."""
        self.bucket.take(sum(map(len, parts)))
        self._store.put(name, parts)

    def get(self, name: str) -> bytes:
        """Get, then wait: the size is not known before."""
        content = self._store.get(name)
        self.bucket.take(len(content))
        return content

    def get_range(self, name: str, *, offset: int, length: int) -> Buffer:
        """Wait, then get."""
        self.bucket.take(max(0, length))
        return self._store.get_range(name, offset=offset, length=length)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """List."""
        return self._store.list(prefix)

    def delete(self, name: str) -> None:
        """Delete."""
        self._store.delete(name)
