"""Which blocks a log changes: C and Python agree, and what is not understood makes everything doubtful."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloudsave.kernels.native import NativeKernels
from cloudsave.kernels.wal_walk import WalkStart, begin_walk
from cloudsave.model.changes import ANY, CHANGE_BLOCK, CHANGE_FROM, EVERYTHING, Change
from tests.unit.kernels.built import built_kernels
from tests.unit.kernels.synthetic_wal import SEGMENT_BYTES, SYSTEM, Block, Image, WalWriter

TABLE, INDEX = (1663, 5, 16384), (1663, 5, 16390)
EVERYTHING_CHANGED = [EVERYTHING]


@pytest.fixture(params=["native", "twin"])
def kernels(request: pytest.FixtureRequest) -> NativeKernels | None:
    return built_kernels() if request.param == "native" else None


def changes(
    log: WalWriter, kernels: NativeKernels | None, *, skip: int = 0, piece_bytes: int = 1 << 30
) -> list[Change]:
    """What the log after its first `skip` records changes."""
    begin = log.records[skip - 1][1] if skip else log.start
    walk = begin_walk(
        WalkStart(begin, SEGMENT_BYTES, SYSTEM if not skip else 0, 1, collect_changes=True), kernels
    )
    content = bytes(log.log[begin - log.start :])
    for at in range(0, len(content), piece_bytes):
        walk.walk(content[at : at + piece_bytes])
    assert not walk.stop_reason
    return [tuple(row) for row in walk.take_changes().tolist()]


def block(relation: tuple[int, int, int], number: int) -> Change:
    return (*relation, number, CHANGE_BLOCK)


def all_from(space: int, database: int, relation: int, first: int = 0) -> Change:
    return (space, database, relation, first, CHANGE_FROM)


@pytest.mark.parametrize("major", [14, 15, 16, 17, 18])
@pytest.mark.parametrize("piece_bytes", [1, 23, 1 << 30])
def test_every_block_of_a_main_fork_is_told_once(
    major: int, piece_bytes: int, kernels: NativeKernels | None
) -> None:
    log = WalWriter(major=major)
    for number in (7, 3, 7):
        log.blocks([Block(TABLE, number, data=b"row"), Block(INDEX, 9), Block(INDEX, 10)], b"main")
    log.blocks([Block(TABLE, 100, image=Image(bytes(5000), hole=True, packed=0))])
    log.blocks([Block(TABLE, 101, image=Image(bytes(300), hole=True, packed=1))], bytes(300))
    log.blocks([Block(TABLE, 102, image=Image(bytes(8192), hole=False, packed=0)), Block(TABLE, 103)])
    log.blocks([Block(TABLE, 8, fork=2), Block(TABLE, 4)], before=b"\xfd\x01\x00\xfc\x01\x00\x00\x00")
    wanted = {block(TABLE, n) for n in (3, 4, 7, 100, 101, 102, 103)} | {block(INDEX, 9), block(INDEX, 10)}
    assert changes(log, kernels, piece_bytes=piece_bytes) == sorted(wanted)


@pytest.mark.parametrize("packed", [1, 2, 4])
def test_each_way_of_compressing_images_is_understood(packed: int, kernels: NativeKernels | None) -> None:
    log = WalWriter(major=17)
    log.blocks([Block(TABLE, 5, image=Image(bytes(99), hole=True, packed=packed)), Block(INDEX, 6)])
    assert changes(log, kernels) == [block(TABLE, 5), block(INDEX, 6)]


@pytest.mark.parametrize("major", [14, 18])
def test_blocks_are_found_before_the_version_is_known(major: int, kernels: NativeKernels | None) -> None:
    log = WalWriter(major=major)
    log.noise(10)
    log.blocks([Block(TABLE, 5, image=Image(bytes(99), hole=True, packed=1)), Block(INDEX, 6)])
    assert {block(TABLE, 5), block(INDEX, 6)} <= set(changes(log, kernels, skip=1))


def test_a_record_with_as_many_blocks_as_can_be(kernels: NativeKernels | None) -> None:
    log = WalWriter()
    many = [Block((1663, 5, n), n, data=b"d", image=Image(b"i", hole=True, packed=1)) for n in range(33)]
    log.blocks(many, bytes(400), before=b"\xfd\x01\x00\xfc\x01\x00\x00\x00")
    assert changes(log, kernels) == [(1663, 5, n, n, CHANGE_BLOCK) for n in range(33)]


def dropping(info: int, *, parts: int = 4, relations: int = 2) -> WalWriter:
    """A commit or abort that drops relations."""
    data = struct.pack("<qI", 5, parts) + (bytes(8) if parts & 1 else b"")
    data += struct.pack("<I", 300) + bytes(1200) if parts & 2 else b""
    data += struct.pack("<I", relations) + struct.pack("<IIIIII", *TABLE, *INDEX)
    log = WalWriter()
    log.record(1, info | 0x81, data + (struct.pack("<I", 7) if parts & 16 else b""), xid=7)
    return log


@pytest.mark.parametrize("info", [0x00, 0x20, 0x30, 0x40])
@pytest.mark.parametrize("parts", [4, 7])
def test_relations_that_are_dropped_are_changed(info: int, parts: int, kernels: NativeKernels | None) -> None:
    log = dropping(info, parts=parts | 16)
    assert changes(log, kernels) == [all_from(*TABLE), all_from(*INDEX)]


def special(manager: int, info: int, main: bytes) -> WalWriter:
    log = WalWriter()
    log.record(manager, info, main)
    return log


def words(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}I", *values)


@pytest.mark.parametrize(
    ("log", "wanted"),
    [
        (special(2, 0x11, words(*TABLE, 0)), [all_from(*TABLE)]),
        (special(2, 0x11, words(*TABLE, 2)), []),
        (special(2, 0x21, words(17, *TABLE, 7)), [all_from(*TABLE, 17)]),
        (special(2, 0x21, words(17, *TABLE, 4)), []),
        (special(4, 0x01, words(16999, 1663, 1, 1663)), [all_from(ANY, 16999, ANY)]),
        (special(4, 0x10, words(16999, 1663)), [all_from(ANY, 16999, ANY)]),
        (special(4, 0x21, words(16999, 1, 1663)), [all_from(ANY, 16999, ANY)]),
        (special(5, 0x00, words(17001) + b"/somewhere\0"), [all_from(17001, ANY, ANY)]),
        (special(5, 0x10, words(17001)), [all_from(17001, ANY, ANY)]),
        (special(0, 0x60, words(100, 8, 10, 0, 64, 1, 0)), []),
        (special(0, 0x60, words(100, 8, 10, 0, 64, 0, 0)), EVERYTHING_CHANGED),
        (special(0, 0x60, words(100, 8)), EVERYTHING_CHANGED),
        (special(0, 0x10, bytes(80)), []),
    ],
)
def test_special_records(log: WalWriter, wanted: list[Change], kernels: NativeKernels | None) -> None:
    assert changes(log, kernels) == wanted


@pytest.mark.parametrize(
    "log",
    [
        special(2, 0x31, words(*TABLE, 0)),
        special(2, 0x11, words(*TABLE)),
        special(2, 0x21, words(17, *TABLE)),
        special(4, 0x01, b"ab"),
        special(1, 0x11, bytes(40)),
        special(1, 0x01, bytes(8)),
        special(10, 0x01, bytes(40)),
        special(0, 0x61, words(100, 8, 10, 0, 64, 1, 0)),
        special(21, 0x01, bytes(40)),
        special(200, 0x71, bytes(40)),
        dropping(0x00, relations=3),
        dropping(0x00, relations=1 << 31),
        dropping(0x00, parts=1),
    ],
)
def test_what_is_not_understood_makes_everything_doubtful(
    log: WalWriter, kernels: NativeKernels | None
) -> None:
    assert changes(log, kernels) == EVERYTHING_CHANGED


@pytest.mark.parametrize(
    "body",
    [
        b"\x21" + bytes(30),
        b"\x00\x80\x00\x00" + bytes(4),
        b"\x00\x00\x05\x00" + bytes(16),
        b"\x01\x00\x00\x00" + bytes(16) + b"\x01\x80\x00\x00" + bytes(4),
        b"\x00",
        b"\xff\x07abc",
        b"\xfe\xff\xff\xff\xff",
        b"\xff\x01a\xff\x01b",
    ],
)
def test_malformed_fragments_make_everything_doubtful(body: bytes, kernels: NativeKernels | None) -> None:
    log = WalWriter()
    log.raw_record(10, 0x00, body)
    assert EVERYTHING in changes(log, kernels)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=120), st.sampled_from([0, 1, 2, 4, 5, 10, 200]), st.integers(0, 255), st.booleans())
def test_twins_agree_on_any_record(body: bytes, manager: int, info: int, known: bool) -> None:
    if manager == 0 and info & 0xF0 in (0x00, 0x40, 0x70, 0x90, 0xD0):
        info = 0x60
    if manager == 1 and info & 0x70 in (0x00, 0x30):
        info = info & 0x8F | 0x20
    log = WalWriter(major=14)
    log.noise(3)
    log.raw_record(manager, info, body)
    skip = 0 if known else 1
    assert changes(log, built_kernels(), skip=skip) == changes(log, None, skip=skip)


def test_more_changes_than_the_table_holds_are_all_told() -> None:
    log = WalWriter()
    for number in range(0, 100_000, 25):
        log.blocks([Block(TABLE, number + n) for n in range(25)])
    assert changes(log, built_kernels()) == [block(TABLE, n) for n in range(100_000)]


def test_a_drop_of_more_relations_than_the_table_holds_makes_everything_doubtful() -> None:
    count = 80_000
    log = WalWriter()
    relations = b"".join(words(1663, 5, n) for n in range(count))
    log.record(1, 0x81, struct.pack("<qII", 5, 4, count) + relations, xid=7)
    found = changes(log, built_kernels())
    assert EVERYTHING in found
    assert all_from(1663, 5, 0) in found


def test_nothing_of_a_record_with_a_wrong_crc_is_told(kernels: NativeKernels | None) -> None:
    log = WalWriter()
    log.blocks([Block(TABLE, 1)])
    log.blocks([Block(TABLE, 2)])
    log.log[log.records[1][0] - log.start + 40] ^= 1
    walk = begin_walk(WalkStart(log.start, SEGMENT_BYTES, collect_changes=True), kernels)
    walk.walk(log.log)
    assert walk.stop_reason
    assert [tuple(row) for row in walk.take_changes().tolist()] == [block(TABLE, 1)]


def test_changes_are_collected_only_where_wanted(kernels: NativeKernels | None) -> None:
    log = WalWriter()
    log.blocks([Block(TABLE, 1)])
    walk = begin_walk(WalkStart(log.start, SEGMENT_BYTES), kernels)
    walk.walk(log.log)
    assert len(walk.take_changes()) == 0


def test_what_was_seen_is_known(kernels: NativeKernels | None) -> None:
    """From the begin of a segment the rest of an older record is skipped: its changes are not known."""
    log = WalWriter()
    while log.end % SEGMENT_BYTES < SEGMENT_BYTES - 3000:
        log.noise(2500)
    log.blocks([Block(TABLE, 1, data=bytes(9000))])
    _, end = log.records[-1]
    log.blocks([Block(TABLE, 2)])
    second = log.start + SEGMENT_BYTES
    walk = begin_walk(WalkStart(second, SEGMENT_BYTES, collect_changes=True), kernels)
    content = bytes(log.log[SEGMENT_BYTES:])
    assert walk.seen_from == second
    walk.walk(content[:100])
    assert walk.seen_from is None
    walk.walk(content[100:])
    assert walk.seen_from == end
    assert [tuple(row) for row in walk.take_changes().tolist()] == [block(TABLE, 2)]
    from_boundary = begin_walk(WalkStart(end, SEGMENT_BYTES, collect_changes=True), kernels)
    from_boundary.walk(content[end - second :])
    assert from_boundary.seen_from == end
