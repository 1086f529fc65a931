"""Every back end and every wrapper keeps the contract of stores; stores that do not are found out."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cloudsave.clock import SYSTEM_CLOCK
from cloudsave.errors import ObjectExists, StoreError, StoreUnavailable
from cloudsave.store.api import Buffer, ObjectInfo, ObjectStore
from cloudsave.store.contract import CHECKS, run_contract
from cloudsave.store.faulty import FaultPlan, Faulty
from cloudsave.store.memory import MemoryStore
from cloudsave.store.metered import Meter, Metered
from cloudsave.store.open import open_store
from cloudsave.store.posix import PosixStore
from cloudsave.store.posix_calls import place_by_rename
from cloudsave.store.retrying import Retrying, RetryLimits
from cloudsave.store.throttled import Throttled, TokenBucket
from tests.s3_server import S3Server

MakeStore = Callable[[Path, S3Server], ObjectStore]


def _no_links(source_dir: int, source: str, target_dir: int, target: str) -> None:
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))


def _s3(directory: Path, server: S3Server) -> ObjectStore:
    return open_store(server.url("contract", directory.name), clock=SYSTEM_CLOCK)


def _throttled(directory: Path, server: S3Server) -> ObjectStore:
    return Throttled(MemoryStore(), TokenBucket(bytes_per_second=1e9, clock=SYSTEM_CLOCK))


class _EachSecondTryFails(MemoryStore):
    """
    The first put of a name fails before its effect, the second after it; each other get and listing fails.

    A listing fails when half of it has been told.
    """

    def __init__(self) -> None:
        super().__init__()
        self.faults = 0
        self._turns: dict[str, int] = {}

    def put(self, name: str, parts: Sequence[Buffer]) -> None:
        turn = self._turn(f"put {name}")
        if turn == 1:
            self._fault()
        super().put(name, parts)
        if turn == 2:
            self._fault()

    def get(self, name: str) -> bytes:
        content = super().get(name)
        if self._turn("get") % 2:
            self._fault()
        return content

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        infos = list(super().list(prefix))
        yield from infos[: len(infos) // 2]
        if self._turn("list") % 2:
            self._fault()
        yield from infos[len(infos) // 2 :]

    def _turn(self, operation: str) -> int:
        self._turns[operation] = self._turns.get(operation, 0) + 1
        return self._turns[operation]

    def _fault(self) -> None:
        self.faults += 1
        raise StoreUnavailable("could not reach the fake")


STORES: dict[str, MakeStore] = {
    "memory": lambda directory, server: MemoryStore(),
    "posix": lambda directory, server: PosixStore(directory / "repository"),
    "posix without links": lambda directory, server: PosixStore(
        directory, placements=(_no_links, place_by_rename)
    ),
    "s3": _s3,
    "s3 with Object Lock": lambda directory, server: open_store(
        server.url("contract-locked", directory.name), clock=SYSTEM_CLOCK, lock_days=1
    ),
    "retrying": lambda directory, server: Retrying(MemoryStore(), clock=SYSTEM_CLOCK),
    "throttled": _throttled,
    "metered": lambda directory, server: Metered(MemoryStore(), Meter(), clock=SYSTEM_CLOCK),
    "faulty without faults": lambda directory, server: Faulty(MemoryStore(), FaultPlan(fail_at=0)),
    "all wrappers over s3": lambda directory, server: Metered(
        Retrying(
            Throttled(_s3(directory, server), TokenBucket(bytes_per_second=None, clock=SYSTEM_CLOCK)),
            clock=SYSTEM_CLOCK,
        ),
        Meter(),
        clock=SYSTEM_CLOCK,
    ),
}


@pytest.mark.parametrize("make", STORES.values(), ids=STORES.keys())
def test_store_keeps_the_contract(make: MakeStore, tmp_path: Path, s3_server: S3Server) -> None:
    store = make(tmp_path, s3_server)

    results = run_contract(store, "validate/")

    assert [result for result in results if not result.passed] == []
    assert len(results) == len(CHECKS) + 1
    assert list(store.list("")) == []


def test_s3_lists_more_than_one_page(tmp_path: Path, s3_server: S3Server) -> None:
    store = _s3(tmp_path, s3_server)
    names = [f"many/{number:05}" for number in range(1_005)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda name: store.put(name, [b"x"]), names))

    assert [info.name for info in store.list("many/")] == names


def test_retrying_hides_faults_but_takes_equal_content_for_its_own() -> None:
    flaky = _EachSecondTryFails()
    limits = RetryLimits(first_pause_seconds=0.0001, pause_seconds_max=0.0001)

    results = run_contract(Retrying(flaky, clock=SYSTEM_CLOCK, limits=limits), "validate/")

    assert [result for result in results if not result.passed] == []
    assert flaky.faults > 100


def test_the_faults_that_retrying_hides_break_the_contract_without_it() -> None:
    results = run_contract(_EachSecondTryFails(), "validate/")

    assert sum(not result.passed for result in results) > 10


# ---- negative controls: the contract finds each way to lose data -------------------------------------------


class _Overwrites(MemoryStore):
    def put(self, name: str, parts: Sequence[Buffer]) -> None:
        super().delete(name)
        super().put(name, parts)


class _ChecksThenPuts(MemoryStore):
    """Refuses an existing name, but not atomically: what an imitation of conditional put often does."""

    def __init__(self) -> None:
        super().__init__()
        self._both_have_checked = threading.Barrier(2)

    def put(self, name: str, parts: Sequence[Buffer]) -> None:
        if name in self.objects:
            raise ObjectExists("exists")
        content = b"".join(parts)
        racing = threading.current_thread() is not threading.main_thread() and len(content) > 60_000
        if racing:
            self._both_have_checked.wait(30)
            super().delete(name)
        super().put(name, [content])


class _LosesListEntries(MemoryStore):
    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        return (info for number, info in enumerate(super().list(prefix)) if number != 13)


class _ListsLate(MemoryStore):
    """A listing that lags one object behind: eventual consistency."""

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        newest = next(reversed(self.objects), None)
        return (info for info in super().list(prefix) if info.name != newest)


class _ListsInAnyOrder(MemoryStore):
    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        return iter(sorted(super().list(prefix), key=lambda info: info.name.split("/")))


class _ListsByText(MemoryStore):
    """Takes a prefix for text, so that "a/" also finds what begins with "a"."""

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        everything = super().list("")
        return (info for info in everything if info.name.startswith(prefix.rstrip("/")))


class _ShortRanges(MemoryStore):
    def get_range(self, name: str, *, offset: int, length: int) -> Buffer:
        return self.get(name)[offset : offset + length]


class _LosesTheLastPart(MemoryStore):
    def put(self, name: str, parts: Sequence[Buffer]) -> None:
        super().put(name, parts[:1024])


class _DeleteMissingFails(MemoryStore):
    def delete(self, name: str) -> None:
        self.get(name)
        super().delete(name)


class _LeaksDriverErrors(MemoryStore):
    def get(self, name: str) -> bytes:
        if name not in self.objects:
            raise KeyError(name)
        return super().get(name)


class _TakesAnyName(MemoryStore):
    def put(self, name: str, parts: Sequence[Buffer]) -> None:
        try:
            super().put(name, parts)
        except ObjectExists:
            raise
        except StoreError:
            return


class _KeepsDeleted(MemoryStore):
    def delete(self, name: str) -> None:
        return


@pytest.mark.parametrize(
    ("broken", "check"),
    [
        (_Overwrites, "put_refuses_an_existing_name"),
        (_ChecksThenPuts, "one_of_two_racing_puts_wins"),
        (_LosesListEntries, "list_after_write"),
        (_ListsLate, "list_after_write"),
        (_ListsInAnyOrder, "list_order"),
        (_ListsByText, "list_by_prefix"),
        (_ShortRanges, "range_beyond_the_end"),
        (_LosesTheLastPart, "put_of_many_parts"),
        (_DeleteMissingFails, "delete"),
        (_LeaksDriverErrors, "missing_object"),
        (_TakesAnyName, "bad_names"),
        (_KeepsDeleted, "clean_up"),
    ],
)
def test_contract_finds_a_broken_store(broken: type[MemoryStore], check: str) -> None:
    results = {result.name: result for result in run_contract(broken(), "validate/")}

    assert not results[check].passed
    assert results[check].detail


@pytest.mark.parametrize("fail_at", [1, 50])
def test_contract_reports_an_outage_instead_of_raising(fail_at: int) -> None:
    plan = FaultPlan(fail_at=fail_at, outage=True)

    results = run_contract(Faulty(MemoryStore(), plan), "validate/")

    assert plan.fired
    assert not results[-1].passed
    assert "This fault was planned" in results[-1].detail
