"""The indexer finds every transaction however the bytes come, and takes no byte that is not right."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloudsave.engines.binlog.indexer import BinlogIndexer
from cloudsave.engines.binlog.position import offset_of
from cloudsave.errors import LogDamaged
from cloudsave.model.log import Commit
from cloudsave.model.position import Position
from tests.unit.engines.binlog.synthetic import TIME, File


def _file(engine: str, numbers: range) -> File:
    made = File()
    for number in numbers:
        if engine == "mysql":
            made.mysql(number, instant_us=TIME * 1_000_000 + number, rows=bytes(number))
        else:
            made.mariadb(number, rows=bytes(number), standalone=number % 3 == 0)
    return made


def _indexer(offset: int) -> BinlogIndexer:
    return BinlogIndexer(Position("b", offset))


@pytest.mark.parametrize("engine", ["mysql", "mariadb"])
@given(cuts=st.lists(st.integers(0, 4000), max_size=12))
@settings(max_examples=60, deadline=None)
def test_transactions_are_found_however_the_log_is_cut(engine: str, cuts: list[int]) -> None:
    one, two = _file(engine, range(1, 8)), _file(engine, range(8, 12))
    one.rotate(b"binlog.000008")
    log = bytes(one.content + two.content)
    indexer = _indexer(offset_of(7, 0))
    commits: list[Commit] = []
    places = sorted({0, len(log), *(min(cut, len(log)) for cut in cuts)})
    for begin, end in itertools.pairwise(places):
        indexer.feed(log[begin:end])
        commits.extend(indexer.take().commits)
    expected = [
        (offset_of(number, begin), offset_of(number, end), transaction)
        for number, made in ((7, one), (8, two))
        for begin, end, transaction in made.transactions
    ]
    assert [(one.offset, one.end_offset, one.transaction) for one in commits] == expected
    if engine == "mysql":
        assert [one.instant_us - TIME * 1_000_000 for one in commits] == list(range(1, 12))


def test_log_is_followed_from_the_begin_of_any_transaction() -> None:
    made = _file("mysql", range(1, 5))
    begin, _, number = made.transactions[2]
    indexer = _indexer(offset_of(3, begin))
    indexer.feed(bytes(made.content[begin:]))
    index = indexer.take()
    assert [one.transaction for one in index.commits] == [number, number + 1]
    assert index.record_first == offset_of(3, begin)
    assert index.records_end == offset_of(3, len(made.content))


def test_a_transaction_that_is_cut_off_is_not_complete() -> None:
    made = _file("mariadb", range(1, 3))
    begin, _, _ = made.transactions[-1]
    indexer = _indexer(offset_of(1, 0))
    indexer.feed(bytes(made.content[:-1]))
    index = indexer.take()
    assert len(index.commits) == 1
    assert (index.record_last, index.records_end) == (offset_of(1, begin), offset_of(1, begin))


def test_file_that_a_crash_ended_is_followed_by_the_next_one() -> None:
    one, two = _file("mysql", range(1, 3)), _file("mysql", range(3, 5))
    half = one.transactions[-1][0] + 40
    whole = next(e for b, e, _ in one.transactions[:1] for _ in (b,))
    assert half > whole
    indexer = _indexer(offset_of(1, 0))
    indexer.feed(bytes(one.content[:whole] + two.content))
    assert [one.transaction for one in indexer.take().commits] == [1, 3, 4]


@given(place=st.integers(0, 1 << 20), bit=st.integers(0, 7))
@settings(max_examples=150, deadline=None)
def test_no_changed_bit_is_taken(place: int, bit: int) -> None:
    made = _file("mysql", range(1, 4))
    damaged = bytearray(made.content)
    damaged[place % len(damaged)] ^= 1 << bit
    indexer = _indexer(offset_of(1, 0))
    try:
        indexer.feed(bytes(damaged))
    except LogDamaged:
        return
    # A changed length may ask for more bytes than there are; then the event is not taken, nor what follows.
    assert indexer.take().records_end < offset_of(1, place % len(damaged))


def test_left_out_event_is_noticed() -> None:
    made = _file("mysql", range(1, 4))
    begin, end, _ = made.transactions[1]
    with pytest.raises(LogDamaged, match="000001"):
        _indexer(offset_of(1, 0)).feed(bytes(made.content[:begin] + made.content[end:]))


def test_file_without_checksums_is_refused() -> None:
    with pytest.raises(LogDamaged) as caught:
        _indexer(offset_of(1, 0)).feed(bytes(File(checksums=0).content))
    assert "without checksums" in caught.value.detail
