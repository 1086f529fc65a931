"""Several timelines, several servers of one cluster: followed, restored to, and never mixed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

import pytest

from cloudsave.clock import SYSTEM_CLOCK
from cloudsave.engines.postgresql.engine import PostgresEngine
from cloudsave.engines.postgresql.log import parse_lsn
from cloudsave.errors import LogConflict, TargetUnreachable
from cloudsave.logs.background import BackgroundCapture, capture_until
from cloudsave.model.ledger import Ledger as LogLedger
from cloudsave.model.log import LogSegment
from cloudsave.model.position import Position
from cloudsave.model.target import Target, TargetKind
from tests.integration.postgresql.cluster import Cluster, ClusterFactory, poll
from tests.integration.postgresql.oracle import Ledger, LedgerClients, assert_ledger
from tests.integration.postgresql.recoveries import DIALECT, Protected, restored

FILE = 16 << 20
FAR = 1 << 62
WAIT_SECONDS = 60.0
QUIET = {"autovacuum": "off", "checkpoint_timeout": "1h"}
BLIND_BYTES = 64 << 10
"""What is compared at the end of the stored log at the least."""


def now() -> datetime:
    """This host's clock, which is also the servers'."""
    return datetime.now(UTC)


def url_of(*clusters: Cluster) -> str:
    """A URL that leads to whichever of some servers accepts writes."""
    hosts = ",".join(quote(str(one.home), safe="") for one in clusters)
    ports = ",".join("5432" for _ in clusters)
    return f"postgresql://postgres@/postgres?host={hosts}&port={ports}&target_session_attrs=read-write"


def caught_up(standby: Cluster, lsn: str) -> None:
    """Wait until a standby has replayed so far."""
    replayed = f"SELECT pg_last_wal_replay_lsn() >= '{lsn}'"
    poll(lambda: standby.psql(replayed) == "t", f"the standby has replayed {lsn}")


def rows_of(protected: Protected, target: Target) -> tuple[list[int], list[str]]:
    """What a restore to a target brings, and over which branches."""
    with restored(protected, target) as found, found.connect() as connection:
        row = connection.execute("SELECT array_agg(i ORDER BY i) FROM t").fetchone()
        assert row is not None
        return row[0], [step[0] for step in found.plan.path]


# ---- one after the other


@pytest.mark.postgresql_majors("18")
def test_each_of_three_timelines_can_be_restored_to(clusters: ClusterFactory, postgresql_major: str) -> None:
    first = clusters.create(postgresql_major)
    second = first.make_standby()
    third = second.make_standby()
    protected = Protected.begin(first)
    protected.engine = PostgresEngine(url_of(first, second, third))
    instants, positions = [], []

    def write(server: Cluster) -> None:
        """Two rows on the present timeline, and what lies between them and after."""
        for offset in (1, 2):
            server.psql(f"INSERT INTO t VALUES ({2 * len(positions) + offset})")
            if offset == 1:
                instants.append(now())
        positions.append(server.lsn())

    with protected.captured() as capture:
        first.psql("CREATE TABLE t (i int)")
        early = protected.back_up()
        write(first)
        caught_up(third, first.psql("SELECT pg_current_wal_flush_lsn()"))
        first.stop()
        second.promote()
        write(second)
        # Captured up to here: from now on the slot on the new primary holds what follows.
        protected.catch_up(capture, second)
        late = protected.back_up()
        caught_up(third, second.psql("SELECT pg_current_wal_flush_lsn()"))
        second.stop()
        third.promote()
        write(third)
        protected.catch_up(capture, third)
    assert third.timeline() == 3
    assert [late.start.branch, late.stop.branch] == ["00000002", "00000002"]
    one, two, three = (f"0000000{number}" for number in (1, 2, 3))
    expected = {
        Target(TargetKind.TIME, time=instants[0]): ([1], [one]),
        Target(TargetKind.TIME, time=instants[1]): ([1, 2, 3], [one, two]),
        Target(TargetKind.LATEST, branch=two): ([1, 2, 3, 4], [two]),
        Target(TargetKind.LATEST, backup_id=early.backup_id): ([1, 2, 3, 4, 5, 6], [one, two, three]),
    }
    for target, wanted in expected.items():
        assert rows_of(protected, target) == wanted, target
    # Further targets by their plans: the same way leads to them.
    plan = protected.plan(Target(TargetKind.TIME, time=instants[2]))
    assert (plan.backup.backup_id, [step[0] for step in plan.path]) == (late.backup_id, [two, three])
    for branch, lsn in zip((one, two, three), positions, strict=True):
        position = Position(branch, parse_lsn(lsn))
        target = Target(TargetKind.POSITION, position=position, inclusive=False)
        assert protected.plan(target).branch == branch
        beyond = replace(target, position=replace(position, offset=FAR), branch=three)
        with pytest.raises(TargetUnreachable):
            protected.plan(beyond)
    # Negative control: without its history, no target on or beyond the second timeline is reached.
    (history,) = [name for name in protected.objects if name.endswith("00000002/history")]
    del protected.objects[history]
    with pytest.raises(TargetUnreachable, match="history of branch 00000002"):
        protected.plan(Target(TargetKind.TIME, time=instants[1]))
    assert protected.plan(Target(TargetKind.TIME, time=instants[0]))


# ---- two at once


@contextmanager
def twins(clusters: ClusterFactory, major: str) -> Iterator[tuple[Protected, Cluster, Cluster]]:
    """
    Two standbys that were promoted at the same place to the same number, with one row each since then; their
    first server's log and backup are stored.
    """
    primary = clusters.create(major, conf=QUIET)
    primary.psql("CREATE TABLE t (i int)")
    pair = [primary.make_standby(conf=QUIET) for _ in range(2)]
    protected = Protected.begin(primary)
    with protected.captured() as capture:
        protected.back_up()
        primary.psql("INSERT INTO t VALUES (1)")
        protected.catch_up(capture)
        end = primary.psql("SELECT pg_current_wal_flush_lsn()")
        for standby in pair:
            caught_up(standby, end)
    primary.stop()
    for number, standby in enumerate(pair):
        standby.promote()
        standby.psql(f"INSERT INTO t VALUES ({number + 10})")
    yield protected, pair[0], pair[1]


def capture_in_vain(protected: Protected) -> None:
    """Capture until something ends it."""
    with protected.captured() as capture:
        capture.await_durable(Position("00000002", FAR), timeout_seconds=WAIT_SECONDS)


def history_of(server: Cluster) -> bytes:
    """The server's own history file of its timeline."""
    return (server.data / "pg_wal" / "00000002.history").read_bytes()


@pytest.mark.postgresql_majors("14", "18")
@pytest.mark.fault("same-branch-number-twice")
def test_two_servers_of_the_same_timeline_number_are_never_mixed(
    clusters: ClusterFactory, postgresql_major: str
) -> None:
    with twins(clusters, postgresql_major) as (protected, chosen, other):
        assert history_of(chosen) == history_of(other), "the servers were not promoted at the same place"
        mine, foreign = protected.succeeded_by(chosen), protected.succeeded_by(other)
        with mine.captured() as capture:
            fill_up(mine, capture, other)
            before = protected.lineage.logs()
            # While the first one is captured, and through a slot that goes away:
            with pytest.raises(LogConflict):
                capture_in_vain(foreign)
            with pytest.raises(LogConflict):
                capture_until(
                    foreign.engine.log_source(slot="one_off", temporary=True),
                    foreign.lineage,
                    DIALECT,
                    Position("00000002", FAR),
                    clock=SYSTEM_CLOCK,
                    timeout_seconds=WAIT_SECONDS,
                )
            assert protected.lineage.logs() == before
            assert_the_end_alone_tells_nothing(protected, chosen, other)
            chosen.psql("INSERT INTO t VALUES (11)")
            mine.catch_up(capture)
        with pytest.raises(LogConflict):
            capture_in_vain(foreign)
        assert rows_of(mine, Target(TargetKind.LATEST))[0] == [1, 10, 10, 11]
        # A standby of the captured one is no other server.
        again = protected.succeeded_by(chosen.make_standby())
        chosen.psql("INSERT INTO t VALUES (12)")
        with again.captured() as capture:
            mine.catch_up(capture)


def fill_up(protected: Protected, capture: BackgroundCapture, other: Cluster) -> None:
    """Both servers end their log file; what is stored of the one ends with it."""
    protected.catch_up(capture)
    for server in (protected.cluster, other):
        server.psql("INSERT INTO t VALUES (10)")
        server.switch_wal()
    protected.catch_up(capture)
    poll(lambda: any(one.last - one.first == FILE for one in stored_of("00000002", protected)), "it is whole")


def stored_of(branch: str, protected: Protected) -> list[LogSegment]:
    """Stretches of log; what was stored in pieces is stored once more as a whole, soon after."""
    return [one for one in protected.lineage.logs() if one.branch == branch]


def assert_the_end_alone_tells_nothing(protected: Protected, chosen: Cluster, other: Cluster) -> None:
    """
    Negative control: what is stored ends with a log file that both have filled up with nothing, so that its
    end would have passed for that of the other one.
    """
    end = LogLedger(protected.lineage.logs()).furthest("00000002")
    assert end % FILE == 0
    name = DIALECT.log_file_name("00000002", end - 1, log_file_bytes=FILE)
    one, two = ((server.data / "pg_wal" / name).read_bytes() for server in (chosen, other))
    assert one[-BLIND_BYTES:] == two[-BLIND_BYTES:]
    assert one != two


# ---- a standby that is the source


@pytest.mark.postgresql_majors("18")
def test_the_log_of_a_standby_under_load_brings_back_all_that_its_primary_acknowledged(
    clusters: ClusterFactory, postgresql_major: str, tmp_path: Path
) -> None:
    primary = clusters.create(postgresql_major)
    primary.pgbench_init(1)
    standby = primary.make_standby()
    record = tmp_path / "ledger.jsonl"
    protected = Protected.begin(standby)
    with protected.captured() as capture:
        load = primary.pgbench_run(clients=1, rate=200)
        with LedgerClients(lambda: primary.url, record, clients=2) as clients:
            clients.wait_for(20)
            protected.back_up()
            clients.wait_for(100)
            standby.restart()
            clients.wait_for(100)
            standby.psql("SELECT pg_wal_replay_pause()")
            clients.wait_for(100)
            standby.psql("SELECT pg_wal_replay_resume()")
        load.stop()
        end = parse_lsn(primary.psql("SELECT pg_current_wal_flush_lsn()"))
        capture.await_durable(Position("00000001", end), timeout_seconds=WAIT_SECONDS)
    ledger = Ledger.read(record)
    for target, expectation in (
        (Target(TargetKind.LATEST), ledger.expected_latest()),
        (
            Target(TargetKind.TIME, time=ledger.quiet_instant(fraction=0.8)),
            ledger.expected_ids(ledger.quiet_instant(fraction=0.8)),
        ),
    ):
        with restored(protected, target) as found, found.connect() as connection:
            assert_ledger(connection, expectation)
    # A standby cannot tell what its primary acknowledges: the last commit is the latest time there is.
    with pytest.raises(TargetUnreachable):
        protected.plan(Target(TargetKind.TIME, time=now()))
