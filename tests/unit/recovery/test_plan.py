"""Plans on small histories, one rule each."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime

import pytest
from tests.unit.recovery.synthetic_log import SECOND, START_US, Record, World, commits_of, replay

from cloudsave.errors import TargetUnreachable, UnknownBackup
from cloudsave.model.history import BranchPoint
from cloudsave.model.log import LogHole, instant_from_us
from cloudsave.model.position import Position
from cloudsave.model.target import Target, TargetKind
from cloudsave.recovery.plan import RecoveryPlan, plan_recovery
from cloudsave.recovery.reach import Reach
from cloudsave.recovery.readings import SLACK_US, steps_back


def at(seconds: float) -> datetime:
    """The instant so many seconds after the begin."""
    return instant_from_us(START_US + int(seconds * SECOND))


def line(count: int, *, first_offset: int = 0, first_number: int = 0) -> list[Record]:
    """`count` commits of 10 bytes; commit n at n * 100 s has transaction n."""
    return [
        Record(
            first_offset + 10 * n,
            first_offset + 10 * n + 10,
            START_US + (first_number + n) * 100 * SECOND,
            first_number + n + 1000,
        )
        for n in range(count)
    ]


def simple_world() -> World:
    """30 commits, one backup from commit 4 to 6, the log in four objects, the last complete until 2995 s."""
    world = World(records={"1": line(30)})
    for first, last in ((0, 75), (75, 150), (150, 225)):
        world.store("1", first, last)
    world.store("1", 225, 300, complete_until_us=START_US + 2995 * SECOND)
    world.backup(1, "1", 40, 60, started_us=START_US + 395 * SECOND)
    return world


def plan(world: World, target: Target) -> RecoveryPlan:
    """The plan for a target."""
    return plan_recovery(target, world.history(), world)


def time_target(seconds: float, **more: object) -> Target:
    """A target at an instant."""
    return Target(TargetKind.TIME, time=at(seconds), **more)  # type: ignore[arg-type]


def reached(world: World, target: Target) -> list[int]:
    """The numbers of the commits that a restore to `target` replays."""
    return [one - 1000 for one in commits_of(replay(world, plan(world, target)))]


def test_a_time_between_two_commits_stops_before_the_later() -> None:
    made = plan(simple_world(), time_target(1050))
    assert (made.stop.recovery_end, made.stop.inclusive) == (110, False)
    assert made.last_commit is not None
    assert made.last_commit.transaction == 1010
    assert made.first_left_out is not None
    assert made.first_left_out.transaction == 1011
    assert [one.first for one in made.segments] == [0, 75]


def test_inclusive_takes_the_commit_of_that_very_instant_and_exclusive_leaves_it_out() -> None:
    world = simple_world()
    assert reached(world, time_target(1000))[-1] == 10
    assert reached(world, time_target(1000, inclusive=False))[-1] == 9


def disordered(step_us: int, **more: object) -> World:
    """Commit 13 lies behind commit 12 and is stamped so much earlier."""
    world = World(records={"1": line(30)}, **more)  # type: ignore[arg-type]
    records = world.records["1"]
    records[13] = replace(records[13], instant_us=records[12].instant_us - step_us)
    world.store("1", 0, 300)
    world.backup(1, "1", 40, 60, started_us=START_US)
    return world


def test_commit_instants_need_not_be_monotonic() -> None:
    world = disordered(SLACK_US)
    # Commit 13 (instant 1198) lies behind commit 12 (instant 1200): at 1199 the server leaves out both.
    assert reached(world, time_target(1199))[-1] == 11
    assert reached(world, time_target(1200))[-1] == 13


def test_a_time_to_which_the_clock_was_set_back_is_refused_with_both_positions() -> None:
    world = disordered(50 * SECOND)
    with pytest.raises(TargetUnreachable, match="more than once") as caught:
        plan(world, time_target(1160))
    first, last = (hint.partition(":  ")[0].split()[1].rstrip(":") for hint in caught.value.hints)
    assert [first, last] == ["1:0x78", "1:0x82"]
    before = Target(TargetKind.POSITION, position=Position("", 0x78), inclusive=False)
    assert reached(world, before)[-1] == 11
    assert reached(world, Target(TargetKind.POSITION, position=Position("", 0x82)))[-1] == 13
    # Control: all other times are what they were.
    assert reached(world, time_target(1140))[-1] == 11
    assert reached(world, time_target(1250))[-1] == 13


def steps(world: World, **more: object) -> list[tuple[int, int, int]]:
    """Steps back as offset and seconds."""
    history = replace(world.history(), **more)  # type: ignore[arg-type]
    found = steps_back(Reach(Target(TargetKind.LATEST), history, world))
    return [(at, (low - START_US) // SECOND, (high - START_US) // SECOND) for at, low, high in found]


def test_each_step_of_the_clock_is_told_once_and_as_far_as_instants_exist_twice() -> None:
    world = World(records={"1": line(30)})
    records = world.records["1"]
    for number in range(12, 30):
        records[number] = replace(records[number], instant_us=START_US + (number - 8) * 100 * SECOND)
    world.backup(1, "1", 40, 60, started_us=START_US)
    world.store("1", 0, 120)
    for first in range(120, 160, 10):
        world.store("1", first, first + 10)
    assert steps(world) == [(120, 400, 700)], "the clock is at 700 again, and not yet at 1100"
    for first in range(160, 300, 20):
        world.store("1", first, first + 20)
    assert steps(world) == [(120, 400, 1100)]
    assert steps(world, instants_at_commit=False) == []


def test_stored_log_that_overlaps_is_no_step_of_the_clock() -> None:
    world = World(records={"1": line(30)})
    world.backup(1, "1", 40, 60, started_us=START_US)
    for first, last in ((0, 200), (100, 300), (0, 300)):
        world.store("1", first, last)
    assert steps(world) == []


def test_a_time_that_the_clock_has_not_come_to_again_exists_once() -> None:
    world = World(records={"1": line(20)})
    world.records["1"] += [
        Record(200 + 10 * n, 210 + 10 * n, START_US + (500 + n) * SECOND, 2000 + n) for n in range(10)
    ]
    world.store("1", 0, 300)
    world.backup(1, "1", 40, 60, started_us=START_US + 395 * SECOND)
    assert reached(world, time_target(1850))[-1] == 18
    assert any("set back" in note for note in plan(world, time_target(1850)).notes)
    world.records["1"].append(Record(300, 310, START_US + 1900 * SECOND, 3000))
    world.store("1", 300, 310)
    with pytest.raises(TargetUnreachable, match="more than once"):
        plan(world, time_target(1850))


def test_where_a_commit_has_the_instant_of_its_statement_a_long_one_is_no_step_of_the_clock() -> None:
    world = disordered(500 * SECOND)
    history = replace(world.history(), instants_at_commit=False)
    made = plan_recovery(time_target(1160), history, world)
    assert commits_of(replay(world, made))[-1] == 1011
    assert any("began before the target" in note for note in made.notes)


def test_a_time_before_the_first_backup_is_refused_and_names_the_earliest() -> None:
    with pytest.raises(TargetUnreachable) as caught:
        plan(simple_world(), time_target(300))
    assert caught.value.before is None
    assert caught.value.after is not None
    assert caught.value.after.instant == at(500)
    assert caught.value.after.position == "1:0x3c"
    assert any("nearest reachable state after" in hint for hint in caught.value.hints)


def test_a_time_during_the_backup_is_refused_since_the_data_would_be_newer() -> None:
    with pytest.raises(TargetUnreachable, match="target time"):
        plan(simple_world(), time_target(450))
    assert reached(simple_world(), time_target(500))[-1] == 5


def test_a_time_up_to_which_the_log_is_known_to_be_complete_replays_all_of_it() -> None:
    assert reached(simple_world(), time_target(2950))[-1] == 29


def test_a_time_after_the_end_of_the_log_is_refused_and_names_the_end() -> None:
    with pytest.raises(TargetUnreachable) as caught:
        plan(simple_world(), time_target(2996))
    assert caught.value.after is None
    assert caught.value.before is not None
    assert caught.value.before.instant == at(2995)
    assert "after the end of the durable log" in caught.value.detail


def world_with_hole() -> World:
    """The log misses [100, 150); backups before and after it."""
    world = World(records={"1": line(30)})
    world.store("1", 0, 100)
    world.store("1", 150, 300)
    world.backup(1, "1", 40, 60, started_us=START_US + 395 * SECOND)
    world.backup(2, "1", 180, 200, started_us=START_US + 1795 * SECOND)
    return world


@pytest.mark.parametrize(
    "target",
    [
        time_target(1200),
        Target(TargetKind.POSITION, position=Position("1", 120)),
        Target(TargetKind.POSITION, position=Position("1", 170)),
    ],
)
def test_a_target_in_or_after_a_hole_is_refused_with_both_neighbours(target: Target) -> None:
    with pytest.raises(TargetUnreachable) as caught:
        plan(world_with_hole(), target)
    assert caught.value.before is not None
    assert caught.value.after is not None
    assert caught.value.before.position == "1:0x64"
    assert caught.value.before.instant == at(900)
    assert caught.value.after.position == "1:0xc8"
    assert caught.value.after.instant == at(1900)


def test_the_cause_of_a_recorded_hole_is_told() -> None:
    world = world_with_hole()
    history = replace(world.history(), holes=(LogHole("1", 100, 150, "the slot was lost"),))
    with pytest.raises(TargetUnreachable) as caught:
        plan_recovery(time_target(1200), history, world)
    assert "the slot was lost" in caught.value.detail


def test_targets_on_both_sides_of_a_hole_use_the_backup_of_their_side() -> None:
    world = world_with_hole()
    assert plan(world, time_target(850)).backup.backup_id == "B1"
    assert plan(world, time_target(2550)).backup.backup_id == "B2"
    assert plan(world, Target(TargetKind.LATEST)).backup.backup_id == "B2"


def test_latest_is_refused_when_the_last_log_cannot_be_reached() -> None:
    world = world_with_hole()
    del world.backups[1]
    with pytest.raises(TargetUnreachable, match="latest") as caught:
        plan(world, Target(TargetKind.LATEST))
    assert caught.value.before is not None
    assert caught.value.before.position == "1:0x64"


def test_latest_stops_after_the_last_complete_record() -> None:
    world = World(records={"1": line(30)})
    world.store("1", 0, 255)
    world.backup(1, "1", 40, 60)
    made = plan(world, Target(TargetKind.LATEST))
    assert (made.stop.recovery_end, made.stop.inclusive, made.stop.log_end) == (240, True, 250)
    assert "last commit" in made.notes[0]


def test_immediate_takes_the_newest_backup_that_has_its_log() -> None:
    world = simple_world()
    world.backup(2, "1", 290, 310)
    made = plan(world, Target(TargetKind.IMMEDIATE))
    assert made.backup.backup_id == "B1"
    assert (made.stop.recovery_end, made.stop.inclusive) == (60, False)
    assert reached(world, Target(TargetKind.IMMEDIATE))[-1] == 5
    assert any("B2" in note for note in made.notes)


def test_a_position_is_taken_exactly() -> None:
    world = simple_world()
    position = Position("1", 150)
    assert reached(world, Target(TargetKind.POSITION, position=position))[-1] == 15
    assert reached(world, Target(TargetKind.POSITION, position=position, inclusive=False))[-1] == 14


def test_a_position_at_the_very_end_is_reached_exclusively_only() -> None:
    world = simple_world()
    end = Position("1", 300)
    assert reached(world, Target(TargetKind.POSITION, position=end, inclusive=False))[-1] == 29
    with pytest.raises(TargetUnreachable):
        plan(world, Target(TargetKind.POSITION, position=end))


def test_a_position_where_no_record_begins_includes_no_further_one() -> None:
    """A server would replay the next record for it: the commit at 120 for the position 115."""
    made = plan(simple_world(), Target(TargetKind.POSITION, position=Position("1", 115)))
    assert (made.stop.recovery_end, made.stop.inclusive) == (115, False)
    assert made.first_left_out is not None
    assert made.first_left_out.offset == 120
    exact = plan(simple_world(), Target(TargetKind.POSITION, position=Position("1", 120)))
    assert (exact.stop.recovery_end, exact.stop.inclusive) == (120, True)


def test_a_position_before_the_stop_of_the_first_backup_is_refused() -> None:
    with pytest.raises(TargetUnreachable) as caught:
        plan(simple_world(), Target(TargetKind.POSITION, position=Position("1", 59)))
    assert caught.value.after is not None
    assert caught.value.after.position == "1:0x3c"


def test_a_transaction_is_found_by_its_commit() -> None:
    world = simple_world()
    assert reached(world, Target(TargetKind.TRANSACTION, transaction=1012))[-1] == 12
    assert reached(world, Target(TargetKind.TRANSACTION, transaction=1012, inclusive=False))[-1] == 11


def test_an_unknown_or_too_old_transaction_is_refused() -> None:
    with pytest.raises(TargetUnreachable, match="not in the stored log"):
        plan(simple_world(), Target(TargetKind.TRANSACTION, transaction=77))
    with pytest.raises(TargetUnreachable, match="not reachable"):
        plan(simple_world(), Target(TargetKind.TRANSACTION, transaction=1005))


def world_with_names(*at_offsets: int) -> World:
    """Restore points called "release" in place of some commits."""
    world = World(records={"1": line(30)})
    for offset in at_offsets:
        old = world.records["1"][offset // 10]
        world.records["1"][offset // 10] = Record(old.offset, old.end, old.instant_us, name="release")
    world.store("1", 0, 300)
    world.backup(1, "1", 40, 60)
    return world


def test_a_named_restore_point_is_the_point_itself() -> None:
    world = world_with_names(150)
    made = plan(world, Target(TargetKind.NAME, name="release"))
    assert (made.stop.recovery_end, made.stop.inclusive) == (150, True)
    with pytest.raises(TargetUnreachable, match="not in the stored log"):
        plan(world, Target(TargetKind.NAME, name="other"))


def test_a_name_that_occurs_twice_is_refused_with_the_list_unless_a_position_is_given() -> None:
    world = world_with_names(150, 200)
    with pytest.raises(TargetUnreachable, match="ambiguous") as caught:
        plan(world, Target(TargetKind.NAME, name="release"))
    assert "1:0x96" in caught.value.detail
    assert "1:0xc8" in caught.value.detail
    made = plan(world, Target(TargetKind.NAME, name="release", position=Position("1", 200)))
    assert made.stop.recovery_end == 200


def world_with_branches(*, with_history: bool = True) -> World:
    """Branch 2 leaves branch 1 at 200; branch 1 goes on to 260 without it."""
    world = World(records={"1": line(26), "2": line(30, first_offset=200, first_number=40)})
    if with_history:
        world.ancestors["2"] = (BranchPoint("1", 200),)
    world.store("1", 0, 130)
    world.store("1", 130, 260)
    world.store("2", 200, 400)
    world.backup(1, "1", 40, 60)
    return world


def test_a_path_crosses_to_the_newest_branch_at_the_switch() -> None:
    world = world_with_branches()
    made = plan(world, time_target(4550))
    assert made.histories == ("2",)
    assert [(one.segment.branch, one.first, one.last) for one in made.extents] == [
        ("1", 40, 130),
        ("1", 130, 200),
        ("2", 200, 270),
    ]
    assert [one - 1000 for one in commits_of(replay(world, made))][-8:] == [18, 19, 40, 41, 42, 43, 44, 45]


def test_the_older_branch_is_followed_when_asked_for() -> None:
    world = world_with_branches()
    assert reached(world, time_target(2450, branch="1"))[-1] == 24
    position = Target(TargetKind.POSITION, position=Position("1", 240))
    assert reached(world, position)[-1] == 24


def test_a_branch_that_another_one_outlives_is_not_taken_for_the_source() -> None:
    """A restored copy was captured: branch 2 ends at 4200 s, and the source's branch 1 goes on after that."""
    world = World(records={"1": line(60), "2": line(3, first_offset=200, first_number=40)})
    world.ancestors["2"] = (BranchPoint("1", 200),)
    world.store("1", 0, 600)
    world.store("2", 200, 230)
    world.backup(1, "1", 40, 60)
    with pytest.raises(TargetUnreachable, match="branches 1 and 2 both go on") as caught:
        plan(world, Target(TargetKind.LATEST))
    assert "--branch 1" in caught.value.hints[0]
    assert reached(world, Target(TargetKind.LATEST, branch="1"))[-1] == 59
    assert reached(world, Target(TargetKind.LATEST, branch="2"))[-1] == 42


def test_a_position_that_the_chosen_branch_never_had_is_refused() -> None:
    with pytest.raises(TargetUnreachable, match="not on the way"):
        plan(world_with_branches(), Target(TargetKind.POSITION, position=Position("1", 240), branch="2"))


def test_the_server_is_led_to_the_branch_of_the_stop_and_no_further() -> None:
    world = world_with_branches()
    for target in (time_target(1250), Target(TargetKind.IMMEDIATE)):
        made = plan(world, target)
        assert (made.branch, made.path, made.histories) == ("1", (("1", 0, None),), ())
    assert reached(world, time_target(1250))[-1] == 12
    assert plan(world, time_target(4550)).branch == "2"


def test_the_end_of_a_branch_is_taken_from_its_child_where_only_that_has_it() -> None:
    world = World(records={"1": line(26), "2": [*line(7, first_offset=130, first_number=13)]})
    world.records["2"] += line(20, first_offset=200, first_number=40)
    world.ancestors["2"] = (BranchPoint("1", 200),)
    world.store("1", 0, 130)
    world.store("2", 130, 400)
    world.backup(1, "1", 40, 60)
    made = plan(world, time_target(1550))
    assert (made.branch, [one.segment.branch for one in made.extents]) == ("1", ["1", "2"])
    assert reached(world, time_target(1550))[-1] == 15
    # The child's last record says nothing of the parent's part: a server that is led to the child, and stops
    # before it began, writes a history in which the child ends before it begins.
    before = Target(TargetKind.POSITION, position=Position("", 155), inclusive=False)
    made = plan(world, before)
    assert (made.branch, made.stop.log_end) == ("1", 200)
    assert reached(world, before)[-1] == 15


def test_a_range_does_not_offer_times_that_a_clock_set_back_has_yet_to_reach_again() -> None:
    again = [Record(200 + 10 * n, 210 + 10 * n, START_US + (500 + n) * SECOND, 2000 + n) for n in range(10)]
    world = World(records={"1": [*line(20), *again]})
    world.store("1", 0, 300)
    world.backup(1, "1", 40, 60, started_us=START_US + 395 * SECOND)
    world.backup(2, "1", 230, 250, started_us=START_US + 503 * SECOND)
    (offered,) = Reach(Target(TargetKind.LATEST), world.history(), world).ranges()
    assert instant_from_us(offered.end_us) == at(509)
    for seconds, why in ((509, "more than once"), (510, "not reachable"), (1500, "not reachable")):
        with pytest.raises(TargetUnreachable, match=why):
            plan(world, time_target(seconds))
    # Who names the backup means the clock after it.
    assert reached(world, time_target(509, backup_id="B2"))[-1] == 1009


def test_each_time_that_is_offered_can_be_had_when_the_log_does_not_say_yet_how_far_it_goes() -> None:
    world = World(records={"1": line(26)})
    world.store("1", 0, 260)
    started_us = START_US + 2595 * SECOND
    world.backup(1, "1", 240, 260, started_us=started_us, complete_until_us=started_us)
    (offered,) = Reach(Target(TargetKind.LATEST), world.history(), world).ranges()
    assert (offered.begin_us, offered.end_us) == (started_us, started_us)
    assert reached(world, time_target(2595))[-1] == 25
    with pytest.raises(TargetUnreachable):
        plan(world, time_target(2595.5))


def test_no_time_is_offered_where_none_is_known() -> None:
    """A replica does not know what its primary acknowledges: its clock says nothing of the log."""
    world = World(records={"1": line(26)})
    world.store("1", 0, 260)
    world.backup(1, "1", 240, 260, started_us=START_US + 2595 * SECOND)
    (offered,) = Reach(Target(TargetKind.LATEST), world.history(), world).ranges()
    assert (offered.begin_us, offered.end_us) == (0, 0)
    with pytest.raises(TargetUnreachable):
        plan(world, time_target(2595))
    assert reached(world, Target(TargetKind.LATEST))[-1] == 25


def test_immediate_needs_no_log_after_the_backup() -> None:
    world = World(records={"1": line(30)})
    world.store("1", 0, 60)
    world.backup(1, "1", 40, 60)
    made = plan(world, Target(TargetKind.IMMEDIATE))
    assert (made.stop.recovery_end, made.stop.inclusive, made.stop.log_end) == (50, True, 60)
    assert reached(world, Target(TargetKind.IMMEDIATE))[-1] == 5


def test_a_missing_history_file_is_a_refusal() -> None:
    with pytest.raises(TargetUnreachable, match="history of branch 2"):
        plan(world_with_branches(with_history=False), Target(TargetKind.LATEST))


def test_a_backup_on_the_parent_counts_only_when_it_stops_before_the_switch() -> None:
    world = world_with_branches()
    world.backup(2, "1", 190, 230)
    assert plan(world, time_target(4550)).backup.backup_id == "B1"
    assert plan(world, time_target(2450, branch="1")).backup.backup_id == "B2"


def test_contradicting_histories_are_refused() -> None:
    world = world_with_branches()
    world.records["3"] = line(10, first_offset=300, first_number=70)
    world.ancestors["3"] = (BranchPoint("1", 180), BranchPoint("2", 300))
    world.store("3", 300, 400)
    with pytest.raises(TargetUnreachable, match="contradicts"):
        plan(world, Target(TargetKind.LATEST))


def test_a_chosen_backup_is_used_or_refused_but_never_replaced() -> None:
    world = simple_world()
    world.backup(2, "1", 140, 160, started_us=START_US + 1395 * SECOND)
    assert plan(world, time_target(2050)).backup.backup_id == "B2"
    assert plan(world, time_target(2050, backup_id="B1")).backup.backup_id == "B1"
    with pytest.raises(TargetUnreachable):
        plan(world, time_target(1050, backup_id="B2"))
    with pytest.raises(UnknownBackup):
        plan(world, time_target(1050, backup_id="B9"))


def test_the_plan_tells_itself_to_people_and_programs() -> None:
    made = plan(simple_world(), time_target(1050))
    assert any("B1" in one for one in made.describe())
    assert made.as_dict()["recovery_end"] == 110
