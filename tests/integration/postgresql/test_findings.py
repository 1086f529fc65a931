"""What `check` says of real servers, each finding once present and once absent."""

from __future__ import annotations

import shutil
from datetime import datetime, timedelta

import pytest

from cloudsave.clock import Clock
from cloudsave.engines.postgresql.engine import PostgresEngine
from cloudsave.engines.postgresql.findings import least_privileges
from cloudsave.model.finding import Finding, Severity
from tests.integration.postgresql.backups import started, take_backup
from tests.integration.postgresql.cluster import Cluster, ClusterFactory, poll


def by_subject(cluster: Cluster, *, role: str = "postgres", clock: Clock | None = None) -> dict[str, Finding]:
    """The findings about a server."""
    engine = PostgresEngine(cluster.url.replace("postgres@", f"{role}@"), clock=clock or Clock())
    return {finding.subject: finding for finding in engine.findings()}


def test_sound_server_has_no_problem(clusters: ClusterFactory, postgresql_major: str) -> None:
    cluster = clusters.create(postgresql_major, conf={"fsync": "on", "max_slot_wal_keep_size": "1GB"})
    found = by_subject(cluster)
    assert not [f for f in found.values() if f.severity in (Severity.PROBLEM, Severity.WARNING)]
    for subject in ("wal_level", "data checksums", "max_wal_senders", "clock", "volumes"):
        assert found[subject].severity == Severity.OK, found[subject]


def test_unsuitable_settings_are_named_with_their_cure(
    clusters: ClusterFactory, postgresql_major: str
) -> None:
    conf = {
        "wal_level": "minimal",
        "max_wal_senders": "0",
        "full_page_writes": "off",
        "synchronous_commit": "off",
    }
    cluster = clusters.create(postgresql_major, conf=conf, checksums=False)
    cluster.psql("CREATE UNLOGGED TABLE u (x int)")
    found = by_subject(cluster)
    assert found["wal_level"].severity == Severity.PROBLEM
    assert "ALTER SYSTEM SET wal_level = 'replica'" in found["wal_level"].hint
    assert found["full_page_writes"].severity == Severity.PROBLEM
    assert found["max_wal_senders"].severity == Severity.PROBLEM
    assert "max_wal_senders = 2" in found["max_wal_senders"].hint
    assert found["fsync"].severity == Severity.WARNING
    assert found["data checksums"].severity == Severity.WARNING
    assert found["synchronous_commit"].severity == Severity.NOTICE
    assert found["unlogged tables"].fact.startswith("1 unlogged tables")
    limit = found["max_slot_wal_keep_size"]
    assert limit.severity == Severity.WARNING
    assert "GB'" in limit.hint


@pytest.mark.fault("slot-about-to-be-lost")
def test_slots_say_what_they_hold_and_when_they_are_lost(cluster: Cluster) -> None:
    cluster.psql("SELECT pg_create_physical_replication_slot('cloudsave_one', true)")
    cluster.psql("SELECT pg_create_physical_replication_slot('bare', false)")
    cluster.psql("CREATE TABLE filler AS SELECT g FROM generate_series(1, 200000) g")
    told = "there is room for"
    poll(
        lambda: told in by_subject(cluster)["slot cloudsave_one"].fact, "the server knows the rate of its log"
    )
    found = by_subject(cluster)
    assert "idle, holds" in found["slot cloudsave_one"].fact
    assert found["slot bare"].severity == Severity.WARNING
    cluster.configure({"max_slot_wal_keep_size": "16MB", "max_wal_size": "32MB", "min_wal_size": "32MB"})
    cluster.reload()
    for _ in range(6):
        cluster.psql("INSERT INTO filler SELECT g FROM generate_series(1, 100000) g")
        cluster.switch_wal()
    cluster.psql("CHECKPOINT")
    lost = by_subject(cluster)["slot cloudsave_one"]
    assert lost.severity == Severity.PROBLEM
    assert "lost" in lost.fact


@pytest.mark.fault("archiver-failing", control="test_sound_server_has_no_problem")
def test_failing_archiver_is_a_warning(clusters: ClusterFactory, postgresql_major: str) -> None:
    cluster = clusters.create(postgresql_major, conf={"archive_mode": "on", "archive_command": "false"})
    cluster.psql("CREATE TABLE t (x int)")
    cluster.switch_wal()
    poll(lambda: cluster.psql("SELECT failed_count > 0 FROM pg_stat_archiver") == "t", "archiving fails")
    assert by_subject(cluster)["archiver"].severity == Severity.WARNING
    cluster.configure({"archive_command": "true"})
    cluster.reload()
    poll(lambda: cluster.psql("SELECT archived_count > 0 FROM pg_stat_archiver") == "t", "archiving works")
    assert by_subject(cluster)["archiver"].severity == Severity.OK
    cluster.configure({"archive_command": ""})
    cluster.reload()
    poll(lambda: cluster.psql("SHOW archive_command") in ("", "(disabled)"), "settings are read again")
    assert by_subject(cluster)["archive_mode"].severity == Severity.WARNING


class LateClock(Clock):
    """A machine whose clock is a minute behind."""

    def now(self) -> datetime:
        return super().now() - timedelta(seconds=60)


def test_clock_that_differs_is_a_warning(cluster: Cluster) -> None:
    late = by_subject(cluster, clock=LateClock())["clock"]
    assert late.severity == Severity.WARNING
    assert "60 s" in late.fact


def test_replica_reports_its_lag(clusters: ClusterFactory, postgresql_major: str) -> None:
    primary = clusters.create(postgresql_major)
    standby = primary.make_standby()
    assert by_subject(standby)["replica"].severity == Severity.OK
    standby.psql("SELECT pg_wal_replay_pause()")
    poll(lambda: standby.psql("SELECT pg_is_wal_replay_paused()") == "t", "replay pauses")
    assert "paused" in by_subject(standby)["replica"].fact
    assert "replica" not in by_subject(primary)


def test_printed_rights_are_enough_and_not_more_than_needed(cluster: Cluster, postgresql_major: str) -> None:
    """A role with exactly the printed rights is found complete, and takes a local backup that starts."""
    for statement in least_privileges("saver", int(postgresql_major)):
        cluster.psql(statement)
    hba = cluster.home / "outside_hba.conf"
    shutil.copy(cluster.data / "pg_hba.conf", hba)
    cluster.configure({"hba_file": str(hba)})
    cluster.user.own(cluster.home)
    cluster.restart()
    found = by_subject(cluster, role="saver")
    assert found["role"].severity == Severity.OK, found
    assert not [f for f in found.values() if "not checked" in f.fact]
    engine = PostgresEngine(cluster.url.replace("postgres@", "saver@"))
    taken = take_backup(engine.backup_source(mode="local", fast=True, label="least"), cluster)
    assert taken.start.notes[1:] == ()
    assert str(hba) in taken.outside
    assert started(taken, cluster).psql("SELECT 1") == "1"


@pytest.mark.postgresql_majors("14", "18")
def test_missing_rights_are_named_with_their_grants(cluster: Cluster) -> None:
    cluster.psql('CREATE ROLE "odd name" LOGIN')
    found = by_subject(cluster, role="odd%20name")
    assert found["role"].severity == Severity.PROBLEM
    assert 'ALTER ROLE "odd name" REPLICATION;' in found["role"].hint
    assert "GRANT EXECUTE ON FUNCTION pg_catalog.pg_" in found["rights"].hint
    assert 'GRANT pg_read_all_settings, pg_read_all_stats TO "odd name";' in found["rights"].hint
    for statement in found["rights"].hint.removeprefix("as a superuser: ").split("; "):
        cluster.psql(statement)
    cluster.psql(found["role"].hint.removeprefix("as a superuser: "))
    assert by_subject(cluster, role="odd%20name")["role"].severity == Severity.OK
