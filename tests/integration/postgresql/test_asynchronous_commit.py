"""
Commits that are acknowledged before they are written (synchronous_commit = off), and time targets near the
end of the stored log: each is refused, or brings every commit acknowledged by then.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest

from cloudsave.engines.postgresql.log import parse_lsn
from cloudsave.errors import TargetUnreachable
from cloudsave.logs.background import durable_up_to
from cloudsave.model.log import LogIndex, LogSegment, instant_from_us, us_from_instant
from cloudsave.model.position import Position
from cloudsave.model.target import Target, TargetKind
from cloudsave.recovery.history import IndexReader, read_history
from cloudsave.recovery.plan import RecoveryPlan, plan_recovery
from tests.integration.postgresql.cluster import Cluster, ClusterFactory, poll
from tests.integration.postgresql.oracle import Ledger, LedgerClients, assert_ledger
from tests.integration.postgresql.recoveries import DIALECT, Protected, restored

ASYNCHRONOUS = "&options=-csynchronous_commit%3Doff"
QUIET = {"autovacuum": "off", "checkpoint_timeout": "1h"}
SLOW_WRITER = {**QUIET, "wal_writer_delay": "2s"}
TAIL_SECONDS = 5.0
"""Targets within so much of the end of capture are tried."""
TRIED_MAX = 200
PAUSE_SECONDS = 0.01
"""Between two commits of one client: the machine is left to what is tested."""


def now() -> datetime:
    """This host's clock, which is also the server's."""
    return datetime.now(UTC)


@contextmanager
def unwritten(cluster: Cluster) -> Iterator[None]:
    """Nothing writes commits that nobody waits for: the process that does is stopped."""
    pid = int(cluster.psql("SELECT pid FROM pg_stat_activity WHERE backend_type = 'walwriter'"))
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


class CalmClients(LedgerClients):
    """Ledger clients that leave the machine some time."""

    def _commit_one(self, connection: psycopg.Connection[Any], number: int) -> None:
        super()._commit_one(connection, number)
        self._stopping.wait(PAUSE_SECONDS)


@dataclass
class FlushedByNow:
    """
    Indexes that say what the end of the written log would suggest: that the last object holds every commit
    acknowledged before `instant`. The negative control.
    """

    indexes: IndexReader
    last: LogSegment
    instant: datetime

    def __call__(self, segment: LogSegment) -> LogIndex:
        index = self.indexes(segment)
        if segment != self.last:
            return index
        return replace(index, complete_until_us=us_from_instant(self.instant))

    def last_record(self, segment: LogSegment, end: int) -> int | None:
        return self.indexes.last_record(segment, end)

    def begins(self, segment: LogSegment, offset: int) -> bool:
        return self.indexes.begins(segment, offset)


class Planner:
    """Plans to times; `flushed_by`: with what the negative control would take for true."""

    def __init__(self, protected: Protected, *, flushed_by: datetime | None = None) -> None:
        self._history = read_history(protected.lineage, DIALECT)
        reader = IndexReader(protected.lineage, DIALECT, log_file_bytes=16 << 20)
        self._commits = {
            commit.offset: commit.transaction
            for segment in self._history.segments
            for commit in reader(segment).commits
        }
        last = max(self._history.segments, key=lambda one: (one.last, one.first))
        self._indexes = FlushedByNow(reader, last, flushed_by) if flushed_by else reader

    def plan(self, instant: datetime) -> RecoveryPlan | None:
        """The plan for a time; None where it is refused."""
        try:
            return plan_recovery(Target(TargetKind.TIME, time=instant), self._history, self._indexes)
        except TargetUnreachable:
            return None

    def transactions(self, plan: RecoveryPlan) -> set[int]:
        """The transactions that the log of a plan brings, by the indexes of the stored objects."""
        bound = plan.stop.recovery_end + plan.stop.inclusive
        return {
            transaction for offset, transaction in self._commits.items() if plan.log_begin <= offset < bound
        }


@pytest.mark.postgresql_majors("14", "18")
@pytest.mark.fault("commit-not-written-yet")
def test_a_commit_that_is_not_written_yet_is_never_left_out_in_silence(
    clusters: ClusterFactory, postgresql_major: str
) -> None:
    cluster = clusters.create(postgresql_major, conf=QUIET)
    cluster.psql("CREATE TABLE t (i int)")
    protected = Protected.begin(cluster)
    with protected.captured(object_age_seconds=3.0) as capture, cluster.connect() as connection:
        protected.back_up()
        with unwritten(cluster):
            connection.execute("INSERT INTO t VALUES (1)")
            written = parse_lsn(cluster.psql("SELECT pg_current_wal_flush_lsn()"))
            connection.execute("SET synchronous_commit = off")
            connection.execute("INSERT INTO t VALUES (2)")
            acknowledged = now()
            at = Position("00000001", written)
            poll(lambda: durable_up_to(protected.lineage, at), "the first row is durable")
            assert parse_lsn(cluster.psql("SELECT pg_current_wal_flush_lsn()")) == written
            assert Planner(protected).plan(acknowledged) is None
            # Negative control: by the written log alone the target would be taken, without the second row.
            believed = Planner(protected, flushed_by=now()).plan(acknowledged)
            assert believed is not None
            assert believed.stop.log_end <= written
        # Written at last, the same target is reached.
        poll(lambda: Planner(protected).plan(acknowledged) is not None, "the target is reachable")
        protected.catch_up(capture)
    with restored(protected, Target(TargetKind.TIME, time=acknowledged)) as found:
        assert found.connect().execute("SELECT array_agg(i ORDER BY i) FROM t").fetchone() == ([1, 2],)


@pytest.mark.postgresql_majors("18")
def test_a_time_shortly_after_the_last_commit_is_reachable(
    clusters: ClusterFactory, postgresql_major: str
) -> None:
    """Nothing is refused that is covered: the server was asked after the commit and before the cut."""
    cluster = clusters.create(postgresql_major, conf=QUIET)
    protected = Protected.begin(cluster)
    with protected.captured(object_age_seconds=2.0) as capture:
        protected.back_up()
        cluster.psql("CREATE TABLE t (i int)")
        committed = now()
        protected.catch_up(capture)
    assert Planner(protected).plan(committed + timedelta(milliseconds=500)) is not None
    assert Planner(protected).plan(committed + timedelta(seconds=60)) is None


@pytest.mark.postgresql_majors("18")
@pytest.mark.parametrize("synchronous", [False, True], ids=["off", "on"])
def test_every_time_near_the_end_is_refused_or_brings_all_that_was_acknowledged(
    clusters: ClusterFactory, postgresql_major: str, tmp_path: Path, synchronous: bool
) -> None:
    cluster = clusters.create(postgresql_major, conf=SLOW_WRITER)
    record = tmp_path / "ledger.jsonl"
    protected = Protected.begin(cluster)
    url = cluster.url if synchronous else cluster.url + ASYNCHRONOUS
    with CalmClients(lambda: url, record, clients=2) as clients:
        with protected.captured() as capture:
            clients.wait_for(20)
            backup = protected.back_up()
            clients.wait_for(200)
            protected.catch_up(capture)
            written = [written_at(cluster) for _ in range(20) if clients.wait_for(15) is None]
        stopped = now()
        clients.wait_for(100)
    ledger = Ledger.read(record)
    planner = Planner(protected)
    begin = instant_from_us(backup.finished_us)
    instants = [one for one in instants_near(ledger, stopped) if one > begin]
    plans = {instant: planner.plan(instant) for instant in instants}
    refused = [instant for instant, plan in plans.items() if plan is None]
    assert refused, "no target was near enough to the end"
    assert not [one for instant in instants for one in problems(planner, ledger, instant)]
    # What a later commit in the stored log proves is never refused.
    last_us = max(segment.commit_last_us for segment in protected.lineage.logs())
    assert min(refused) >= instant_from_us(last_us)
    reached = max(instant for instant, plan in plans.items() if plan is not None)
    with restored(protected, Target(TargetKind.TIME, time=reached)) as found, found.connect() as connection:
        assert_ledger(connection, ledger.expected_ids(reached))
    # Negative control: what is written tells of commits that wait for it, and of no others.
    end = max(segment.last for segment in protected.lineage.logs())
    believed = max(instant for instant, position in written if position <= end)
    believing = Planner(protected, flushed_by=believed)
    wrong = [one for one in instants if one < believed and problems(believing, ledger, one)]
    assert bool(wrong) is not synchronous


def written_at(cluster: Cluster) -> tuple[datetime, int]:
    """An instant, and how far the log had been written then or a little later."""
    instant = now()
    return instant, parse_lsn(cluster.psql("SELECT pg_current_wal_flush_lsn()"))


def instants_near(ledger: Ledger, end: datetime) -> list[datetime]:
    """Instants just after commits were sent and acknowledged, some before and some after `end`."""
    near = sorted(
        instant + timedelta(microseconds=1)
        for commit in ledger.acknowledged()
        for instant in (commit.sent, commit.acked)
        if instant is not None and abs((instant - end).total_seconds()) < TAIL_SECONDS
    )
    step = max(1, len(near) // TRIED_MAX)
    return [*near[::step], *near[-TRIED_MAX // 4 :]]


def problems(planner: Planner, ledger: Ledger, instant: datetime) -> list[str]:
    """What a plan to a time brings too little or too much of; nothing where it is refused."""
    plan = planner.plan(instant)
    if plan is None:
        return []
    brought = planner.transactions(plan)
    begun = instant_from_us(plan.backup.started_us)
    known = [commit for commit in ledger.commits.values() if commit.sent > begun]
    return [
        f"transaction {commit.xid} at {instant}"
        for commit in known
        if (commit.acked is not None and commit.acked <= instant and commit.xid not in brought)
        or (commit.sent > instant and commit.xid in brought)
    ]
