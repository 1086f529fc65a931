"""Retention rules on small histories, one rule each."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta, tzinfo
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloudsave.model.history import Ancestry, BranchPoint
from cloudsave.model.log import LogSegment, us_from_instant
from cloudsave.model.position import Position
from cloudsave.model.retention import RetentionRules, StoredBackup, Verdict
from cloudsave.policy.retention import Decision, RetentionHistory, decide, decide_log

BEGIN = datetime(2026, 1, 1, 12, tzinfo=UTC)
DAY = 100
"""Offsets of log a day."""
FIRST, SECOND, THIRD = "00000001", "00000002", "00000003"
FORK = Ancestry({SECOND: (BranchPoint(FIRST, 20 * DAY),)})


def us(days: float) -> int:
    """The instant so many days after the begin."""
    return us_from_instant(BEGIN + timedelta(days=days))


def backup(day: float, *, branch: str = FIRST, **facts: object) -> StoredBackup:
    """A backup that is called by its day and needs the log of 10 offsets."""
    offset = int(day * DAY)
    return StoredBackup(
        f"day-{day:06.2f}-{branch[-1]}",
        Position(branch, offset),
        Position(branch, offset + 10),
        offset - offset % 50,
        us(day),
        us(day),
        **facts,  # type: ignore[arg-type]
    )


def log(branch: str, first_day: float, last_day: float, *, per_day: int = 2) -> list[LogSegment]:
    """Log without a hole, each stretch with commits up to its end."""
    step = DAY // per_day
    firsts = range(int(first_day * DAY), int(last_day * DAY), step)
    return [LogSegment(branch, f, f + step, us(f / DAY), us((f + step) / DAY)) for f in firsts]


def history(
    backups: list[StoredBackup],
    segments: list[LogSegment] | None = None,
    *,
    now: float = 30,
    ancestry: Ancestry | None = None,
    zone: tzinfo = UTC,
) -> RetentionHistory:
    """A history with log to day 30 where nothing else is said."""
    found = log(FIRST, 0, 30) if segments is None else segments
    return RetentionHistory(tuple(backups), tuple(found), ancestry or Ancestry(), us(now), zone)


def kept(decision: Decision) -> list[str]:
    """The days of the backups that stay."""
    return [one.backup_id.split("-")[1] for one in decision.verdicts if one.keep]


def days(*numbers: float) -> list[str]:
    """As `kept` names them."""
    return [f"{number:06.2f}" for number in numbers]


def verdict(decision: Decision, day: float) -> Verdict:
    """That on the backup of a day."""
    return next(one for one in decision.verdicts if one.backup_id.split("-")[1] == f"{day:06.2f}")


DAILY = [backup(day) for day in range(30)]


def test_without_a_rule_nothing_goes() -> None:
    found = decide(RetentionRules(), history(DAILY))
    assert len(kept(found)) == 30
    assert decide_log(history(DAILY), found, first_branch=FIRST) == ()


def test_a_window_keeps_its_backups_and_the_one_that_its_begin_is_reached_from() -> None:
    found = decide(RetentionRules(days=7.5), history(DAILY))
    assert kept(found) == days(22, 23, 24, 25, 26, 27, 28, 29)
    assert "begin of the window" in verdict(found, 22).reasons[0]
    assert "before the window, which begins 2026-01-24T00:00:00" in verdict(found, 21).reasons[0]


def test_a_backup_that_ends_as_the_window_begins_is_its_base() -> None:
    found = decide(RetentionRules(days=7), history(DAILY))
    assert kept(found)[0] == days(23)[0]


def test_the_window_counts_from_the_newest_that_is_stored_where_backups_have_stopped() -> None:
    found = decide(RetentionRules(days=7.5), history(DAILY, now=400))
    assert kept(found) == days(22, 23, 24, 25, 26, 27, 28, 29)


def test_a_source_whose_clock_ran_ahead_does_not_empty_the_window() -> None:
    odd = LogSegment(FIRST, 3000, 3050, us(4000), us(4000))
    found = decide(RetentionRules(days=7.5), history(DAILY, [*log(FIRST, 0, 30), odd], now=30))
    assert kept(found) == days(22, 23, 24, 25, 26, 27, 28, 29)


def test_the_newest_count_only_where_they_can_be_restored() -> None:
    broken = [backup(28, trouble="log is missing"), backup(29, trouble="log is missing")]
    found = decide(RetentionRules(last=2), history(DAILY[:28] + broken))
    assert kept(found) == days(26, 27)
    assert "cannot be restored: log is missing" in verdict(found, 29).reasons[0]


def test_nothing_goes_where_nothing_could_be_restored() -> None:
    broken = [backup(day, trouble="packs are missing") for day in range(5)]
    assert len(kept(decide(RetentionRules(last=1), history(broken)))) == 5


def test_broken_backups_stay_for_as_long_as_sound_ones_would() -> None:
    broken = [backup(day, trouble="log is missing") for day in (10, 25)]
    found = decide(RetentionRules(days=7), history([*broken, backup(5), backup(29)]))
    assert kept(found) == days(5, 25, 29)


def test_periods_keep_the_newest_of_each_and_skip_empty_ones() -> None:
    sparse = [backup(day) for day in (0, 0.1, 5, 5.2, 20, 29)]
    found = decide(RetentionRules(daily=3), history(sparse))
    assert kept(found) == days(5.2, 20, 29)
    assert verdict(found, 5.2).reasons == ("the newest of day 2026-01-06",)
    assert not verdict(found, 5.2).with_log
    assert verdict(found, 29).with_log


@pytest.mark.parametrize(
    ("rules", "taken", "stay"),
    [
        (RetentionRules(hourly=2), (2.9, 2.94, 2.95, 3.0), (2.95, 3.0)),
        (RetentionRules(daily=2), (1.0, 2.0, 2.45, 3.0), (2.45, 3.0)),
        (RetentionRules(weekly=2), (1.0, 3.0, 3.49, 10.0), (3.49, 10.0)),
        (RetentionRules(monthly=2), (20.0, 30.4, 40.0, 45.0), (30.4, 45.0)),
        (RetentionRules(yearly=2), (1.0, 300.0, 364.0, 400.0), (364.0, 400.0)),
    ],
)
def test_each_period_is_that_of_the_calendar(
    rules: RetentionRules, taken: tuple[float, ...], stay: tuple[float, ...]
) -> None:
    """The begin, day 0, is a Thursday, noon."""
    past = history([backup(day) for day in taken], [])
    assert kept(decide(rules, past)) == days(*stay)


def test_days_begin_in_the_zone_that_is_configured() -> None:
    night = [backup(0.45), backup(0.47), backup(0.55)]  # 22:48, 23:16 and 01:12 UTC
    assert kept(decide(RetentionRules(daily=2), history(night, []))) == days(0.47, 0.55)
    berlin = history(night, [], zone=ZoneInfo("Europe/Berlin"))
    assert kept(decide(RetentionRules(daily=2), berlin)) == days(0.45, 0.55)


def test_holds_and_unfinished_children_keep_a_backup() -> None:
    taken = [backup(1, holds=("audit",)), backup(2, children=("x",)), backup(3), backup(29)]
    found = decide(RetentionRules(last=1), history(taken))
    assert kept(found) == days(1, 2, 29)
    assert verdict(found, 1).reasons == ("held: audit",)


def test_proved_backups_stay_beside_the_newest() -> None:
    taken = [backup(day, proved=day in (3, 5, 7)) for day in range(10)]
    assert kept(decide(RetentionRules(last=1, proved=2), history(taken))) == days(5, 7, 9)
    broken = [*taken[:7], backup(7, proved=True, trouble="packs are missing"), *taken[8:]]
    assert kept(decide(RetentionRules(last=1, proved=2), history(broken))) == days(3, 5, 9)


PAGE = ("base/5/1", 7)


def with_page(day: int, state: str) -> StoredBackup:
    """A backup in which the page is "good", "bad", "unchecked" or not there."""
    if state == "bad":
        return backup(day, corrupt=frozenset({PAGE}))
    return backup(day, good={PAGE: state == "good"} if state != "absent" else {})


def test_the_last_good_copy_of_a_damaged_page_stays_with_its_log() -> None:
    states = ["absent", "good", "good", "unchecked", "bad", "bad"]
    taken = [with_page(day, state) for day, state in enumerate(states)]
    found = decide(RetentionRules(last=1), history(taken))
    assert kept(found) == days(2, 5)
    assert verdict(found, 2).with_log
    assert "base/5/1:7" in verdict(found, 2).reasons[0]


def test_an_unchecked_copy_counts_where_there_is_no_other() -> None:
    taken = [with_page(day, state) for day, state in enumerate(["unchecked", "bad"])]
    assert kept(decide(RetentionRules(last=1), history(taken))) == days(0, 1)


def test_the_good_copy_goes_once_no_backup_with_the_damage_stays() -> None:
    taken = [with_page(day, state) for day, state in enumerate(["good", "bad", "good", "good"])]
    assert kept(decide(RetentionRules(last=3), history(taken))) == days(0, 1, 2, 3)
    assert kept(decide(RetentionRules(last=2), history(taken))) == days(2, 3)


def test_a_copy_that_is_kept_for_a_page_may_need_another_one() -> None:
    other = ("base/5/2", 1)
    taken = [
        backup(0, good={PAGE: True, other: True}),
        backup(1, good={PAGE: True}, corrupt=frozenset({other})),
        backup(2, good={other: True}, corrupt=frozenset({PAGE})),
    ]
    assert kept(decide(RetentionRules(last=1), history(taken))) == days(0, 1, 2)


# ---- branches


def forked() -> list[StoredBackup]:
    """Branch 2 left branch 1 on day 20; both went on, branch 1 until day 24."""
    return [
        *(backup(day) for day in (5, 15, 18, 22)),
        *(backup(day, branch=SECOND) for day in (21, 26, 29)),
    ]


def forked_log() -> list[LogSegment]:
    """Of both branches."""
    return [*log(FIRST, 0, 24), *log(SECOND, 20, 30)]


def test_each_line_that_reaches_into_the_window_keeps_its_base() -> None:
    past = history(forked(), forked_log(), ancestry=FORK)
    found = decide(RetentionRules(days=7), past)  # begins on day 23
    assert kept(found) == days(21, 22, 26, 29)
    assert {one.branch for one in decide_log(past, found, first_branch=FIRST)} == {FIRST, SECOND}


def test_an_abandoned_line_goes_when_the_window_has_passed_it() -> None:
    past = history(forked(), forked_log(), ancestry=FORK)
    found = decide(RetentionRules(days=5), past)  # begins on day 25, branch 1 ended on day 24
    assert kept(found) == days(21, 26, 29)
    assert found.living == {SECOND}


def test_a_new_branch_without_a_backup_keeps_what_leads_to_it() -> None:
    taken = [backup(5), backup(15), backup(22)]
    past = history(taken, forked_log(), ancestry=FORK)
    found = decide(RetentionRules(last=1), past)
    assert kept(found) == days(15, 22)
    assert "branch 00000002" in " ".join(verdict(found, 15).reasons)
    left = set(past.segments) - set(decide_log(past, found, first_branch=FIRST))
    assert {one.first for one in left if one.branch == FIRST} >= set(range(1500, 2000, 50))
    assert {one for one in left if one.branch == SECOND} == set(log(SECOND, 20, 30))


# ---- what somebody may have put who has no key: names of log objects


def test_log_of_nowhere_does_not_take_the_place_of_a_line_that_lives() -> None:
    odd = LogSegment("FFFFFFFF", 5, 9, us(4000), us(4000))
    past = history(DAILY, [*log(FIRST, 0, 30), odd])
    found = decide(RetentionRules(daily=2), past)
    assert verdict(found, 29).with_log
    assert odd not in decide_log(past, found, first_branch=FIRST)
    assert {one.first for one in set(past.segments) - set(decide_log(past, found, first_branch=FIRST))} >= {
        2950
    }


def test_instants_in_names_of_log_make_no_old_backup_new() -> None:
    boosted = [replace(one, reached_us=us(4000)) for one in DAILY[:5]]
    found = decide(RetentionRules(last=2, daily=3), history([*boosted, *DAILY[5:]]))
    assert kept(found) == days(27, 28, 29)


def test_log_stays_where_there_is_no_backup_yet() -> None:
    past = history([])
    assert decide_log(past, decide(RetentionRules(days=1), past), first_branch=FIRST) == ()


def test_log_of_a_branch_without_a_backup_goes_when_all_that_stays_is_later() -> None:
    segments = [*log(FIRST, 28, 30), *log(SECOND, 5, 9)]
    past = history([backup(29)], segments, ancestry=Ancestry({SECOND: ()}))
    gone = decide_log(past, decide(RetentionRules(last=1), past), first_branch=FIRST)
    assert {one for one in gone if one.branch == SECOND} == set(log(SECOND, 5, 9))


# ---- log


def remaining(past: RetentionHistory, rules: RetentionRules) -> set[tuple[str, int]]:
    """(branch, first) of the log that stays."""
    gone = decide_log(past, decide(rules, past), first_branch=FIRST)
    return {(one.branch, one.first) for one in past.segments if one not in gone}


def test_log_stays_from_the_base_of_the_window_on() -> None:
    assert remaining(history(DAILY), RetentionRules(days=7.5)) == {(FIRST, f) for f in range(2200, 3000, 50)}


def test_a_backup_kept_for_its_own_moment_keeps_the_log_that_makes_it_consistent() -> None:
    taken = [backup(day) for day in (0, 10.45, 29)]
    past = history(taken)
    assert remaining(past, RetentionRules(yearly=5, monthly=1, last=1)) >= {(FIRST, 2900), (FIRST, 2950)}
    held = history([taken[0], backup(10.45, holds=("x",)), taken[2]])
    # It needs [1000, 1055]: the stretches that begin at 1000 and 1050.
    assert remaining(held, RetentionRules(last=1)) == {
        (FIRST, 1000),
        (FIRST, 1050),
        (FIRST, 2900),
        (FIRST, 2950),
    }


def test_log_of_a_branch_whose_history_is_not_stored_stays() -> None:
    past = history(DAILY, [*log(FIRST, 0, 30), *log(THIRD, 1, 2)])
    assert {one for one in remaining(past, RetentionRules(last=1)) if one[0] == THIRD} == {
        (THIRD, 100),
        (THIRD, 150),
    }


@settings(max_examples=300, deadline=None)
@given(
    taken=st.lists(
        st.tuples(st.integers(0, 29), st.booleans(), st.sampled_from([FIRST, SECOND])), max_size=12
    ),
    window=st.integers(0, 30),
    last=st.integers(0, 4),
    daily=st.integers(0, 4),
    fork_day=st.integers(1, 29),
)
def test_what_the_window_promises_can_be_reached(
    taken: list[tuple[int, bool, str]], window: int, last: int, daily: int, fork_day: int
) -> None:
    """
    By another way of thinking: each moment of the window that could be reached before can be reached after,
    from some backup that stays, over log that stays.
    """
    ancestry = Ancestry({SECOND: (BranchPoint(FIRST, fork_day * DAY),)})
    backups = [
        backup(day + 0.01 * number, branch=branch, trouble="" if sound else "broken")
        for number, (day, sound, branch) in enumerate(taken)
        if branch == FIRST or day > fork_day
    ]
    segments = [*log(FIRST, 0, 30), *log(SECOND, fork_day, 30)]
    past = history(backups, segments, ancestry=ancestry)
    rules = RetentionRules(days=window, last=last, daily=daily)
    found = decide(rules, past)
    gone = set(decide_log(past, found, first_branch=FIRST)) if rules.any else set()
    left = [one for one in segments if one not in gone]
    stay = [one for one in backups if verdict_of(found, one).keep]
    for branch in (FIRST, SECOND):
        for offset in range((30 - window) * DAY + 60, 30 * DAY, 130) if window else ():
            if reachable(backups, segments, ancestry, branch, offset):
                assert reachable(stay, left, ancestry, branch, offset)
    for one in stay:
        if not one.trouble:
            assert reachable([one], left, ancestry, one.stop.branch, one.stop.offset)


def verdict_of(found: Decision, one: StoredBackup) -> Verdict:
    """By id."""
    return next(verdict for verdict in found.verdicts if verdict.backup_id == one.backup_id)


def reachable(
    backups: list[StoredBackup], segments: list[LogSegment], ancestry: Ancestry, branch: str, offset: int
) -> bool:
    """Whether some sound backup and unbroken log, looked at every 10 bytes, lead to `offset` of `branch`."""
    steps = ancestry.lineage_of(branch)

    def on(place: int) -> str:
        return next(name for name, _, end in steps if end is None or place < end)

    stored = {(one.branch, place) for one in segments for place in range(one.first, one.last, 10)}
    for one in backups:
        past_fork = on(one.stop.offset - 1) != one.stop.branch
        if one.trouble or past_fork or one.stop.offset > offset:
            continue
        if all((on(place), place) in stored for place in range(one.log_begin, offset, 10)):
            return True
    return False
