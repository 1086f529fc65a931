"""A store in the memory of this process: the fake with the full contract, for tests and simulations."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from datetime import datetime

from cloudsave.clock import SYSTEM_CLOCK, Clock
from cloudsave.errors import IntegrityError, ObjectExists, ObjectMissing
from cloudsave.store.api import Buffer, ObjectInfo, StoreCapabilities
from cloudsave.store.names import validate_name, validate_prefix, validate_range


class MemoryStore:
    """Objects in a dictionary. `objects` is open to tests that damage or inspect what is stored."""

    def __init__(self, *, clock: Clock = SYSTEM_CLOCK) -> None:
        self.objects: dict[str, tuple[bytes, datetime]] = {}
        self._clock = clock
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        """It has no address."""
        return "memory://"

    @property
    def capabilities(self) -> StoreCapabilities:
        """As good as the best store: what outlives a power cut is for the test to say."""
        return StoreCapabilities(conditional_put=True, durable_put=True)

    def put(self, name: str, parts: Sequence[Buffer]) -> None:
        """Copy the parts, then insert under the lock."""
        validate_name(name)
        content = b"".join(parts)
        with self._lock:
            if name in self.objects:
                raise ObjectExists(f'object "{name}" exists', detail=f"Store: {self.url}.")
            self.objects[name] = (content, self._clock.now())

    def get(self, name: str) -> bytes:
        """The stored bytes."""
        validate_name(name)
        with self._lock:
            if name not in self.objects:
                raise ObjectMissing(f'object "{name}" is missing', detail=f"Store: {self.url}.")
            return self.objects[name][0]

    def get_range(self, name: str, *, offset: int, length: int) -> Buffer:
        """A view of the stored bytes."""
        validate_range(offset=offset, length=length)
        content = self.get(name)
        if offset + length > len(content):
            raise IntegrityError(
                f'object "{name}" is too short',
                detail=f"It has {len(content)} bytes; {offset + length} were expected.",
            )
        return memoryview(content)[offset : offset + length]

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """The names as they are at the call."""
        validate_prefix(prefix)
        with self._lock:
            found = [
                ObjectInfo(name, len(content), modified)
                for name, (content, modified) in self.objects.items()
                if name.startswith(prefix)
            ]
        return iter(sorted(found, key=lambda info: info.name))

    def delete(self, name: str) -> None:
        """Forget the object."""
        validate_name(name)
        with self._lock:
            self.objects.pop(name, None)
