"""Restores over data directories of real servers: equal to a fresh restore byte for byte, and they start."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest

from cloudsave.clock import SYSTEM_CLOCK
from cloudsave.engines.postgresql.existing_directory import PostgresDirectoryInspector
from cloudsave.engines.postgresql.target import PostgresTarget
from cloudsave.errors import TargetDirectoryInUse
from cloudsave.model.target import Target, TargetKind
from cloudsave.recovery.bring_up import BringUpContext, BringUpOptions, bring_up, recovery_digest
from cloudsave.recovery.delta import delta_options
from cloudsave.recovery.history import read_history
from cloudsave.recovery.journal import JOURNAL_FILES
from cloudsave.recovery.plan import RecoveryPlan
from cloudsave.recovery.restore import RestoredFiles, RestoreRequest, finish_restore, restore_files
from cloudsave.telemetry import NoProgress
from tests.integration.postgresql.cluster import Cluster
from tests.integration.postgresql.recoveries import DIALECT, Protected

LATEST = Target(TargetKind.LATEST)
PAGE = 8192
ROWS = 200_000
"""Rows of pgbench_accounts."""
_NUMBERS = itertools.count(1)


@dataclass
class Site:
    """A server with a backup, log after it, and a place for restores."""

    protected: Protected
    plan: RecoveryPlan
    oid: str
    """Of its tablespace."""
    root: Path

    def restore(self, name: str, *, delta: bool) -> RestoredFiles:
        """Files into a directory of that name, its tablespace beside."""
        inspector = PostgresDirectoryInspector()
        history = read_history(self.protected.lineage, DIALECT)
        request = RestoreRequest(
            self.root / name,
            tablespaces={self.oid: str(self.root / f"{name}-space")},
            workers=2,
            recovery_digest=recovery_digest(self.plan),
            delta=delta_options(inspector, history) if delta else None,
        )
        return restore_files(self.protected.reader(self.plan), request)

    @contextmanager
    def started(self, name: str) -> Iterator[psycopg.Connection[object]]:
        """The server on a restored directory, at its target and open."""
        server = PostgresTarget()
        context = BringUpContext(self.protected.lineage, DIALECT, server, SYSTEM_CLOCK, NoProgress())
        options = BringUpOptions(bin_directory=self.protected.cluster.bindir, settings={"fsync": "off"})
        try:
            bring_up(self.plan, self.root / name, context, options)
            with psycopg.connect(server.connection_url(), autocommit=True) as connection:
                yield connection
        finally:
            server.stop()


@pytest.fixture
def site(cluster: Cluster) -> Site:
    """Accounts, a table in a tablespace, and rows 1 to 20 after the backup."""
    space = cluster.factory.folder()
    cluster.pgbench_init(ROWS // 100_000)
    cluster.psql(f"CREATE TABLESPACE apart LOCATION '{space}'")
    cluster.psql("CREATE TABLE far TABLESPACE apart AS SELECT g AS i FROM generate_series(1, 5000) g")
    cluster.psql("CREATE TABLE t (i int)")
    cluster.psql("CREATE UNLOGGED TABLE u AS SELECT 1 AS i")
    protected = Protected.begin(cluster)
    with protected.captured() as capture:
        manifest = protected.back_up()
        cluster.psql("INSERT INTO t SELECT generate_series(1, 20)")
        protected.catch_up(capture)
    (oid,) = manifest.tablespaces
    return Site(protected, protected.plan(LATEST), oid, cluster.factory.folder())


def tree(directory: Path) -> dict[str, object]:
    """Everything in a directory and its tablespace but the journal: kind, mode, owner and content."""
    found: dict[str, object] = {}
    for root in (directory, directory.with_name(directory.name + "-space")):
        for path in sorted(root.rglob("*")):
            facts = path.lstat()
            content = b"" if path.is_symlink() or path.is_dir() else path.read_bytes()
            if path.name not in JOURNAL_FILES:
                name = f"{root.name[len(directory.name) :]}/{path.relative_to(root)}"
                found[name] = (facts.st_mode, facts.st_uid, content)
    return found


def differing(found: dict[str, object], wanted: dict[str, object]) -> list[str]:
    """Names of what differs."""
    return sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))


def relation_files(root: Path) -> list[Path]:
    """Files of relations, largest first."""
    files = [one for one in root.rglob("*") if one.is_file() and one.name.isdigit()]
    return sorted(files, key=lambda one: (-one.stat().st_size, str(one)))


def damage(directory: Path) -> None:
    """A damaged page, a truncated file, a missing one, one too many, and a whole database too many."""
    damaged, truncated, missing = relation_files(directory / "base")[:3]
    content = bytearray(damaged.read_bytes())
    content[5 * PAGE + 100 : 5 * PAGE + 200] = bytes(100)
    damaged.write_bytes(content)
    os.truncate(truncated, truncated.stat().st_size // 2)
    missing.unlink()
    (directory / "base/999/1").parent.mkdir()
    (directory / "base/999/1").write_bytes(b"too many" * 2000)
    far = relation_files(directory.with_name(directory.name + "-space"))[0]
    far.write_bytes(bytes(far.stat().st_size))


def test_over_a_used_and_damaged_directory_it_is_what_a_fresh_restore_makes(site: Site) -> None:
    site.restore("fresh", delta=False)
    wanted = tree(site.root / "fresh")
    site.restore("used", delta=False)
    with site.started("used") as connection:
        connection.execute("UPDATE pgbench_accounts SET abalance = 7 WHERE aid % 1000 = 0")
        for statement in ("DROP TABLE pgbench_history", "CREATE DATABASE later", "CHECKPOINT"):
            connection.execute(statement)
        connection.execute("INSERT INTO far SELECT generate_series(1, 9999)")
        with pytest.raises(TargetDirectoryInUse, match="server may be running"):
            site.restore("used", delta=True)
    damage(site.root / "used")
    assert differing(tree(site.root / "used"), wanted)
    done = site.restore("used", delta=True)
    assert not differing(tree(site.root / "used"), wanted)
    assert done.bytes_kept > 10 << 20
    assert done.bytes_written > 0
    assert done.set_aside is not None
    assert "00000002.history" in os.listdir(done.set_aside)
    assert any(name.startswith("00000002000000") for name in os.listdir(done.set_aside))
    with site.started("used") as connection:
        assert connection.execute("SELECT count(*), sum(abalance) FROM pgbench_accounts").fetchone() == (
            ROWS,
            0,
        )
        assert connection.execute("SELECT count(*) FROM far").fetchone() == (5000,)
        assert connection.execute("SELECT array_agg(i) FROM t").fetchone() == (list(range(1, 21)),)
        connection.execute("CREATE EXTENSION amcheck")
        connection.execute("SELECT bt_index_check('pgbench_accounts_pkey', true)")
    # The check can fail: one byte is enough.
    victim = relation_files(site.root / "fresh/base")[0]
    content = bytearray(victim.read_bytes())
    content[12345] ^= 1
    victim.write_bytes(content)
    assert differing(tree(site.root / "fresh"), wanted) == [f"/{victim.relative_to(site.root / 'fresh')}"]


def copy_of(site: Site, name: str) -> str:
    """A copy of a restored directory and its tablespace, the link put right."""
    new = f"{name}-{next(_NUMBERS)}"
    for suffix in ("", "-space"):
        shutil.copytree(site.root / f"{name}{suffix}", site.root / f"{new}{suffix}", symlinks=True)
    link = site.root / new / "pg_tblspc" / site.oid
    link.unlink()
    link.symlink_to(site.root / f"{new}-space")
    site.protected.cluster.user.own(site.root)
    return new


def seconds_until_killed(site: Site, name: str, seconds: float) -> tuple[bool, float]:
    """A delta restore in a process that dies after so long; whether it did, and how long it ran."""
    begun = time.monotonic()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        site.restore(name, delta=True)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGALRM)
    return status != 0, time.monotonic() - begun


@pytest.mark.postgresql_majors("15")
def test_a_delta_restore_killed_at_any_moment_goes_on(site: Site) -> None:
    site.restore("fresh", delta=False)
    wanted = tree(site.root / "fresh")
    site.restore("used", delta=False)
    finish_restore(site.root / "used")
    damage(site.root / "used")
    _, usual_seconds = seconds_until_killed(site, copy_of(site, "used"), 600.0)
    amid = 0
    for share in range(1, 11):
        name = copy_of(site, "used")
        before = tree(site.root / name)
        killed, _ = seconds_until_killed(site, name, usual_seconds * share / 10)
        after = tree(site.root / name)
        startable = "/global/pg_control" in after
        assert not startable or not differing(after, wanted) or not differing(after, before)
        amid += killed and not startable
        site.restore(name, delta=True)
        assert not differing(tree(site.root / name), wanted)
    assert amid >= 3
    with site.started(name) as connection:
        assert connection.execute("SELECT count(*) FROM pgbench_accounts").fetchone() == (ROWS,)
        assert connection.execute("SELECT max(i) FROM t").fetchone() == (20,)


@pytest.mark.postgresql_majors("14", "18")
@pytest.mark.fault(
    "server-runs-in-target", control="test_over_a_used_and_damaged_directory_it_is_what_a_fresh_restore_makes"
)
def test_a_place_that_a_server_uses_is_refused(site: Site) -> None:
    """Found by its processes, whatever has become of `postmaster.pid`, and through links of a copy."""
    site.restore("used", delta=False)
    finish_restore(site.root / "used")
    copied = copy_of(site, "used")
    link = site.root / copied / "pg_tblspc" / site.oid
    link.unlink()
    link.symlink_to(site.protected.cluster.psql(f"SELECT pg_tablespace_location({site.oid})"))
    before = tree(site.root / copied)
    inspector = PostgresDirectoryInspector()
    history = read_history(site.protected.lineage, DIALECT)
    request = RestoreRequest(site.root / copied, delta=delta_options(inspector, history))
    with pytest.raises(TargetDirectoryInUse, match="server may be running") as caught:
        restore_files(site.protected.reader(site.plan), request)
    assert str(site.protected.cluster.data) in caught.value.detail
    assert tree(site.root / copied) == before
    cluster = site.protected.cluster
    (cluster.data / "postmaster.pid").rename(cluster.home / "postmaster.pid")
    assert "Process" in inspector.users_of([cluster.data])
    facts = inspector.inspect(cluster.data)
    assert facts is not None
    assert "Process" in facts.in_use
    (cluster.home / "postmaster.pid").rename(cluster.data / "postmaster.pid")
    cluster.stop()
    assert inspector.users_of([cluster.data]) == ""
    facts = inspector.inspect(cluster.data)
    assert facts is not None
    assert facts.in_use == ""
    assert facts.lineage == site.protected.lineage.id
