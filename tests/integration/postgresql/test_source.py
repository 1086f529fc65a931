"""Base backups of real servers, local and remote: what is taken starts, is complete, and damage is named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cloudsave.clock import Clock
from cloudsave.engines.api import BackupSource
from cloudsave.engines.postgresql.backup_session import BackupSession
from cloudsave.engines.postgresql.connection import connect
from cloudsave.engines.postgresql.data_directory import is_not_the_servers
from cloudsave.engines.postgresql.engine import PostgresEngine
from cloudsave.engines.postgresql.source_local import PIECE_BYTES
from cloudsave.errors import (
    CloudsaveError,
    EngineError,
    PermissionMissing,
    SourceUnreadable,
    UnsuitableSettings,
)
from cloudsave.model.engine_facts import BackupStart, BackupStop
from cloudsave.model.identity import Role
from cloudsave.model.item import ItemKind
from tests.integration.postgresql.backups import Taken, started, take_backup
from tests.integration.postgresql.cluster import Cluster, ClusterFactory, ServerFailed, poll

MODES = pytest.mark.parametrize("mode", ["local", "remote"])
BALANCED = "SELECT (SELECT sum(abalance) FROM pgbench_accounts) = (SELECT sum(delta) FROM pgbench_history)"
KILL_SESSION = (
    "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity "
    "WHERE application_name = 'cloudsave backup'"
)
KEEP_LOG = {"wal_keep_size": "1GB"}


def backup(cluster: Cluster, mode: str) -> Taken:
    """A backup by the engine alone."""
    source = PostgresEngine(cluster.url).backup_source(mode=mode, fast=True, label="a test's backup")
    return take_backup(source, cluster)


def relation_path(cluster: Cluster, table: str) -> str:
    """Path of a table's file below the data directory."""
    return cluster.psql(f"SELECT pg_relation_filepath('{table}')")


@MODES
def test_backup_under_load_starts_and_balances(
    clusters: ClusterFactory, postgresql_major: str, mode: str
) -> None:
    cluster = clusters.create(postgresql_major, tablespaces=["side"], conf=KEEP_LOG)
    cluster.pgbench_init(5)
    cluster.psql("CREATE TABLE apart TABLESPACE side AS SELECT g FROM generate_series(1, 30000) g")
    cluster.psql("CREATE UNLOGGED TABLE fleeting AS SELECT g FROM generate_series(1, 30000) g")
    cluster.psql("CREATE TABLE empty (x int)")
    fleeting = relation_path(cluster, "fleeting")
    with cluster.pgbench_run(clients=2) as load:
        poll(lambda: cluster.psql("SELECT count(*) > 100 FROM pgbench_history") == "t", "pgbench runs")
        source = PostgresEngine(cluster.url).backup_source(mode=mode, fast=True, label="under load")
        taken = take_backup(source, cluster)
        assert load.running()
        cluster.psql("CREATE TABLE after_backup AS SELECT 1")
    assert taken.start.method == mode
    assert taken.start.bytes_expected > 50 << 20
    assert taken.stop.position.offset > taken.start.position.offset
    assert taken.stop.corrupt_pages == ()
    assert fleeting not in taken.files
    assert fleeting + "_init" in taken.files
    assert [item.kind for item in taken.stop.directories].count(ItemKind.LINK) == 1
    restored = started(taken, cluster)
    assert restored.psql(BALANCED) == "t"
    assert restored.psql("SELECT count(*), sum(g) FROM apart") == "30000|450015000"
    assert restored.psql("SELECT count(*) FROM fleeting") == "0"
    assert restored.psql("SELECT count(*) FROM after_backup") == "1"
    restored.amcheck()
    restored.stop()
    restored.verify_checksums()


@MODES
def test_negative_control_a_file_left_out_is_noticed(cluster: Cluster, mode: str) -> None:
    cluster.psql("CREATE TABLE t AS SELECT g FROM generate_series(1, 30000) g")
    path = relation_path(cluster, "t")
    taken = backup(cluster, mode)
    (taken.directory / path).unlink()
    restored = started(taken, cluster)
    with pytest.raises(ServerFailed):
        restored.psql("SELECT count(*) FROM t")


@MODES
@pytest.mark.fault("page-corrupt-in-source", control="test_backup_under_load_starts_and_balances")
def test_corrupt_page_is_named_and_the_backup_finishes(cluster: Cluster, mode: str) -> None:
    cluster.psql("CREATE TABLE t AS SELECT g FROM generate_series(1, 30000) g")
    path = relation_path(cluster, "t")
    cluster.stop()
    flip(cluster.data / path, 3 * 8192 + 5000)
    flip(cluster.data / path, 7 * 8192 + 100)
    cluster.start()
    taken = backup(cluster, mode)
    assert [(page.path, page.block) for page in taken.stop.corrupt_pages] == [(path, 3), (path, 7)]
    for block in (3, 7):
        here, there = (
            place.read_bytes()[block * 8192 :][:8192]
            for place in (taken.directory / path, cluster.data / path)
        )
        assert here == there, "a bad page is kept as it is"


def flip(path: Path, offset: int) -> None:
    """Change one byte of a file."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 0x10]))


@pytest.mark.postgresql_majors("15", "18")
@MODES
def test_without_checksums_only_headers_can_be_judged(
    clusters: ClusterFactory, postgresql_major: str, mode: str
) -> None:
    cluster = clusters.create(postgresql_major, checksums=False)
    assert not PostgresEngine(cluster.url).identify().page_checksums
    cluster.psql("CREATE TABLE t AS SELECT g FROM generate_series(1, 30000) g")
    path = relation_path(cluster, "t")
    cluster.stop()
    flip(cluster.data / path, 3 * 8192 + 5000)
    with (cluster.data / path).open("r+b") as file:
        file.seek(5 * 8192 + 12)
        file.write(b"\xff\xff\xff\xff")
    cluster.start()
    taken = backup(cluster, mode)
    assert [(page.path, page.block) for page in taken.stop.corrupt_pages] == [(path, 5)]


class Changing:
    """
    A source whose server is changed after the begin. In another thread: DROP DATABASE waits for all server
    processes, one that sends a base backup included.
    """

    def __init__(self, source: BackupSource, change: Callable[[], None]) -> None:
        self.source = source
        self.pieces = source.pieces
        self.abort = source.abort
        self.change = change
        self.thread = ThreadPoolExecutor(1)

    def begin(self) -> BackupStart:
        begun = self.source.begin()
        self.changed = self.thread.submit(self.change)
        if begun.method == "local":
            self.changed.result()
        return begun

    def finish(self) -> BackupStop:
        self.changed.result()
        self.thread.shutdown()
        return self.source.finish()


@MODES
@pytest.mark.fault("tables-vanish-during-backup", control="test_negative_control_a_file_left_out_is_noticed")
def test_tables_dropped_and_databases_removed_meanwhile_do_no_harm(
    clusters: ClusterFactory, postgresql_major: str, mode: str
) -> None:
    cluster = clusters.create(postgresql_major, conf=KEEP_LOG)
    cluster.psql("CREATE DATABASE doomed")
    cluster.psql("CREATE TABLE dropped AS SELECT g FROM generate_series(1, 30000) g")
    cluster.psql("CREATE TABLE shrunk AS SELECT g FROM generate_series(1, 1200000) g")
    assert int(cluster.psql("SELECT pg_relation_size('shrunk')")) > PIECE_BYTES, (
        "no piece vanishes as a whole"
    )
    cluster.psql("CREATE TABLE kept AS SELECT g FROM generate_series(1, 1000) g")
    source = PostgresEngine(cluster.url).backup_source(mode=mode, fast=True, label="ddl")

    def change() -> None:
        cluster.psql("DROP DATABASE doomed")
        cluster.psql("DROP TABLE dropped")
        cluster.psql("DELETE FROM shrunk WHERE g > 1000")
        cluster.psql("VACUUM shrunk")
        cluster.psql("CREATE TABLE fresh AS SELECT g FROM generate_series(1, 30000) g")
        cluster.psql("CHECKPOINT")

    restored = started(take_backup(Changing(source, change), cluster), cluster)
    counts = "SELECT (SELECT count(*) FROM kept), (SELECT count(*) FROM shrunk), (SELECT count(*) FROM fresh)"
    assert restored.psql(counts) == "1000|1000|30000"
    restored.amcheck()


@MODES
def test_configuration_outside_of_the_data_directory_comes_along(cluster: Cluster, mode: str) -> None:
    hba = cluster.home / "outside_hba.conf"
    shutil.copy(cluster.data / "pg_hba.conf", hba)
    included = cluster.home / "more.conf"
    included.write_text("work_mem = '5MB'\n")
    unreadable = cluster.home / "gone.conf"
    cluster.configure({"hba_file": str(hba), "ident_file": str(unreadable)})
    with (cluster.data / "postgresql.conf").open("a") as file:
        file.write(f"include '{included}'\n")
    cluster.user.own(cluster.home)
    cluster.restart()
    taken = backup(cluster, mode)
    assert taken.outside == {str(hba): hba.read_bytes(), str(included): b"work_mem = '5MB'\n"}
    assert any(str(unreadable) in note for note in taken.start.notes)
    assert taken.start.settings["hba_file"] == str(hba)


@MODES
def test_backup_of_a_standby_starts(clusters: ClusterFactory, postgresql_major: str, mode: str) -> None:
    primary = clusters.create(postgresql_major, conf=KEEP_LOG)
    primary.pgbench_init(2)
    standby = primary.make_standby(conf=KEEP_LOG)
    with primary.pgbench_run(clients=1):
        poll(lambda: standby.psql("SELECT count(*) > 100 FROM pgbench_history") == "t", "standby replays")
        primary.psql("CHECKPOINT")
        taken = backup(standby, mode)
        primary.psql("CREATE TABLE marker AS SELECT 1")
    poll(lambda: standby.psql("SELECT to_regclass('marker') IS NOT NULL") == "t", "standby has it all")
    (taken.directory / "standby.signal").unlink()
    restored = started(taken, standby)
    assert restored.psql(BALANCED) == "t"
    assert restored.psql("SELECT count(*) FROM marker") == "1"
    restored.amcheck()


def test_identity_is_right_at_once_after_a_promotion(clusters: ClusterFactory, postgresql_major: str) -> None:
    primary = clusters.create(postgresql_major, conf={"checkpoint_timeout": "1h"})
    standby = primary.make_standby()
    cascaded = standby.make_standby()
    before = PostgresEngine(standby.url).identify()
    assert (before.role, before.branch) == (Role.REPLICA, "00000001")
    primary.stop(immediate=True)
    standby.promote()
    after = PostgresEngine(standby.url).identify()
    assert (after.role, after.branch) == (Role.PRIMARY, "00000002")
    standby.psql("CREATE TABLE on_two (x int)")
    poll(lambda: cascaded.psql("SELECT to_regclass('on_two') IS NOT NULL") == "t", "the cascade follows")
    follower = PostgresEngine(cascaded.url).identify()
    assert (follower.role, follower.branch) == (Role.REPLICA, "00000002")
    assert cascaded.psql("SELECT timeline_id FROM pg_control_checkpoint()") == "1", "the control file lags"
    assert follower.system_identifier == primary_identifier(before.system_identifier, after.system_identifier)


def primary_identifier(one: str, other: str) -> str:
    """Both are the same; which it is."""
    assert one == other
    return one


def test_identity_names_the_server(cluster: Cluster, postgresql_major: str) -> None:
    identity = PostgresEngine(cluster.url).identify()
    assert identity.system_identifier == cluster.system_identifier()
    assert identity.major == int(postgresql_major)
    assert identity.version.startswith(postgresql_major + ".")
    assert identity.data_directory == str(cluster.data)
    assert (identity.page_bytes, identity.log_file_bytes, identity.page_checksums) == (8192, 16 << 20, True)


def test_auto_reads_locally_and_says_so(cluster: Cluster) -> None:
    source = PostgresEngine(cluster.url).backup_source(mode="auto", fast=True, label="auto")
    begun = source.begin()
    source.abort()
    assert begun.method == "local"
    assert begun.notes[0].startswith("read locally")


@pytest.mark.fault("clone-taken-for-server", control="test_auto_reads_locally_and_says_so")
def test_clone_is_never_taken_for_the_server(cluster: Cluster) -> None:
    """A running clone has the same system identifier; a cold one even a copied postmaster.pid."""
    clone = cluster.factory.folder() / "clone"
    cluster.psql("CHECKPOINT")
    shutil.copytree(cluster.data, clone, symlinks=True, ignore_dangling_symlinks=True)
    with connect(cluster.url, application_name="test") as session:
        identifier = cluster.system_identifier()
        assert is_not_the_servers(session, cluster.data, identifier) == ""
        assert "not the server's" in is_not_the_servers(session, clone, identifier)
        assert "another cluster" in is_not_the_servers(session, clone, "1")
        assert "not on this machine" in is_not_the_servers(session, clone / "nowhere", identifier)
        (clone / "postmaster.pid").unlink()
        clone.chmod(0o700)
        running = cluster.factory.adopt(cluster.major, clone)
        assert running.system_identifier() == identifier
        assert "not the server's" in is_not_the_servers(session, clone, identifier)


@pytest.mark.fault("session-lost-during-backup", control="test_backup_under_load_starts_and_balances")
def test_lost_session_makes_the_backup_worthless_and_says_so(cluster: Cluster) -> None:
    source = PostgresEngine(cluster.url).backup_source(mode="local", fast=True, label="killed")
    source.begin()
    cluster.psql(KILL_SESSION)
    with pytest.raises(EngineError):
        source.finish()
    source.abort()


class HurriedClock(Clock):
    """A clock on which a minute passes at each look."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def monotonic(self) -> float:
        self.seconds += 60.0
        return self.seconds


def test_lost_session_ends_a_long_backup_early(cluster: Cluster) -> None:
    engine = PostgresEngine(cluster.url, clock=HurriedClock())
    source = engine.backup_source(mode="local", fast=True, label="killed")
    source.begin()
    pieces = source.pieces()
    next(pieces)
    next(pieces)
    cluster.psql(KILL_SESSION)
    with pytest.raises(EngineError):
        next(pieces)
    source.abort()


def test_abort_ends_backup_mode(cluster: Cluster) -> None:
    source = PostgresEngine(cluster.url).backup_source(mode="local", fast=True, label="aborted")
    source.begin()
    source.abort()
    source.abort()
    held = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'cloudsave backup'"
    poll(lambda: cluster.psql(held) == "0", "the session is gone")
    assert backup(cluster, "local").stop.corrupt_pages == ()


@pytest.mark.fault("link-in-place-of-data", control="test_auto_reads_locally_and_says_so")
def test_link_in_place_of_data_is_refused(cluster: Cluster) -> None:
    cluster.stop()
    outside = cluster.home / "pg_xact"
    shutil.move(cluster.data / "pg_xact", outside)
    (cluster.data / "pg_xact").symlink_to(outside)
    (cluster.data / "notes.txt").symlink_to("/etc/hostname")
    cluster.start()
    source = PostgresEngine(cluster.url).backup_source(mode="local", fast=True, label="links")
    with pytest.raises(UnsuitableSettings, match="pg_xact"):
        source.begin()
    source.abort()


@MODES
def test_tablespaces_of_all_kinds(cluster: Cluster, mode: str) -> None:
    """In place (a directory, no link), inside of the data directory, and shared with another version."""
    apart = cluster.home / "apart"
    inside = cluster.data / "inside"
    for place in (apart, inside, apart / "PG_9.6_201608131" / "1"):
        place.mkdir(parents=True)
    (apart / "PG_9.6_201608131" / "1" / "99").write_bytes(b"of another server")
    cluster.user.own(cluster.home)
    # A server that recovers needs the setting as well.
    cluster.configure({"allow_in_place_tablespaces": "on"})
    cluster.reload()
    poll(lambda: cluster.psql("SHOW allow_in_place_tablespaces") == "on", "the setting holds")
    for name, location in (("apart", str(apart)), ("inside", str(inside)), ("in_place", "")):
        cluster.psql(f"CREATE TABLESPACE {name} LOCATION '{location}'")
        cluster.psql(f"CREATE TABLE in_{name} TABLESPACE {name} AS SELECT g FROM generate_series(1, 9999) g")
    taken = backup(cluster, mode)
    kinds = [
        item.kind for item in taken.stop.directories if item.path.count("/") == 1 and "pg_tblspc" in item.path
    ]
    assert sorted(kinds) == ["directory", "link", "link"]
    assert sorted(taken.start.tablespaces.values()) == sorted([str(apart), str(inside)])
    assert not [path for path in taken.files if "PG_9.6" in path or path.startswith("inside/")]
    restored = started(taken, cluster)
    for name in ("apart", "inside", "in_place"):
        assert restored.psql(f"SELECT count(*) FROM in_{name}") == "9999"
    restored.amcheck()


def test_a_tablespace_made_during_a_local_backup_is_left_to_replay(cluster: Cluster) -> None:
    place = cluster.home / "late"
    place.mkdir()
    cluster.user.own(place)
    source = PostgresEngine(cluster.url).backup_source(mode="local", fast=True, label="late")
    begun = source.begin()
    cluster.psql(f"CREATE TABLESPACE late LOCATION '{place}'")
    paths = [piece.item.path for piece in source.pieces()]
    stopped = source.finish()
    links = [item.path for item in stopped.directories if item.kind == "link"]
    assert begun.tablespaces == {}
    assert not links, "a link that the manifest's tablespaces do not name cannot be restored"
    assert not [path for path in paths if path.startswith("pg_tblspc/")]


def test_small_files_come_between_the_pieces_of_large_ones(cluster: Cluster) -> None:
    cluster.psql(
        "CREATE TABLE large (t text); ALTER TABLE large ALTER t SET STORAGE PLAIN;"
        "INSERT INTO large SELECT repeat('x', 7000) FROM generate_series(1, 6000); CHECKPOINT"
    )
    large = relation_path(cluster, "large")
    source = PostgresEngine(cluster.url).backup_source(mode="local", fast=True, label="order")
    source.begin()
    paths = [piece.item.path for piece in source.pieces()]
    source.finish()
    first, second = (at for at, path in enumerate(paths) if path == large)
    between = paths[first + 1 : second]
    assert len(between) > 100
    assert len(set(between)) == len(between)
    assert len(paths[second + 1 :]) > 100


def test_files_made_during_a_local_backup_are_left_to_replay(cluster: Cluster) -> None:
    source = PostgresEngine(cluster.url).backup_source(mode="local", fast=True, label="later")
    source.begin()
    cluster.psql("CREATE TABLE later AS SELECT g FROM generate_series(1, 5000) g; CHECKPOINT")
    paths = [piece.item.path for piece in source.pieces()]
    assert relation_path(cluster, "later") not in paths
    source.finish()


@pytest.mark.fault("other-kinds-of-files")
def test_other_links_and_kinds_are_noted(cluster: Cluster) -> None:
    (cluster.data / "notes.txt").symlink_to("/etc/hostname")
    taken = backup(cluster, "local")
    assert any("notes.txt" in note for note in taken.stop.notes)


def test_local_is_refused_where_it_is_impossible(cluster: Cluster) -> None:
    cluster.psql("CREATE ROLE plain LOGIN REPLICATION")
    url = cluster.url.replace("postgres@", "plain@")
    with pytest.raises(PermissionMissing) as caught:
        PostgresEngine(url).backup_source(mode="local", fast=True, label="x")
    assert "may not call" in caught.value.detail
    assert "GRANT EXECUTE ON FUNCTION" in caught.value.hints[0]
    source = PostgresEngine(url).backup_source(mode="auto", fast=True, label="x")
    try:
        begun = source.begin()
        assert begun.method == "remote"
        assert "may not call" in begun.notes[0]
    finally:
        source.abort()


def test_errors_of_the_seam_are_ours(cluster: Cluster) -> None:
    with pytest.raises(CloudsaveError):
        PostgresEngine(cluster.url.replace("postgres@", "nobody_here@")).identify()
    session = BackupSession(connect(cluster.url, application_name="test"))
    with pytest.raises(EngineError):
        session.row("select 1/0", doing="divide")
    session.close()
    assert issubclass(SourceUnreadable, EngineError)
