"""Waiting for the log of a base backup: until it is durable, and no longer than it can become so."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Generator

import pytest

from cloudsave.clock import SYSTEM_CLOCK
from cloudsave.errors import BackupLogLost, BackupNotCovered
from cloudsave.logs.background import BackgroundCapture, BackupLogCover, await_durable
from cloudsave.logs.ledger import unrecorded_gaps
from cloudsave.model.engine_facts import BranchEnd, LogAtHand, LogChunk, SlotState
from cloudsave.model.ledger import Ledger
from cloudsave.model.log import LogHole, LogIndex, LogSegment
from cloudsave.model.position import Position
from tests.unit.logs.fakes import (
    IDENTITY,
    LOG_FILE_BYTES,
    FakeClock,
    FakeDialect,
    FakeServer,
    FakeSource,
    MemoryArchive,
)

START, STOP = Position("1", 1000), Position("1", 5000)
TIMEOUT_SECONDS = 900.0
LOOK_SECONDS = 0.01
IDLE_LOOKS = 40


class World:
    """An archive and the wait of a backup that needs [START, STOP)."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.begun = self.clock.seconds
        self.archive = MemoryArchive()

    def store(self, first: int, last: int, *, branch: str = "1") -> None:
        self.archive.put_log(LogSegment(branch, first, last), [bytes(last - first)], LogIndex())

    def lose(self, first: int, last: int, *, branch: str = "1") -> None:
        self.archive.put_hole(LogHole(branch, first, last, "the server removed it"))

    def wait(self) -> None:
        await_durable(self.archive, START, STOP, clock=self.clock, timeout_seconds=TIMEOUT_SECONDS)

    @property
    def waited_seconds(self) -> float:
        return self.clock.seconds - self.begun


@pytest.fixture
def world() -> World:
    made = World()
    made.store(0, 2000)
    return made


@pytest.mark.parametrize("span", [(2000, 3000), (2000, 9000), (3000, 3001), (4999, 5000), (0, 9000)])
def test_log_that_is_recorded_as_lost_is_not_waited_for(world: World, span: tuple[int, int]) -> None:
    world.lose(*span)
    world.store(9000, 9500)
    with pytest.raises(BackupLogLost, match="lost") as caught:
        world.wait()
    assert world.waited_seconds == 0
    assert f"{span[0]:#x}" in caught.value.detail
    assert "the server removed it" in caught.value.detail
    assert caught.value.hints


def test_log_that_is_only_late_is_waited_for_until_the_deadline(world: World) -> None:
    """Control: the same missing log, and no record of its loss."""
    world.store(9000, 9500)
    with pytest.raises(BackupNotCovered):
        world.wait()
    assert world.waited_seconds >= TIMEOUT_SECONDS


@pytest.mark.parametrize(("span", "branch"), [((0, 1000), "1"), ((5000, 6000), "1"), ((2000, 3000), "2")])
def test_a_hole_elsewhere_does_no_harm(world: World, span: tuple[int, int], branch: str) -> None:
    world.lose(*span, branch=branch)
    with pytest.raises(BackupNotCovered):
        world.wait()
    world.store(2000, 5000)
    world.wait()


def test_log_that_came_by_another_way_after_it_was_recorded_as_lost_counts(world: World) -> None:
    world.lose(2000, 3000)
    world.store(2000, 3000)
    with pytest.raises(BackupNotCovered):
        world.wait()
    world.store(3000, 5000)
    world.wait()


def test_the_cover_of_a_backup_refuses_what_another_capture_lost(world: World) -> None:
    def no_source(_: SlotState) -> FakeSource:
        raise AssertionError("another capture runs")

    cover = BackupLogCover(
        lambda: SlotState.ACTIVE, no_source, world.archive, FakeDialect(), clock=world.clock
    )
    cover.begin()
    world.lose(2000, 4000)
    with pytest.raises(BackupLogLost):
        cover.wait_until_durable(START, STOP, None)
    assert world.waited_seconds == 0
    cover.close()


def test_a_capture_on_another_branch_refuses_what_is_lost_of_the_first() -> None:
    world = World()
    server = FakeServer(end=LOG_FILE_BYTES, slot_offset=LOG_FILE_BYTES)
    server.promote("2")
    server.end += 500
    source = FakeSource(server, world.clock, threading.Event())
    source.script = iter([lambda: False])
    with BackgroundCapture(source, world.archive, FakeDialect(), clock=SYSTEM_CLOCK) as capture:
        capture.await_durable(Position("2", server.end), timeout_seconds=60)
        with pytest.raises(BackupNotCovered):
            capture.await_durable(Position("1", 3000), timeout_seconds=0.1)
        world.lose(2000, 4000)
        with pytest.raises(BackupLogLost):
            capture.await_durable(Position("1", 3000), timeout_seconds=TIMEOUT_SECONDS)


class SlowSource(FakeSource):
    """Streams nothing before the backup has read the source's own files, and for a while after that."""

    def __init__(self, server: FakeServer, clock: FakeClock) -> None:
        super().__init__(server, clock, threading.Event())
        self.script = itertools.repeat(lambda: True)
        self.files_read = threading.Event()

    def stream(self, start: Position) -> Generator[LogChunk | BranchEnd, None, None]:
        idle = 0
        while idle < IDLE_LOOKS:
            yield LogChunk(start.branch, start.offset, b"", 0)
            idle += self.files_read.wait(LOOK_SECONDS) and not threading.Event().wait(LOOK_SECONDS)
        yield from super().stream(start)


def test_a_backup_waits_for_its_own_capture_where_older_log_is_missing() -> None:
    """Else the gap between two backups would stay without a record of why."""
    clock, archive = FakeClock(), MemoryArchive()
    first, second = LOG_FILE_BYTES, 3 * LOG_FILE_BYTES
    server = FakeServer(end=second + 7000, slot_offset=second)
    archive.put_log(LogSegment("1", first, first + 900), [server.read("1", first, first + 900)], LogIndex())
    source = SlowSource(server, clock)

    def read(begin: Position, end: int) -> bytes:
        source.files_read.set()
        return server.read(begin.branch, begin.offset, end)

    cover = BackupLogCover(lambda: SlotState.ABSENT, lambda _: source, archive, FakeDialect(), clock=clock)
    cover.begin()
    try:
        start, stop = Position("1", second), Position("1", second + 7000)
        cover.wait_until_durable(start, stop, LogAtHand(IDENTITY, read))
    finally:
        cover.close()
    ledger = Ledger(archive.logs())
    assert unrecorded_gaps(ledger, [], "1") == []
    assert ledger.ranges("1") == ((first, second + 7000),)
