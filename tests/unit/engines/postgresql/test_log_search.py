"""The search as a whole: damaged log is refused by name or passed over, and never a crash."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloudsave.engines.postgresql.log_search import PostgresLogSearch
from cloudsave.engines.search_api import Horizon
from cloudsave.errors import LogDamaged
from cloudsave.kernels.native import NativeKernels
from cloudsave.model.found import ChangeKind, SearchQuery
from tests.unit.engines.postgresql.synthetic_catalogue import columns
from tests.unit.kernels.built import built_kernels
from tests.unit.kernels.synthetic_heap import PG_CLASS, busy_log, delete, end, insert, update
from tests.unit.kernels.synthetic_wal import SEGMENT_BYTES, WalWriter

EVERYTHING = SearchQuery(0, 1 << 62, frozenset(ChangeKind), 1, aborted=True)
LOGS = {major: busy_log(major) for major in (14, 18)}


@pytest.fixture(params=["native", "twin"])
def kernels(request: pytest.FixtureRequest) -> NativeKernels | None:
    return built_kernels() if request.param == "native" else None


def search_of(wal: WalWriter, kernels: NativeKernels | None) -> PostgresLogSearch:
    return PostgresLogSearch(f"{wal.major}.1", log_file_bytes=SEGMENT_BYTES, kernels=kernels)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([14, 18]),
    st.lists(st.tuples(st.integers(0, 1 << 30), st.integers(0, 255)), max_size=6),
)
def test_damaged_log_never_crashes(major: int, damage: list[tuple[int, int]]) -> None:
    wal = LOGS[major]
    log = bytearray(wal.log)
    for place, value in damage:
        log[place % len(log)] = value
    search = search_of(wal, built_kernels())
    reading = search.begin(EVERYTHING, wal.start)
    with suppress(LogDamaged):
        reading.feed(bytes(log))
    with suppress(LogDamaged):
        reading.feed_earlier(bytes(log), wal.start)
    with suppress(LogDamaged):
        search.horizons(bytes(log), wal.start)
    reading.lacks_earlier()
    reading.lacks_names()
    for one in reading.found():
        assert one.stop_offset <= one.offset or not one.instant_us


def test_a_search_tells_the_same_with_and_without_kernels(kernels: NativeKernels | None) -> None:
    wal = WalWriter()
    whole = columns("orders")
    insert(wal, 5, PG_CLASS, line=3, columns=whole)
    end(wal, 5, 1)
    update(
        wal,
        6,
        PG_CLASS,
        old=3,
        line=4,
        columns=columns(file=20_000)[88:92],
        prefix=88,
        suffix=len(whole) - 92,
    )
    end(wal, 6, 2)
    delete(wal, 8, PG_CLASS, line=4)
    end(wal, 7, 3, children=[8])
    reading = search_of(wal, kernels).begin(EVERYTHING, wal.start)
    for place in range(0, len(wal.log), 99):
        reading.feed(bytes(wal.log[place : place + 99]))
    assert not reading.lacks_earlier()
    assert [[change.text for change in one.changes] for one in reading.found()] == [
        ["created table public.orders in database 5"],
        ["truncated table public.orders in database 5"],
        ["dropped table public.orders in database 5"],
    ]


def test_transaction_ids_go_round() -> None:
    search = search_of(LOGS[18], None)
    last = (1 << 32) - 1
    assert search.reaches(Horizon(1, last - 5, last - 2), Horizon(2, last - 2, 9))
    assert search.reaches(Horizon(1, last - 5, last - 2), Horizon(2, 7, 9))
    assert not search.reaches(Horizon(1, last - 5, 7), Horizon(2, last - 1, 9))
