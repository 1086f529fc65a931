"""A base backup that is too slow, or too fast, is told so by the configuration file while it runs."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path

import pytest

from tests.integration.postgresql.cluster import Cluster, poll
from tests.integration.postgresql.command_line import SOURCE, CommandLine

SLOW = 'read_limit_bytes_per_second = "200 kB"\nworkers = 1\n'
WATCHED_SECONDS = 3.0
"""Longer than a command takes to look at its files again."""
QUICK_SECONDS = 60.0
"""25 MB at 200 kB a second would take two minutes."""


@pytest.mark.postgresql_majors("18")
def test_a_running_backup_takes_its_limits_from_the_changed_file(cluster: Cluster, tmp_path: Path) -> None:
    with closing(CommandLine(tmp_path, cluster)) as user:
        user.prepare()
        before = user.config.read_text()
        user.config.write_text(SLOW + before)
        backup = user.begin("--progress", "json", "backup", SOURCE)
        reading = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'cloudsave backup'"
        poll(lambda: cluster.psql(reading) == "1" or not backup.running(), "the backup reads")
        begun = time.monotonic()
        poll(
            lambda: not backup.running() or time.monotonic() - begun > WATCHED_SECONDS,
            "negative control: with the old limits it is still at work",
        )
        assert backup.running()
        user.config.write_text(before)
        answer = backup.wait(timeout_seconds=QUICK_SECONDS).expect(0)
        assert "read_limit_bytes_per_second is not limited from now on" in answer.stderr
        assert "workers is " in answer.stderr
