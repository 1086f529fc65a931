"""Throttled, metered and faulty."""

from __future__ import annotations

import threading

import pytest

from cloudsave.errors import ObjectMissing, StoreUnavailable
from cloudsave.store.faulty import FaultPlan, Faulty
from cloudsave.store.memory import MemoryStore
from cloudsave.store.metered import Meter, Metered
from cloudsave.store.throttled import BURST_SECONDS, Throttled, TokenBucket
from tests.fake_clock import FakeClock

# ---- throttled -------------------------------------------------------------------------------------------


def test_throttled_holds_puts_and_gets_to_the_rate() -> None:
    clock = FakeClock()
    store = Throttled(MemoryStore(), TokenBucket(bytes_per_second=1_000, clock=clock))

    for number in range(10):
        store.put(f"a/{number}", [b"x" * 400, b"y" * 600])
    assert clock.monotonic() == pytest.approx(10, abs=0.01)
    store.get("a/0")
    store.get_range("a/1", offset=0, length=500)
    assert clock.monotonic() == pytest.approx(11.5, abs=0.01)


def test_throttled_lets_idle_time_be_used_only_up_to_the_burst() -> None:
    clock = FakeClock()
    store = Throttled(MemoryStore(), TokenBucket(bytes_per_second=1_000, clock=clock))
    clock.advance(3_600)

    store.put("a", [b"x" * int(1_000 * BURST_SECONDS)])
    assert clock.sleeps == []
    store.put("b", [b"x" * 2_000])

    assert sum(clock.sleeps) == pytest.approx(2, abs=0.01)


def test_throttled_takes_a_new_rate_while_it_waits() -> None:
    class Impatient(FakeClock):
        bucket: TokenBucket

        def sleep(self, seconds: float) -> None:
            super().sleep(seconds)
            if len(self.sleeps) == 2:
                self.bucket.set_rate(1_000_000)

    clock = Impatient()
    clock.bucket = TokenBucket(bytes_per_second=1, clock=clock)

    Throttled(MemoryStore(), clock.bucket).put("a", [b"x" * 1_000_000])

    assert clock.monotonic() < 3


def test_throttled_without_a_rate_never_waits() -> None:
    clock = FakeClock()
    bucket = TokenBucket(bytes_per_second=10, clock=clock)
    bucket.set_rate(None)
    store = Throttled(MemoryStore(), bucket)

    store.put("a", [b"x" * 1_000_000])

    assert store.get("a") == b"x" * 1_000_000
    assert clock.sleeps == []


def test_throttled_shares_one_rate_among_threads() -> None:
    clock = FakeClock()
    store = Throttled(MemoryStore(), TokenBucket(bytes_per_second=1_000, clock=clock))
    threads = [
        threading.Thread(target=lambda who=who: [store.put(f"{who}/{n}", [b"x" * 500]) for n in range(10)])
        for who in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    assert len(list(store.list(""))) == 40
    assert clock.monotonic() >= 19.9


@pytest.mark.parametrize("rate", [0, -1])
def test_throttled_refuses_a_rate_that_would_wait_for_ever(rate: float) -> None:
    with pytest.raises(ValueError, match="positive"):
        TokenBucket(bytes_per_second=rate, clock=FakeClock())


# ---- metered ---------------------------------------------------------------------------------------------


def test_metered_counts_requests_bytes_seconds_and_failures() -> None:
    clock = FakeClock()

    class Slow(MemoryStore):
        def get(self, name: str) -> bytes:
            clock.advance(2)
            return super().get(name)

    meter = Meter()
    store = Metered(Slow(), meter, clock=clock)
    store.put("a", [b"one", b"two"])
    store.put("b", [])
    store.get("a")
    with pytest.raises(ObjectMissing):
        store.get("c")
    assert len(list(store.list(""))) == 2
    store.delete("a")
    store.get_range("b", offset=0, length=0)

    totals = meter.totals()
    assert (totals["put"].requests, totals["put"].size_bytes, totals["put"].failures) == (2, 6, 0)
    assert (totals["get"].requests, totals["get"].size_bytes, totals["get"].failures) == (2, 6, 1)
    assert totals["get"].seconds == pytest.approx(4)
    assert (totals["list"].requests, totals["delete"].requests, totals["get_range"].requests) == (1, 1, 1)


# ---- faulty ----------------------------------------------------------------------------------------------


def test_faulty_fails_before_or_after_the_effect() -> None:
    before, after = MemoryStore(), MemoryStore()

    with pytest.raises(StoreUnavailable):
        Faulty(before, FaultPlan(fail_at=1)).put("a", [b"x"])
    with pytest.raises(StoreUnavailable):
        Faulty(after, FaultPlan(fail_at=1, after_effect=True)).put("a", [b"x"])

    assert list(before.objects) == []
    assert list(after.objects) == ["a"]


def test_faulty_lists_half_before_it_fails_after_the_effect() -> None:
    inner = MemoryStore()
    for number in range(4):
        inner.put(str(number), [])
    listing = Faulty(inner, FaultPlan(fail_at=1, after_effect=True)).list("")

    assert [next(listing).name, next(listing).name] == ["0", "1"]
    with pytest.raises(StoreUnavailable):
        next(listing)


def test_faulty_can_play_an_outage_and_the_death_of_the_process() -> None:
    class Killed(BaseException):
        pass

    plan = FaultPlan(fail_at=2, outage=True, error=Killed)
    store = Faulty(MemoryStore(), plan)
    store.put("a", [b"x"])

    for _ in range(3):
        with pytest.raises(Killed):
            store.get("a")
    assert plan.fired
    assert plan.operations == 4


def test_faulty_plan_that_is_never_reached_says_so() -> None:
    plan = FaultPlan(fail_at=3)
    Faulty(MemoryStore(), plan).put("a", [b"x"])

    assert not plan.fired
