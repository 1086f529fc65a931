"""Retrying repeats only what may pass, ends in time, and never takes another's object for its own."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from cloudsave.errors import (
    IntegrityError,
    ObjectExists,
    ObjectMissing,
    StoreError,
    StoreFull,
    StorePermission,
    StoreUnavailable,
)
from cloudsave.store.api import Buffer
from cloudsave.store.faulty import FaultPlan, Faulty
from cloudsave.store.memory import MemoryStore
from cloudsave.store.retrying import Retrying, RetryLimits
from tests.fake_clock import FakeClock


def _run(store) -> list[object]:
    """A few of each operation, and what they told."""
    for number in range(4):
        store.put(f"a/{number}", [b"content ", b"%d" % number])
    store.delete("a/3")
    listed = [info.name for info in store.list("a/")]
    return [listed, store.get("a/1"), bytes(store.get_range("a/2", offset=8, length=1))]


EXPECTED = [["a/0", "a/1", "a/2"], b"content 1", b"2"]


@pytest.mark.parametrize("after_effect", [False, True])
def test_each_operation_fails_in_turn_and_the_run_is_as_without_faults(after_effect: bool) -> None:
    fail_at = 0
    fired = True
    while fired:
        fail_at += 1
        assert fail_at < 100
        plan = FaultPlan(fail_at=fail_at, after_effect=after_effect)
        assert _run(Retrying(Faulty(MemoryStore(), plan), clock=FakeClock())) == EXPECTED
        fired = plan.fired
    assert fail_at - 1 == len(plan.trace) >= 8


@pytest.mark.parametrize("after_effect", [False, True])
def test_without_retrying_each_of_these_faults_is_seen(after_effect: bool) -> None:
    for fail_at in range(1, 9):
        plan = FaultPlan(fail_at=fail_at, after_effect=after_effect)
        with pytest.raises(StoreUnavailable):
            _run(Faulty(MemoryStore(), plan))
        assert plan.fired


def test_exists_after_an_unclear_put_is_success_only_for_equal_content() -> None:
    plan = FaultPlan(fail_at=1, after_effect=True)
    inner = MemoryStore()
    Retrying(Faulty(inner, plan), clock=FakeClock()).put("a", [b"mi", b"ne"])
    assert plan.trace == ["put a", "put a", "get a"]
    assert inner.get("a") == b"mine"


@pytest.mark.parametrize("theirs", [b"theirs", b"min", b"mine!", b"", b"minE"])
def test_an_object_of_another_writer_is_never_taken_for_ours(theirs: bytes) -> None:
    inner = MemoryStore()
    inner.put("a", [theirs])
    plan = FaultPlan(fail_at=1)

    with pytest.raises(ObjectExists):
        Retrying(Faulty(inner, plan), clock=FakeClock()).put("a", [b"mi", b"ne"])

    assert inner.get("a") == theirs


def test_exists_at_the_first_try_is_an_error_even_for_equal_content() -> None:
    inner = MemoryStore()
    inner.put("a", [b"mine"])

    with pytest.raises(ObjectExists):
        Retrying(inner, clock=FakeClock()).put("a", [b"mine"])


def test_reading_back_is_retried_too() -> None:
    class ReadBackFailsOnce(MemoryStore):
        puts = gets = 0

        def put(self, name: str, parts: Sequence[Buffer]) -> None:
            super().put(name, parts)
            self.puts += 1
            raise StoreUnavailable("lost the answer")

        def get(self, name: str) -> bytes:
            self.gets += 1
            if self.gets == 1:
                raise StoreUnavailable("could not read")
            return super().get(name)

    inner = ReadBackFailsOnce()
    Retrying(inner, clock=FakeClock()).put("a", [b"mine"])

    assert (inner.puts, inner.gets) == (1, 2)


@pytest.mark.parametrize(
    "error", [StoreFull, StorePermission, ObjectMissing, ObjectExists, IntegrityError, StoreError]
)
def test_other_errors_pass_through_at_once(error: type[Exception]) -> None:
    clock = FakeClock()
    plan = FaultPlan(fail_at=1, error=error)

    with pytest.raises(error):
        Retrying(Faulty(MemoryStore(), plan), clock=clock).put("a", [b"x"])

    assert plan.operations == 1
    assert clock.sleeps == []


def test_an_outage_ends_at_the_deadline_with_growing_pauses() -> None:
    clock = FakeClock()
    limits = RetryLimits(deadline_seconds=100, first_pause_seconds=1, pause_seconds_max=8)
    plan = FaultPlan(fail_at=1, outage=True)

    with pytest.raises(StoreUnavailable) as caught:
        Retrying(Faulty(MemoryStore(), plan), clock=clock, limits=limits).get("a")

    assert 84 <= clock.monotonic() <= 100
    assert f"after {plan.operations} tries" in caught.value.detail
    assert "This fault was planned" in caught.value.detail
    for number, pause in enumerate(clock.sleeps):
        longest = min(8, 2**number)
        assert longest / 2 <= pause <= longest
    assert len({round(pause, 6) for pause in clock.sleeps[3:]}) > 3


def test_a_clock_that_stands_still_does_not_make_it_try_for_ever() -> None:
    class StandingClock(FakeClock):
        def sleep(self, seconds: float) -> None:
            self.sleeps.append(seconds)

    plan = FaultPlan(fail_at=1, outage=True)

    with pytest.raises(StoreUnavailable):
        Retrying(Faulty(MemoryStore(), plan), clock=StandingClock(), limits=RetryLimits(tries_max=7)).delete(
            "a"
        )

    assert plan.operations == 7
