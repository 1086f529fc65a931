"""
What happens to servers and their slots while nobody captures, or the wrong one is captured: no log is lost
without an alarm, and no foreign log gets in. Each test is its own control: the same check before the fault,
or after its cure, says the opposite.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cloudsave.clock import SYSTEM_CLOCK
from cloudsave.errors import LogConflict, TargetUnreachable
from cloudsave.logs.archive import push
from cloudsave.logs.background import BackgroundCapture
from cloudsave.logs.status import CaptureOptions, CaptureStatus
from cloudsave.model.position import Position
from cloudsave.model.target import Target, TargetKind
from tests.integration.postgresql.cluster import Cluster, ClusterFactory, poll
from tests.integration.postgresql.recoveries import DIALECT, DURABLE_SECONDS, Protected, restored

pytestmark = pytest.mark.postgresql_majors("14", "18")

SMALL_LOG = {"max_wal_size": "32MB", "min_wal_size": "32MB", "wal_keep_size": "0"}
KEPT_LOG = {"wal_keep_size": "1GB"}
RECYCLED_FILES = 5
LATEST = Target(TargetKind.LATEST)
DROP_SLOT = "SELECT pg_drop_replication_slot('cloudsave')"
WAIT_SECONDS = 30.0


class Capture:
    """A capture that remembers what it reported."""

    def __init__(self, protected: Protected) -> None:
        self.seen: list[CaptureStatus] = []
        self.background = BackgroundCapture(
            protected.engine.log_source(slot="cloudsave", temporary=False),
            protected.lineage,
            DIALECT,
            CaptureOptions(object_age_seconds=0.2, running_patience_seconds=15.0),
            clock=SYSTEM_CLOCK,
            observer=self.seen.append,
        )

    def alarms(self) -> set[str]:
        """What a person was told."""
        return {one.alarm for one in self.seen if one.alarm}


@contextmanager
def captured(protected: Protected) -> Iterator[Capture]:
    """Capture to the end of the server's log as it is when the context is left."""
    capture = Capture(protected)
    with capture.background as background:
        yield capture
        protected.catch_up(background)


def protected_table(cluster: Cluster) -> Protected:
    """A server with a backup, and the rows 1 and 2 of a table around it, all log captured."""
    protected = Protected.begin(cluster)
    with captured(protected):
        cluster.psql("CREATE TABLE t (i int)")
        cluster.psql("INSERT INTO t VALUES (1)")
        protected.back_up()
        cluster.psql("INSERT INTO t VALUES (2)")
    return protected


def rows(protected: Protected, target: Target = LATEST) -> list[int]:
    """What a restore brings."""
    with restored(protected, target) as found, found.connect() as connection:
        row = connection.execute("SELECT array_agg(i ORDER BY i) FROM t").fetchone()
        assert row is not None
        return list(row[0] or [])


def recycle(cluster: Cluster) -> None:
    """Let the server write log files until it has removed those that nobody holds."""
    cluster.psql("CREATE TABLE IF NOT EXISTS filler (i int)")
    for _ in range(RECYCLED_FILES):
        cluster.psql("INSERT INTO filler SELECT generate_series(1, 100)")
        cluster.switch_wal()
        cluster.psql("CHECKPOINT")


def replayed(standby: Cluster, primary: Cluster) -> None:
    """Wait until a standby has all of its primary's log."""
    end = primary.psql("SELECT pg_current_wal_flush_lsn()")
    poll(lambda: standby.psql(f"SELECT pg_last_wal_replay_lsn() >= '{end}'") == "t", "the standby has it all")


# ---- slots


@pytest.mark.fault("slot-dropped-log-kept")
def test_a_slot_that_was_dropped_costs_nothing_while_the_server_has_the_log(
    clusters: ClusterFactory, postgresql_major: str
) -> None:
    cluster = clusters.create(postgresql_major, conf=KEPT_LOG)
    protected = protected_table(cluster)
    cluster.psql(DROP_SLOT)
    cluster.psql("INSERT INTO t VALUES (3)")
    recycle(cluster)
    with captured(protected) as capture:
        cluster.psql("INSERT INTO t VALUES (4)")
    assert capture.alarms() == set()
    assert protected.lineage.holes() == []
    assert rows(protected) == [1, 2, 3, 4]


@pytest.mark.fault(
    "slot-dropped", control="test_a_slot_that_was_dropped_costs_nothing_while_the_server_has_the_log"
)
def test_a_slot_that_was_dropped_and_its_log_recycled_is_a_hole_that_is_alarmed(
    clusters: ClusterFactory, postgresql_major: str
) -> None:
    cluster = clusters.create(postgresql_major, conf=SMALL_LOG)
    protected = protected_table(cluster)
    cluster.psql(DROP_SLOT)
    recycle(cluster)
    with captured(protected) as capture:
        cluster.psql("INSERT INTO t VALUES (4)")
    assert any("lost for good" in alarm for alarm in capture.alarms())
    (hole,) = protected.lineage.holes()
    with pytest.raises(TargetUnreachable) as caught:
        protected.plan(LATEST)
    assert caught.value.before is not None
    before = Target(TargetKind.POSITION, position=Position("00000001", hole.first), inclusive=False)
    assert rows(protected, before) == [1, 2]


@pytest.mark.postgresql_majors("18")
@pytest.mark.fault("slot-idle-timeout")
def test_a_slot_that_was_invalidated_for_being_idle_is_alarmed(
    clusters: ClusterFactory, postgresql_major: str
) -> None:
    cluster = clusters.create(postgresql_major, conf=SMALL_LOG)
    protected = protected_table(cluster)
    cluster.configure({"idle_replication_slot_timeout": "1s"})
    cluster.reload()

    def lost() -> bool:
        cluster.psql("CHECKPOINT")
        return cluster.psql("SELECT wal_status FROM pg_replication_slots") == "lost"

    poll(lost, "the idle slot is invalidated")
    cluster.configure({"idle_replication_slot_timeout": "0"})
    cluster.reload()
    recycle(cluster)
    with captured(protected) as capture:
        cluster.psql("INSERT INTO t VALUES (4)")
    assert any("lost for good" in alarm for alarm in capture.alarms())
    assert len(protected.lineage.holes()) == 1
    with pytest.raises(TargetUnreachable):
        protected.plan(LATEST)


@pytest.mark.fault("hole-before-first-backup")
def test_a_hole_before_the_first_backup_harms_no_restore_after_it(
    clusters: ClusterFactory, postgresql_major: str
) -> None:
    cluster = clusters.create(postgresql_major, conf=SMALL_LOG)
    protected = Protected.begin(cluster)
    with captured(protected):
        cluster.psql("CREATE TABLE t (i int)")
        cluster.psql("INSERT INTO t VALUES (1)")
    cluster.psql(DROP_SLOT)
    recycle(cluster)
    with captured(protected):
        protected.back_up()
        cluster.psql("INSERT INTO t VALUES (2)")
    (hole,) = protected.lineage.holes()
    assert rows(protected) == [1, 2]
    # Control: what lies before the hole is stored, and refused all the same, as no backup leads there.
    before = Target(TargetKind.POSITION, position=Position("00000001", hole.first), inclusive=False)
    with pytest.raises(TargetUnreachable) as caught:
        protected.plan(before)
    assert caught.value.after is not None


# ---- which server is it?


@pytest.mark.fault("demoted-primary-captured")
def test_a_primary_that_was_replaced_is_captured_with_an_alarm_and_not_followed_unasked(
    clusters: ClusterFactory, postgresql_major: str
) -> None:
    old = clusters.create(postgresql_major, conf=KEPT_LOG)
    new = old.make_standby(conf=KEPT_LOG)
    protected = protected_table(old)
    replayed(new, old)
    new.promote()
    with captured(protected.succeeded_by(new)) as capture:
        new.psql("INSERT INTO t VALUES (3)")
    assert capture.alarms() == set()
    with captured(protected) as capture:
        old.psql("INSERT INTO t VALUES (-1)")
    assert any("demoted" in alarm for alarm in capture.alarms())
    with pytest.raises(TargetUnreachable, match="which one is meant"):
        protected.plan(LATEST)
    assert rows(protected, Target(TargetKind.LATEST, branch="00000002")) == [1, 2, 3]
    assert rows(protected, Target(TargetKind.LATEST, branch="00000001")) == [-1, 1, 2]


@pytest.mark.fault("source-rewound")
def test_a_server_that_was_rewound_goes_on_without_a_hole(
    clusters: ClusterFactory, postgresql_major: str
) -> None:
    old = clusters.create(postgresql_major, conf=KEPT_LOG)
    new = old.make_standby(conf=KEPT_LOG)
    protected = protected_table(old)
    replayed(new, old)
    new.promote()
    with captured(protected):
        old.psql("INSERT INTO t VALUES (-1)")
    old.stop()
    new.psql("INSERT INTO t VALUES (3)")
    new.psql("CHECKPOINT")
    own = (old.data / "postgresql.conf").read_text()
    old.run(
        "pg_rewind", "-D", str(old.data), f"--source-server=host={new.home} user=postgres dbname=postgres"
    )
    (old.data / "postgresql.conf").write_text(own)
    old.configure({"primary_conninfo": f"host={new.home} user=postgres"})
    (old.data / "standby.signal").touch()
    old.user.own(old.data)
    old.start()
    replayed(old, new)
    end = Position("00000002", int_of(new.psql("SELECT pg_current_wal_flush_lsn()")))
    with Capture(protected).background as capture:
        capture.await_durable(end, timeout_seconds=DURABLE_SECONDS)
    assert protected.lineage.holes() == []
    assert rows(protected) == [1, 2, 3]
    stray = Target(TargetKind.LATEST, branch="00000001")
    assert rows(protected, stray) == [-1, 1, 2]


def int_of(lsn: str) -> int:
    """An LSN as a number."""
    return DIALECT.parse_position(lsn, branch="00000001")


@pytest.mark.fault("source-restored-in-place")
def test_a_source_that_was_put_back_to_an_older_state_is_refused_until_it_is_on_a_branch_of_its_own(
    clusters: ClusterFactory, postgresql_major: str
) -> None:
    cluster = clusters.create(postgresql_major, conf=KEPT_LOG)
    protected = protected_table(cluster)
    cluster.stop()
    older = cluster.home / "older"
    shutil.copytree(cluster.data, older, symlinks=True)
    cluster.start()
    with captured(protected):
        cluster.psql("INSERT INTO t VALUES (3)")
        recycle(cluster)
    stored = protected.lineage.logs()
    cluster.stop()
    shutil.rmtree(cluster.data)
    older.rename(cluster.data)
    cluster.user.own(cluster.data)
    cluster.start()
    cluster.psql("INSERT INTO t VALUES (-3)")
    with pytest.raises(LogConflict), Capture(protected).background as capture:
        capture.await_durable(Position("00000001", 1 << 62), timeout_seconds=WAIT_SECONDS)
    assert protected.lineage.logs() == stored
    assert rows(protected) == [1, 2, 3]


@pytest.mark.fault("log-file-of-other-content-pushed")
def test_a_log_file_of_the_same_name_and_other_content_is_refused(
    clusters: ClusterFactory, postgresql_major: str, tmp_path: Path
) -> None:
    one, other = (clusters.create(postgresql_major) for _ in range(2))
    assert one.system_identifier() == other.system_identifier()
    protected = Protected.begin(one)
    files = []
    for number, cluster in enumerate((one, other)):
        cluster.psql(f"CREATE TABLE t AS SELECT {number} AS i")
        name = cluster.psql("SELECT pg_walfile_name(pg_current_wal_lsn())")
        cluster.switch_wal()
        files.append(cluster.data / "pg_wal" / name)
    assert files[0].name == files[1].name
    push(protected.lineage, DIALECT, files[0])
    stored = protected.lineage.logs()
    with pytest.raises(LogConflict):
        push(protected.lineage, DIALECT, files[1])
    assert protected.lineage.logs() == stored
    assert "stored already" in push(protected.lineage, DIALECT, files[0])
