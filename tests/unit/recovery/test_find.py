"""The search of stored log: what is read, what is said to be missing, and how things are named."""

from __future__ import annotations

import struct

import pytest
from tests.unit.engines.postgresql.synthetic_catalogue import columns, page
from tests.unit.kernels.synthetic_heap import TABLE, delete, end, running
from tests.unit.recovery.searched_site import (
    BRANCH,
    SECOND_BRANCH,
    Site,
    accident,
    filler,
    instant,
    long_transaction,
    time,
)

from cloudsave.errors import LogDamaged, LogNotStored
from cloudsave.model.found import ChangeKind
from cloudsave.model.ledger import Ledger
from cloudsave.model.log import Commit, LogIndex, LogSegment
from cloudsave.recovery import find as flow
from cloudsave.recovery.find import Filters, SearchResult, stored_runs


def texts(result: SearchResult) -> list[list[str]]:
    return [[change.text for change in hit.found.changes] for hit in result.hits]


def test_a_transaction_that_began_before_the_span_is_found_whole() -> None:
    site = long_transaction()
    site.store()
    result = site.find(8.5, 9.5)
    assert texts(result) == [
        ["31 rows deleted from relation with file 1663/5/16384 (name unknown) in database 5"]
    ]
    assert result.whole


def test_where_the_begin_of_transactions_is_not_stored_it_is_said() -> None:
    site = long_transaction(horizons=False)
    site.store()
    result = site.find(8.5, 9.5)
    assert not result.whole
    assert "may have done more" in result.shortcomings[0]


def test_how_far_is_looked_back_is_limited_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flow, "LOOK_BACK_OBJECTS_MAX", 2)
    site = long_transaction()
    site.store()
    result = site.find(8.5, 9.5)
    assert not result.whole
    assert texts(result) == [], "fewer rows than wanted were seen of it"


def test_a_hole_in_the_span_is_told_and_one_outside_is_not() -> None:
    site = Site()
    filler(site, 0, 20)
    site.store(without=[10])
    result = site.find(5, 15)
    assert [one.text.partition(" from ")[0] for one in result.unsearched] == ["the log has a hole"]
    assert site.find(12, 15).unsearched == []
    assert site.find(2, 6).unsearched == []


def test_what_lies_before_and_after_the_stored_log_is_told() -> None:
    site = Site()
    filler(site, 0, 5)
    site.store()
    assert site.find(-100, 3).unsearched[0].last is not None
    assert site.find(1, 900).unsearched == [], "the log is known up to second 1000"
    assert site.find(900, 950).hits == []
    assert site.find(1, 2000).unsearched[0].last is None
    for first, last in ((-100, -50), (1500, 2000)):
        with pytest.raises(LogNotStored):
            site.find(first, last)


def test_a_dropped_relation_is_named_by_an_image_of_long_before() -> None:
    site = Site()
    accident(site)
    site.store()
    result = site.find(5.5, 6.5)
    assert texts(result) == [["dropped table public.orders in database 5"]]
    assert result.hits[0].found.changes[0].relation is not None
    assert result.hits[0].found.changes[0].relation.known_by == "log"
    assert result.hits[0].found.stop_offset == site.wal.records[-5][0]


def test_a_relation_is_named_by_the_backup_where_the_log_does_not() -> None:
    site = Site()
    running(site.wal, oldest=5, following=5)
    for _ in range(12):
        delete(site.wal, 5)
    end(site.wal, 5, time(6))
    mapping = struct.pack("<iiII", 0x592717, 1, 1259, 17_000)
    empty = struct.pack("<ii", 0x592717, 0)
    site.store(
        files={
            "global/pg_filenode.map": empty,
            "base/5/pg_filenode.map": mapping,
            "base/5/17000": page(columns("orders")),
            "base/6/pg_filenode.map": empty,
            "base/6/1259": page(columns("of another database")),
            "global/1262": page(struct.pack("<I64s", 5, b"shop").ljust(100, b"\0")),
        }
    )
    assert texts(site.find()) == [["12 rows deleted from table public.orders in database shop"]]
    assert len(site.find(filters=Filters("orders", "", "shop")).hits) == 1
    assert len(site.find(filters=Filters("public.orders")).hits) == 1
    assert site.find(filters=Filters("orders", "", "6")).hits == []
    missed = site.find(filters=Filters("order"))
    assert missed.hits == []
    assert {one.name for one in missed.names} == {"orders", "of another database"}


def test_one_transaction_is_found_by_the_index_and_little_log_is_read() -> None:
    site = long_transaction()
    filler(site, 12, 60)
    site.store()
    result = site.find(transaction=5)
    assert [hit.found.transaction for hit in result.hits] == [5]
    assert result.log_bytes < site.find().log_bytes // 3


def test_commits_alone_need_no_log() -> None:
    site = long_transaction()
    site.store()
    result = site.find(2, 9, kinds=frozenset({ChangeKind.COMMIT}))
    assert [hit.found.transaction for hit in result.hits] == [*range(1002, 1008), 5]
    assert result.log_bytes == 0


def test_a_state_before_the_backup_is_not_offered() -> None:
    site = Site()
    end(site.wal, 5, time(1), dropped=[TABLE])
    filler(site, 2, 5)
    end(site.wal, 6, time(6), dropped=[TABLE])
    site.store()
    assert [hit.reachable for hit in site.find().hits] == [False, True]


def test_a_search_goes_on_over_a_promotion() -> None:
    site = long_transaction()
    site.promote()
    filler(site, 12, 14)
    end(site.wal, 6, time(15), dropped=[TABLE])
    site.store()
    result = site.find(8.5)
    assert [(hit.found.transaction, hit.branch) for hit in result.hits] == [(5, BRANCH), (6, SECOND_BRANCH)]
    assert result.branch == SECOND_BRANCH
    assert all(hit.reachable for hit in result.hits)
    assert result.whole


def test_a_commit_that_ends_in_the_object_behind_the_span_is_found() -> None:
    site = Site()
    filler(site, 0, 1)
    site.store()
    wal, begin = site.wal, site.wal.end
    running(wal, oldest=5, following=5)
    commit = end(wal, 5, time(2), dropped=[TABLE] * 30)
    middle = wal.end - 200
    wal.commit(6, time(500))
    listed = Commit(commit, wal.records[-1][0], instant(2), 5)
    later = Commit(*wal.records[-1], instant(500), 6)
    for first, last, index in (
        (begin, middle, LogIndex([listed], record_first=begin, records_end=commit)),
        (middle, wal.end, LogIndex([later], record_first=wal.records[-1][0], records_end=wal.end)),
    ):
        instants = index.commits.instants.tolist()
        segment = LogSegment(BRANCH, first, last, *instants, *instants)
        site.lineage.put_log(segment, [bytes(wal.log[first - wal.start : last - wal.start])], index)
    assert [hit.found.transaction for hit in site.find(1.5, 3).hits] == [5]


def test_log_that_no_server_wrote_is_named_and_not_searched_on() -> None:
    site = Site()
    filler(site, 0, 2)
    site.store()
    first = site.lineage.logs()[0]
    damaged = LogSegment(BRANCH, first.last, first.last + 8192, instant(3), instant(3))
    site.lineage.put_log(damaged, [bytes(8192)], LogIndex(record_first=first.last))
    with pytest.raises(LogDamaged):
        site.find()


def test_runs_are_cut_at_holes_and_not_at_branches() -> None:
    segments = [
        LogSegment("1", 0, 10),
        LogSegment("1", 10, 25),
        LogSegment("2", 20, 30),
        LogSegment("2", 40, 50),
    ]
    path = (("1", 0, 20), ("2", 20, None))
    runs = stored_runs(Ledger(segments), path)
    assert [(run.first, run.last) for run in runs] == [(0, 30), (40, 50)]
    assert stored_runs(Ledger([]), path) == []
    beyond = stored_runs(Ledger([LogSegment("1", 22, 25)]), path)
    assert beyond == [], "log that its branch wrote after the other had left it"
