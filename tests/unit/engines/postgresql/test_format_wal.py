"""Positions, file names, and what the walker and the indexer tell of a log."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudsave.engines.postgresql.format_wal import (
    EPOCH_US,
    WalIndexer,
    WalWalker,
    format_lsn,
    parse_lsn,
    parse_segment_name,
    segment_name,
)
from cloudsave.errors import ForeignSystem, LogDamaged
from cloudsave.kernels.wal_walk import StopReason, WalkStart
from cloudsave.model.position import Position
from tests.unit.kernels.synthetic_wal import SEGMENT_BYTES, SYSTEM, WalWriter, eventful_log

BRANCH = "00000001"


def indexer(start: int, *, branch: str = BRANCH, system: int = SYSTEM) -> WalIndexer:
    return WalIndexer(Position(branch, start), log_file_bytes=SEGMENT_BYTES, system_identifier=str(system))


@pytest.mark.parametrize(
    ("text", "lsn"),
    [
        ("0/3000028", 0x3000028),
        ("16/B374D848", 0x16B374D848),
        ("0/0", 0),
        ("FFFFFFFF/FFFFFFFF", (1 << 64) - 1),
    ],
)
def test_lsn_reads_and_prints_as_the_server_does(text: str, lsn: int) -> None:
    assert parse_lsn(text) == lsn
    assert format_lsn(lsn) == text


@pytest.mark.parametrize(
    "text", ["", "0", "/", "0/", "/0", "0/123456789", "g/0", "0/0 ", "-1/0", "0x1/0", "1_0/0"]
)
def test_what_is_no_lsn_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no LSN"):
        parse_lsn(text)


@pytest.mark.parametrize("lsn", [-1, 1 << 64])
def test_what_cannot_be_an_lsn_is_not_printed(lsn: int) -> None:
    with pytest.raises(ValueError, match="no LSN"):
        format_lsn(lsn)


@given(st.integers(1, (1 << 32) - 1), st.integers(0, (1 << 64) - 1), st.integers(20, 30))
def test_segment_name_leads_back_to_the_segment(timeline: int, lsn: int, shift: int) -> None:
    size = 1 << shift
    name = segment_name(timeline, lsn, segment_bytes=size)
    assert len(name) == 24
    assert parse_segment_name(name, segment_bytes=size) == (timeline, lsn - lsn % size)


@given(st.text(max_size=30))
def test_any_name_can_be_asked_about(name: str) -> None:
    found = parse_segment_name(name, segment_bytes=16 << 20)
    assert found is None or segment_name(*found, segment_bytes=16 << 20) == name


@pytest.mark.parametrize(
    "name",
    [
        "00000001000000000000010",
        "000000010000000000000100",
        "00000001000000000000001a",
        "00000001000000000000001A.partial",
        "00000001.history",
        "000000000000000000000001",
    ],
)
def test_other_names_are_no_segments(name: str) -> None:
    assert parse_segment_name(name, segment_bytes=16 << 20) is None


def test_walker_tells_commits_restore_points_and_timelines() -> None:
    log = eventful_log()
    log.record(0, 0x90, (77).to_bytes(8, "little") + b"\2\0\0\0" + b"\1\0\0\0" + bytes(4))
    fed = WalWalker(WalkStart(log.start, SEGMENT_BYTES)).feed(log.log)
    assert [row[:4] for row in fed.commits.tolist()] == log.commits
    assert [(point.name, point.time_us) for point in fed.restore_points] == [("a point", 6_000_000)]
    assert [(one.previous_timeline, one.timeline) for one in fed.timeline_changes] == [(1, 2)]
    assert (fed.timeline_changes[0].start, fed.timeline_changes[0].end) == log.records[-1]


def test_walker_says_where_and_why_the_log_ends() -> None:
    log = WalWriter()
    log.commit(3, 4)
    end = log.end
    walker = WalWalker(WalkStart(log.start, SEGMENT_BYTES), stop_at_invalid=True)
    assert len(walker.feed(bytes(log.log) + bytes(100)).commits) == 1
    assert walker.end is not None
    assert (walker.end.position, walker.end.reason) == (end, StopReason.NO_RECORD)
    assert str(walker.end) == "at 0/1000050 there is no record"
    assert len(walker.feed(bytes(log.log)).commits) == 0
    assert walker.server_major == 18


def test_damage_is_an_error_unless_asked_otherwise() -> None:
    log = WalWriter()
    log.commit(3, 4)
    log.log[70] ^= 1
    with pytest.raises(LogDamaged, match="log is damaged at 0/1000028") as raised:
        WalWalker(WalkStart(log.start, SEGMENT_BYTES)).feed(log.log)
    assert raised.value.offset == log.start + 40
    assert "CRC" in raised.value.detail


def test_foreign_log_is_refused() -> None:
    log = eventful_log()
    with pytest.raises(ForeignSystem, match="another cluster"):
        indexer(log.start, system=SYSTEM + 1).feed(log.log)


def test_log_of_a_later_timeline_is_refused_and_of_an_earlier_one_is_not() -> None:
    log = WalWriter(timeline=2)
    log.commit(3, 4)
    with pytest.raises(LogDamaged):
        indexer(log.start).feed(log.log)
    later = indexer(log.start, branch="00000003")
    later.feed(log.log)
    assert len(later.take().commits) == 1


def test_index_of_each_stretch_holds_what_began_in_it() -> None:
    log = eventful_log()
    reader = indexer(log.start)
    commits, points = [], []
    for low in range(log.start, log.end, 100_000):
        high = min(low + 100_000, log.end)
        reader.feed(log.log[low - log.start : high - log.start])
        index = reader.take()
        inside = [begin for begin, _ in log.records if low <= begin < high]
        assert (index.record_first, index.record_last) == (inside[0], inside[-1]) if inside else (None, None)
        complete = [end for _, end in log.records if end <= high]
        assert index.records_end == (complete[-1] if complete else 0)
        commits += index.commits
        points += index.restore_points
    assert [(c.offset, c.end_offset, c.instant_us - EPOCH_US, c.transaction) for c in commits] == log.commits
    assert [(p.name, p.instant_us - EPOCH_US) for p in points] == [("a point", 6_000_000)]
    assert reader.take().commits == ()


def test_indexer_that_resumes_knows_its_end_before_the_first_record() -> None:
    log = eventful_log()
    boundary = log.records[5][1]
    assert indexer(boundary).take().records_end == boundary
    assert indexer(log.start).take().records_end == 0
