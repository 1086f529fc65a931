"""`cloudsave restore` and `verify` as they are typed, on a repository in a directory."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest

from cloudsave.clock import SYSTEM_CLOCK
from cloudsave.store.posix import PosixStore
from tests.integration.postgresql.cluster import Cluster
from tests.integration.postgresql.recoveries import Protected

pytestmark = pytest.mark.postgresql_majors("15")
PASSPHRASE = "correct horse battery staple"
COMMAND_SECONDS_MAX = 300


@dataclass
class Typed:
    """A command's end."""

    code: int
    stdout: str
    stderr: str

    def json(self) -> dict[str, Any]:
        """Its result."""
        assert self.code == 0, self.stderr
        return dict(json.loads(self.stdout))


@dataclass
class Site:
    """A repository with a source called "db", and the moment between its rows 10 and 11."""

    cluster: Cluster
    config: Path
    amid: datetime

    def type(self, *arguments: str) -> Typed:
        """Run a command line."""
        done = subprocess.run(
            [sys.executable, "-m", "cloudsave", "--config", str(self.config), "--no-progress", *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=COMMAND_SECONDS_MAX,
        )
        return Typed(done.returncode, done.stdout, done.stderr)

    def place(self) -> Path:
        """A directory to restore into; it does not exist."""
        return self.cluster.factory.folder() / "restored"


@pytest.fixture
def site(cluster: Cluster, tmp_path: Path) -> Site:
    """A backup and twenty rows after it."""
    store = PosixStore(tmp_path / "repository", clock=SYSTEM_CLOCK)
    protected = Protected.begin(cluster, store, passphrase=PASSPHRASE)
    with protected.captured() as capture:
        cluster.psql("CREATE TABLE t (i int)")
        protected.back_up()
        cluster.psql("INSERT INTO t SELECT generate_series(1, 10)")
        amid = datetime.now(UTC)
        cluster.psql("INSERT INTO t SELECT generate_series(11, 20)")
        protected.catch_up(capture)
    secret = tmp_path / "passphrase"
    secret.write_text(PASSPHRASE + "\n")
    secret.chmod(0o600)
    config = tmp_path / "cloudsave.toml"
    config.write_text(
        f'[repository]\nurl = "{tmp_path}/repository"\npassphrase_file = "{secret}"\n'
        f'[sources.db]\nurl = "{cluster.url}"\n'
    )
    return Site(cluster, config, amid)


def test_a_restore_that_starts_the_server(site: Site) -> None:
    place = site.place()
    bins = str(site.cluster.bindir)
    typed = ["restore", "db", "--into", str(place), "--time", site.amid.isoformat(), "--start"]
    result = site.type("--json", *typed, "--bin-dir", bins).json()
    server = site.cluster.factory.adopt(site.cluster.major, place, start=False)
    try:
        with psycopg.connect(result["connection_url"], autocommit=True) as connection:
            assert connection.execute("SELECT max(i) FROM t").fetchone() == (10,)
            assert connection.execute("SELECT pg_is_in_recovery()").fetchone() == (False,)
        assert result["open"] is True
    finally:
        server.run("pg_ctl", "stop", "-m", "immediate", "-D", str(place), check=False)
    assert site.type(*typed).code == 2, "a directory in use was written to"


def test_a_restore_for_later_leaves_a_command_that_answers_truly(site: Site, tmp_path: Path) -> None:
    place = site.place()
    result = site.type("--json", "restore", "db", "--into", str(place)).json()
    assert result["started"] is False
    conf = (place / "postgresql.auto.conf").read_text()
    found = re.search("^restore_command = '(.*)'$", conf, re.MULTILINE)
    assert found is not None
    command = found[1].replace("''", "'")
    assert (place / "recovery.signal").exists()
    assert not (place / "cloudsave.restore.json").exists()

    def ask(name: str) -> int:
        meant = {"%f": name, "%p": "fetched", "%%": "%"}
        shown = re.sub("%[fp%]", lambda one: meant[one[0]], command)
        return subprocess.run(["/bin/sh", "-c", shown], cwd=tmp_path, check=False).returncode

    assert ask("00000009.history") == 1
    assert ask("0000000100000000000000FF") == 1
    label = (place / "backup_label").read_text()
    first = re.search(r"file ([0-9A-F]{24})", label)
    assert first is not None
    assert ask(first[1]) == 0
    assert (tmp_path / "fetched").stat().st_size == 16 << 20
    os.rename(tmp_path / "repository", tmp_path / "elsewhere")
    assert ask(first[1]) == 255


def test_a_restore_over_the_directory_of_the_last_one(site: Site) -> None:
    place = site.place()
    typed = ["restore", "db", "--into", str(place), "--time", site.amid.isoformat()]
    site.type("--json", *typed).json()
    (place / "base/extra").write_text("too much")
    assert site.type(*typed).code == 2, "a directory in use was written to"
    shown = site.type("--json", *typed, "--delta", "--dry-run").json()
    assert str(place / "base/extra") in shown["removes"]
    assert (place / "base/extra").exists()
    bins = str(site.cluster.bindir)
    result = site.type("--json", *typed, "--delta", "--start", "--bin-dir", bins).json()
    server = site.cluster.factory.adopt(site.cluster.major, place, start=False)
    try:
        assert result["bytes_kept"] > 10 * result["bytes_written"]
        assert not (place / "base/extra").exists()
        with psycopg.connect(result["connection_url"], autocommit=True) as connection:
            assert connection.execute("SELECT max(i) FROM t").fetchone() == (10,)
        assert "server may be running" in site.type(*typed, "--delta").stderr
    finally:
        server.run("pg_ctl", "stop", "-m", "immediate", "-D", str(place), check=False)


def test_a_dry_run_shows_the_plan_and_touches_nothing(site: Site) -> None:
    place = site.place()
    result = site.type(
        "--json", "restore", "db", "--into", str(place), "--time", site.amid.isoformat(), "--dry-run"
    ).json()
    assert result["inclusive"] is False
    assert result["recovery_end"] > 0
    assert result["fetch_bytes"] > 0
    assert not place.exists()
    assert "stops at" in site.type("restore", "db", "--dry-run").stdout


REFUSED: list[tuple[list[str], int, str]] = [
    (["--time", "2020-01-01T00:00:00Z"], 4, "nearest reachable state after"),
    (["--time", "2020-01-01T00:00:00"], 2, "no zone"),
    (["--time", "13am"], 2, "cannot understand time"),
    (["--position", "FFFF/0"], 4, "nearest reachable state before"),
    (["--position", "elsewhere"], 2, "position"),
    (["--transaction", "4000000000"], 4, "not in the stored log"),
    (["--name", "absent"], 4, "not in the stored log"),
    (["--latest", "--immediate"], 2, "one target"),
    (["--latest", "--exclusive"], 2, "--exclusive"),
    (["--branch", "00000009"], 4, "not stored"),
    (["--backup", "absent"], 2, "not in the repository"),
    (["--tablespace", "7=/x"], 2, "no tablespace"),
    (["--tablespace", "seven"], 2, "--tablespace"),
    (["--look", "--start"], 2, "--look"),
]
"""Arguments, exit code, and what the error says."""


def test_what_cannot_be_done_is_refused_with_nothing_touched(site: Site) -> None:
    for arguments, code, text in REFUSED:
        place = site.place()
        done = site.type("restore", "db", "--into", str(place), *arguments)
        assert done.code == code, (arguments, done.stderr)
        assert text in done.stderr, (arguments, done.stderr)
        assert list(place.parent.iterdir()) == []


def test_a_time_tomorrow_is_refused_with_the_last_moment_that_is_known(site: Site) -> None:
    tomorrow = (datetime.now(UTC) + timedelta(days=1)).isoformat()
    done = site.type("restore", "db", "--into", str(site.place()), "--time", tomorrow)
    assert done.code == 4
    assert "after the end of the durable log" in done.stderr


def test_verify_tells_sound_from_damaged(site: Site, tmp_path: Path) -> None:
    assert site.type("--json", "verify").json()["sound"] is True
    assert site.type("--json", "verify", "db", "--read-all").json()["sound"] is True
    pack = next((tmp_path / "repository").rglob("packs/*"))
    content = bytearray(pack.read_bytes())
    content[len(content) // 2] ^= 1
    pack.chmod(0o600)
    pack.write_bytes(content)
    assert site.type("verify", "db").code == 0
    assert site.type("verify", "db", "--read-all").code == 3
    pack.unlink()
    assert site.type("verify").code == 3
    assert site.type("verify", "nothing").code == 2
