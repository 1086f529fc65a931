"""Two servers that call a branch by the same number are told apart, and never mixed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cloudsave.errors import LogConflict
from cloudsave.logs.status import CaptureOptions
from cloudsave.model.identity import Role
from cloudsave.model.position import Position
from tests.unit.logs.fakes import LOG_FILE_BYTES, FakeServer, unavailable
from tests.unit.logs.test_capture import START, World


def failed_over(*, more: int = 9000) -> World:
    """Branch 2 of the first server is captured, after the begin of branch 1."""
    world = World()
    world.run(world.durable)
    world.server.promote("2")
    world.write(more)
    world.run(world.durable)
    return world


def twin(world: World) -> FakeServer:
    """Another server that was promoted at the same place to the same number, and wrote something else."""
    server = replace(world.server, slot_offset=None, seeds={"2": "the other one"})
    server.end += 777
    return server


def test_the_origin_of_a_branch_is_claimed_before_its_log() -> None:
    world = failed_over()
    switch = world.server.points[0].end_offset
    assert list(world.archive.stored_origins) == [Position("2", switch)]
    assert world.archive.order.index("origin 2") < world.archive.order.index("log 2")


def test_the_first_branch_needs_no_origin() -> None:
    world = World()
    world.run(world.durable)
    assert world.archive.stored_origins == {}


def test_another_server_of_the_same_branch_number_is_refused() -> None:
    world = failed_over()
    before = dict(world.archive.objects)
    world.server = twin(world)
    with pytest.raises(LogConflict):
        world.run(lambda: world.write(5000), world.durable)
    assert world.archive.objects == before


def test_a_server_that_comes_second_is_refused_before_any_log_is_stored() -> None:
    """Both are new to the repository, and none has stored anything of the branch yet."""
    world = World()
    world.run(world.durable)
    world.server.promote("2")
    other = twin(world)
    world.archive.claim_origin(
        Position("2", world.server.points[0].end_offset),
        world.server.read("2", world.server.points[0].end_offset, world.server.end),
    )
    world.server = other
    with pytest.raises(LogConflict):
        world.run(lambda: world.write(5000), world.durable)
    assert {segment.branch for segment in world.archive.objects} == {"1"}


def test_the_same_branch_from_a_standby_of_its_server_is_taken() -> None:
    """Control: another server, with a slot of its own, that has the same log."""
    world = failed_over()
    world.server = replace(world.server, slot_offset=None)
    world.server.identity = replace(world.server.identity, role=Role.REPLICA)
    world.run(lambda: world.write(5000), world.durable)
    world.assert_complete("2", START, world.server.end)


def test_a_branch_whose_first_log_is_gone_is_known_by_its_last() -> None:
    world = failed_over(more=LOG_FILE_BYTES * 4)
    world.server = twin(world)
    world.server.removed_before = START + LOG_FILE_BYTES * 2
    world.server.slot_offset = world.server.end
    with pytest.raises(LogConflict):
        world.run(lambda: world.write(5000), world.durable)


def test_an_ancestor_that_is_another_one_is_refused_too() -> None:
    world = failed_over()
    world.server = twin(world)
    world.server.promote("3")
    with pytest.raises(LogConflict):
        world.run(lambda: world.write(5000), world.durable)
    assert {segment.branch for segment in world.archive.objects} == {"1", "2"}


def test_another_history_of_the_same_branch_is_refused_though_one_is_stored() -> None:
    world = failed_over()
    world.server = replace(world.server, slot_offset=None)
    (point,) = world.server.points
    world.server.points = (replace(point, end_offset=point.end_offset + 64),)
    with pytest.raises(LogConflict, match="history"):
        world.run(world.durable)


def test_a_branch_of_which_a_standby_has_nothing_yet_is_waited_for() -> None:
    world = World()
    world.run(world.durable)
    world.server.promote("2")
    promoted_end = world.server.end
    world.server.end = world.server.points[0].end_offset
    source = world._source()
    errors = [unavailable() for _ in range(2)]
    connects = source.connect

    def connect():
        if source.connects == 3:
            world.server.end = promoted_end
        return connects()

    source.connect = connect  # type: ignore[method-assign]
    source.connect_errors = errors
    world.run(lambda: source.connects > 2, world.durable, source=source)
    assert any("could not see how branch 2 began" in status.last_error for status in world.seen)
    world.assert_complete("2", START, promoted_end)


def test_the_capture_of_a_single_backup_looks_no_further_than_its_slot() -> None:
    """A server whose first log of the branch is long gone would note an error for each backup."""
    world = failed_over(more=LOG_FILE_BYTES * 4)
    world.server.slot_offset = None
    world.server.removed_before = START + LOG_FILE_BYTES * 2
    world.run(world.durable, options=CaptureOptions(object_bytes_max=LOG_FILE_BYTES, salvage=False))
    switch = world.server.points[0].end_offset
    assert Position("2", switch) not in world.source.streamed_from
