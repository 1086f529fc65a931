"""Recoveries of real servers to every kind of target, judged by a record that clients kept outside."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
import pytest

from cloudsave.backup.plan import BackupRequest, plan_backup
from cloudsave.backup.run import BackupContext, run_backup
from cloudsave.clock import SYSTEM_CLOCK
from cloudsave.engines.postgresql.log import parse_lsn
from cloudsave.engines.postgresql.target import PostgresTarget
from cloudsave.errors import (
    CloudsaveError,
    IntegrityError,
    RecoveryMismatch,
    ServerDidNotStart,
    TargetDirectoryInUse,
    TargetUnreachable,
)
from cloudsave.logs.background import BackupLogCover
from cloudsave.model.engine_facts import BackupStart, SlotState
from cloudsave.model.position import Position
from cloudsave.model.target import Target, TargetKind
from cloudsave.recovery.bring_up import BringUpContext, BringUpOptions, bring_up, recovery_digest
from cloudsave.recovery.journal import JOURNAL_NAME
from cloudsave.recovery.plan import RecoveryPlan
from cloudsave.recovery.restore import RestoreRequest, restore_files
from cloudsave.telemetry import NoProgress
from tests.integration.postgresql.cluster import Cluster
from tests.integration.postgresql.oracle import Expectation, Ledger, LedgerClients, assert_ledger
from tests.integration.postgresql.recoveries import DIALECT, Protected, Restored, restored


def assert_restored_as(found: Restored, expectation: Expectation) -> None:
    """The restored server holds exactly what the oracle wants, and the oracle wants something."""
    assert expectation.must_have
    with found.connect() as connection:
        assert_ledger(connection, expectation)


@pytest.mark.fault("restored-server-archives")
def test_every_kind_of_target_brings_exactly_the_acknowledged_commits(
    cluster: Cluster, tmp_path: Path
) -> None:
    record = tmp_path / "ledger.jsonl"
    protected = Protected.begin(cluster)
    with protected.captured() as capture, LedgerClients(lambda: cluster.url, record) as clients:
        clients.wait_for(30)
        manifest = protected.back_up()
        clients.wait_for(100)
        named = cluster.psql("SELECT pg_create_restore_point('release')")
        clients.wait_for(20)
        lsn = cluster.lsn()
        clients.wait_for(100)
        clients.stop()
        protected.catch_up(capture)
    ledger = Ledger.read(record)
    middle = ledger.quiet_instant(fraction=0.7)
    acknowledged = ledger.acknowledged()
    chosen = acknowledged[int(len(acknowledged) * 0.8)].xid
    position = Position("00000001", parse_lsn(lsn))
    targets = {
        Target(TargetKind.TIME, time=middle): ledger.expected_ids(middle),
        Target(TargetKind.POSITION, position=position, inclusive=False): ledger.expected_at_position(lsn),
        Target(TargetKind.TRANSACTION, transaction=chosen): ledger.expected_at_transaction(chosen),
        Target(TargetKind.TRANSACTION, transaction=chosen, inclusive=False): ledger.expected_at_transaction(
            chosen, inclusive=False
        ),
        Target(TargetKind.NAME, name="release"): ledger.expected_at_position(named),
        Target(TargetKind.LATEST): ledger.expected_latest(),
    }
    for target, expectation in targets.items():
        with restored(protected, target) as found:
            assert_restored_as(found, expectation)
            assert found.plan.backup.backup_id == manifest.backup_id
            assert found.state.opened is not None
            assert found.state.opened.branch == "00000002"
            with found.connect() as connection:
                assert connection.execute("show archive_mode").fetchone() == ("off",)


# ---- what must end in a refusal

LATEST = Target(TargetKind.LATEST)


def now() -> datetime:
    """This host's clock, which is also the server's."""
    return datetime.now(UTC)


def filled(cluster: Cluster) -> tuple[Protected, datetime, datetime]:
    """A backup, rows 1 to 20 after it in several log objects, and instants before and amid the rows."""
    protected = Protected.begin(cluster)
    before = now()
    with protected.captured() as capture:
        cluster.psql("CREATE TABLE t (i int)")
        protected.back_up()
        for number in range(1, 21):
            cluster.psql(f"INSERT INTO t VALUES ({number})")
            if number == 10:
                amid = now()
            if number % 5 == 0:
                protected.catch_up(capture)
    return protected, before, amid


@pytest.mark.fault(
    "log-object-missing", control="test_times_before_the_backup_and_after_the_end_are_refusals"
)
def test_a_missing_log_object_is_a_refusal_and_not_an_earlier_end(cluster: Cluster) -> None:
    protected, _, amid = filled(cluster)
    whole = protected.plan(LATEST)
    lost = whole.segments[len(whole.segments) // 2]
    names = [name for name in protected.objects if f"/{lost.first:016x}-{lost.last:016x}" in name]
    assert len(names) == 1
    del protected.objects[names[0]]
    with pytest.raises(TargetUnreachable) as caught:
        protected.plan(LATEST)
    assert caught.value.before is not None
    assert caught.value.before.instant is not None
    assert amid - timedelta(minutes=1) < caught.value.before.instant < now()


def test_times_before_the_backup_and_after_the_end_are_refusals(cluster: Cluster) -> None:
    protected, before, amid = filled(cluster)
    with pytest.raises(TargetUnreachable) as caught:
        protected.plan(Target(TargetKind.TIME, time=before))
    assert caught.value.after is not None
    with pytest.raises(TargetUnreachable) as caught:
        protected.plan(Target(TargetKind.TIME, time=now() + timedelta(days=1)))
    assert caught.value.before is not None
    with restored(protected, Target(TargetKind.TIME, time=amid)) as found, found.connect() as connection:
        assert connection.execute("SELECT max(i) FROM t").fetchone() == (10,)


@pytest.mark.fault("commit-before-begin")
def test_a_commit_between_the_order_of_a_backup_and_its_begin_is_not_before_it(cluster: Cluster) -> None:
    """Such a commit is in the backup, and nothing of it in the log from its start on."""
    protected = Protected.begin(cluster)
    cluster.psql("CREATE TABLE t (i int)")
    moments: list[datetime] = []
    source = protected.engine.backup_source(mode="remote", fast=True, label="test")
    begin = source.begin

    def begin_late() -> BackupStart:
        moments.append(now())
        cluster.psql("INSERT INTO t VALUES (1)")
        return begin()

    source.begin = begin_late
    with protected.captured() as capture:
        cover = BackupLogCover(
            lambda: SlotState.ACTIVE,
            lambda _: protected.engine.log_source(slot="unused", temporary=True),
            protected.lineage,
            DIALECT,
            clock=SYSTEM_CLOCK,
        )
        plan = plan_backup(BackupRequest("db", workers=1), protected.engine.identify(), ())
        run_backup(
            plan, BackupContext(protected.lineage, lambda: source, cover, DIALECT, SYSTEM_CLOCK, NoProgress())
        )
        protected.catch_up(capture)
    with pytest.raises(TargetUnreachable, match="not reachable"):
        protected.plan(Target(TargetKind.TIME, time=moments[0]))
    assert protected.plan(Target(TargetKind.LATEST))


@pytest.mark.fault("history-missing")
def test_a_promotion_is_followed_and_a_missing_history_is_a_refusal(cluster: Cluster) -> None:
    protected = Protected.begin(cluster)
    with protected.captured() as capture:
        cluster.psql("CREATE TABLE t (i int)")
        protected.back_up()
        cluster.psql("INSERT INTO t VALUES (1)")
        protected.catch_up(capture)
        standby = cluster.make_standby()
        cluster.psql("INSERT INTO t VALUES (2)")
        protected.catch_up(capture)
        wanted = cluster.psql("SELECT pg_current_wal_flush_lsn()")
        caught_up = f"SELECT pg_last_wal_replay_lsn() >= '{wanted}'::pg_lsn"
        while standby.psql(caught_up) != "t":
            time.sleep(0.02)
        amid = now()
    cluster.stop()
    standby.promote()
    successor = protected.succeeded_by(standby)
    with successor.captured() as capture:
        standby.psql("INSERT INTO t VALUES (103)")
        successor.catch_up(capture)
    with restored(successor, LATEST) as found:
        assert [step[0] for step in found.plan.path] == ["00000001", "00000002"]
        assert found.state.opened is not None
        assert found.state.opened.branch == "00000003"
        with found.connect() as connection:
            assert connection.execute("SELECT array_agg(i ORDER BY i) FROM t").fetchone() == ([1, 2, 103],)
    target = Target(TargetKind.TIME, time=amid)
    with restored(successor, target) as found, found.connect() as connection:
        assert connection.execute("SELECT array_agg(i ORDER BY i) FROM t").fetchone() == ([1, 2],)
    history = next(name for name in protected.objects if name.endswith("00000002/history"))
    del protected.objects[history]
    with pytest.raises(TargetUnreachable, match="history of branch 00000002"):
        successor.plan(LATEST)


# ---- how servers are brought up


def test_a_look_is_read_only_and_leaves_the_directory_for_more(cluster: Cluster) -> None:
    protected, _, amid = filled(cluster)
    with restored(protected, Target(TargetKind.TIME, time=amid), look=True) as found:
        assert found.state.opened is None
        assert found.state.at_target.paused_at_target
        with found.connect() as connection:
            assert connection.execute("SELECT count(*) FROM t").fetchone() == (10,)
            with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
                connection.execute("INSERT INTO t VALUES (0)")
    context = BringUpContext(protected.lineage, DIALECT, PostgresTarget(), SYSTEM_CLOCK, NoProgress())
    try:
        options = BringUpOptions(bin_directory=cluster.bindir)
        assert bring_up(found.plan, found.directory, context, options).opened is not None
    finally:
        context.target.stop()


def test_a_server_that_an_earlier_run_opened_is_finished_and_still_judged(cluster: Cluster) -> None:
    """A run that was killed between the promotion and its end leaves this: it must not be replayed again."""
    protected, _, amid = filled(cluster)
    with restored(protected, Target(TargetKind.TIME, time=amid)) as found:
        pass
    plan, directory = found.plan, found.directory
    elsewhere = replace(
        plan.stop, replayed_min=plan.stop.replayed_min - 999, replayed_max=plan.stop.replayed_max - 999
    )
    wanted: list[tuple[RecoveryPlan, bool, type[CloudsaveError] | None]] = [
        (replace(plan, stop=elsewhere), False, RecoveryMismatch),
        (replace(plan, branch="00000007"), False, RecoveryMismatch),
        (plan, True, TargetDirectoryInUse),
        (plan, False, None),
    ]
    for one, look, refusal in wanted:
        context = BringUpContext(protected.lineage, DIALECT, PostgresTarget(), SYSTEM_CLOCK, NoProgress())
        options = BringUpOptions(bin_directory=cluster.bindir, look=look)
        try:
            if refusal is not None:
                with pytest.raises(refusal):
                    bring_up(one, directory, context, options)
                assert not (directory / "postmaster.pid").exists()
                continue
            up = bring_up(one, directory, context, options)
            assert up.at_target.opened_before
            assert up.at_target.replayed_offset == found.state.at_target.replayed_offset
            assert up.opened is not None
            assert up.opened.branch == "00000002"
            with psycopg.connect(up.connection_url, autocommit=True) as connection:
                assert connection.execute("SELECT max(i) FROM t").fetchone() == (10,)
                connection.execute("INSERT INTO t VALUES (0)")
        finally:
            context.target.stop()


@pytest.mark.fault("tablespace-shared-with-source")
def test_tablespaces_are_remapped_and_never_shared_with_the_source(cluster: Cluster) -> None:
    place = cluster.factory.folder()
    cluster.psql(f"CREATE TABLESPACE apart LOCATION '{place}'")
    cluster.psql("CREATE TABLE far (i int) TABLESPACE apart")
    cluster.psql("INSERT INTO far SELECT generate_series(1, 1000)")
    protected = Protected.begin(cluster)
    with protected.captured() as capture:
        manifest = protected.back_up()
        cluster.psql("INSERT INTO far VALUES (1001)")
        protected.catch_up(capture)
    (oid,) = manifest.tablespaces
    with pytest.raises(TargetDirectoryInUse, match="tablespace"):
        protected.restore_files(protected.plan(LATEST))
    new = cluster.factory.folder() / "moved"
    with restored(protected, LATEST, tablespaces={oid: str(new)}) as found, found.connect() as connection:
        assert connection.execute("SELECT count(*) FROM far").fetchone() == (1001,)
        assert connection.execute("SELECT pg_tablespace_location(%s::oid)", [oid]).fetchone() == (str(new),)


@pytest.mark.fault("tablespace-made-after-backup")
def test_a_tablespace_made_after_the_backup_is_never_shared_with_the_source(cluster: Cluster) -> None:
    """Replay links to the source's own directory: the restored server would overwrite the source's files."""
    protected = Protected.begin(cluster)
    place = cluster.home / "late"
    place.mkdir()
    cluster.user.own(place)
    with protected.captured() as capture:
        protected.back_up()
        before = cluster.lsn()
        cluster.psql(f"CREATE TABLESPACE late LOCATION '{place}'")
        cluster.psql("CREATE TABLE t TABLESPACE late AS SELECT g FROM generate_series(1, 999) g")
        protected.catch_up(capture)
    with pytest.raises(TargetDirectoryInUse, match=str(place)), restored(protected, LATEST):
        pytest.fail("the restored server runs in the source's tablespace")
    earlier = Target(TargetKind.POSITION, position=Position("", parse_lsn(before)), inclusive=False)
    with restored(protected, earlier):
        pass
    cluster.stop()
    place.rename(cluster.home / "elsewhere")
    place.mkdir()
    cluster.user.own(place)
    with restored(protected, LATEST) as found, found.connect() as connection:
        assert connection.execute("SELECT count(*) FROM t").fetchone() == (999,)


def test_a_configuration_outside_of_the_data_directory_serves(cluster: Cluster) -> None:
    protected, _, _ = filled(cluster)
    plan = protected.plan(LATEST)
    directory = protected.restore_files(plan)
    beside = directory.with_name(directory.name + ".config") / "etc/postgresql/main"
    beside.mkdir(parents=True)
    for name in ("postgresql.conf", "pg_hba.conf", "pg_ident.conf"):
        (directory / name).rename(beside / name)
    with (beside / "postgresql.conf").open("a") as file:
        file.write("data_directory = '/var/lib/postgresql/main'\nhba_file = '/etc/pg_hba.conf'\n")
        file.write("ident_file = '/etc/pg_ident.conf'\nexternal_pid_file = '/var/run/main.pid'\n")
        file.write("work_mem = '7MB'\nrecovery_target_time = '2020-01-01'\nrestore_command = 'false'\n")
        file.write("synchronous_standby_names = 'nobody'\narchive_mode = on\narchive_command = 'false'\n")
    cluster.user.own(directory.parent)
    server = PostgresTarget()
    context = BringUpContext(protected.lineage, DIALECT, server, SYSTEM_CLOCK, NoProgress())
    try:
        bring_up(plan, directory, context, BringUpOptions(bin_directory=cluster.bindir))
        with psycopg.connect(server.connection_url(), autocommit=True) as connection:
            assert connection.execute("SELECT max(i) FROM t").fetchone() == (20,)
            assert connection.execute("SHOW work_mem").fetchone() == ("7MB",)
            connection.execute("INSERT INTO t VALUES (21)")
    finally:
        server.stop()


@pytest.mark.fault(
    "log-damaged-during-replay", control="test_every_kind_of_target_brings_exactly_the_acknowledged_commits"
)
def test_damaged_log_stops_the_recovery_and_is_told_as_such(cluster: Cluster) -> None:
    protected, _, _ = filled(cluster)
    plan = protected.plan(LATEST)
    directory = protected.restore_files(plan)
    victim = plan.segments[-3]
    name = next(one for one in protected.objects if f"{victim.first:016x}-{victim.last:016x}" in one)
    content, at = protected.objects[name]
    damaged = bytearray(content)
    damaged[len(damaged) // 2] ^= 1
    protected.objects[name] = (bytes(damaged), at)
    server = PostgresTarget()
    context = BringUpContext(protected.lineage, DIALECT, server, SYSTEM_CLOCK, NoProgress())
    with pytest.raises(IntegrityError, match="damaged"):
        bring_up(plan, directory, context, BringUpOptions(bin_directory=cluster.bindir))
    assert not (directory / "postmaster.pid").exists()


@pytest.mark.postgresql_majors("14", "15", "18")
@pytest.mark.fault(
    "server-ends-elsewhere", control="test_every_kind_of_target_brings_exactly_the_acknowledged_commits"
)
def test_a_server_that_ends_elsewhere_than_planned_is_not_opened(cluster: Cluster) -> None:
    protected, _, amid = filled(cluster)
    plan = protected.plan(Target(TargetKind.TIME, time=amid))
    directory = protected.restore_files(plan)
    elsewhere = replace(
        plan.stop, replayed_min=plan.stop.replayed_min - 999, replayed_max=plan.stop.replayed_max - 999
    )
    context = BringUpContext(protected.lineage, DIALECT, PostgresTarget(), SYSTEM_CLOCK, NoProgress())
    with pytest.raises(RecoveryMismatch):
        bring_up(
            replace(plan, stop=elsewhere), directory, context, BringUpOptions(bin_directory=cluster.bindir)
        )
    assert not (directory / "postmaster.pid").exists()


@pytest.mark.postgresql_majors("15")
def test_a_server_that_cannot_pause_at_the_target_is_opened_where_it_is_right(cluster: Cluster) -> None:
    """More than 64 open subtransactions: no reader may come in before their end, and so there is no pause."""
    cluster.psql("CREATE TABLE t (i int); CREATE TABLE s (i int)")
    protected = Protected.begin(cluster)
    with protected.captured() as capture, cluster.connect(autocommit=False) as busy:
        for number in range(100):
            busy.execute("SAVEPOINT one")
            busy.execute("INSERT INTO s VALUES (%s)", (number,))
        protected.back_up()
        cluster.psql("INSERT INTO t VALUES (1)")
        lsn = parse_lsn(cluster.lsn())
        cluster.psql("INSERT INTO t VALUES (2)")
        protected.catch_up(capture)
        target = Target(TargetKind.POSITION, position=Position("", lsn), inclusive=False)
        with restored(protected, target) as found, found.connect() as connection:
            assert connection.execute("SELECT array_agg(i) FROM t").fetchone() == ([1],)
            assert connection.execute("SELECT count(*) FROM s").fetchone() == (0,)
        with pytest.raises(RecoveryMismatch), restored(protected, target, look=True):
            pytest.fail("a look is at a server that is open for writing")


@pytest.mark.fault(
    "server-does-not-start", control="test_every_kind_of_target_brings_exactly_the_acknowledged_commits"
)
def test_what_the_server_says_is_in_the_error_when_it_does_not_start(cluster: Cluster) -> None:
    protected, _, _ = filled(cluster)
    plan = protected.plan(LATEST)
    directory = protected.restore_files(plan)
    context = BringUpContext(protected.lineage, DIALECT, PostgresTarget(), SYSTEM_CLOCK, NoProgress())
    options = BringUpOptions(bin_directory=cluster.bindir, settings={"shared_preload_libraries": "absent"})
    with pytest.raises(ServerDidNotStart, match="absent"):
        bring_up(plan, directory, context, options)


@pytest.mark.postgresql_majors("14", "15", "18")
@pytest.mark.fault("restore-killed")
def test_a_restore_killed_at_any_moment_goes_on(cluster: Cluster) -> None:
    cluster.pgbench_init(8)
    protected, _, _ = filled(cluster)
    plan = protected.plan(LATEST)
    reader = protected.reader(plan)
    directory = cluster.factory.folder() / "killed"
    request = RestoreRequest(directory, workers=2, recovery_digest=recovery_digest(plan))
    kills = 0
    # On a busy machine the first ones are killed before they have begun.
    for milliseconds in (1, 3, 10, 20, 40, 80, 120, 160, 320, 640, 1280, 2560):
        if milliseconds > 160 and (directory / JOURNAL_NAME).exists():
            break
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, milliseconds / 1000)
            restore_files(reader, request)
            os._exit(0)
        kills += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGALRM
    assert kills >= 3
    assert restore_files(reader, request).resumed
    server = PostgresTarget()
    context = BringUpContext(protected.lineage, DIALECT, server, SYSTEM_CLOCK, NoProgress())
    try:
        bring_up(plan, directory, context, BringUpOptions(bin_directory=cluster.bindir))
        with psycopg.connect(server.connection_url(), autocommit=True) as connection:
            assert connection.execute("SELECT count(*) FROM pgbench_accounts").fetchone() == (800000,)
            assert connection.execute("SELECT max(i) FROM t").fetchone() == (20,)
    finally:
        server.stop()
