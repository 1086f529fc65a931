"""The stand-alone program restores backups, knowing the documented format and nothing of cloudsave."""

from __future__ import annotations

import ast
import importlib.util
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cloudsave.clock import SYSTEM_CLOCK
from cloudsave.model.ledger import Ledger
from cloudsave.repository.keys import Secret
from cloudsave.repository.log_objects import log_object_name
from cloudsave.repository.repository import Repository
from cloudsave.store.posix import PosixStore
from tests.integration.postgresql.cluster import Cluster, ClusterFactory, poll
from tests.integration.postgresql.recoveries import Protected

RESCUE = Path(__file__).parents[3] / "tools" / "rescue.py"
PASSPHRASE = "correct horse battery staple"
PACKAGES = {"zstandard", "blake3", "cryptography"}
LINES_MAX = 399
STATE_SQL = """
    SELECT md5(string_agg(t::text, ',' ORDER BY aid)) FROM pgbench_accounts t
    UNION ALL SELECT md5(string_agg(t::text, ',' ORDER BY id)) FROM apart t
"""


def protect(cluster: Cluster) -> tuple[Protected, Path]:
    """A server with a repository in a directory, opened by a passphrase."""
    directory = cluster.factory.folder() / "repository"
    return Protected.begin(cluster, PosixStore(directory), passphrase=PASSPHRASE), directory


def rescue(repository: Path, *arguments: object, secret: Path) -> subprocess.CompletedProcess[str]:
    """Run the program by itself: isolated, so that it could not import cloudsave if it tried."""
    option = "--repository-key-file" if secret.name.endswith(".key") else "--passphrase-file"
    command = [sys.executable, "-I", RESCUE, "--repository", repository, option, secret, *arguments]
    return subprocess.run(list(map(str, command)), check=False, capture_output=True, text=True, cwd="/")


def rescued(cluster: Cluster, data: Path, printed: str) -> Cluster:
    """The rescued directory as a running server, with the lines that the program printed."""
    with (data / "postgresql.conf").open("a") as file:
        file.write(printed)
    server = cluster.factory.adopt(cluster.major, data)
    # A hot standby lets clients in as soon as it is consistent; the end of the log comes later.
    poll(lambda: server.psql("SELECT pg_is_in_recovery()") == "f", "the log is replayed")
    return server


def passphrase_file(directory: Path, passphrase: str = PASSPHRASE) -> Path:
    """A file with a passphrase."""
    path = directory / "passphrase"
    path.write_text(passphrase + "\n")
    return path


@pytest.mark.postgresql_majors("15", "18")
def test_rescue_restores_a_server_with_all_its_log(
    clusters: ClusterFactory, postgresql_major: str, tmp_path: Path
) -> None:
    cluster = clusters.create(postgresql_major, tablespaces=["apart"])
    cluster.pgbench_init()
    cluster.psql("CREATE TABLE apart (id int, t text) TABLESPACE apart")
    protected, repository = protect(cluster)
    with protected.captured() as capture:
        protected.back_up(mode="remote")
        cluster.psql("INSERT INTO apart SELECT g, repeat('x', 500) FROM generate_series(1, 3000) g")
        manifest = protected.back_up(mode="local")
        cluster.psql("UPDATE pgbench_accounts SET abalance = aid WHERE aid % 7 = 0")
        cluster.psql("DELETE FROM apart WHERE id % 3 = 0")
        cluster.switch_wal()
        cluster.psql("INSERT INTO apart VALUES (-1, 'the last row')")
        protected.catch_up(capture)
    wanted = cluster.psql(STATE_SQL)
    cluster.stop()
    assert manifest.kind == "incremental"
    root = cluster.factory.folder()
    secret = passphrase_file(tmp_path)

    listed = rescue(repository, "list", secret=secret)
    assert listed.returncode == 0, listed.stderr
    assert manifest.backup_id in listed.stdout
    assert "log of branch 00000001" in listed.stdout

    arguments = ("restore", manifest.backup_id, "--into", root / "data", "--wal-into", root / "wal")
    done = rescue(repository, *arguments, secret=secret)
    assert done.returncode == 0, done.stderr
    assert (root / "data" / "recovery.signal").exists()
    assert {path.stat().st_size for path in (root / "wal").iterdir()} == {manifest.log_file_bytes}
    spaces = list((root / "data" / "pg_tblspc").iterdir())
    assert [path.resolve().parent for path in spaces] == [root / "data.tablespaces"]
    (root / "data.tablespaces").chmod(0o711)

    server = rescued(cluster, root / "data", done.stdout)
    assert server.psql(STATE_SQL) == wanted
    assert server.psql("SELECT t FROM apart WHERE id = -1") == "the last row"
    assert server.timeline() == 2
    server.amcheck()
    server.stop()
    server.verify_checksums()

    again = rescue(repository, *arguments, secret=secret)
    assert again.returncode == 1
    assert "is not an empty directory" in again.stderr


@pytest.mark.postgresql_majors("18")
def test_rescue_refuses_damage_and_wrong_keys(cluster: Cluster, tmp_path: Path) -> None:
    protected, repository = protect(cluster)
    with protected.captured() as capture:
        manifest = protected.back_up()
        protected.catch_up(capture)
    cluster.stop()
    secret = passphrase_file(tmp_path)
    lineage = repository / protected.lineage.root
    place = random.Random(1)

    def attempt(number: int, secret: Path = secret) -> subprocess.CompletedProcess[str]:
        into, wal = tmp_path / f"into-{number}", tmp_path / f"wal-{number}"
        arguments = ("restore", manifest.backup_id, "--into", into, "--wal-into", wal)
        return rescue(repository, *arguments, secret=secret)

    raw_key = tmp_path / "repository.key"
    opened = Repository.open(PosixStore(repository), secret=Secret(passphrase=PASSPHRASE), clock=SYSTEM_CLOCK)
    raw_key.write_bytes(opened._key)
    assert attempt(0, raw_key).returncode == 0

    cover = Ledger(protected.lineage.logs()).cover(
        [("00000001", 0, None)], manifest.start.offset, manifest.stop.offset
    )
    log = repository / log_object_name(protected.lineage.id, cover.extents[0].segment)
    backup = lineage / "backups" / manifest.backup_id
    victims = [*lineage.glob("packs/*"), lineage / "maps" / manifest.maps[0], log, backup]
    for number, victim in enumerate(victims, 1):
        whole = victim.read_bytes()
        for change in ("flip", "cut", "remove"):
            damaged = bytearray(whole)
            damaged[place.randrange(len(damaged))] ^= 1 << place.randrange(8)
            victim.unlink()
            if change != "remove":
                victim.write_bytes(damaged if change == "flip" else whole[: place.randrange(len(whole))])
            done = attempt(10 * number + len(change))
            if change == "remove" and victim == log and done.returncode == 0:
                break  # The same log is stored once more, as a part of another stretch.
            assert done.returncode == (1 if victim == backup and change == "remove" else 5), (victim, done)
            assert "rescue: error: " in done.stderr
            assert not (tmp_path / f"into-{10 * number + len(change)}" / "recovery.signal").exists()
        victim.unlink(missing_ok=True)
        victim.write_bytes(whole)

    wrong = tmp_path / "wrong"
    wrong.mkdir()
    done = attempt(1000, passphrase_file(wrong, PASSPHRASE + "!"))
    assert done.returncode == 5
    assert "does not open this repository" in done.stderr
    raw_key.write_bytes(bytes(32))
    assert attempt(1001, raw_key).returncode == 5
    assert not (tmp_path / "into-1001").exists()
    shutil.rmtree(lineage / "logs")
    done = attempt(1002)
    assert done.returncode == 5
    assert "log that makes the backup consistent is missing" in done.stderr
    assert rescue(repository, "list", secret=secret).returncode == 0


@pytest.mark.postgresql_majors("18")
def test_rescue_follows_the_log_across_a_promotion(
    clusters: ClusterFactory, postgresql_major: str, tmp_path: Path
) -> None:
    cluster = clusters.create(postgresql_major)
    cluster.psql("CREATE TABLE events (n int)")
    protected, repository = protect(cluster)
    with protected.captured() as capture:
        manifest = protected.back_up()
        cluster.psql("INSERT INTO events VALUES (1)")
        standby = cluster.make_standby()
        protected.catch_up(capture)
    cluster.stop()
    standby.promote()
    standby.psql("INSERT INTO events VALUES (2)")
    protected = protected.succeeded_by(standby)
    with protected.captured() as capture:
        protected.catch_up(capture, standby)
    standby.stop()
    root = cluster.factory.folder()
    arguments = ("restore", manifest.backup_id, "--into", root / "data", "--wal-into", root / "wal")
    done = rescue(repository, *arguments, secret=passphrase_file(tmp_path))
    assert done.returncode == 0, done.stderr
    assert (root / "wal" / "00000002.history").exists()
    server = rescued(cluster, root / "data", done.stdout)
    assert server.psql("SELECT n FROM events ORDER BY n").split() == ["1", "2"]
    assert server.timeline() == 3


def _row(path: str, kind: str = "file", *, outside: bool = False) -> dict[str, Any]:
    return {"path": path, "kind": kind, "outside": outside, "mode": 0o600, "size_bytes": 0}


@pytest.mark.parametrize(
    "rows",
    [
        [_row("../x")],
        [_row("/etc/passwd")],
        [_row("base/../../x")],
        [_row("base//x")],
        [_row("base/./x")],
        [_row("")],
        [_row("a\0b")],
        [_row("/etc/../../x", outside=True)],
        [_row("/", outside=True)],
        [_row("base", "link")],
        [_row("pg_tblspc/../x", "link")],
        [_row("pg_tblspc/16384", "link"), _row("pg_tblspc/16384/../../x")],
        [_row("base/1"), _row("base/1")],
    ],
)
def test_rescue_refuses_paths_that_escape(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    specification = importlib.util.spec_from_file_location("rescue", RESCUE)
    assert specification is not None
    assert specification.loader is not None
    program = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(program)
    harmless = [_row("base/1"), _row("/etc/a", outside=True), _row("base", "directory")]
    assert len(program.Target({"files": harmless}, tmp_path / "into").places) == 3
    with pytest.raises(SystemExit, match="rescue: error: "):
        program.Target({"files": rows}, tmp_path / "into")
    assert list(tmp_path.iterdir()) == []


def test_rescue_is_short_and_depends_on_nothing_of_ours() -> None:
    source = RESCUE.read_text()
    assert len(source.splitlines()) <= LINES_MAX
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add((node.module or "").partition(".")[0])
    assert imported - set(sys.stdlib_module_names) == PACKAGES
    assert "importlib" not in source
    assert "__import__" not in source
