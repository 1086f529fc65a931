"""The walk over WAL: C and Python agree on whatever is fed, and nothing unproved is told."""

from __future__ import annotations

import itertools
import random
import struct
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloudsave.kernels.native import NativeKernels
from cloudsave.kernels.wal_walk import (
    MAGIC_BY_MAJOR,
    EventKind,
    StopReason,
    Walk,
    WalkStart,
    begin_walk,
)
from tests.unit.kernels.built import built_kernels
from tests.unit.kernels.synthetic_wal import SEGMENT_BYTES, SYSTEM, WalWriter, eventful_log

LOG = eventful_log()
START = WalkStart(LOG.start, SEGMENT_BYTES, SYSTEM, 1)


@pytest.fixture(params=["native", "twin"])
def kernels(request: pytest.FixtureRequest) -> NativeKernels | None:
    return built_kernels() if request.param == "native" else None


def observed(walk: Walk) -> tuple[object, ...]:
    """All that can be asked of a walk, but for the position, which after a stop means nothing."""
    return (
        walk.record_first,
        walk.record_last,
        walk.complete_start,
        walk.complete_previous,
        walk.records_end,
        walk.seen_from,
        walk.record_count,
        walk.timeline,
        walk.magic,
        walk.stop_reason,
        walk.stop_position,
    )


def pieces(log: bytes, cuts: list[int]) -> Iterator[bytes]:
    places = sorted({0, len(log), *(cut % (len(log) + 1) for cut in cuts)})
    for first, last in itertools.pairwise(places):
        yield log[first:last]


def assert_same(start: WalkStart, log: bytes, cuts: list[int]) -> Walk:
    start = replace(start, collect_changes=True)
    native, twin = begin_walk(start, built_kernels()), begin_walk(start, None)
    for piece in pieces(log, cuts):
        events, names = native.walk(piece)
        other_events, other_names = twin.walk(piece)
        assert events.tolist() == other_events.tolist()
        assert names == other_names
        assert observed(native) == observed(twin)
        if not native.stop_reason:
            assert native.position == twin.position
        if len(piece) % 3 == 0:
            native.forget()
            twin.forget()
        if len(piece) % 2 == 0:
            assert native.take_changes().tolist() == twin.take_changes().tolist()
    assert native.take_changes().tolist() == twin.take_changes().tolist()
    return native


def commits(walk: Walk, log: bytes) -> list[tuple[int, ...]]:
    events, _ = walk.walk(log)
    return [tuple(row[:4]) for row in events.tolist() if row[4] == EventKind.COMMIT]


@pytest.mark.parametrize("major", [14, 15, 16, 17, 18])
def test_every_record_of_a_log_is_found(major: int, kernels: NativeKernels | None) -> None:
    log = eventful_log(major)
    walk = begin_walk(WalkStart(log.start, SEGMENT_BYTES, SYSTEM, 1), kernels)
    events, names = walk.walk(log.log)
    assert [tuple(row[:4]) for row in events.tolist() if row[4] == EventKind.COMMIT] == log.commits
    assert names == [b"a point".ljust(64, b"\0")]
    assert walk.record_count == len(log.records)
    assert (walk.complete_start, walk.records_end) == log.records[-1]
    assert (walk.record_first, walk.record_last) == (log.records[0][0], log.records[-1][0])
    assert (walk.magic, walk.stop_reason) == (MAGIC_BY_MAJOR[major], StopReason.NONE)


def test_more_events_than_fit_in_one_call_are_all_told(kernels: NativeKernels | None) -> None:
    log = WalWriter()
    for number in range(10_000):
        log.commit(number + 3, number)
        if number % 6000 == 0:
            log.restore_point(b"%d" % number, number)
    walk = begin_walk(START, kernels)
    events, names = walk.walk(log.log)
    assert [tuple(row[:4]) for row in events.tolist() if row[4] == EventKind.COMMIT] == log.commits
    assert [name.rstrip(b"\0") for name in names] == [b"%d" % number for number in (0, 6000)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 1 << 30), max_size=40))
def test_twins_agree_however_a_log_is_cut(cuts: list[int]) -> None:
    walk = assert_same(START, bytes(LOG.log), cuts)
    assert walk.record_count == len(LOG.records)


def test_twins_agree_on_single_bytes() -> None:
    log = WalWriter()
    log.noise(9000)
    log.commit_prepared(7, 8)
    log.restore_point(b"x", 9)
    assert assert_same(START, bytes(log.log), list(range(len(log.log)))).record_count == 3


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 1 << 30), st.integers(0, 255)), min_size=1, max_size=3),
    st.lists(st.integers(0, 1 << 30), max_size=4),
)
def test_damage_ends_both_walks_alike_and_yields_no_false_commit(
    changes: list[tuple[int, int]], cuts: list[int]
) -> None:
    log = bytearray(LOG.log[: 200 << 10])
    for place, value in changes:
        log[place % len(log)] = value
    walk = assert_same(START, bytes(log), cuts)
    found = commits(begin_walk(START, built_kernels()), bytes(log))
    assert set(found) <= set(LOG.commits)
    assert found == [row for row in LOG.commits if row[1] <= (walk.records_end or 0)]


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=40_000), st.lists(st.integers(0, 1 << 30), max_size=4), st.booleans())
def test_random_bytes_crash_nothing(noise: bytes, cuts: list[int], headers: bool) -> None:
    log = bytearray(noise)
    if headers:
        shell = WalWriter()
        while len(shell.log) < len(log):
            shell.page_header()
            shell.log += noise[len(shell.log) : len(shell.log) + 8192 - len(shell.log) % 8192]
        log = shell.log
    assert assert_same(START, bytes(log), cuts).record_count == 0


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300), st.sampled_from([0x00, 0x30, 0xB0]), st.sampled_from([0, 1]), st.booleans())
def test_any_content_with_a_right_crc_crashes_nothing(
    body: bytes, info: int, manager: int, prefixed: bool
) -> None:
    log = WalWriter(major=17)
    log.noise(10)
    if prefixed:
        log.record(manager, info, body)
    else:
        log.raw_record(manager, info, body)
    assert_same(START, bytes(log.log), [50, 90])
    middle = log.records[0][1]
    assert_same(WalkStart(middle, SEGMENT_BYTES), bytes(log.log[middle - log.start :]), [30])


@pytest.mark.parametrize("statistics", [0, 1, 2, 7])
@pytest.mark.parametrize("major", [17, 18])
def test_transaction_of_two_phases_is_found_before_the_version_is_known(
    major: int, statistics: int, kernels: NativeKernels | None
) -> None:
    log = WalWriter(major=major)
    log.noise(10)
    log.commit_prepared(4711, 5, statistics=statistics)
    boundary = log.records[0][1]
    walk = begin_walk(WalkStart(boundary, SEGMENT_BYTES), kernels)
    assert commits(walk, bytes(log.log[boundary - log.start :])) == log.commits


def test_walk_resumes_at_every_boundary(kernels: NativeKernels | None) -> None:
    for _, end in random.Random(5).sample(LOG.records, 25):
        walk = begin_walk(WalkStart(end, SEGMENT_BYTES, SYSTEM), kernels)
        found = commits(walk, bytes(LOG.log[end - LOG.start :]))
        assert found == [row for row in LOG.commits if row[0] >= end]
        assert not walk.stop_reason


def test_walk_from_a_segment_that_begins_within_a_record_skips_its_rest(
    kernels: NativeKernels | None,
) -> None:
    segment = LOG.start + 2 * SEGMENT_BYTES
    begin, end = next(span for span in LOG.records if span[0] < segment < span[1])
    walk = begin_walk(WalkStart(segment, SEGMENT_BYTES, SYSTEM), kernels)
    walk.walk(LOG.log[segment - LOG.start : segment - LOG.start + 100])
    assert walk.records_end is None
    found = commits(walk, bytes(LOG.log[segment - LOG.start + 100 :]))
    assert found == [row for row in LOG.commits if row[0] >= end]
    assert walk.record_first == (end if end % 8192 else end + 24)
    assert begin not in [row[0] for row in found]


def test_switch_record_is_complete_with_its_segment(kernels: NativeKernels | None) -> None:
    begin, end = next(span for span in LOG.records if span[1] % SEGMENT_BYTES == 0)
    walk = begin_walk(START, kernels)
    walk.walk(LOG.log[: end - LOG.start - 1])
    assert walk.records_end == begin
    walk.walk(LOG.log[end - LOG.start - 1 : end - LOG.start])
    assert walk.records_end == end


def test_unfinished_record_may_be_overwritten_only_by_the_record_that_says_so(
    kernels: NativeKernels | None,
) -> None:
    log = WalWriter()
    log.commit(3, 4)
    log.noise(20_000)
    lost, _ = log.records.pop()
    del log.log[8192:]
    log.previous = log.records[-1][0]
    log.page_header(flags=8)
    kept = bytes(log.log)
    log.record(0, 0xD0, struct.pack("<Qq", lost, 99))
    log.commit(4, 5)
    walk = begin_walk(START, kernels)
    assert commits(walk, bytes(log.log)) == log.commits
    assert not walk.stop_reason
    false = WalWriter(log=bytearray(kept), previous=log.records[0][0])
    false.record(0, 0xD0, struct.pack("<Qq", lost + 8, 99))
    walk = begin_walk(START, kernels)
    walk.walk(false.log)
    assert walk.stop_reason is StopReason.CONTINUATION


def broken(reason: StopReason) -> bytes:
    """A log that ends by `reason` in its second page or record."""
    log = WalWriter()
    log.commit(3, 4)
    at = log.end - log.start
    if reason is StopReason.NO_RECORD:
        return bytes(log.log) + bytes(64)
    log.noise(9000)
    damage = {
        StopReason.LENGTH: (at, struct.pack("<I", 23)),
        StopReason.PREVIOUS: (at + 8, struct.pack("<Q", log.start)),
        StopReason.CRC: (at + 100, b"\xff"),
        StopReason.MAGIC: (8192, struct.pack("<H", MAGIC_BY_MAJOR[15])),
        StopReason.PAGE_HEADER: (8192 + 2, b"\x11"),
        StopReason.TIMELINE: (8192 + 4, b"\x02"),
        StopReason.ADDRESS: (8192 + 10, b"\x09"),
        StopReason.CONTINUATION: (8192 + 16, b"\xff"),
        StopReason.SYSTEM: (24, b"\x00"),
    }
    if reason is StopReason.CONTENT:
        log = WalWriter()
        log.commit(3, 4)
        log.raw_record(1, 0x00, b"\xff\x04abcd")
    else:
        place, value = damage[reason]
        log.log[place : place + len(value)] = value
    return bytes(log.log)


@pytest.mark.parametrize("reason", [reason for reason in StopReason if reason])
def test_each_reason_to_stop_is_told(reason: StopReason, kernels: NativeKernels | None) -> None:
    walk = begin_walk(START, kernels)
    walk.walk(broken(reason))
    assert walk.stop_reason is reason
    assert walk.records_end in (None, LOG.start + 40 + 40)


def test_timeline_may_rise_but_not_fall(kernels: NativeKernels | None) -> None:
    for timelines, reason in (((2, 3), StopReason.NONE), ((3, 2), StopReason.TIMELINE)):
        log = WalWriter(timeline=timelines[0])
        log.noise(8192 - 200)
        log.timeline = timelines[1]
        log.noise(4000)
        log.commit(3, 4)
        walk = begin_walk(WalkStart(log.start, SEGMENT_BYTES), kernels)
        assert commits(walk, bytes(log.log)) == ([] if reason else log.commits)
        assert walk.stop_reason is reason


def test_crc_is_checked_unless_told_otherwise(kernels: NativeKernels | None) -> None:
    log = broken(StopReason.CRC)
    walk = begin_walk(WalkStart(LOG.start, SEGMENT_BYTES, check_crc=False), kernels)
    walk.walk(log)
    assert (walk.stop_reason, walk.record_count) == (StopReason.NONE, 2)


@pytest.mark.parametrize(
    ("position", "segment_bytes"),
    [
        (4, 1 << 20),
        (-8, 1 << 20),
        (16, 1 << 20),
        (8192 + 16, 1 << 20),
        (0, 3 << 20),
        (0, 1 << 19),
        (32, 1 << 20),
    ],
)
def test_impossible_starts_are_refused(position: int, segment_bytes: int) -> None:
    with pytest.raises(ValueError, match=r"cannot have|no record"):
        WalkStart(position, segment_bytes)
