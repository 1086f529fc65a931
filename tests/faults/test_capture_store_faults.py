"""
Every store operation of capture fails in turn, before and after its effect, for a moment or for good.

The server recycles whatever was acknowledged, at once: log that was acknowledged too early would be gone.
After each fault the next run ends with every byte stored, over two branches, and with no hole but the one
that the server itself had torn before.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from cloudsave.errors import StorePermission, StoreUnavailable
from cloudsave.logs.capture import run_capture
from cloudsave.logs.ledger import file_begin
from cloudsave.logs.status import CaptureOptions
from cloudsave.model.history import Ancestry
from cloudsave.model.ledger import Ledger, read_extents
from cloudsave.model.log import LogHole
from cloudsave.model.position import Position
from cloudsave.repository.crypto import LineageKeys
from cloudsave.repository.lineage import Lineage
from cloudsave.store.api import ObjectStore
from cloudsave.store.faulty import FaultPlan, Faulty
from cloudsave.store.memory import MemoryStore
from tests.unit.logs.fakes import IDENTITY, LOG_FILE_BYTES, FakeClock, FakeDialect, FakeServer, FakeSource
from tests.unit.repository.samples import REPOSITORY_KEY, SeededClock

OPTIONS = CaptureOptions(object_bytes_max=LOG_FILE_BYTES)
START = LOG_FILE_BYTES * 3
OPERATIONS_MAX = 300
"""Limit: a run of this size has fewer; more means that the loop does not end."""

Step = Callable[[], bool]


class DeathError(BaseException):
    """The process died at this operation."""


def away(operation: str) -> BaseException:
    """The store cannot be reached."""
    return StoreUnavailable(f"could not {operation}")


def refused(operation: str) -> BaseException:
    """The store's credentials have been taken away."""
    return StorePermission(f"store refused to {operation}")


class RecyclingSource(FakeSource):
    """Its server removes log as soon as it was acknowledged, but for the file that is being written."""

    def acknowledge(self, position: Position) -> None:
        """Acknowledge, and recycle."""
        super().acknowledge(position)
        if self.server.branch == position.branch:
            held = file_begin(position.offset, LOG_FILE_BYTES)
            self.server.removed_before = max(self.server.removed_before, held)


class World:
    """A server, a store and runs of capture between them."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.server = FakeServer(end=START + 10_000, slot_offset=START + 5000)
        self.store = MemoryStore()

    def lineage(self, store: ObjectStore | None = None) -> Lineage:
        """The lineage on the store itself, or as seen through a faulty one."""
        keys = LineageKeys.derive(REPOSITORY_KEY, IDENTITY.lineage)
        return Lineage(store or self.store, keys, clock=SeededClock(1))

    def run(self, *steps: Step, store: ObjectStore | None = None) -> None:
        """One run of capture; `steps` are worked off whenever all log has been streamed."""
        source = RecyclingSource(self.server, self.clock, threading.Event())
        source.script = iter(steps)
        run_capture(
            source,
            self.lineage(store),
            FakeDialect(),
            OPTIONS,
            stop=source.stop,
            clock=self.clock,
            observer=lambda status: None,
        )

    def write(self, count: int) -> Step:
        """A step: the server writes log."""

        def step() -> bool:
            self.server.end += count
            return True

        return step

    def promote(self) -> bool:
        """A step: the server goes on with a new branch."""
        self.server.promote(str(len(self.server.points) + 2))
        return True

    def durable(self) -> bool:
        """A step: wait until everything is durable."""
        branch = self.server.branch
        return max((one.last for one in self.lineage().logs() if one.branch == branch), default=0) >= (
            self.server.end
        )

    def finish(self) -> None:
        """A run without faults to the end of the server's log."""
        self.run(self.durable)

    def stored(self) -> bytes:
        """All log from the last hole to the end, read along the branches. Asserts that it is whole."""
        ancestry = Ancestry({self.server.branch: self.server.points})
        lineage = self.lineage()
        for segment in lineage.logs():
            assert lineage.read_log(segment) == self.server.read(segment.branch, segment.first, segment.last)
        path = ancestry.lineage_of(self.server.branch)
        cover = Ledger(lineage.logs()).cover(path, self.first_needed(), self.server.end)
        assert cover.complete, f"log ends at {cover.end:#x} of branch {cover.branch}"
        return read_extents(lineage.read_log, cover.extents)

    def first_needed(self) -> int:
        """Where the log begins that must be whole: behind the last hole."""
        return max([START, *(hole.last for hole in self.lineage().holes())])


def changing_world() -> tuple[World, list[Step]]:
    """Log in pieces and in whole files, a promotion, more log; on top of what an earlier run stored."""
    world = World()
    world.run(world.durable, world.write(7000), world.durable)
    more = [world.write(50_000), world.durable, world.write(900), world.durable]
    return world, [*more, world.promote, world.write(70_000), world.durable]


def torn_world() -> tuple[World, list[Step]]:
    """The server has removed log that was never captured."""
    world = World()
    world.run(world.durable)
    world.write(LOG_FILE_BYTES * 10)()
    world.server.removed_before = START + LOG_FILE_BYTES * 4
    world.server.slot_offset = START + LOG_FILE_BYTES * 9 + 77
    return world, [world.durable, world.write(3000), world.durable]


def no_holes(world: World) -> list[LogHole]:
    """What a changing world must have recorded."""
    return []


def the_one_hole(world: World) -> list[LogHole]:
    """What a torn world must have recorded."""
    (hole,) = world.lineage().holes()
    assert (hole.first, hole.last) == (START + 10_000, START + LOG_FILE_BYTES * 4)
    return [hole]


Made = Callable[[], tuple[World, list[Step]]]


def faulted_run(made: Made, holes: Callable[[World], list[LogHole]], plan: FaultPlan) -> None:
    """A run under a plan of faults, then one without, and the judgement."""
    world, steps = made()
    threads = set(threading.enumerate())
    failure = ""
    try:
        world.run(*steps, store=Faulty(world.store, plan))
    except (StorePermission, DeathError) as error:
        failure = str(error)
    assert not failure or plan.fired
    assert set(threading.enumerate()) <= threads, "a thread is left behind"
    world.finish()
    assert world.lineage().holes() == holes(world)
    expected = world.server.read(world.server.branch, world.first_needed(), world.server.end)
    assert world.stored() == expected


@pytest.mark.parametrize("after_effect", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    ("error", "outage"),
    [(away, False), (refused, True), (DeathError, True)],
    ids=["away", "refused", "death"],
)
@pytest.mark.parametrize(
    ("made", "holes", "operations_min"),
    [(changing_world, no_holes, 20), (torn_world, the_one_hole, 20)],
    ids=["changing", "torn"],
)
@pytest.mark.fault(
    "store-operation-fails-capture",
    "capture-put-not-answered",
    control="test_log_acknowledged_before_it_is_durable_would_be_seen",
)
def test_every_operation_of_capture_may_fail(
    made: Made,
    holes: Callable[[World], list[LogHole]],
    operations_min: int,
    error: Callable[[str], BaseException],
    outage: bool,
    after_effect: bool,
) -> None:
    for fail_at in range(1, OPERATIONS_MAX):
        plan = FaultPlan(fail_at=fail_at, after_effect=after_effect, outage=outage, error=error)
        faulted_run(made, holes, plan)
        if not plan.fired:
            break
    assert not plan.fired
    assert fail_at > operations_min
    verbs = {operation.split()[0] for operation in plan.trace}
    assert {"put", "get", "list"} <= verbs


def test_log_acknowledged_before_it_is_durable_would_be_seen() -> None:
    """Negative control: an acknowledgement that runs ahead makes this server drop log, and a hole appears."""
    world, _ = changing_world()
    world.write(LOG_FILE_BYTES * 3)()
    ahead = RecyclingSource(world.server, world.clock, threading.Event())
    ahead.acknowledge(Position("1", world.server.end))
    world.finish()
    assert len(world.lineage().holes()) == 1
    with pytest.raises(AssertionError):
        assert world.lineage().holes() == no_holes(world)


def test_a_log_object_that_vanishes_would_be_seen() -> None:
    """Negative control: the judgement reads what is stored."""
    world, steps = changing_world()
    world.run(*steps)
    lineage = world.lineage()
    victim = next(one for one in lineage.logs() if one.last - one.first == LOG_FILE_BYTES)
    inside = [one for one in lineage.logs() if victim.first <= one.first < victim.last]
    for name in [name for name in world.store.objects if any(f"{one.first:016x}-" in name for one in inside)]:
        world.store.delete(name)
    with pytest.raises(AssertionError):
        world.stored()
