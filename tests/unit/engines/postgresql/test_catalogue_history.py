"""Rows that name things are followed through log records, and never guessed."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloudsave.engines.postgresql.catalogue_history import CatalogueHistory, Operation
from cloudsave.engines.postgresql.format_catalogue import PG_CLASS, NamingRow, parse_map, parse_row, tuples_of
from tests.unit.engines.postgresql.synthetic_catalogue import columns, page
from tests.unit.kernels.synthetic_heap import (
    PG_CLASS as PG_CLASS_FILE,
)
from tests.unit.kernels.synthetic_heap import (
    Image,
    block,
    delete,
    insert,
    record,
    relation_map,
    update,
)
from tests.unit.kernels.synthetic_wal import WalWriter


def followed(wal: WalWriter) -> CatalogueHistory:
    """The history after all records of a log without page breaks."""
    history = CatalogueHistory(wal.major)
    for begin, end in wal.records:
        (length,) = struct.unpack_from("<I", wal.log, begin - wal.start)
        history.apply(begin, bytes(wal.log[begin - wal.start : min(end, begin + length) - wal.start]))
    return history


@pytest.mark.parametrize("major", [14, 15, 16, 17, 18])
def test_an_update_of_differing_bytes_alone_is_understood(major: int) -> None:
    wal = WalWriter(major=major)
    old, new = columns(major=major), columns(file=20_000, major=major)
    insert(wal, 5, PG_CLASS_FILE, line=3, columns=old)
    update(wal, 6, PG_CLASS_FILE, old=3, line=4, columns=new[88:92], prefix=88, suffix=len(old) - 92)
    delete(wal, 7, PG_CLASS_FILE, line=4)
    history = followed(wal)
    (made,), (changed,), (gone,) = history.changes[5], history.changes[6], history.changes[7]
    row = NamingRow(PG_CLASS, 16_384, "orders", 2200, 16_384, 0, "r")
    assert (made.operation, made.old, made.new) == (Operation.INSERT, None, row)
    assert changed.old == row
    assert changed.new is not None
    assert (changed.new.file, changed.new.name) == (20_000, "orders")
    assert (gone.operation, gone.old) == (Operation.DELETE, changed.new)
    assert all(one.known for one in (made, changed, gone))


def test_a_row_that_no_record_told_is_unknown_and_not_guessed() -> None:
    wal = WalWriter()
    delete(wal, 7, PG_CLASS_FILE, line=4)
    update(wal, 8, PG_CLASS_FILE, old=5, line=6, columns=b"1234", prefix=88, suffix=60)
    delete(wal, 9, PG_CLASS_FILE, line=6)
    history = followed(wal)
    assert [history.changes[xid][0].known for xid in (7, 8, 9)] == [False, False, False]


@pytest.mark.parametrize("compressed", [False, True])
def test_an_image_tells_every_row_of_its_page(compressed: bool) -> None:
    whole = page(columns("first", oid=16_384), columns("second", oid=16_390, file=16_390))
    upper = struct.unpack_from("<H", whole, 14)[0]
    stored, hole = whole[:32] + whole[upper:], upper - 32
    if compressed:  # as literals alone
        stored = b"".join(b"\0" + stored[at : at + 8] for at in range(0, len(stored), 8))
    image = Image(stored, 32, hole, "pglz" if compressed else "")
    wal = WalWriter()
    head = block(0, PG_CLASS_FILE, image=image)
    record(wal, 10, 0x10, xid=7, main=struct.pack("<IHBB", 7, 2, 0, 0), blocks=[head])
    delete(wal, 8, PG_CLASS_FILE, line=1)
    history = followed(wal)
    assert history.changes[7][0].old is not None
    assert history.changes[7][0].old.name == "second"
    assert history.changes[8][0].old is not None
    assert history.changes[8][0].old.name == "first"


def test_a_catalogue_that_moved_is_followed_to_its_new_file() -> None:
    wal = WalWriter()
    relation_map(wal, 5, {1259: 20_000, 1249: 1249})
    insert(wal, 5, (1663, 5, 20_000), line=1, columns=columns())
    insert(wal, 5, (1663, 6, 20_000), line=1, columns=columns())
    history = followed(wal)
    assert 20_000 in history.watched()
    assert [one.database for one in history.changes[5]] == [5], (
        "another database's file of that number is no catalogue"
    )


def test_tuples_of_a_page_are_found_and_dead_ones_told() -> None:
    assert [(one.line, one.undeleted) for one in tuples_of(page(columns(), columns()))] == [
        (1, True),
        (2, True),
    ]
    assert list(tuples_of(bytes(8192))) == []


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.binary(max_size=200), max_size=5),
    st.lists(st.tuples(st.integers(0, 8191), st.integers(0, 255)), max_size=20),
)
def test_any_page_and_any_row_is_read_or_passed_over(
    rows: list[bytes], damage: list[tuple[int, int]]
) -> None:
    damaged = bytearray(page(*rows))
    for place, value in damage:
        damaged[place if place % 2 else place % 60] = value
    content = bytes(damaged)
    for one in tuples_of(content):
        for catalogue in (1259, 2615, 1262):
            parse_row(catalogue, one.columns, major=14)
            parse_row(catalogue, one.columns, major=18)
    parse_map(content)


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from([0x00, 0x10, 0x20, 0x40, 0x70]),
    st.binary(max_size=40),
    st.binary(max_size=120),
    st.none() | st.binary(max_size=200),
)
def test_any_record_is_followed_or_passed_over(
    operation: int, main: bytes, data: bytes, stored: bytes | None
) -> None:
    wal = WalWriter()
    image = None if stored is None else Image(stored, 10, 100, "lz4")
    record(wal, 10, operation, xid=5, main=main, blocks=[block(0, PG_CLASS_FILE, data=data, image=image)])
    followed(wal).learn_images()
