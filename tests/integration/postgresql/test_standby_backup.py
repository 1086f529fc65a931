"""Base backups of standbys: restores of them are complete, and what makes one worthless refuses it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from cloudsave.backup.plan import BackupRequest, plan_backup
from cloudsave.backup.run import BackupContext, run_backup
from cloudsave.clock import SYSTEM_CLOCK
from cloudsave.engines.api import BackupSource
from cloudsave.errors import BackupInvalidated
from cloudsave.model.engine_facts import BackupStart, LogAtHand
from cloudsave.model.item import Piece
from cloudsave.model.manifest import Manifest
from cloudsave.model.position import Position
from cloudsave.telemetry import NoProgress
from tests.integration.postgresql.cluster import Cluster, ClusterFactory, poll
from tests.integration.postgresql.command_line import SOURCE, CommandLine
from tests.integration.postgresql.oracle import Ledger, LedgerClients, assert_ledger, lsn_number
from tests.integration.postgresql.recoveries import Protected

MAJORS = pytest.mark.postgresql_majors("14", "18")
MODES = pytest.mark.parametrize("mode", ["local", "remote"])
SETTLED = {"wal_keep_size": "1GB", "checkpoint_timeout": "1h"}


def replayed(standby: Cluster, primary: Cluster) -> None:
    """Wait until the standby has replayed all that its primary has written."""
    end = primary.psql("SELECT pg_current_wal_flush_lsn()")
    poll(lambda: standby.psql(f"SELECT pg_last_wal_replay_lsn() >= '{end}'") == "t", "the standby has it all")


@pytest.mark.postgresql_majors("18")
def test_backup_of_a_standby_with_its_primarys_log_is_restored_without_a_loss(
    clusters: ClusterFactory, tmp_path: Path, postgresql_major: str
) -> None:
    restore_is_complete(clusters.create(postgresql_major, conf=SETTLED), tmp_path, "primary", "local")


@pytest.mark.postgresql_majors("14")
def test_backup_of_a_standby_with_its_own_log_is_restored_without_a_loss(
    clusters: ClusterFactory, tmp_path: Path, postgresql_major: str
) -> None:
    restore_is_complete(clusters.create(postgresql_major, conf=SETTLED), tmp_path, "standby", "remote")


@pytest.mark.postgresql_majors("18")
def test_backup_of_a_standby_without_a_capture_is_complete_by_itself(
    clusters: ClusterFactory, tmp_path: Path, postgresql_major: str
) -> None:
    restore_is_complete(clusters.create(postgresql_major, conf=SETTLED), tmp_path, "nowhere", "remote")


def restore_is_complete(primary: Cluster, tmp_path: Path, captured: str, mode: str) -> None:
    """Back up a standby under load and restore; the log is captured from the primary, the standby, or not."""
    primary.pgbench_init(3)
    standby = primary.make_standby(conf=SETTLED)
    record = tmp_path / "ledger.jsonl"
    capturing = standby if captured == "standby" else primary
    with closing(CommandLine(tmp_path, primary, url=capturing.url)) as user:
        user.prepare()
        with user.config.open("a") as file:
            file.write(f'backup_url = "{standby.url}"\n')
        with LedgerClients(lambda: primary.url, record) as clients:
            clients.wait_for(50)
            if captured == "nowhere":
                backup = user.run("backup", SOURCE, "--mode", mode)
            else:
                with user.captured():
                    primary.psql("CHECKPOINT")
                    clients.wait_for(50)
                    backup = user.run("backup", SOURCE, "--mode", mode)
                    clients.wait_for(100)
                    clients.stop()
                    end = primary.psql("SELECT pg_current_wal_flush_lsn()")
                    replayed(standby, primary)
                    wait_until_stored(user, end)
        assert backup["method"] == mode
        ledger = Ledger.read(record)
        expected, target = ledger.expected_latest(), ("--latest",)
        if captured == "nowhere":
            stop = backup["stop"]["offset"]
            consistent = f"{stop >> 32:X}/{stop & 0xFFFFFFFF:X}"
            expected, target = ledger.expected_at_position(consistent), ("--immediate",)
        with user.restored(*target) as restored, restored.server.connect() as connection:
            assert_ledger(connection, expected)
            restored.server.amcheck()


def wait_until_stored(user: CommandLine, lsn: str) -> None:
    """Wait until `logs status` says that the log up to a position is durable."""

    def durable() -> bool:
        ranges = user.run("logs", "status", SOURCE)["ranges"]
        return max(lsn_number(one["end"]) for one in ranges) >= lsn_number(lsn)

    poll(durable, f"log up to {lsn} is durable")


# ---- what makes a backup worthless -------------------------------------------------------------------------


class Disturbed:
    """A source to whose server something happens after the first piece has been read."""

    def __init__(self, source: BackupSource, disturb: Callable[[], None]) -> None:
        self._source = source
        self._disturb = disturb
        self.finish = source.finish
        self.abort = source.abort

    def begin(self) -> BackupStart:
        return self._source.begin()

    def pieces(self) -> Iterator[Piece]:
        pieces = self._source.pieces()
        yield next(pieces)
        self._disturb()
        yield from pieces


class Everything:
    """A cover for backups whose log is captured already."""

    def begin(self) -> str:
        return "captured"

    def fill(self, start: Position, stop: Position, at_hand: LogAtHand) -> bool:
        return True

    def wait_until_durable(self, start: Position, stop: Position, at_hand: LogAtHand | None) -> None:
        """It is."""

    def close(self) -> None:
        """Nothing was begun."""


def back_up(protected: Protected, mode: str, disturb: Callable[[], None]) -> Manifest:
    """A base backup by the flow, disturbed."""
    identity = protected.engine.identify()
    plan = plan_backup(BackupRequest("db", mode=mode, workers=2), identity, protected.lineage.backup_ids())

    def open_source() -> BackupSource:
        return Disturbed(protected.engine.backup_source(mode=mode, fast=True, label="disturbed"), disturb)

    dialect = protected.engine.dialect
    context = BackupContext(protected.lineage, open_source, Everything(), dialect, SYSTEM_CLOCK, NoProgress())
    return run_backup(plan, context)


@MAJORS
@MODES
@pytest.mark.fault("promotion-during-standby-backup")
def test_a_promotion_during_the_backup_makes_it_worthless(
    clusters: ClusterFactory, postgresql_major: str, mode: str
) -> None:
    primary = clusters.create(postgresql_major, conf=SETTLED)
    primary.pgbench_init(4)  # More than the sockets between server and us can hold.
    standby = primary.make_standby(conf=SETTLED)
    replayed(standby, primary)
    protected = Protected.begin(standby)
    with pytest.raises(BackupInvalidated):
        back_up(protected, mode, standby.promote)
    assert protected.lineage.backup_ids() == []
    back_up(protected, mode, lambda: None)  # Negative control: undisturbed, the same is accepted.
    assert len(protected.lineage.backup_ids()) == 1


@MAJORS
@MODES
@pytest.mark.fault("full-page-writes-off")
def test_full_page_writes_switched_off_at_the_primary_make_it_worthless(
    clusters: ClusterFactory, postgresql_major: str, mode: str
) -> None:
    primary = clusters.create(postgresql_major, conf=SETTLED)
    primary.pgbench_init(4)
    standby = primary.make_standby(conf=SETTLED)
    protected = Protected.begin(standby)

    def full_page_writes(state: str) -> None:
        primary.psql(f"ALTER SYSTEM SET full_page_writes = {state}")
        primary.reload()
        poll(lambda: primary.psql("SHOW full_page_writes") == state, "the setting holds")
        poll(
            lambda: (
                primary.psql("CHECKPOINT; SELECT full_page_writes FROM pg_control_checkpoint()")
                == ("t" if state == "on" else "f")
            ),
            "the checkpointer knows the setting",
        )
        replayed(standby, primary)

    with pytest.raises(BackupInvalidated):
        back_up(protected, mode, lambda: full_page_writes("off"))
    standby.psql("CHECKPOINT")
    assert "full_page_writes" in {one.subject for one in protected.engine.findings()}
    full_page_writes("on")
    standby.psql("CHECKPOINT")
    assert "full_page_writes" not in {one.subject for one in protected.engine.findings()}
    back_up(protected, mode, lambda: None)
    assert len(protected.lineage.backup_ids()) == 1


@MAJORS
@MODES
@pytest.mark.fault("standby-changes-branch")
def test_a_standby_that_follows_to_another_branch_makes_it_worthless(
    clusters: ClusterFactory, postgresql_major: str, mode: str
) -> None:
    primary = clusters.create(postgresql_major, conf=SETTLED)
    primary.pgbench_init(4)
    standby = primary.make_standby(conf=SETTLED)
    cascaded = standby.make_standby(conf=SETTLED)
    replayed(cascaded, primary)
    protected = Protected.begin(cascaded)

    def promote_above() -> None:
        standby.promote()
        standby.psql("CREATE TABLE on_two (x int); CHECKPOINT")
        poll(lambda: cascaded.psql("SELECT to_regclass('on_two') IS NOT NULL") == "t", "the cascade follows")
        cascaded.psql("CHECKPOINT")

    with pytest.raises(BackupInvalidated):
        back_up(protected, mode, promote_above)
    back_up(protected, mode, lambda: None)
    (backup_id,) = protected.lineage.backup_ids()
    assert protected.lineage.manifest(backup_id).start.branch == "00000002"
