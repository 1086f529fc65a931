"""The pass over WAL that says what transactions did: C and Python agree on whatever is fed."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloudsave.kernels.native import NativeKernels
from cloudsave.kernels.wal_facts import (
    WATCHED_MAX,
    FactKind,
    FactsPass,
    FactsStart,
    begin_facts,
    read_fragments,
)
from cloudsave.kernels.wal_walk import MAGIC_BY_MAJOR, StopReason
from tests.unit.kernels.built import built_kernels
from tests.unit.kernels.synthetic_heap import (
    OTHER,
    PG_CLASS,
    TABLE,
    Image,
    block,
    busy_log,
    delete,
    end,
    insert,
    magic,
    record,
)
from tests.unit.kernels.synthetic_wal import SEGMENT_BYTES, WalWriter

LOG = busy_log()
Row = tuple[int, ...]


@pytest.fixture(params=["native", "twin"])
def kernels(request: pytest.FixtureRequest) -> NativeKernels | None:
    return built_kernels() if request.param == "native" else None


def start_of(wal: WalWriter, *, watched: tuple[int, ...] = (1259,)) -> FactsStart:
    return FactsStart(wal.start, SEGMENT_BYTES, magic(wal), watched)


def pieces(log: bytes, cuts: list[int]) -> Iterator[bytes]:
    places = sorted({0, len(log), *(cut % (len(log) + 1) for cut in cuts)})
    for first, last in itertools.pairwise(places):
        yield log[first:last]


def fed(walk: FactsPass, log: bytes, cuts: list[int] | None = None) -> tuple[list[Row], list[bytes]]:
    """All rows, those that are counted added up in front of the others; and the records."""
    counted: dict[Row, list[int]] = {}
    others: list[Row] = []
    records: list[bytes] = []
    for piece in pieces(log, cuts or []):
        for facts in walk.feed(piece):
            records += facts.records
            if facts.records and facts.records[-1][17] == 7:
                walk.watch((1259, 20_000))
            for start, value, xid, kind, *relation, count in facts.rows.tolist():
                if kind <= FactKind.DELETE:
                    known = counted.setdefault((xid, kind, *relation), [start, 0])
                    known[1] += count
                else:
                    others.append((start, value * (kind != FactKind.RECORD), xid, kind, *relation, count))
    return [(*key, *known) for key, known in sorted(counted.items())] + others, records


def assert_same(start: FactsStart, log: bytes, cuts: list[int]) -> FactsPass:
    native, twin = begin_facts(start, built_kernels()), begin_facts(start, None)
    assert fed(native, log, cuts) == fed(twin, log, cuts)
    assert (native.stop_reason, native.stop_position) == (twin.stop_reason, twin.stop_position)
    if not native.stop_reason:
        assert native.position == twin.position
    return native


@pytest.mark.parametrize("major", [14, 15, 16, 17, 18])
def test_every_fact_of_a_log_is_told(major: int, kernels: NativeKernels | None) -> None:
    wal = busy_log(major)
    rows, records = fed(begin_facts(start_of(wal), kernels), bytes(wal.log))
    counted = {row[:2] + row[4:5]: row[6] for row in rows if len(row) == 7}
    assert counted[700, FactKind.INSERT, TABLE[2]] == 100 + 40
    assert counted[701, FactKind.UPDATE, OTHER[2]] == 1
    assert counted[702, FactKind.DELETE, TABLE[2]] == 1, "a speculative insertion taken back is no delete"
    others = [(FactKind(row[3]).name, row[2], *row[4:7]) for row in rows if len(row) == 8 and row[3] != 14]
    assert others == [
        ("HORIZON", 700, 0, 0, 700),
        ("TRUNCATE", 702, 0, 5, 16_384),
        ("TRUNCATE", 702, 0, 5, 16_390),
        ("FILE_MADE", 702, *TABLE),
        ("FILE_CUT", 702, *TABLE),
        ("DATABASE_DROPPED", 703, 0, 16_500, 0),
        ("ABORT", 702, 1663, 5, 0),
        ("CHILD", 701, 0, 0, 700),
        ("FILE_DROPPED", 700, *TABLE),
        ("FILE_DROPPED", 700, *OTHER),
        ("COMMIT", 700, 1663, 5, 0),
        ("PREPARE", 703, 0, 0, 0),
        ("COMMIT", 703, 1663, 5, 0),
        ("ABORT", 704, 1663, 5, 0),
        ("COMMIT", 705, 0, 0, 0),
        ("COMMIT", 706, 0, 0, 0),
    ]
    assert len(records) == 6 + 1 + 1 + 1, "deletes with images, an update, the map, and what it moved"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 1 << 30), max_size=40))
def test_twins_agree_however_a_log_is_cut(cuts: list[int]) -> None:
    assert not assert_same(start_of(LOG), bytes(LOG.log), cuts).stop_reason


def test_twins_agree_on_single_bytes() -> None:
    wal = WalWriter()
    insert(wal, 5)
    wal.noise(9000)
    end(wal, 5, 6, children=[7, 8], dropped=[TABLE])
    assert not assert_same(start_of(wal), bytes(wal.log), list(range(len(wal.log)))).stop_reason


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 1 << 30), st.integers(0, 255)), min_size=1, max_size=4),
    st.lists(st.integers(0, 1 << 30), max_size=3),
    st.sampled_from([14, 18]),
)
def test_twins_agree_on_damaged_log(damage: list[tuple[int, int]], cuts: list[int], major: int) -> None:
    wal = LOG if major == 18 else LOG_14
    log = bytearray(wal.log)
    for place, value in damage:
        log[place % len(log)] = value
    assert_same(start_of(wal), bytes(log), cuts)


LOG_14 = busy_log(14)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=3000), st.integers(0, 255), st.integers(0, 255))
def test_twins_agree_on_any_body_of_a_record(body: bytes, manager: int, info: int) -> None:
    wal = WalWriter()
    wal.raw_record(manager % 11, info, body, xid=3)
    assert_same(start_of(wal), bytes(wal.log), [])


def test_the_rest_of_a_record_that_began_earlier_is_skipped(kernels: NativeKernels | None) -> None:
    wal = WalWriter()
    wal.noise(20_000)
    insert(wal, 5)
    start = FactsStart(wal.start + 8192, SEGMENT_BYTES, magic(wal))
    walk = begin_facts(start, kernels)
    rows, _ = fed(walk, bytes(wal.log[8192:]))
    assert [row[0] for row in rows] == [5]


def test_an_end_with_more_parts_than_fit_at_once_is_told_whole(kernels: NativeKernels | None) -> None:
    wal = WalWriter()
    insert(wal, 4)
    end(wal, 5, 6, children=list(range(10, 80_010)))
    rows, _ = fed(begin_facts(start_of(wal), kernels), bytes(wal.log))
    assert len(rows) == 1 + 80_000 + 1


def test_records_that_are_larger_than_the_buffer_come_whole(kernels: NativeKernels | None) -> None:
    wal = WalWriter()
    body = bytes(n % 251 for n in range(60_000))
    head, payload = block(0, PG_CLASS, data=body)
    for _ in range(40):
        wal.raw_record(10, 0x00, head + payload, xid=5)
    rows, records = fed(begin_facts(start_of(wal), kernels), bytes(wal.log))
    assert [len(one) for one in records] == [24 + len(head) + len(body)] * 40
    assert {row[-1] for row in rows if len(row) == 7} == {40}, "a record that came again was counted twice"


def test_what_is_no_log_stops_the_pass(kernels: NativeKernels | None) -> None:
    wal = WalWriter()
    insert(wal, 5)
    for other, reason in (
        (bytes(8192), StopReason.MAGIC),
        (bytes(wal.log) + bytes(64), StopReason.NO_RECORD),
    ):
        walk = begin_facts(start_of(wal), kernels)
        fed(walk, other)
        assert walk.stop_reason is reason
        assert list(walk.feed(bytes(100))) == []
    walk = begin_facts(FactsStart(wal.start, SEGMENT_BYTES, MAGIC_BY_MAJOR[15]), kernels)
    fed(walk, bytes(wal.log))
    assert walk.stop_reason is StopReason.MAGIC, "pages of another version were read"


def test_too_many_watched_relations_are_refused(kernels: NativeKernels | None) -> None:
    with pytest.raises(ValueError, match="watched"):
        begin_facts(start_of(LOG, watched=tuple(range(WATCHED_MAX + 1))), kernels)


@pytest.mark.parametrize("major", [14, 15, 18])
@pytest.mark.parametrize("compression", ["", "pglz", "lz4", "zstd"])
def test_blocks_are_read_with_their_images(major: int, compression: str) -> None:
    if major == 14 and compression not in ("", "pglz"):
        compression = "pglz"
    wal = WalWriter(major=major)
    image = Image(b"stored" * 9, 100, 8192 - 54 if not compression else 5000, compression)
    unapplied = Image(b"checked only", 8, 8180, applied=False)
    main = struct.pack("<IHBB", 5, 1, 0, 0)
    parts = [
        block(0, TABLE, data=b"data", image=image, page=9, major=major),
        block(1, None, image=unapplied, page=10, major=major, anew=True),
    ]
    record(wal, 10, 0x20, xid=5, main=main, blocks=parts)
    begin, finish = wal.records[0]
    whole = bytes(wal.log[begin - wal.start : finish - wal.start])
    (length,) = struct.unpack_from("<I", whole)
    found = read_fragments(whole[:length], magic(wal))
    assert found is not None
    first, second = found.blocks
    assert found.main == main
    assert (first.relation, first.number, first.data, first.image) == (TABLE, 9, b"data", b"stored" * 9)
    assert (first.hole_begin, first.hole_bytes) == (100, image.hole_bytes)
    assert first.compression == compression
    assert (second.relation, second.number, second.image, second.made_anew) == (TABLE, 10, None, True)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=400))
def test_fragments_of_anything_are_read_or_refused(body: bytes) -> None:
    for number in MAGIC_BY_MAJOR.values():
        read_fragments(bytes(24) + body, number)


def test_counts_of_a_mass_delete_are_few_rows() -> None:
    wal = WalWriter()
    for number in range(5000):
        delete(wal, 5 + number % 3)
    rows = [facts.rows for facts in begin_facts(start_of(wal), built_kernels()).feed(bytes(wal.log))]
    assert len(np.concatenate(rows)) == 3
