"""What canaries tell, and what the watch makes of it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cloudsave.logs.canary import OUTSTANDING_MAX, CanaryMeter
from cloudsave.logs.status import CaptureState, CaptureStatus
from cloudsave.logs.watch import ALARM_SECONDS, Facts, Sight, Watcher, WatchOptions
from tests.fake_clock import FakeClock

STATUS = CaptureStatus(
    CaptureState.STREAMING,
    branch="00000001",
    received=0,
    durable=100,
    server_end=0,
    seconds_behind=0.0,
    rpo_breached=False,
    objects=0,
    bytes_stored=0,
    holes=0,
)


def test_nothing_is_known_before_the_first_canary() -> None:
    meter = CanaryMeter()
    meter.durable("1", 50, 1.0)
    assert meter.rpo_seconds(2.0) is None


def test_the_measure_is_the_time_from_commit_to_durable() -> None:
    meter = CanaryMeter()
    meter.durable("1", 50, 1.0)
    meter.committed(100, 10.0)
    assert meter.rpo_seconds(10.5) == 0.5
    meter.durable("1", 99, 11.0)
    assert meter.rpo_seconds(12.0) == 2.0
    meter.durable("1", 100, 13.0)
    assert meter.rpo_seconds(99.0) == 3.0


def test_an_awaited_canary_counts_by_its_age_and_a_late_one_by_the_lag_before() -> None:
    meter = CanaryMeter()
    meter.durable("1", 50, 0.0)
    meter.committed(100, 10.0)
    meter.durable("1", 100, 14.0)
    meter.committed(200, 20.0)
    assert meter.rpo_seconds(21.0) == 4.0
    assert meter.rpo_seconds(40.0) == 20.0


def test_on_another_branch_nothing_is_awaited_any_more() -> None:
    meter = CanaryMeter()
    meter.durable("1", 50, 0.0)
    meter.committed(100, 1.0)
    meter.durable("2", 60, 2.0)
    assert meter.rpo_seconds(50.0) is None


def test_the_oldest_awaited_canary_is_kept_whatever_their_number() -> None:
    meter = CanaryMeter()
    meter.durable("1", 1, 0.0)
    for number in range(OUTSTANDING_MAX + 50):
        meter.committed(100 + number, float(number))
    assert meter.rpo_seconds(20_000.0) == 20_000.0


class Source:
    """A source whose log ends where it is told."""

    def beat(self) -> int | None:
        return 100

    def retained_bytes(self, slot: str) -> int | None:
        return 7

    def close(self) -> None:
        """Nothing."""


class Watched:
    """A watcher whose threads are not begun: a test asks for what it sees."""

    def __init__(self, *, canary_seconds: float = 15.0, rpo_seconds: float = 1.0) -> None:
        self.clock = FakeClock()
        options = WatchOptions("slot", canary_seconds, rpo_seconds)
        self.watcher = Watcher(Source(), options, look=lambda sight: None, facts=Facts, clock=self.clock)
        self.watcher.observe(STATUS)

    def after(self, seconds: float, **changes: object) -> Sight:
        """What is seen when so much time has passed and capture has then said this."""
        self.clock.advance(seconds)
        if changes:
            self.watcher.observe(replace(STATUS, **changes))  # type: ignore[arg-type]
        return self.watcher.sight()


def test_a_capture_that_is_well_is_no_alarm() -> None:
    """Control for the others."""
    watched = Watched()
    watched.watcher._beat()
    for _ in range(20):
        watched.watcher._beat()
        assert watched.after(5, durable=100).alarm == ""


@pytest.mark.parametrize(
    ("seconds", "changes", "words"),
    [
        (ALARM_SECONDS + 1, {}, "said nothing"),
        (ALARM_SECONDS + 16, {"durable": 100}, "does not answer"),
        (1, {"seconds_behind": ALARM_SECONDS + 1}, "not known to be durable"),
    ],
)
def test_each_kind_of_silence_is_an_alarm(seconds: float, changes: dict[str, object], words: str) -> None:
    assert words in Watched().after(seconds, **changes).alarm


def test_a_canary_that_does_not_arrive_is_an_alarm_although_capture_says_that_all_is_well() -> None:
    watched = Watched()
    watched.watcher.observe(replace(STATUS, durable=10))
    watched.watcher._beat()
    watched.after(ALARM_SECONDS - 1, durable=99)
    assert watched.after(0.5, durable=99).alarm == ""
    assert "archiver" in watched.after(1, durable=99).alarm
    assert watched.after(0, durable=100).alarm != "", "the lag of the last one counts until the next"
    watched.watcher._beat()
    assert watched.after(0, durable=100).alarm == ""


def test_a_long_objective_is_not_alarmed_early() -> None:
    watched = Watched(rpo_seconds=3600, canary_seconds=0)
    assert watched.after(7000, seconds_behind=7000.0).alarm == ""
    assert watched.after(201, seconds_behind=7201.0).alarm != ""
