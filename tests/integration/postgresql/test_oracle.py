"""The oracle on real servers, and the proof that it sees what it must."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.integration.postgresql.cluster import Cluster, poll
from tests.integration.postgresql.oracle import (
    Commit,
    Expectation,
    Ledger,
    LedgerClients,
    assert_ledger,
    assert_pgbench_consistent,
    payload_of,
    problems_of,
)

START = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)


def _ledger() -> Ledger:
    """Commit n is sent at second 10 n and answered 2 s later; its record lies in [100 n, 100 n + 20)."""
    commits = {}
    for number in range(1, 6):
        sent = START + timedelta(seconds=10 * number)
        commits[number] = Commit(
            number, 0, 700 + number, sent, 100 * number, sent + timedelta(seconds=2), 100 * number + 20
        )
    commits[6] = Commit(6, 0, 706, START + timedelta(seconds=60), 600)
    return Ledger(commits)


def test_commit_under_way_at_the_target_is_free() -> None:
    expected = _ledger().expected_ids(START + timedelta(seconds=31))
    assert expected.must_have == {1, 2}
    assert expected.must_not_have == {4, 5, 6}


def test_acknowledged_at_the_very_target_must_be_there() -> None:
    assert _ledger().expected_ids(START + timedelta(seconds=32)).must_have == {1, 2, 3}


def test_position_decides_by_where_the_commit_record_can_lie() -> None:
    expected = _ledger().expected_at_position(f"0/{310:X}")
    assert expected.must_have == {1, 2}
    assert expected.must_not_have == {4, 5, 6}


@pytest.mark.parametrize(
    ("inclusive", "had", "not_had"), [(True, {1, 2, 3}, {4, 5, 6}), (False, {1, 2}, {3, 4, 5, 6})]
)
def test_transaction_target_is_inclusive_or_not(inclusive: bool, had: set[int], not_had: set[int]) -> None:
    expected = _ledger().expected_at_transaction(703, inclusive=inclusive)
    assert expected.must_have == had
    assert expected.must_not_have == not_had


def test_commit_in_doubt_is_neither_promised_nor_forbidden_at_the_end() -> None:
    expected = _ledger().expected_latest()
    assert 6 not in expected.must_have
    assert not expected.must_not_have


def test_every_kind_of_loss_is_a_problem() -> None:
    expectation = Expectation(frozenset({1, 2}), frozenset({4}), frozenset({1, 2, 3, 4}))
    good = {number: payload_of(number) for number in (1, 2)}
    assert problems_of(good, expectation) == []
    assert problems_of({1: payload_of(1)}, expectation) == ["acknowledged row 2 is missing"]
    assert problems_of({**good, 4: payload_of(4)}, expectation) == [
        "row 4, committed after the target, is there"
    ]
    assert problems_of({**good, 9: payload_of(9)}, expectation) == ["row 9 was never sent"]
    assert problems_of({**good, 3: "torn"}, expectation) == ["row 3 has another content"]


def test_record_agrees_with_a_server_that_crashed_and_came_back(cluster: Cluster, tmp_path: Path) -> None:
    record = tmp_path / "ledger.jsonl"
    cluster.pgbench_init(1)
    with cluster.pgbench_run(clients=1), LedgerClients(lambda: cluster.url, record) as clients:
        clients.wait_for(40)
        history = "SELECT count(*) FROM pgbench_history"
        poll(lambda: cluster.psql(history) != "0", "pgbench has committed something")
        cluster.crash()
        cluster.start()
        clients.wait_for(40)
    ledger = Ledger.read(record)
    with cluster.connect() as connection:
        assert_ledger(connection, ledger.expected_latest())
        assert_pgbench_consistent(connection)
        middle = ledger.expected_ids(ledger.quiet_instant())
        assert middle.must_have
        assert middle.must_not_have
        with pytest.raises(AssertionError, match="committed after the target"):
            assert_ledger(connection, middle)
        connection.execute("DELETE FROM ledger WHERE id = 5")
        with pytest.raises(AssertionError, match="row 5 is missing"):
            assert_ledger(connection, ledger.expected_latest())


def test_pgbench_invariant_sees_one_lost_update(cluster: Cluster) -> None:
    cluster.pgbench_init(1)
    cluster.run("pgbench", "-n", "-t", "20")
    with cluster.connect() as connection:
        assert_pgbench_consistent(connection)
        connection.execute("UPDATE pgbench_accounts SET abalance = abalance + 1 WHERE aid = 1")
        with pytest.raises(AssertionError, match="accounts, tellers"):
            assert_pgbench_consistent(connection)
