"""A wrapper that counts requests, bytes and seconds per verb."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from cloudsave.clock import Clock
from cloudsave.store.api import Buffer, ObjectInfo, ObjectStore, StoreCapabilities

VERBS = ("put", "get", "get_range", "list", "delete")


@dataclass(frozen=True, slots=True)
class VerbTotals:
    """What one verb has done so far. `seconds` adds up over threads; a failed request counts no bytes."""

    requests: int = 0
    failures: int = 0
    size_bytes: int = 0
    seconds: float = 0.0


class Meter:
    """Totals per verb; safe to use from several threads and by several stores."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._totals = {verb: VerbTotals() for verb in VERBS}

    def totals(self) -> dict[str, VerbTotals]:
        """All verbs as they are now."""
        with self._lock:
            return dict(self._totals)

    def record(self, verb: str, *, size_bytes: int, seconds: float, failed: bool) -> None:
        """Count one request."""
        with self._lock:
            before = self._totals[verb]
            self._totals[verb] = replace(
                before,
                requests=before.requests + 1,
                failures=before.failures + failed,
                size_bytes=before.size_bytes + size_bytes,
                seconds=before.seconds + seconds,
            )


@dataclass(slots=True)
class _Transfer:
    """The bytes that one request moved, known at its end."""

    size_bytes: int = 0


class Metered:
    """Tells a meter of every request."""

    def __init__(self, store: ObjectStore, meter: Meter, *, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self.meter = meter

    @property
    def url(self) -> str:
        """That of the wrapped store."""
        return self._store.url

    @property
    def capabilities(self) -> StoreCapabilities:
        """Those of the wrapped store."""
        return self._store.capabilities

    def put(self, name: str, parts: Sequence[Buffer]) -> None:
        """Put."""
        with self._measured("put") as transfer:
            self._store.put(name, parts)
            transfer.size_bytes = sum(map(len, parts))

    def get(self, name: str) -> bytes:
        """Get."""
        with self._measured("get") as transfer:
            content = self._store.get(name)
            transfer.size_bytes = len(content)
            return content

    def get_range(self, name: str, *, offset: int, length: int) -> Buffer:
        """Get."""
        with self._measured("get_range") as transfer:
            content = self._store.get_range(name, offset=offset, length=length)
            transfer.size_bytes = len(content)
            return content

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """List; the time that the caller spends between two names is counted too."""
        with self._measured("list"):
            yield from self._store.list(prefix)

    def delete(self, name: str) -> None:
        """Delete."""
        with self._measured("delete"):
            self._store.delete(name)

    @contextlib.contextmanager
    def _measured(self, verb: str) -> Iterator[_Transfer]:
        transfer = _Transfer()
        begun = self._clock.monotonic()
        failed = True
        try:
            yield transfer
            failed = False
        finally:
            seconds = self._clock.monotonic() - begun
            self.meter.record(verb, size_bytes=transfer.size_bytes, seconds=seconds, failed=failed)
