"""
Retention by the command line on real servers: what was promised can be restored, to its edges, and what was
not is refused; capture goes on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.integration.postgresql.cluster import Cluster
from tests.integration.postgresql.command_line import SOURCE, CommandLine

pytestmark = pytest.mark.postgresql_majors("14", "18")
FINDINGS, UNREACHABLE = 3, 4


@pytest.fixture
def user(cluster: Cluster, tmp_path: Path) -> Iterator[CommandLine]:
    found = CommandLine(tmp_path, cluster)
    yield found
    found.close()


@dataclass
class Steps:
    """A table that gets one row a step, and where the log was after each."""

    cluster: Cluster
    user: CommandLine
    positions: list[str]

    def more(self, count: int) -> None:
        """Some steps, each in a log file of its own, all durable."""
        for _ in range(count):
            number = len(self.positions)
            self.cluster.psql(f"INSERT INTO steps VALUES ({number}, repeat('x', 2000))")
            self.positions.append(self.cluster.psql("SELECT pg_current_wal_insert_lsn()"))
            self.cluster.psql(
                f"INSERT INTO noise SELECT {number}, repeat('y', 50) FROM generate_series(1, 200)"
            )
            self.cluster.switch_wal()
        self.user.catch_up()

    def backup(self, *options: str) -> str:
        """A base backup; its id."""
        return str(self.user.run("backup", SOURCE, *options)["backup_id"])

    def count_in(self, *target: str) -> int:
        """How many steps a restore brings back."""
        with self.user.restored(*target) as restored:
            return int(restored.server.psql("SELECT count(*) FROM steps"))


def states(answer: dict[str, Any]) -> dict[str, bool]:
    """Whether each backup is kept."""
    return {one["backup_id"]: one["keep"] for one in answer["backups"]}


def test_what_is_promised_can_be_restored_to_its_edges_and_nothing_else(
    cluster: Cluster, user: CommandLine
) -> None:
    cluster.psql("CREATE TABLE steps (number int, filler text)")
    cluster.psql("CREATE TABLE noise (number int, filler text)")
    user.prepare(rpo_seconds=0.2)
    steps = Steps(cluster, user, [])
    with user.captured():
        steps.more(2)
        first = steps.backup()
        steps.more(2)
        second = steps.backup()
        steps.more(2)
        third = steps.backup()
        steps.more(2)
        fourth = steps.backup()
        steps.more(2)
        assert steps.count_in("--position", steps.positions[3]) == 4
        user.run("hold", "add", first, "--reason", "before the migration")
        everything = user.run("expire", SOURCE)
        assert (everything["removed"], everything["log_objects"]) == ([], 0)
        assert all(states(everything).values())

        planned = user.run("expire", SOURCE, "--keep-last", "2", "--dry-run")
        assert states(planned) == {first: True, second: False, third: True, fourth: True}
        assert planned["log_objects"] > 0
        assert len(user.run("list", SOURCE)) == 4
        done = user.run("expire", SOURCE, "--keep-last", "2")
        assert (done["removed"], done["log_objects"]) == ([second], planned["log_objects"])
        user.run("gc")
        assert user.run("verify", "--read-all")["sound"] is True

        ranges = user.run("ranges", SOURCE)
        assert [one["backups"] for one in ranges["ranges"]] == [[first], [third, fourth]]
        assert all(hole["expired"] for hole in ranges["holes"])
        assert user.run("logs", "status", SOURCE)["holes"]
        steps.more(1)
    edge = ranges["ranges"][1]["begin_position"].rpartition(":")[2]
    assert steps.count_in("--backup", first, "--immediate") == 2
    assert steps.count_in("--position", edge) == 6
    assert steps.count_in("--position", steps.positions[6]) == 7
    assert steps.count_in("--latest") == 11
    for position in (steps.positions[3], steps.positions[4]):
        refused = user.refused(
            *user.restore_command(user.place(), "--position", position), exit_code=UNREACHABLE
        )
        assert refused["code"] == "CS-5001"
    refused = user.refused("show", second, exit_code=2)
    assert refused["code"] == "CS-1005"

    with user.captured():
        steps.more(1)
        fifth = steps.backup()
        assert user.run("show", fifth)["detection"]["rung"] == "log"
        user.run("hold", "release", first)
        sixth = steps.backup("--full")
        last = user.run("expire", SOURCE, "--keep-last", "1")
        assert last["removed"] == [first, third, fourth, fifth]
        assert user.run("gc", SOURCE)["lineages"][0]["bytes_freed"] > 0
        assert user.run("verify", "--read-all")["sound"] is True
        after = user.run("ranges", SOURCE)
        assert [one["backups"] for one in after["ranges"]] == [[sixth]]
        assert after["holes"] == []
        steps.more(1)
    assert steps.count_in("--latest") == 13
