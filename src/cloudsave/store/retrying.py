"""A wrapper that repeats what may pass, and resolves the doubt that a repeated put brings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from cloudsave.clock import Clock
from cloudsave.errors import ObjectExists, ObjectMissing, StoreUnavailable
from cloudsave.store.api import Buffer, ObjectInfo, ObjectStore, StoreCapabilities

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RetryLimits:
    """How long and how often to try."""

    deadline_seconds: float = 300.0
    """From the first try of one operation; no try begins after it."""
    first_pause_seconds: float = 0.2
    pause_seconds_max: float = 15.0
    tries_max: int = 100


class Retrying:
    """Repeats operations that raise StoreUnavailable; every other error passes through at once."""

    def __init__(self, store: ObjectStore, *, clock: Clock, limits: RetryLimits | None = None) -> None:
        self._store = store
        self._clock = clock
        self._limits = limits or RetryLimits()

    @property
    def url(self) -> str:
        """That of the wrapped store."""
        return self._store.url

    @property
    def capabilities(self) -> StoreCapabilities:
        """Those of the wrapped store."""
        return self._store.capabilities

    def put(self, name: str, parts: Sequence[Buffer]) -> None:
        """
        Put until the outcome is clear.

        After a failed try the object may be there. "Exists" is then success if, read back, it holds our
        bytes.
        """
        unclear = False

        def attempt() -> None:
            nonlocal unclear
            try:
                self._store.put(name, parts)
            except ObjectExists:
                if not unclear or not self._holds(name, parts):
                    raise
            except StoreUnavailable:
                unclear = True
                raise

        self._repeat(attempt)

    def get(self, name: str) -> bytes:
        """Get until it succeeds."""
        return self._repeat(lambda: self._store.get(name))

    def get_range(self, name: str, *, offset: int, length: int) -> Buffer:
        """Get until it succeeds."""
        return self._repeat(lambda: self._store.get_range(name, offset=offset, length=length))

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """List; after a failure begin again behind the last name. Progress renews the deadline."""
        last = ""
        listing = self._store.list(prefix)

        def following() -> ObjectInfo | None:
            nonlocal listing
            try:
                return next((info for info in listing if info.name > last), None)
            except StoreUnavailable:
                listing = self._store.list(prefix)
                raise

        while (info := self._repeat(following)) is not None:
            last = info.name
            yield info

    def delete(self, name: str) -> None:
        """Delete until it succeeds."""
        self._repeat(lambda: self._store.delete(name))

    def _holds(self, name: str, parts: Sequence[Buffer]) -> bool:
        """Whether the stored object is the concatenation of `parts`. Raises StoreUnavailable when unclear."""
        try:
            stored = memoryview(self._store.get(name))
        except ObjectMissing as error:
            raise StoreUnavailable(f'could not store object "{name}"', detail=error.message) from error
        begin = 0
        for part in parts:
            if stored[begin : begin + len(part)] != part:
                return False
            begin += len(part)
        return begin == len(stored)

    def _repeat(self, attempt: Callable[[], T]) -> T:
        limits = self._limits
        begun = self._clock.monotonic()
        for tries in range(1, limits.tries_max + 1):
            try:
                return attempt()
            except StoreUnavailable as error:
                pause = self._pause_seconds(tries)
                elapsed = self._clock.monotonic() - begun
                if tries == limits.tries_max or elapsed + pause > limits.deadline_seconds:
                    raise StoreUnavailable(
                        error.message,
                        detail=f"{error.detail} Gave up after {tries} tries in {elapsed:.0f} s.".strip(),
                        hints=error.hints,
                    ) from error
                self._clock.sleep(pause)
        raise AssertionError("the last try returns or raises")

    def _pause_seconds(self, tries: int) -> float:
        """Doubling, with the upper half random so that many clients do not come back at once."""
        limits = self._limits
        longest = min(limits.pause_seconds_max, limits.first_pause_seconds * 2.0 ** min(tries - 1, 30))
        return longest * (0.5 + self._clock.random_bytes(1)[0] / 512)
