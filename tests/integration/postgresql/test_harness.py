"""The harness itself on every version: servers start, bear load, crash, come back, and hand over."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest

from tests.integration.postgresql.cluster import (
    SESSION_PREFIX,
    Cluster,
    ClusterFactory,
    ServerFailed,
    open_session_folder,
    poll,
)

ROOT = Path(__file__).parents[3]


def test_server_is_of_the_version_asked_for(cluster: Cluster, postgresql_major: str) -> None:
    assert cluster.psql("SHOW server_version_num")[:2] == postgresql_major
    assert cluster.psql("SHOW data_checksums") == "on"
    with cluster.connect() as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)


def test_committed_rows_survive_a_crash_under_load(cluster: Cluster) -> None:
    cluster.pgbench_init(1)
    with cluster.pgbench_run(clients=2) as load:
        wait = "SELECT count(*) > 50 FROM pgbench_history"
        poll(lambda: cluster.psql(wait) == "t", "pgbench makes progress")
        assert load.running()
        cluster.psql("CREATE TABLE kept AS SELECT 7 AS x")
        cluster.crash()
    assert not cluster.running()
    cluster.start()
    assert cluster.psql("SELECT x FROM kept") == "7"
    sums = "SELECT (SELECT sum(abalance) FROM pgbench_accounts) = (SELECT sum(delta) FROM pgbench_history)"
    assert cluster.psql(sums) == "t"
    cluster.amcheck()
    cluster.stop()
    cluster.verify_checksums()


def test_standby_streams_and_is_promoted_to_a_new_timeline(
    clusters: ClusterFactory, postgresql_major: str
) -> None:
    primary = clusters.create(postgresql_major, tablespaces=["side"])
    primary.psql("CREATE TABLE t (x int) TABLESPACE side; INSERT INTO t SELECT generate_series(1, 10)")
    standby = primary.make_standby()
    primary.psql("INSERT INTO t VALUES (11)")
    poll(lambda: standby.psql("SELECT count(*) FROM t") == "11", "the standby replays")
    assert standby.system_identifier() == primary.system_identifier()
    primary.stop(immediate=True)
    standby.promote()
    assert standby.timeline() == 2
    standby.psql("INSERT INTO t VALUES (12)")
    assert standby.psql("SELECT count(*) FROM t") == "12"


def test_waldump_shows_the_commit(cluster: Cluster) -> None:
    start = cluster.lsn()
    cluster.psql("CREATE TABLE w (x int)")
    assert "COMMIT" in cluster.waldump(start=start, end=cluster.lsn())


@pytest.mark.postgresql_majors("15", "18")
def test_fresh_identity_differs_and_plain_pages_are_possible(
    clusters: ClusterFactory, postgresql_major: str
) -> None:
    one = clusters.create(postgresql_major, tcp=True)
    other = clusters.create(postgresql_major, checksums=False, fresh_identity=True)
    assert one.system_identifier() != other.system_identifier()
    assert other.psql("SHOW data_checksums") == "off"
    with psycopg.connect(one.tcp_url) as connection:
        assert connection.execute("SELECT 2").fetchone() == (2,)


@pytest.mark.postgresql_majors("18")
def test_failed_start_shows_the_log(clusters: ClusterFactory, postgresql_major: str) -> None:
    broken = clusters.create(postgresql_major, start=False, conf={"shared_buffers": "nonsense"})
    with pytest.raises(ServerFailed, match="nonsense"):
        broken.start()


@pytest.mark.postgresql_majors("18")
def test_nothing_is_left_running_after_the_factory_closes(
    clusters: ClusterFactory, postgresql_major: str
) -> None:
    cluster = clusters.create(postgresql_major)
    homes = [cluster.home, clusters.folder(), clusters.folder(on_disk=True)]
    assert cluster.process is not None
    pid = cluster.process.pid
    assert clusters.close() == []
    assert not any(home.exists() for home in homes)
    assert not Path(f"/proc/{pid}").exists()


def test_folder_of_a_dead_run_is_removed_and_of_a_living_one_kept(tmp_path: Path) -> None:
    dead = tmp_path / f"{SESSION_PREFIX}dead"
    dead.mkdir()
    (dead / "owner").write_text("999999999 1")
    living = open_session_folder(tmp_path)
    assert (living / "owner").read_text().startswith(f"{os.getpid()} ")
    open_session_folder(tmp_path)
    assert living.is_dir()
    assert not dead.exists()


ABANDONING_RUN = """
import os, sys
from pathlib import Path
from tests.integration.postgresql.cluster import ClusterFactory, open_session_folder

folder = open_session_folder(Path(sys.argv[2]))
factory = ClusterFactory({"18": Path(sys.argv[1])}, root=folder, disk=folder, noted=lambda major: None)
print(factory.create("18").process.pid, flush=True)
os._exit(1)
"""


@pytest.mark.postgresql_majors("18")
def test_server_of_a_killed_run_is_ended_by_the_next_run(
    clusters: ClusterFactory, postgresql_major: str
) -> None:
    parent = clusters.folder()
    bindir = clusters.bindirs[postgresql_major]
    command = [sys.executable, "-c", ABANDONING_RUN, str(bindir), str(parent)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT, timeout=60)
    server = Path("/proc") / done.stdout.strip()
    assert server.name.isdigit(), done.stderr
    assert server.exists()
    (abandoned,) = parent.iterdir()
    open_session_folder(parent)
    poll(lambda: not server.exists(), "the abandoned server is gone")
    assert not abandoned.exists()
