"""Log objects: names that tell what is inside, log and index read back, conflicts refused."""

from __future__ import annotations

import os
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloudsave.errors import IntegrityError, LogConflict, ObjectMissing
from cloudsave.model.changes import CHANGE_TYPE, LogChanges, sorted_changes
from cloudsave.model.log import Commit, LogHole, LogIndex, LogSegment, RestorePoint
from cloudsave.repository.log_objects import log_object_name, parse_log_object_name
from cloudsave.store.api import ObjectInfo
from cloudsave.store.memory import MemoryStore
from tests.unit.repository.samples import LINEAGE, SEGMENT, lineage_on, noise, sample_log

offsets = st.integers(0, (1 << 60) - 1)
instants = st.integers(0, (1 << 62))
commits = st.builds(Commit, offsets, offsets, instants, st.integers(0, (1 << 40)))
points = st.builds(RestorePoint, offsets, offsets, instants, st.text(max_size=63))
numbers = st.integers(0, (1 << 32) - 1)
rows = st.lists(st.tuples(numbers, numbers, numbers, numbers, st.sampled_from([1, 2])), max_size=40)
changes = st.builds(
    lambda seen_from, found: LogChanges(seen_from, sorted_changes(np.array(found, CHANGE_TYPE))),
    offsets,
    rows,
)
indexes = st.builds(
    LogIndex,
    commits=st.lists(commits, max_size=20).map(tuple),
    restore_points=st.lists(points, max_size=3).map(tuple),
    record_first=st.none() | offsets,
    record_last=st.none() | offsets,
    records_end=offsets,
    complete_until_us=instants,
    changes=st.none() | changes,
)


@settings(max_examples=60, deadline=None)
@given(index=indexes, first=offsets, log=st.binary(min_size=1, max_size=3000), cuts=st.integers(1, 5))
def test_log_and_index_are_read_back(index: LogIndex, first: int, log: bytes, cuts: int) -> None:
    lineage = lineage_on(MemoryStore())
    segment = LogSegment("0000000A", first, first + len(log), 5, 7)
    parts = [log[begin : begin + cuts] for begin in range(0, len(log), cuts)]
    lineage.put_log(segment, parts, index)
    (found,) = lineage.logs()
    assert found == segment
    assert found.size_bytes > len(log)
    assert lineage.read_log(found) == log
    assert lineage.log_index(found) == index
    assert lineage.log_index(replace(found, size_bytes=0)) == index
    assert lineage.logs_near("0000000A", first) == [segment]
    assert lineage.logs_near("0000000B", first) == []


def test_changes_take_a_byte_or_two_per_block() -> None:
    store = MemoryStore()
    lineage = lineage_on(store)
    random = np.random.default_rng(1)
    found = [
        (1663, 5, 16384 + n % 3, int(block), 1) for n, block in enumerate(random.integers(0, 200_000, 30_000))
    ]
    index = LogIndex(changes=LogChanges(SEGMENT, sorted_changes(np.array(found, CHANGE_TYPE))))
    segment = LogSegment("00000001", SEGMENT, SEGMENT + 100)
    lineage.put_log(segment, [bytes(100)], index)
    assert lineage.log_index(segment) == index
    assert sum(len(content) for content, _ in store.objects.values()) < 2 * len(found)


def test_an_index_larger_than_the_first_read_takes_a_second_one() -> None:
    lineage = lineage_on(MemoryStore())
    rows = [int.from_bytes(noise(n, 7), "little") for n in range(20_000)]
    index = LogIndex(commits=tuple(Commit(row, row + 1, row, row) for row in rows))
    segment = LogSegment("00000001", SEGMENT, SEGMENT + 100, min(rows), max(rows))
    lineage.put_log(segment, [bytes(100)], index)
    assert lineage.log_index(lineage.logs()[0]) == index


@settings(max_examples=100, deadline=None)
@given(first=offsets, length=st.integers(1, 1 << 30), earliest=instants, latest=instants)
def test_a_name_tells_its_segment(first: int, length: int, earliest: int, latest: int) -> None:
    segment = LogSegment("00000003", first, first + length, earliest, latest)
    name = log_object_name(LINEAGE, segment)
    assert parse_log_object_name(ObjectInfo(name, 77, datetime.now(UTC))) == segment


@pytest.mark.parametrize(
    "name",
    [
        "logs/00000001/history",
        "logs/00000001/holes/0000000000000000-0000000000000010",
        "logs/00000001/00000000/0000000000000010-0000000000000010-0000000000000000-0000000000000000",
        "logs/00000001/00000000/000000000000001x-0000000000000020-0000000000000000-0000000000000000",
        "logs/00000001/00000000/10-20-0-0",
        "logs/00000001/0000000000000010-0000000000000020-0000000000000000-0000000000000000",
    ],
)
def test_other_names_are_not_log(name: str) -> None:
    assert parse_log_object_name(ObjectInfo(f"lineages/{LINEAGE}/{name}", 1, datetime.now(UTC))) is None


def test_the_same_log_again_is_accepted_and_other_log_refused() -> None:
    lineage = lineage_on(MemoryStore())
    segment, log, index = sample_log(SEGMENT, 400)
    lineage.put_log(segment, [log], index)
    lineage.put_log(segment, [log[:100], log[100:]], index)
    with pytest.raises(LogConflict, match="differs"):
        lineage.put_log(segment, [log[:-1] + bytes([log[-1] ^ 1])], index)
    assert lineage.read_log(segment) == log


@pytest.mark.parametrize("log", [b"", b"the end of a file"])
def test_log_that_ends_before_its_stretch_is_read_back_without_padding(log: bytes) -> None:
    lineage = lineage_on(MemoryStore())
    segment = LogSegment("b", 1 << 32, 2 << 32)
    index = LogIndex(padding_bytes=(1 << 32) - len(log))
    lineage.put_log(segment, [log], index)
    assert lineage.read_log(segment) == log
    assert lineage.log_index(segment) == index
    with pytest.raises(ValueError, match="do not fill"):
        lineage.put_log(segment, [log + b"!"], index)


def test_bytes_that_do_not_fill_the_segment_are_refused() -> None:
    segment, log, index = sample_log(SEGMENT, 400)
    with pytest.raises(ValueError, match="fill"):
        lineage_on(MemoryStore()).put_log(segment, [log[:-1]], index)


def test_an_object_under_the_name_of_another_stretch_does_not_open() -> None:
    store = MemoryStore()
    lineage = lineage_on(store)
    segment, log, index = sample_log(SEGMENT, 400)
    lineage.put_log(segment, [log], index)
    moved = replace(segment, first=SEGMENT + 8, last=SEGMENT + 408)
    store.objects[log_object_name(LINEAGE, moved)] = store.objects.pop(log_object_name(LINEAGE, segment))
    for read in (lineage.read_log, lineage.log_index):
        with pytest.raises(IntegrityError):
            read(moved)
    with pytest.raises(ObjectMissing):
        lineage.read_log(segment)


def test_each_flipped_bit_of_the_index_is_found_by_the_short_read() -> None:
    store = MemoryStore()
    lineage = lineage_on(store)
    segment, log, index = sample_log(SEGMENT, 400)
    lineage.put_log(segment, [log], index)
    name = log_object_name(LINEAGE, segment)
    content, instant = store.objects[name]
    (listed,) = lineage.logs()
    index_end = 48 + int.from_bytes(content[40:44], "little")
    for place in (*range(5), *range(8, index_end)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        store.objects[name] = (bytes(damaged), instant)
        with pytest.raises(IntegrityError):
            lineage.log_index(listed)


def test_histories_and_holes_are_read_back() -> None:
    lineage = lineage_on(MemoryStore())
    history = b"1\t0/3000000\tno recovery target specified\n"
    lineage.put_history("00000002", history)
    lineage.put_history("00000002", history)
    with pytest.raises(LogConflict, match="history"):
        lineage.put_history("00000002", history + b"\n")
    big = os.urandom(3 << 20)
    lineage.put_history("00000003", big)
    assert lineage.histories() == {"00000002": history, "00000003": big}
    hole = LogHole("00000001", SEGMENT, 2 * SEGMENT, "the server removed it")
    lineage.put_hole(hole)
    lineage.put_hole(hole)
    assert lineage.holes() == [hole]
    assert lineage.logs() == []
