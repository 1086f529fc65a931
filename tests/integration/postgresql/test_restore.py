"""Recoveries of real servers to every kind of target, judged by a record that clients kept outside."""

from __future__ import annotations

from pathlib import Path

from cloudsave.engines.postgresql.log import parse_lsn
from cloudsave.model.position import Position
from cloudsave.model.target import Target, TargetKind
from tests.integration.postgresql.cluster import Cluster
from tests.integration.postgresql.oracle import Expectation, Ledger, LedgerClients, assert_ledger
from tests.integration.postgresql.recoveries import Protected, Restored, restored


def assert_restored_as(found: Restored, expectation: Expectation) -> None:
    """The restored server holds exactly what the oracle wants, and the oracle wants something."""
    assert expectation.must_have
    with found.connect() as connection:
        assert_ledger(connection, expectation)


def test_every_kind_of_target_brings_exactly_the_acknowledged_commits(
    cluster: Cluster, tmp_path: Path
) -> None:
    record = tmp_path / "ledger.jsonl"
    protected = Protected(cluster)
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
