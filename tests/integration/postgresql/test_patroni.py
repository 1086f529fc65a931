"""A real Patroni cluster: capture follows the leader by a URL of all hosts, and nothing is lost."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from tests.integration.postgresql.cluster import Cluster, ClusterFactory, poll
from tests.integration.postgresql.command_line import SOURCE, CommandLine, Running
from tests.integration.postgresql.oracle import Ledger, LedgerClients, assert_ledger, lsn_number
from tests.integration.postgresql.patroni import Node, Patroni

SLOT = "cloudsave_db"


@pytest.mark.postgresql_majors("15")
def test_capture_follows_a_switchover_and_a_killed_leader_without_a_hole(
    clusters: ClusterFactory, postgresql_major: str, tmp_path: Path
) -> None:
    """
    The oracle proves it: with a synchronous standby, what a client was told is committed has to be there.

    First the new leader has no slot of ours, and capture asks for the log from where it had got to on the old
    branch; then Patroni is told that the slot is permanent, and the next leader has it before we come.
    """
    record = tmp_path / "ledger.jsonl"
    with Patroni(clusters, postgresql_major) as patroni:
        first = patroni.leader()
        with closing(CommandLine(tmp_path, first.cluster, url=patroni.url)) as user:
            user.prepare()
            with user.captured() as capture, LedgerClients(lambda: patroni.url, record) as clients:
                clients.wait_for(50)
                user.run("backup", SOURCE, "--mode", "remote")
                second = patroni.switch_over()
                assert second is not first
                clients.wait_for(100)
                wait_until_captured(user, second.cluster)
                patroni.configure({"slots": {SLOT: {"type": "physical"}}})
                last = patroni.fail_over()
                assert last is first
                clients.wait_for(100)
                clients.stop()
                wait_until_captured(user, last.cluster)
                assert_followed(capture, last)
            status = user.run("logs", "status", SOURCE)  # Exit code 0: no hole.
            assert [one["branch"] for one in status["ranges"]] == ["00000001", "00000002", "00000003"]
            with user.restored("--latest") as restored, restored.server.connect() as connection:
                assert restored.server.timeline() == 4, "restored to the end of 3, opened on the next"
                assert_ledger(connection, Ledger.read(record).expected_latest())


def wait_until_captured(user: CommandLine, server: Cluster) -> None:
    """Wait until all that the leader has flushed by now is durable on its branch."""
    end = lsn_number(server.psql("SELECT pg_current_wal_flush_lsn()"))
    branch = f"{server.timeline():08X}"

    def durable() -> bool:
        ranges = user.run("logs", "status", SOURCE)["ranges"]
        return max((lsn_number(one["end"]) for one in ranges if one["branch"] == branch), default=0) >= end

    poll(durable, f"log of branch {branch} is durable", timeout_seconds=60.0)


def assert_followed(capture: Running, leader: Node) -> None:
    """
    Capture runs, has lost nothing, and Patroni keeps the slot that it streams from. It may have told that it
    was silent during a failover.
    """
    events = capture.statuses()
    assert not [event["alarm"] for event in events if event["alarm"]]
    assert sum(event["holes"] for event in events) == 0
    assert [event for event in events if event["last_error"]], "no interruption was seen: nothing was proved"
    query = f"SELECT count(*) FROM pg_replication_slots WHERE active AND slot_name = '{SLOT}'"
    assert leader.cluster.psql(query) == "1"
