"""`cloudsave logs` as a user and a server run it: processes, signals, exit codes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cloudsave.clock import SYSTEM_CLOCK
from cloudsave.engines.postgresql.dialect import PostgresDialect
from cloudsave.engines.postgresql.log import parse_lsn
from cloudsave.logs.archive import fetch
from cloudsave.logs.ledger import unrecorded_gaps
from cloudsave.model.ledger import Ledger
from cloudsave.repository.keys import Secret
from cloudsave.repository.lineage import Lineage
from cloudsave.repository.repository import Repository
from cloudsave.store.posix import PosixStore
from tests.integration.postgresql.cluster import Cluster, ClusterFactory, poll
from tests.same_bytes import assert_same_bytes

PASSPHRASE = "correct horse battery staple"
DIALECT = PostgresDialect()
BRANCH = "00000001"
FILE = 16 << 20
KILLS = 8
TIMEOUT_SECONDS = 120.0


class Product:
    """The installed command with a configuration and a repository of its own."""

    def __init__(self, folder: Path, cluster: Cluster) -> None:
        self.folder = folder
        self.cluster = cluster
        self.repository = folder / "repository"
        (folder / "passphrase").write_text(PASSPHRASE)
        (folder / "passphrase").chmod(0o600)
        (folder / "cloudsave.toml").touch()
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("CLOUDSAVE_")},
            "CLOUDSAVE_CONFIG": str(folder / "cloudsave.toml"),
            "CLOUDSAVE_PASSPHRASE_FILE": str(folder / "passphrase"),
            "CLOUDSAVE_REPOSITORY_URL": f"file://{self.repository}",
        }
        self.run("init")
        self.run("source", "add", "db", cluster.url)

    def run(self, *arguments: str, status: int = 0, **environment: str) -> str:
        """Run to the end; what it said. The exit code must be `status`."""
        done = subprocess.run(
            [sys.executable, "-m", "cloudsave", *arguments],
            check=False,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
            env={**self.environment, **environment},
        )
        assert done.returncode == status, f"{arguments}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def capture(self, **environment: str) -> subprocess.Popen[bytes]:
        """Start `logs capture`."""
        return subprocess.Popen(
            [sys.executable, "-m", "cloudsave", "logs", "capture", "db"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**self.environment, **environment},
        )

    def lineage(self) -> Lineage:
        """The stored lineage, seen from outside of the processes."""
        repository = Repository.open(
            PosixStore(self.repository), secret=Secret(passphrase=PASSPHRASE), clock=SYSTEM_CLOCK
        )
        return repository.lineage(f"postgresql-{self.cluster.system_identifier()}")

    def flushed(self) -> int:
        """End of the server's log."""
        return parse_lsn(self.cluster.psql("SELECT pg_current_wal_flush_lsn()"))


@pytest.fixture
def product(clusters: ClusterFactory, postgresql_major: str, tmp_path: Path) -> Product:
    return Product(tmp_path, clusters.create(postgresql_major, conf={"wal_keep_size": "4GB"}))


def durable(lineage: Lineage) -> int:
    return Ledger(lineage.logs()).furthest(BRANCH)


def end_by(process: subprocess.Popen[bytes], number: int) -> int:
    process.send_signal(number)
    return process.wait(timeout=TIMEOUT_SECONDS)


@pytest.mark.postgresql_majors("14", "18")
@pytest.mark.fault("capture-killed")
def test_captures_killed_at_random_moments_lose_nothing(product: Product, tmp_path: Path) -> None:
    chance = random.Random(4711)
    cluster = product.cluster
    cluster.pgbench_init(1)
    with cluster.pgbench_run(clients=2):
        for _ in range(KILLS):
            process = product.capture()
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(timeout=chance.uniform(0.4, 2.5))
            assert end_by(process, signal.SIGKILL) == -signal.SIGKILL
    cluster.switch_wal()
    end = product.flushed()
    process = product.capture()
    lineage = product.lineage()
    poll(lambda: durable(lineage) >= end, "the log is durable", timeout_seconds=TIMEOUT_SECONDS)
    assert end_by(process, signal.SIGTERM) == 0
    ledger = Ledger(lineage.logs())
    assert unrecorded_gaps(ledger, [], BRANCH) == []
    assert lineage.holes() == []
    begin = ledger.ranges(BRANCH)[0][0]
    offsets = range(begin, end - end % FILE, FILE)
    assert len(offsets) >= 1
    for offset in offsets:
        name = DIALECT.log_file_name(BRANCH, offset, log_file_bytes=FILE)
        fetch(lineage, DIALECT, name, tmp_path / "file", log_file_bytes=FILE)
        stored = (tmp_path / "file").read_bytes()
        assert_same_bytes(stored, (cluster.data / "pg_wal" / name).read_bytes(), name)


@pytest.mark.postgresql_majors("18")
def test_sigterm_stores_what_has_been_received(product: Product) -> None:
    process = product.capture(CLOUDSAVE_RPO_SECONDS="3600")
    received = "SELECT count(*) FROM pg_stat_replication WHERE write_lsn >= '{}'"
    poll(lambda: product.cluster.psql(received.format("0/1")) == "1", "capture streams")
    product.cluster.psql("CREATE TABLE t AS SELECT 1 AS x")
    end = product.cluster.psql("SELECT pg_current_wal_flush_lsn()")
    poll(lambda: product.cluster.psql(received.format(end)) == "1", "the log is received")
    lineage = product.lineage()
    assert durable(lineage) < parse_lsn(end)
    assert end_by(process, signal.SIGTERM) == 0
    assert durable(lineage) >= parse_lsn(end)


@pytest.mark.postgresql_majors("14", "18")
@pytest.mark.fault("archive-end-unproved")
def test_fetch_ends_with_1_only_for_what_is_proved_absent(product: Product) -> None:
    cluster = product.cluster
    process = product.capture()
    poll(lambda: cluster.psql("SELECT count(*) FROM pg_stat_replication") == "1", "capture streams")
    product.run("backup", "db")
    cluster.switch_wal()
    end = product.flushed()
    lineage = product.lineage()
    poll(lambda: durable(lineage) >= end, "the log is durable")
    assert end_by(process, signal.SIGTERM) == 0
    there = DIALECT.log_file_name(BRANCH, end - 1, log_file_bytes=FILE)
    target = product.folder / "RECOVERYXLOG"
    product.run("logs", "fetch", "db", there, str(target))
    assert_same_bytes(target.read_bytes(), (cluster.data / "pg_wal" / there).read_bytes(), there)
    beyond = DIALECT.log_file_name(BRANCH, end + 4 * FILE, log_file_bytes=FILE)
    product.run("logs", "fetch", "db", beyond, str(target), status=1)
    product.run("logs", "fetch", "db", "00000002.history", str(target), status=1)
    for arguments in (
        ("db", "nonsense", str(target)),
        ("other", there, str(target)),
        ("db", there),
        ("--bogus",),
    ):
        product.run("logs", "fetch", *arguments, status=255)
    product.run("logs", "fetch", "db", there, "/nowhere/at/all", status=255)
    product.run(
        "logs", "fetch", "db", there, str(target), status=255, CLOUDSAVE_REPOSITORY_URL="file:///nowhere"
    )
    (product.folder / "wrong").write_text("wrong")
    (product.folder / "wrong").chmod(0o600)
    wrong = str(product.folder / "wrong")
    product.run("logs", "fetch", "db", there, str(target), status=255, CLOUDSAVE_PASSPHRASE_FILE=wrong)
    _damage(product.repository, lineage, end - 1)
    said = product.run("logs", "fetch", "db", there, str(target), status=255)
    assert "CS-600" in said


def _damage(repository: Path, lineage: Lineage, offset: int) -> None:
    """Flip a bit in every object that holds the byte at `offset`."""
    for segment in lineage.logs():
        if segment.first <= offset < segment.last:
            (path,) = repository.rglob(f"{segment.first:016x}-{segment.last:016x}-*")
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.chmod(0o600)
            path.write_bytes(content)


@pytest.mark.postgresql_majors("18")
def test_status_and_ranges_tell_what_is_durable(product: Product) -> None:
    process = product.capture()
    poll(lambda: product.cluster.psql("SELECT count(*) FROM pg_stat_replication") == "1", "capture streams")
    product.run("logs", "capture", "db", status=6)
    product.run("backup", "db")
    product.cluster.psql("CREATE TABLE t AS SELECT 1 AS x")
    end = product.flushed()
    lineage = product.lineage()
    poll(lambda: durable(lineage) >= end, "the log is durable")
    assert end_by(process, signal.SIGINT) == 0
    status = json.loads(product.run("logs", "status", "db", "--json"))
    (stored,) = status["ranges"]
    assert parse_lsn(stored["end"]) >= end
    assert status["holes"] == []
    ranges = json.loads(product.run("ranges", "db", "--json"))
    (reachable,) = ranges["ranges"]
    assert parse_lsn(reachable["end_position"]) <= parse_lsn(stored["end"])
    assert reachable["begin"] <= reachable["end"]
    assert "00000001" in product.run("logs", "status", "db")
