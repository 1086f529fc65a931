"""Plans against a brute-force model: random logs, branches, cuts, holes, backups and targets."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from tests.unit.recovery.synthetic_log import SECOND, START_US, Record, World, commits_of, replay

from cloudsave.errors import TargetUnreachable
from cloudsave.model.history import Ancestry, BranchPoint
from cloudsave.model.log import instant_from_us
from cloudsave.model.position import Position
from cloudsave.model.target import Target, TargetKind
from cloudsave.recovery.history import BackupSummary
from cloudsave.recovery.plan import plan_recovery
from cloudsave.recovery.readings import SLACK_US

JITTER_SECONDS = 200
STEP_SECONDS = 20


@st.composite
def records(draw: st.DrawFn, offset: int, number: int, count: int) -> list[Record]:
    """Records of random length, most of them commits, with instants that go back and forth."""
    found = []
    for n in range(count):
        end = offset + draw(st.integers(3, 30))
        instant = (
            START_US
            + ((number + n) * STEP_SECONDS + draw(st.integers(-JITTER_SECONDS, JITTER_SECONDS))) * SECOND
        )
        kind = draw(st.integers(0, 3))
        found.append(Record(offset, end, instant, number + n + 1) if kind else Record(offset, end))
        offset = end
    return found


@st.composite
def worlds(draw: st.DrawFn) -> World:
    """One to three branches, each leaving the one before at some record; cut log, some objects missing."""
    world = World()
    first_offset, number = 0, 0
    points: tuple[BranchPoint, ...] = ()
    for name in ("1", "2", "3")[: draw(st.integers(1, 3))]:
        world.records[name] = draw(records(first_offset, number, draw(st.integers(2, 14))))
        world.ancestors[name] = points
        leave = draw(st.sampled_from(world.records[name]))
        first_offset, number = leave.offset, number + 20
        points = (*points, BranchPoint(name, leave.offset))
    del world.ancestors["1"]
    for name, of_branch in world.records.items():
        _store(draw, world, name, of_branch)
    for number in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(sorted(world.records)))
        of_branch = world.records[name]
        begin = draw(st.integers(0, len(of_branch) // 2))
        end = draw(st.integers(begin, min(begin + 3, len(of_branch) - 1)))
        started = next((one.instant_us for one in of_branch[begin:] if one.transaction), START_US)
        skew = draw(st.integers(-60, 60)) * SECOND
        world.backup(number, name, of_branch[begin].offset, of_branch[end].end, started_us=started + skew)
    return world


def _store(draw: st.DrawFn, world: World, name: str, of_branch: list[Record]) -> None:
    first, last = of_branch[0].offset, of_branch[-1].end
    cuts = sorted({first, last, *draw(st.lists(st.integers(first, last), max_size=5))})
    for begin, end in itertools.pairwise(cuts):
        if draw(st.integers(0, 11)):
            ended = [one for one in of_branch if one.transaction and one.end <= end]
            complete = max((one.instant_us for one in ended), default=0)
            later = [one.instant_us for one in of_branch if one.transaction and one.end > end]
            if complete and all(one > complete + 2 * SECOND for one in later):
                complete += draw(st.integers(0, 1)) * SECOND
            elif later and min(later) <= complete:
                complete = 0
            world.store(name, begin, end, complete_until_us=complete)


@dataclass(frozen=True)
class Known:
    """What a backup leads to, by brute force."""

    backup: BackupSummary
    contained: list[Record]
    """Commits in [start, stop)."""
    after: list[Record]
    """Complete durable records at or after the stop."""
    end: int


def known_of(world: World, branch: str, backup: BackupSummary) -> Known | None:
    """Follow the log byte by byte; None where the backup is not on the path or cannot be made consistent."""
    path = Ancestry(world.ancestors).lineage_of(branch)
    for place in (backup.start, backup.stop):
        if not any(step == place.branch and (end is None or place.offset <= end) for step, _, end in path):
            return None
    names = [step for step, _, _ in path]
    cursor = backup.start.offset
    while True:
        here = next(
            n for n, (_, begin, end) in enumerate(path) if cursor >= begin and (end is None or cursor < end)
        )
        usable = names[here:]
        if not any(one.branch in usable and one.first <= cursor < one.last for one in world.segments):
            break
        cursor += 1
    if cursor < backup.stop.offset:
        return None
    inside = [
        one for one in world.path_records(branch) if backup.start.offset <= one.offset and one.end <= cursor
    ]
    return Known(
        backup,
        [one for one in inside if one.transaction and one.offset < backup.stop.offset],
        [one for one in inside if one.offset >= backup.stop.offset],
        cursor,
    )


def candidates(world: World, branch: str) -> list[Known]:
    """Usable backups, the newest stop first."""
    ordered = sorted(world.backups, key=lambda one: (one.stop.offset, one.start.offset), reverse=True)
    found = [known_of(world, branch, one) for one in ordered]
    return [one for one in found if one is not None]


def wanted_at(
    world: World, branch: str, instant_us: int, *, inclusive: bool
) -> tuple[list[int], bool, bool] | None:
    """
    The commits that a time target must bring, from the definition, whether a later commit proves that the log
    is complete up to it, and whether the clock has been there more than once; None where the target is to be
    refused.
    """
    for known in candidates(world, branch):
        commits = [one for one in known.after if one.transaction]
        contained = max((one.instant_us for one in known.contained), default=0)
        began = known.backup.started_us
        if instant_us < max(contained, began) or (contained == instant_us and not inclusive):
            continue
        for number, one in enumerate(commits):
            if one.instant_us > instant_us or (one.instant_us == instant_us and not inclusive):
                twice = reads_twice(world, branch, known.backup.start.offset, one.offset, instant_us)
                return commits_of([*known.contained, *commits[:number]]), True, twice
        twice = reads_twice(world, branch, known.backup.start.offset, known.end, instant_us)
        return commits_of([*known.contained, *commits]), False, twice
    return None


def reads_twice(world: World, branch: str, start: int, stop: int, instant_us: int) -> bool:
    """Whether later commits are stored before `start`, or earlier ones from `stop` on and later log then."""
    path = Ancestry(world.ancestors).lineage_of(branch)
    on_path = [
        segment
        for segment in world.segments
        for step, begin, end in path
        if step == segment.branch and segment.last > begin and (end is None or segment.first < end)
    ]
    listed = {(one.branch, commit.offset) for one in on_path for commit in world.indexes[one].commits}
    commits = [
        one
        for step, begin, end in path
        for one in world.records[step]
        if (step, one.offset) in listed and begin <= one.offset and (end is None or one.offset < end)
    ]
    if any(one.offset < start and one.instant_us > instant_us + SLACK_US for one in commits):
        return True
    earlier = [
        one.offset for one in commits if one.offset >= stop and one.instant_us <= instant_us - SLACK_US
    ]
    if not earlier:
        return False
    marks = [world.indexes[one].complete_until_us for one in on_path if one.last > max(earlier)]
    later = [one.instant_us for one in commits if one.offset > max(earlier)]
    return max([*marks, *later], default=0) > instant_us


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(worlds(), st.integers(-3, 60), st.booleans(), st.data())
def test_a_time_target_brings_exactly_the_wanted_commits(
    world: World, seconds: int, inclusive: bool, data: st.DataObject
) -> None:
    branch = data.draw(st.sampled_from(sorted(world.records)))
    near = data.draw(st.sampled_from([one.instant_us for one in world.path_records(branch)])) or START_US
    instant_us = near + seconds // 3 * SECOND
    target = Target(TargetKind.TIME, time=instant_from_us(instant_us), inclusive=inclusive, branch=branch)
    wanted = wanted_at(world, branch, instant_us, inclusive=inclusive)
    try:
        plan = plan_recovery(target, world.history(), world)
    except TargetUnreachable as refusal:
        if "more than once" in refusal.message:
            event("more than once")
            assert wanted is not None
            assert wanted[2]
            return
        event("refused")
        assert wanted is None or not wanted[1], "refused although a later commit is stored"
        return
    event("planned")
    assert wanted is not None
    assert not wanted[2], "planned although the clock was there more than once"
    assert commits_of(replay(world, plan)) == wanted[0]
    if plan.last_commit is not None:
        assert plan.last_commit.transaction == wanted[0][-1]


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(worlds(), st.integers(-4, 4), st.booleans(), st.data())
def test_a_position_target_brings_exactly_the_records_up_to_it(
    world: World, distance: int, inclusive: bool, data: st.DataObject
) -> None:
    branch = data.draw(st.sampled_from(sorted(world.records)))
    near = data.draw(st.sampled_from(world.path_records(branch)))
    offset = max(0, near.end + max(0, abs(distance) - 2) * (1 if distance > 0 else -1))
    target = Target(TargetKind.POSITION, position=Position("", offset), inclusive=inclusive, branch=branch)
    usable = [one for one in candidates(world, branch) if one.backup.stop.offset <= offset]
    try:
        plan = plan_recovery(target, world.history(), world)
    except TargetUnreachable:
        event("refused")
        assert not any(one.offset >= offset for known in usable for one in known.after)
        return
    event("planned")
    assert plan.backup.stop.offset <= offset
    applied = replay(world, plan)
    path = [one for one in world.path_records(branch) if one.offset >= plan.log_begin]
    before = [one for one in path if one.offset < offset]
    following = [one for one in path if one.offset >= offset]
    assert plan.stop.replayed_min <= applied[-1].end if applied else True
    if inclusive and following and following[0] in applied:
        assert applied == [*before, following[0]]
    else:
        assert applied == before
        assert not inclusive or before[-1].end > offset, "the record at the position was left out"


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(worlds())
def test_latest_brings_every_complete_record_of_the_newest_branch_or_refuses(world: World) -> None:
    branch = max({one.branch for one in world.segments} | {one.stop.branch for one in world.backups})
    target = Target(TargetKind.LATEST, branch=branch)
    try:
        plan = plan_recovery(target, world.history(), world)
    except TargetUnreachable:
        event("refused")
        return
    event("planned")
    # An ancestor where the last stored record lies before the switch: the history is the same up to there.
    assert plan.branch <= branch
    stored_end = max((one.last for one in world.segments if one.branch == branch), default=0)
    complete = [
        one
        for one in world.path_records(branch)
        if one.offset >= plan.log_begin and one.end <= max(stored_end, plan.stop.log_end)
    ]
    assert replay(world, plan) == complete


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(worlds(), st.booleans(), st.data())
def test_a_transaction_target_ends_with_that_transaction(
    world: World, inclusive: bool, data: st.DataObject
) -> None:
    branch = max({one.branch for one in world.segments} | {one.stop.branch for one in world.backups})
    known_to_any = {one.offset for known in candidates(world, branch) for one in known.after}
    commits = [one for one in world.path_records(branch) if one.transaction]
    likely = [one.transaction for one in commits if one.offset in known_to_any]
    transaction = data.draw(st.sampled_from(likely or [one.transaction for one in commits] or [999]))
    target = Target(TargetKind.TRANSACTION, transaction=transaction, inclusive=inclusive, branch=branch)
    try:
        plan = plan_recovery(target, world.history(), world)
    except TargetUnreachable:
        event("refused")
        for known in candidates(world, branch):
            assert transaction not in commits_of(known.after)
        return
    event("planned")
    path = commits_of(one for one in world.path_records(plan.branch) if one.offset >= plan.log_begin)
    wanted = path[: path.index(transaction) + (1 if inclusive else 0)]
    assert commits_of(replay(world, plan)) == wanted
