"""Work in threads: in order, bounded, and over with the first error; and reading from far away with it."""

from __future__ import annotations

import itertools
import threading
from dataclasses import replace

import pytest

from cloudsave.repository import reader
from cloudsave.repository.parallel import begin, map_ahead, run_all
from cloudsave.repository.reader import BackupReader
from cloudsave.repository.writer import WriterOptions
from cloudsave.store.api import Buffer, StoreCapabilities
from cloudsave.store.memory import MemoryStore
from tests.unit.repository.samples import BLOCK, lineage_on, noise, write_backup

MEETING_SECONDS = 2.0


class Broken(Exception):
    """Something that goes wrong in a thread."""


def test_what_is_begun_goes_on_beside_its_caller() -> None:
    """Each waits for the other: one behind the other they would never meet."""
    meeting = threading.Barrier(2)

    def work() -> int:
        meeting.wait(timeout=MEETING_SECONDS)
        return 7

    result = begin(work, "beside")
    meeting.wait(timeout=MEETING_SECONDS)
    assert result() == 7
    assert result() == 7


def test_what_is_begun_raises_where_its_result_is_asked_for() -> None:
    def work() -> None:
        raise Broken

    result = begin(work, "broken")
    with pytest.raises(Broken):
        result()


def test_results_come_in_order_and_no_more_are_under_way_than_allowed() -> None:
    under_way, most = set(), []
    lock = threading.Lock()

    def work(number: int) -> int:
        with lock:
            under_way.add(number)
            most.append(len(under_way))
        with lock:
            under_way.discard(number)
        return number * number

    assert list(map_ahead(work, range(100), in_flight=4)) == [number * number for number in range(100)]
    assert max(most) <= 4


def test_only_so_many_are_taken_ahead() -> None:
    taken = itertools.count()
    results = map_ahead(lambda number: number, (next(taken) for _ in range(100)), in_flight=3)
    next(results)
    assert next(taken) <= 4


@pytest.mark.parametrize("workers", [1, 4])
def test_the_first_error_ends_it(workers: int) -> None:
    done: list[int] = []

    def work(number: int) -> None:
        if number == 5:
            raise Broken
        done.append(number)

    with pytest.raises(Broken):
        run_all(iter(range(10_000)), work, workers=lambda: workers)
    assert len(done) < 1000
    with pytest.raises(ZeroDivisionError):
        run_all((1 // number for number in (1, 0)), work, workers=lambda: workers)
    with pytest.raises(ZeroDivisionError):
        list(map_ahead(lambda number: 1 // number, [1, 0, 1], in_flight=2))


@pytest.mark.parametrize("raised", [True, False])
def test_more_threads_are_started_when_more_may_work(raised: bool) -> None:
    allowed, meeting = [1], threading.Barrier(3)

    def work(number: int) -> None:
        if number == 5 and raised:
            allowed[0] = 3
        if 20 <= number < 23:
            meeting.wait(MEETING_SECONDS)

    if raised:
        run_all(iter(range(60)), work, workers=lambda: allowed[0])
        return
    with pytest.raises(threading.BrokenBarrierError):
        run_all(iter(range(60)), work, workers=lambda: allowed[0])


def test_threads_rest_when_fewer_may_work() -> None:
    allowed, doing = [3], {}

    def work(number: int) -> None:
        doing[number] = threading.get_ident()
        if number == 30:
            allowed[0] = 1

    run_all(iter(range(400)), work, workers=lambda: allowed[0])
    assert len(doing) == 400
    # Each that became too many may have been waiting for one task more; at the end all lend a hand.
    by = [doing[number] for number in range(40, 380)]
    assert len(by) - max(by.count(thread) for thread in set(by)) <= 2


class DistantStore(MemoryStore):
    """A store far away, whose first requests wait for one another: they must be under way together."""

    def __init__(self, meeting: int) -> None:
        super().__init__()
        self._meeting = threading.Barrier(meeting)
        self.ranges: list[tuple[str, int]] = []

    @property
    def capabilities(self) -> StoreCapabilities:
        return replace(super().capabilities, distant=True)

    def get_range(self, name: str, *, offset: int, length: int) -> Buffer:
        self.ranges.append((name, offset))
        if len(self.ranges) <= self._meeting.parties:
            self._meeting.wait(MEETING_SECONDS)
        return super().get_range(name, offset=offset, length=length)


def test_many_requests_are_under_way_from_far_and_no_one_is_for_a_header(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = DistantStore(meeting=8)
    lineage = lineage_on(store)
    files = {f"base/5/{number}": noise(number, 40 * BLOCK) for number in range(40)}
    options = WriterOptions(workers=2, pack_bytes=1 << 20)
    manifest = write_backup(lineage, "20260101T000000Z-0001", files, options=options)
    store.ranges.clear()
    contents = [bytearray(entry.size_bytes) for entry in manifest.files]

    def write(file_index: int, offset: int, data: memoryview) -> None:
        contents[file_index][offset : offset + len(data)] = data

    BackupReader(lineage, manifest).read_all(write, workers=lambda: 1)
    assert len(manifest.packs) >= 8
    assert len(store.ranges) == len(manifest.packs)
    found = {entry.path: bytes(content) for entry, content in zip(manifest.files, contents, strict=True)}
    assert {path: found[path] for path in files} == files
    # The check can fail: with one request at a time nobody meets.
    monkeypatch.setattr(reader, "REQUESTS_IN_FLIGHT", 1)
    lonely = DistantStore(meeting=8)
    lonely.objects.update(store.objects)
    with pytest.raises(threading.BrokenBarrierError):
        BackupReader(lineage_on(lonely), manifest).read_all(write, workers=lambda: 1)
