"""
MySQL and MariaDB: what is stored is damaged, mixed up or missing, and what is asked for cannot be. One server
of each series is protected once; each fault maltreats a copy of its repository.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tools import provision_binlog
from tools.provision_binlog import BinlogServer

from tests.integration.mysql.cluster import BinlogClusterFactory
from tests.integration.mysql.product import TIMEOUT_SECONDS, Product
from tests.integration.mysql.restored import Restores

DONE, FAILED, USAGE, FINDINGS, UNREACHABLE, DAMAGED = 0, 1, 2, 3, 4, 5


@dataclass
class Site:
    """A copy of the repository, and restores from it."""

    folder: Path
    restores: Restores

    @property
    def repository(self) -> Path:
        return self.folder / "repository"

    def objects(self, pattern: str) -> list[Path]:
        """Stored objects, in the order of their names."""
        found = sorted(self.repository.glob(f"lineages/*/{pattern}"))
        assert found, pattern
        return found

    def run(self, *arguments: str, **environment: str) -> tuple[int, dict[str, Any]]:
        """The exit code, and the error that was told."""
        known = self.restores.product.environment | {
            "CLOUDSAVE_CONFIG": str(self.folder / "cloudsave.toml"),
            "CLOUDSAVE_REPOSITORY_URL": f"file://{self.repository}",
        }
        done = subprocess.run(
            [sys.executable, "-m", "cloudsave", "--json", *arguments],
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=known | environment,
            timeout=TIMEOUT_SECONDS,
        )
        told = [line for line in done.stderr.splitlines() if line.startswith('{"error"')]
        error = json.loads(told[-1])["error"] if told else {}
        assert error.get("code") != "CS-0001", error
        return done.returncode, error

    def restore(self, *target: str, into: Path | None = None) -> tuple[int, dict[str, Any]]:
        """Restore, by default into a new place that must not be there afterwards unless it worked."""
        return self.run(*self.restores.arguments(into or self.restores.new(), *target))


@pytest.fixture(scope="module")
def protected(
    binlog_series: tuple[str, str], binlog_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Restores]:
    """A backup, and log behind it in several objects, each with a row of its own."""
    server = provision_binlog.listing()[binlog_series]
    factory = BinlogClusterFactory(binlog_folder)
    try:
        cluster = factory.create(server)
        if cluster.engine == "mysql":
            cluster.sql("INSTALL PLUGIN clone SONAME 'mysql_clone.so'")
        cluster.sql("CREATE DATABASE d", "CREATE TABLE d.t (x VARCHAR(100))", "INSERT INTO d.t VALUES ('r0')")
        product = Product(tmp_path_factory.mktemp("protected"), cluster)
        capture = product.capture()
        product.run("backup", "db")
        for number in range(1, 5):
            cluster.sql(f"INSERT INTO d.t VALUES ('row-{number}')")
            product.wait_for(f"row-{number}".encode())
        product.stop(capture)
        yield Restores(product)
        product.close()
    finally:
        factory.close()


@pytest.fixture
def site(protected: Restores, binlog_server: BinlogServer, tmp_path: Path) -> Site:
    assert binlog_server is not None
    folder = tmp_path / "site"
    shutil.copytree(protected.product.folder, folder)
    return Site(folder, protected)


def log_objects(site: Site) -> list[Path]:
    return site.objects("logs/*/*/*-*-*-*")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def swap(one: Path, other: Path) -> None:
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


LOG: dict[str, tuple[Callable[[list[Path]], None], int]] = {
    "binlog-object-missing": (lambda found: found[-2].unlink(), UNREACHABLE),
    "binlog-object-truncated": (lambda found: halve(found[-2]), DAMAGED),
    "binlog-object-bit-flipped": (lambda found: flip(found[-2]), DAMAGED),
    "binlog-objects-swapped": (lambda found: swap(found[-2], found[-3]), DAMAGED),
    "binlog-object-emptied": (lambda found: found[-2].write_bytes(b"") and None, DAMAGED),
}


@pytest.mark.fault(*LOG, control="test_without_a_fault_all_of_it_comes_back")
@pytest.mark.parametrize("name", LOG)
def test_log_that_is_not_what_was_stored_is_refused_and_found(site: Site, name: str) -> None:
    maltreat, code = LOG[name]
    maltreat(log_objects(site))
    status, error = site.restore("--latest")
    assert status == code, error
    assert error["hints"]
    assert site.run("verify", "--read-all")[0] == FINDINGS


BACKUP: dict[str, tuple[str, Callable[[Path], None]]] = {
    "binlog-backup-pack-missing": ("packs/*", Path.unlink),
    "binlog-backup-pack-bit-flipped": ("packs/*", flip),
    "binlog-backup-map-missing": ("maps/*", Path.unlink),
    "binlog-backup-manifest-truncated": ("backups/*", halve),
}


@pytest.mark.fault(*BACKUP, control="test_without_a_fault_all_of_it_comes_back")
@pytest.mark.parametrize("name", BACKUP)
def test_a_backup_that_is_not_what_was_stored_is_refused_and_found(site: Site, name: str) -> None:
    pattern, maltreat = BACKUP[name]
    for path in site.objects(pattern):
        maltreat(path)
    status, error = site.restore("--immediate")
    assert status in (FAILED, DAMAGED, UNREACHABLE), error
    assert site.run("verify", "--read-all")[0] == FINDINGS


TARGETS: dict[str, tuple[tuple[str, ...], int]] = {
    "binlog-target-before-first-backup": (("--time", "2001-01-01T00:00:00Z"), UNREACHABLE),
    "binlog-target-after-end": (("--time", "2199-01-01T00:00:00Z"), UNREACHABLE),
    "binlog-target-position-not-stored": (("--position", "000099:4"), UNREACHABLE),
    "binlog-target-gtid-not-stored": (("--transaction", "999999"), UNREACHABLE),
    "binlog-target-not-understood": (("--transaction", "GTID of yesterday"), USAGE),
    "binlog-target-without-zone": (("--time", "2026-01-01 00:00:00"), USAGE),
}


@pytest.mark.fault(*TARGETS, control="test_without_a_fault_all_of_it_comes_back")
@pytest.mark.parametrize("name", TARGETS)
def test_a_target_that_cannot_be_reached_is_refused_before_anything_is_touched(site: Site, name: str) -> None:
    target, code = TARGETS[name]
    into = site.restores.new()
    status, error = site.restore(*target, into=into)
    assert status == code, error
    assert error["hints"]
    assert not into.exists()


@pytest.mark.fault(
    "binlog-restore-over-files",
    "binlog-restore-wrong-passphrase",
    "binlog-restore-without-programs",
    control="test_without_a_fault_all_of_it_comes_back",
)
def test_a_restore_that_must_not_be_leaves_everything_alone(site: Site, tmp_path: Path) -> None:
    into = site.restores.new()
    into.mkdir()
    (into / "ibdata1").write_bytes(b"somebody's")
    status, error = site.restore("--latest", into=into)
    assert (status, [path.name for path in into.iterdir()]) == (USAGE, ["ibdata1"]), error
    wrong, into = tmp_path / "wrong", site.restores.new()
    wrong.write_text("not the passphrase")
    wrong.chmod(0o600)
    status, error = site.run(*site.restores.arguments(into, "--latest"), CLOUDSAVE_PASSPHRASE_FILE=str(wrong))
    assert error["code"] == "CS-6002", "told apart from damage"
    assert not into.exists()
    status, error = site.restore("--latest", "--bin-dir", str(tmp_path))
    assert (status, error["code"]) == (FAILED, "CS-2010")


def test_without_a_fault_all_of_it_comes_back(site: Site) -> None:
    """Control of all above."""
    into = site.restores.new()
    assert site.restore("--latest", into=into)[0] == DONE
    with site.restores.server(into) as server:
        assert [row[0] for row in server.sql("SELECT x FROM d.t ORDER BY x")] == [
            "r0",
            *(f"row-{n}" for n in range(1, 5)),
        ]
    assert site.run("verify", "--read-all")[0] == DONE
