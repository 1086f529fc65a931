"""The newest log is stored from the source's own files, and nothing that is not log."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cloudsave.clock import SYSTEM_CLOCK
from cloudsave.engines.postgresql.dialect import PostgresDialect
from cloudsave.errors import LogConflict, LogDamaged
from cloudsave.logs.ledger import Step
from cloudsave.logs.resume import Resumer
from cloudsave.logs.tail import TAIL_BYTES_MAX, store_tail
from cloudsave.model.engine_facts import LogAtHand
from cloudsave.model.identity import Role, SourceIdentity
from cloudsave.model.ledger import Ledger, read_extents
from cloudsave.model.position import Position
from cloudsave.repository.lineage import Lineage
from cloudsave.store.memory import MemoryStore
from tests.unit.kernels.synthetic_wal import SEGMENT_BYTES, SYSTEM, WalWriter, eventful_log
from tests.unit.repository.samples import lineage_on

LOG = eventful_log()
BRANCH = "00000001"
IDENTITY = SourceIdentity(
    engine="postgresql",
    system_identifier=str(SYSTEM),
    version="18.6",
    major=18,
    branch=BRANCH,
    role=Role.PRIMARY,
    data_directory="/data",
    page_bytes=8192,
    log_file_bytes=SEGMENT_BYTES,
    page_checksums=True,
)
BEGIN = LOG.start + SEGMENT_BYTES


def at_hand(log: bytes, *, until: int = LOG.end) -> LogAtHand:
    """Files that hold `log` up to `until`."""
    return LogAtHand(IDENTITY, lambda begin, end: log[begin.offset - LOG.start : min(end, until) - LOG.start])


def tail(lineage: Lineage, stop: int, files: LogAtHand, *, begin: int = BEGIN) -> bool:
    span = (Position(BRANCH, begin), Position(BRANCH, stop))
    return store_tail(lineage, PostgresDialect(), files, span, SYSTEM_CLOCK)


def stored(lineage: Lineage, begin: int, end: int) -> bytes:
    cover = Ledger(lineage.logs()).cover([(BRANCH, 0, None)], begin, end)
    assert cover.complete
    return read_extents(lineage.read_log, cover.extents)


def test_what_is_missing_is_stored_once_and_continues_what_is_stored() -> None:
    lineage = lineage_on(MemoryStore())
    files = at_hand(bytes(LOG.log))
    ends = [end for _, end in LOG.records if end > BEGIN]
    assert tail(lineage, ends[0] + 8, files)
    assert tail(lineage, ends[-1], files)
    before = len(lineage.logs())
    assert tail(lineage, ends[-1] - 100, files)
    assert len(lineage.logs()) == before
    begin, end = BEGIN - LOG.start, ends[-1] - LOG.start
    assert stored(lineage, BEGIN, ends[-1]) == bytes(LOG.log[begin:end])
    found = [commit.offset for segment in lineage.logs() for commit in lineage.log_index(segment).commits]
    assert set(found) == {row[0] for row in LOG.commits if row[0] >= BEGIN}


@pytest.mark.parametrize(
    "files",
    [
        at_hand(bytes(LOG.log), until=LOG.end - 8),
        at_hand(bytes(len(LOG.log))),
        at_hand(bytes(LOG.log[8192:])),
    ],
)
def test_files_that_are_not_the_log_are_left_alone(files: LogAtHand) -> None:
    lineage = lineage_on(MemoryStore())
    assert not tail(lineage, LOG.end, files)
    assert lineage.logs() == []


def test_more_than_a_tail_is_left_to_capture() -> None:
    lineage = lineage_on(MemoryStore())
    assert not tail(lineage, BEGIN + TAIL_BYTES_MAX + 8, at_hand(bytes(LOG.log)))


def other_log() -> WalWriter:
    """Of a server that began like the first one, and filled up the same log file with something else."""
    wal = WalWriter(start=LOG.start)
    wal.noise(5000)
    wal.commit(77, 5_000_000)
    wal.switch()
    wal.commit(78, 6_000_000)
    wal.noise(30_000)
    wal.commit(79, 7_000_000)
    return wal


def filled_up() -> tuple[Lineage, int]:
    """The first log file is stored, which ends with padding."""
    lineage = lineage_on(MemoryStore())
    assert tail(lineage, BEGIN, at_hand(bytes(LOG.log)), begin=LOG.start)
    return lineage, len(lineage.logs())


def test_the_files_of_another_server_are_left_alone_though_what_is_stored_ends_with_padding() -> None:
    lineage, before = filled_up()
    other = other_log()
    files = LogAtHand(
        IDENTITY, lambda begin, end: bytes(other.log[begin.offset - LOG.start : end - LOG.start])
    )
    assert not tail(lineage, other.end, files, begin=LOG.start)
    assert len(lineage.logs()) == before
    assert tail(lineage, LOG.end, at_hand(bytes(LOG.log)), begin=LOG.start)


def test_log_must_name_the_last_stored_record_where_nothing_can_be_compared() -> None:
    """The server has recycled all log before the stored end; its own log from there on is sound."""
    lineage, _ = filled_up()
    other = other_log()
    resumer = Resumer(lineage, PostgresDialect(), IDENTITY, window_size=SEGMENT_BYTES)
    step = Step(BRANCH, BEGIN, None, resumed=True)
    for log, sound in ((LOG, True), (other, False)):
        resume = resumer.prepare(step, Ledger(lineage.logs()), available=BEGIN)
        indexer = resume.start.indexer
        new = bytes(log.log[BEGIN - LOG.start :])
        if sound:
            indexer.feed(new)
            assert indexer.take().commits
        else:
            with pytest.raises(LogDamaged, match="does not follow"):
                indexer.feed(new)
            alone = PostgresDialect().indexer(
                Position(BRANCH, BEGIN), log_file_bytes=SEGMENT_BYTES, system_identifier=str(SYSTEM)
            )
            alone.feed(new)
            assert alone.take().commits, "nothing is wrong with the other log in itself"


def recycled(log: WalWriter, oldest: int, role: Role) -> LogAtHand:
    """Files of a server that has no log before `oldest` any more."""

    def read(begin: Position, end: int) -> bytes:
        return b"" if begin.offset < oldest else bytes(log.log[begin.offset - LOG.start : end - LOG.start])

    return LogAtHand(replace(IDENTITY, role=role), read)


def test_the_newest_log_is_taken_from_a_primary_that_has_recycled_older_files() -> None:
    lineage, before = filled_up()
    assert not tail(lineage, LOG.end, recycled(LOG, BEGIN, Role.REPLICA), begin=LOG.start)
    assert not tail(lineage, LOG.end, recycled(LOG, BEGIN + 8, Role.PRIMARY), begin=LOG.start)
    other = other_log()
    assert not tail(lineage, other.end, recycled(other, BEGIN, Role.PRIMARY), begin=LOG.start)
    assert len(lineage.logs()) == before
    assert tail(lineage, LOG.end, recycled(LOG, BEGIN, Role.PRIMARY), begin=LOG.start)
    assert stored(lineage, BEGIN, LOG.end) == bytes(LOG.log[BEGIN - LOG.start : LOG.end - LOG.start])


def test_other_log_than_the_stored_one_is_a_conflict() -> None:
    lineage = lineage_on(MemoryStore())
    files = at_hand(bytes(LOG.log))
    assert tail(lineage, LOG.end, files)
    (segment,) = [one for one in lineage.logs() if one.last == LOG.end]
    with pytest.raises(LogConflict):
        lineage.put_log(segment, [bytes(segment.last - segment.first)], lineage.log_index(segment))
