"""A wrapper that fails one chosen operation, before or after its effect. For tests and simulations."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence

from cloudsave.errors import StoreUnavailable
from cloudsave.store.api import Buffer, ObjectInfo, ObjectStore, StoreCapabilities


def _unavailable(operation: str) -> BaseException:
    return StoreUnavailable(f"could not {operation}", detail="This fault was planned.")


class FaultPlan:
    """
    Which operation fails and how. Operations of all verbs and threads are counted together, from 1.

    A test fails the first operation, then the second and so on, until a run ends with `fired` false:
    then every operation of the run has failed once.
    """

    def __init__(
        self,
        *,
        fail_at: int,
        after_effect: bool = False,
        outage: bool = False,
        error: Callable[[str], BaseException] = _unavailable,
    ) -> None:
        """
        Args:
            fail_at: The number of the operation that fails; 0: none.
            after_effect: Fail when the operation has been done, as when only its answer is lost.
            outage: All later operations fail too, before their effect.
            error: Makes what is raised from "verb name"; a BaseException plays the death of the process.
        """
        self.operations = 0
        self.fired = False
        self.trace: list[str] = []
        self._fail_at = fail_at
        self._after_effect = after_effect
        self._outage = outage
        self._error = error
        self._lock = threading.Lock()

    def begin(self, operation: str) -> Callable[[], None]:
        """Count an operation; raises if it fails before its effect. The result is called after the effect."""
        with self._lock:
            self.operations += 1
            self.trace.append(operation)
            chosen = self.operations == self._fail_at
            later = self._outage and 0 < self._fail_at < self.operations
            self.fired = self.fired or chosen
        if later or (chosen and not self._after_effect):
            raise self._error(operation)
        return (lambda: self._fail(operation)) if chosen else _nothing

    def _fail(self, operation: str) -> None:
        raise self._error(operation)


def _nothing() -> None:
    """After the effect of an operation that succeeds."""


class Faulty:
    """Asks a plan before and after every operation."""

    def __init__(self, store: ObjectStore, plan: FaultPlan) -> None:
        self._store = store
        self.plan = plan

    @property
    def url(self) -> str:
        """That of the wrapped store."""
        return self._store.url

    @property
    def capabilities(self) -> StoreCapabilities:
        """Those of the wrapped store."""
        return self._store.capabilities

    def put(self, name: str, parts: Sequence[Buffer]) -> None:
        """Put, or fail."""
        after = self.plan.begin(f"put {name}")
        self._store.put(name, parts)
        after()

    def get(self, name: str) -> bytes:
        """Get, or fail."""
        after = self.plan.begin(f"get {name}")
        content = self._store.get(name)
        after()
        return content

    def get_range(self, name: str, *, offset: int, length: int) -> Buffer:
        """Get, or fail."""
        after = self.plan.begin(f"get_range {name}")
        content = self._store.get_range(name, offset=offset, length=length)
        after()
        return content

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """List; a fault after the effect comes when half of the names have been told."""
        after = self.plan.begin(f"list {prefix}")
        infos = list(self._store.list(prefix))
        for info in infos[: len(infos) // 2]:
            yield info
        after()
        for info in infos[len(infos) // 2 :]:
            yield info

    def delete(self, name: str) -> None:
        """Delete, or fail."""
        after = self.plan.begin(f"delete {name}")
        self._store.delete(name)
        after()
