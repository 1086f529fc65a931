"""Restores on a host that is not like the source's: lower settings, and libraries that sort otherwise."""

from __future__ import annotations

from pathlib import Path

import psycopg
import pytest

from cloudsave.clock import SYSTEM_CLOCK
from cloudsave.engines.postgresql import target as target_module
from cloudsave.engines.postgresql.collation import (
    LIBRARIES_SETTING,
    PostgresCollationInspector,
)
from cloudsave.engines.postgresql.target import PostgresTarget
from cloudsave.errors import ServerDidNotStart, UsageError
from cloudsave.model.target import Target, TargetKind
from cloudsave.recovery.bring_up import BringUpContext, BringUpOptions, bring_up
from cloudsave.recovery.collations import report_collations
from cloudsave.recovery.plan import RecoveryPlan
from cloudsave.telemetry import NoProgress
from tests.integration.postgresql.cluster import Cluster
from tests.integration.postgresql.recoveries import DIALECT, Protected, restored

LATEST = Target(TargetKind.LATEST)
LOWER = (
    "max_connections = 12\nmax_worker_processes = 2\nmax_locks_per_transaction = 10\nmax_wal_senders = 2\n"
)


def brought_up(
    protected: Protected, plan: RecoveryPlan, directory: Path, settings: dict[str, str] | None = None
) -> list[int]:
    """The rows of a server that is started read-only on the directory, at the end of the plan."""
    server = PostgresTarget()
    context = BringUpContext(protected.lineage, DIALECT, server, SYSTEM_CLOCK, NoProgress())
    options = BringUpOptions(
        bin_directory=protected.cluster.bindir, look=True, settings=settings or {}, later_command="false"
    )
    try:
        bring_up(plan, directory, context, options)
        with psycopg.connect(server.connection_url(), autocommit=True) as connection:
            return [row[0] for row in connection.execute("SELECT i FROM t ORDER BY i").fetchall()]
    finally:
        server.stop()


def with_rows(cluster: Cluster) -> Protected:
    """A backup, and a row after it."""
    protected = Protected.begin(cluster)
    with protected.captured() as capture:
        cluster.psql("CREATE TABLE t AS SELECT 1 AS i")
        protected.back_up()
        cluster.psql("INSERT INTO t VALUES (2)")
        protected.catch_up(capture)
    return protected


@pytest.mark.fault("settings-too-low")
def test_settings_that_are_too_low_for_the_log_are_raised(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    protected = with_rows(cluster)
    plan = protected.plan(LATEST)
    for number in (1, 2):
        directory = protected.restore_files(plan)
        with (directory / "postgresql.conf").open("a") as file:
            file.write(LOWER)
        if number == 1:
            with pytest.raises(UsageError, match="max_connections = 12"):
                brought_up(protected, plan, directory, {"max_connections": "12"})
            assert brought_up(protected, plan, directory) == [1, 2]
        else:
            # Without them no server comes up: the check can fail.
            monkeypatch.setattr(target_module, "_needed_settings", lambda data: {})
            with pytest.raises(ServerDidNotStart, match="reach its target") as caught:
                brought_up(protected, plan, directory)
            assert any("--set max_connections=60" in hint for hint in caught.value.hints)


@pytest.mark.postgresql_majors("15", "18")
def test_settings_that_were_raised_after_the_backup_are_named(cluster: Cluster) -> None:
    protected = Protected.begin(cluster)
    with protected.captured() as capture:
        cluster.psql("CREATE TABLE t AS SELECT 1 AS i")
        protected.back_up()
        protected.catch_up(capture)
    cluster.configure({"max_connections": "90"})
    cluster.restart()
    with protected.captured() as capture:
        cluster.psql("INSERT INTO t VALUES (2)")
        protected.catch_up(capture)
    plan = protected.plan(LATEST)
    directory = protected.restore_files(plan)
    with pytest.raises(ServerDidNotStart) as caught:
        brought_up(protected, plan, directory)
    assert any("--set max_connections=90" in hint for hint in caught.value.hints)
    assert brought_up(protected, plan, directory, {"max_connections": "90"}) == [1, 2]


@pytest.mark.fault("sort-order-differs")
def test_a_default_order_of_another_version_is_told(cluster: Cluster) -> None:
    """The version that the catalogue records is forged. (Version 14 records none.)"""
    protected = with_rows(cluster)
    with restored(protected, LATEST) as sound:
        assert not list(PostgresCollationInspector().changes(sound.server.connection_url(), {})), (
            "it cries wolf"
        )
        if int(cluster.major) < 15:
            return
        with sound.connect() as connection:
            connection.execute("UPDATE pg_database SET datcollversion = '1.3' WHERE datname = 'postgres'")
        url = sound.server.connection_url()
        report = report_collations(PostgresCollationInspector(), url, {}, sound.directory)
        assert [(one.database, one.collation, one.recorded) for one in report.changes] == [
            ("postgres", "", "1.3")
        ]
        assert report.file is not None
        assert 'REINDEX DATABASE "postgres";' in report.file.read_text()


@pytest.mark.postgresql_majors("15")
def test_other_versions_of_sort_orders_are_told_with_their_cure(cluster: Cluster) -> None:
    """The versions that are recorded in the catalogue are forged: libraries are what they are."""
    cluster.psql("CREATE COLLATION german (provider = icu, locale = 'de')")
    cluster.psql('CREATE TABLE "Words" (w text COLLATE german PRIMARY KEY, v text COLLATE "C")')
    cluster.psql('CREATE INDEX plain ON "Words" (v)')
    cluster.psql("CREATE DATABASE \"odd name\" TEMPLATE template0 LOCALE_PROVIDER icu ICU_LOCALE 'en-US'")
    protected = Protected.begin(cluster)
    with protected.captured() as capture:
        manifest = protected.back_up()
        cluster.psql("UPDATE pg_collation SET collversion = '1.2' WHERE collname = 'german'")
        cluster.psql("UPDATE pg_database SET datcollversion = '1.3' WHERE datname = 'odd name'")
        protected.catch_up(capture)
    assert "i=" in manifest.settings[LIBRARIES_SETTING]
    with restored(protected, LATEST) as found:
        url, directory, inspector = (
            found.server.connection_url(),
            found.directory,
            PostgresCollationInspector(),
        )
        report = report_collations(inspector, url, manifest.settings, directory)
        assert report.file == directory.with_name(directory.name + ".reindex.sql")
        shown = {(one.database, one.collation, one.recorded) for one in report.changes}
        assert shown == {("postgres", "public.german", "1.2"), ("odd name", "", "1.3")}
        text = report.file.read_text()
        assert 'REINDEX INDEX "public"."Words_pkey";' in text
        assert "plain" not in text
        cluster.run("psql", "-X", "-v", "ON_ERROR_STOP=1", "-d", url, "-f", str(report.file))
        assert not report_collations(inspector, url, manifest.settings, directory).changes
        assert not report.file.exists()
