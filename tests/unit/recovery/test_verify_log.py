"""Log of two servers that was stored as one is found when all is read, and sound log is sound."""

from __future__ import annotations

import pytest
from tests.unit.kernels.synthetic_wal import SEGMENT_BYTES, SYSTEM, WalWriter, eventful_log
from tests.unit.repository.samples import REPOSITORY_KEY, SeededClock

from cloudsave.engines.postgresql.dialect import PostgresDialect
from cloudsave.logs.writer import segment_of
from cloudsave.model.finding import Severity
from cloudsave.model.log import LogIndex
from cloudsave.model.position import Position
from cloudsave.recovery.verify_log import read_log_through
from cloudsave.repository.crypto import LineageKeys
from cloudsave.repository.lineage import Lineage
from cloudsave.store.memory import MemoryStore
from cloudsave.telemetry import NoProgress

BRANCH = "00000001"
LOG = eventful_log()
SECOND = LOG.start + SEGMENT_BYTES
"""Begin of the second log file; the first one ends with padding."""


def other_log() -> WalWriter:
    """Of a server that began like the first one, and filled up the same log file with something else."""
    wal = WalWriter(start=LOG.start)
    wal.noise(5000)
    wal.switch()
    for number in range(40):
        wal.noise(30_000)
        wal.commit(80 + number, 6_000_000 + number)
    return wal


def store(lineage: Lineage, wal: WalWriter, first: int, last: int) -> None:
    """One stretch, indexed by itself as far as that goes: as if nobody had compared anything."""
    data = bytes(wal.log[first - wal.start : last - wal.start])
    index = LogIndex()
    if first % SEGMENT_BYTES == 0:
        indexer = PostgresDialect().indexer(
            Position(BRANCH, first), log_file_bytes=SEGMENT_BYTES, system_identifier=str(SYSTEM)
        )
        indexer.feed(data)
        index = indexer.take()
    lineage.put_log(segment_of(BRANCH, first, last, index), [data], index)


def trouble(lineage: Lineage) -> list[str]:
    found = read_log_through(
        lineage, PostgresDialect(), lineage.logs(), log_file_bytes=SEGMENT_BYTES, progress=NoProgress()
    )
    findings = list(found)
    assert all(one.severity is Severity.PROBLEM and one.hint for one in findings)
    return [one.fact for one in findings]


@pytest.fixture
def lineage() -> Lineage:
    keys = LineageKeys.derive(REPOSITORY_KEY, f"postgresql-{SYSTEM}")
    return Lineage(MemoryStore(), keys, clock=SeededClock(1))


def test_log_of_one_server_is_sound_however_it_was_cut(lineage: Lineage) -> None:
    store(lineage, LOG, LOG.start, SECOND)
    store(lineage, LOG, SECOND, SECOND + 8192 * 3 + 16)
    store(lineage, LOG, SECOND + 8192 * 2, SECOND + SEGMENT_BYTES)
    store(lineage, LOG, SECOND, SECOND + SEGMENT_BYTES)
    store(lineage, LOG, SECOND + SEGMENT_BYTES, LOG.end)
    assert trouble(lineage) == []


def test_the_log_of_another_server_behind_that_of_the_first_is_found(lineage: Lineage) -> None:
    store(lineage, LOG, LOG.start, SECOND)
    store(lineage, other_log(), SECOND, SECOND + SEGMENT_BYTES)
    (fact,) = trouble(lineage)
    assert "cannot be replayed" in fact
    assert "does not follow the one before it" in fact


@pytest.mark.parametrize(("first", "last"), [(0, 8192 * 4), (8192 * 2, 8192 * 6)])
def test_log_of_another_server_in_the_place_of_the_first_ones_is_found(
    lineage: Lineage, first: int, last: int
) -> None:
    store(lineage, LOG, LOG.start, SECOND)
    store(lineage, LOG, SECOND, SECOND + SEGMENT_BYTES)
    store(lineage, other_log(), SECOND + first, SECOND + last)
    (fact,) = trouble(lineage)
    assert "differ" in fact


@pytest.mark.parametrize("begin", [SECOND - 8192, SECOND + 8192])
def test_a_range_that_begins_within_a_log_file_is_followed_from_the_next_one_on(
    lineage: Lineage, begin: int
) -> None:
    """Behind the begin of the other server's log the first one's goes on."""
    third = SECOND + SEGMENT_BYTES
    store(lineage, other_log(), begin, third)
    store(lineage, LOG, third, LOG.end)
    assert len(trouble(lineage)) == (begin < SECOND)
