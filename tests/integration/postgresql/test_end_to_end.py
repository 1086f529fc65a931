"""
The whole story by the command line: real servers under load are captured, backed up, crashed, promoted and
brought back, and each state is judged by a record that clients kept outside of the database.

The negative control of each restore is in `assert_ledger`: each kind of loss, put into the very rows that
were found, must be seen. Those of the page checks are in the scenario itself, those of refusals beside them:
the same command is accepted as long as nothing is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.integration.postgresql.cluster import Cluster, ClusterFactory, ServerFailed, poll
from tests.integration.postgresql.command_line import SOURCE, CommandLine, RestoredServer
from tests.integration.postgresql.oracle import (
    Expectation,
    Ledger,
    LedgerClients,
    assert_ledger,
    assert_pgbench_consistent,
)
from tests.s3_server import S3_ENVIRONMENT, running_s3_server

OpenCommandLine = Callable[..., CommandLine]
SEGMENT_BYTES = 1 << 30
WIDE_ROWS = 140_000
"""At one row a page, a little more than one segment file."""
DDL_ROUNDS_MIN = 3
REMOTE_MAJORS = ("15", "17")
"""Versions whose base backup under load is read by the replication protocol; the others' from the disk."""


@pytest.fixture
def command_lines(clusters: ClusterFactory, tmp_path: Path) -> Iterator[OpenCommandLine]:
    """Opens command lines, and ends all that they started; before the clusters go."""
    opened: list[CommandLine] = []

    def open_one(cluster: Cluster, **more: object) -> CommandLine:
        folder = tmp_path / f"user-{len(opened)}"
        folder.mkdir()
        opened.append(CommandLine(folder, cluster, **more))  # type: ignore[arg-type]
        return opened[-1]

    yield open_one
    for one in opened:
        one.close()


def now() -> datetime:
    """This host's clock, which is also the server's."""
    return datetime.now(UTC)


def text_of(instant: datetime) -> str:
    """An instant as a user types it."""
    return instant.isoformat(timespec="microseconds")


def assert_ledger_of(server: Cluster, expectation: Expectation) -> None:
    """What a server holds is what the record promises."""
    with server.connect() as connection:
        assert_ledger(connection, expectation)


def digest(server: Cluster, query: str, *, dbname: str = "postgres") -> str:
    """One text that stands for all rows of a query, in any order."""
    summed = f"SELECT count(*) || ':' || coalesce(sum(hashtextextended(q::text, 0)), 0) FROM ({query}) q"
    return server.psql(summed, dbname=dbname)


# ---- one source with all that makes a backup hard ----------------------------------------------------------


class Ddl:
    """Changes of the catalogue while a backup runs; each round makes, rewrites, indexes and drops."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self.rounds = 10

    def round(self) -> None:
        """Round n builds upon what the rounds before it left."""
        self.rounds = n = self.rounds + 1
        with self._cluster.connect() as connection:
            for statement in (
                f"CREATE TABLE ddl_{n} AS SELECT g AS i, md5(g::text) AS t FROM generate_series(1, 200) g",
                f"CREATE INDEX ON ddl_{n} (t)",
                f"DROP TABLE IF EXISTS ddl_{n - 4}",
                f"ALTER TABLE IF EXISTS ddl_{n - 1} ADD COLUMN extra int DEFAULT {n}",
                f"ALTER TABLE IF EXISTS ddl_{n - 2} ALTER COLUMN i TYPE numeric",
                f"CREATE DATABASE side_{n}",
                f"DROP DATABASE IF EXISTS side_{n - 2}",
            ):
                connection.execute(statement)
        self._cluster.psql(f"CREATE TABLE inside AS SELECT {n} AS n", dbname=f"side_{n}")

    @staticmethod
    def content(server: Cluster) -> dict[str, str]:
        """All that rounds have left, by name."""
        tables = server.psql("SELECT relname FROM pg_class WHERE relname ~ '^ddl_[0-9]+$'").split()
        databases = server.psql("SELECT datname FROM pg_database WHERE datname ~ '^side_'").split()
        found = {name: digest(server, f"SELECT * FROM {name}") for name in tables}
        inside = {name: digest(server, "SELECT * FROM inside", dbname=name) for name in databases}
        return {**found, **inside}


def rich_cluster(clusters: ClusterFactory, major: str) -> Cluster:
    """A server with a tablespace, an unlogged table, a relation of two segment files, and pgbench."""
    conf = {"max_wal_size": "2GB", "shared_buffers": "64MB", "autovacuum_naptime": "1s"}
    cluster = clusters.create(major, conf=conf, tablespaces=["apart"], on_disk=True)
    cluster.pgbench_init(2)
    cluster.psql("CREATE TABLE far (i int PRIMARY KEY, t text) TABLESPACE apart")
    cluster.psql("INSERT INTO far SELECT g, md5(g::text) FROM generate_series(1, 20000) g")
    cluster.psql("CREATE UNLOGGED TABLE fleeting (i int PRIMARY KEY)")
    cluster.psql("INSERT INTO fleeting SELECT generate_series(1, 1000)")
    cluster.psql("CREATE TABLE wide (i int, t text) WITH (fillfactor = 10)")
    rows = f"SELECT g, repeat(md5(g::text), 15) FROM generate_series(1, {WIDE_ROWS}) g"
    cluster.psql(f"INSERT INTO wide {rows}")
    assert int(cluster.psql("SELECT pg_relation_size('wide')")) > SEGMENT_BYTES
    return cluster


WIDE = "SELECT i, t FROM wide"
FAR = "SELECT * FROM far"


def assert_all_but_the_ledger(found: RestoredServer, source: dict[str, str], ddl: dict[str, str]) -> None:
    """What has not changed since the backup is there, in its places; unlogged tables are empty and usable."""
    server = found.server
    with server.connect() as connection:
        assert_pgbench_consistent(connection)
    assert {query: digest(server, query) for query in source} == source
    assert Ddl.content(server) == ddl
    assert server.psql("SELECT count(*) FROM fleeting") == "0"
    server.psql("INSERT INTO fleeting VALUES (1)")
    place = server.psql("SELECT pg_tablespace_location(oid) FROM pg_tablespace WHERE spcname = 'apart'")
    assert [place] == list(found.facts["tablespaces"].values())


def assert_pages_clean(found: RestoredServer) -> None:
    """The server's own programs find nothing wrong, in the running server and in the files of the stopped."""
    found.server.amcheck()
    found.stop()
    found.server.verify_checksums()


def assert_page_checks_can_fail(found: RestoredServer) -> None:
    """Negative control of the page checks: one byte of the second segment of the large relation."""
    server = found.server
    (segment,) = server.data.glob("base/*/*.1")
    with segment.open("r+b") as file:
        file.seek(3 * 8192 + 8000)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(ServerFailed, match="checksum"):
        server.verify_checksums()


def back_up_during_ddl(user: CommandLine, ddl: Ddl, *, mode: str) -> None:
    """A base backup; the catalogue changes from before it begins until it has ended."""
    ddl.round()
    backup = user.begin("backup", SOURCE, "--mode", mode)
    before = ddl.rounds
    while backup.running() or ddl.rounds < before + DDL_ROUNDS_MIN:
        ddl.round()
    manifest = backup.wait().expect(0).result
    assert manifest["method"].startswith(mode), manifest["method"]
    assert manifest["corrupt_pages"] == []


def test_every_target_after_a_backup_under_load_and_a_crash(
    clusters: ClusterFactory, postgresql_major: str, command_lines: OpenCommandLine, tmp_path: Path
) -> None:
    cluster = rich_cluster(clusters, postgresql_major)
    user = command_lines(cluster)
    user.prepare()
    record = tmp_path / "ledger.jsonl"
    ddl = Ddl(cluster)
    with user.captured() as capture:
        load = cluster.pgbench_run(clients=1, rate=100)
        with LedgerClients(lambda: cluster.url, record, clients=2) as clients:
            clients.wait_for(20)
            mode = "remote" if postgresql_major in REMOTE_MAJORS else "local"
            back_up_during_ddl(user, ddl, mode=mode)
            clients.wait_for(100)
            instant = now()
            clients.wait_for(50)
            lsn = cluster.lsn()
            clients.wait_for(50)
            begun = now()
            clients.wait_for(50)
            named = cluster.psql("SELECT pg_create_restore_point('release')")
            clients.wait_for(50)
            cluster.crash()
            load.stop()
            cluster.start()
            load = cluster.pgbench_run(clients=1, rate=100)
            clients.wait_for(100)
            after_crash = now()
            clients.wait_for(100)
        load.stop()
        user.catch_up()
        errors = [event["last_error"] for event in capture.statuses() if event["last_error"]]
        assert errors, "the crash went unseen: nothing was proved about reconnecting"
    ledger = Ledger.read(record)
    xid = next(one.xid for one in ledger.acknowledged() if one.sent > begun)
    far, wide = ({query: digest(cluster, query)} for query in (FAR, WIDE))
    catalogue = Ddl.content(cluster)
    cluster.stop()
    (backup,) = user.run("list", SOURCE)
    (reachable,) = user.run("ranges", SOURCE)["ranges"]
    assert reachable["backups"] == [backup["backup_id"]]
    consistent = backup["stop_position"]
    targets = {
        ("--time", text_of(instant)): ledger.expected_ids(instant),
        ("--position", lsn, "--exclusive"): ledger.expected_at_position(lsn),
        ("--transaction", str(xid)): ledger.expected_at_transaction(xid),
        ("--name", "release"): ledger.expected_at_position(named),
        ("--time", text_of(after_crash)): ledger.expected_ids(after_crash),
        ("--immediate",): ledger.expected_at_position(consistent),
        ("--latest",): ledger.expected_latest(),
    }
    for target, expectation in targets.items():
        place = clusters.folder(on_disk=True) / "apart"
        (oid,) = backup["tablespaces"]
        with user.restored(*target, "--tablespace", f"{oid}={place}") as found:
            assert_ledger_of(found.server, expectation)
            if target != ("--immediate",):
                # A gigabyte is compared once; its pages are checked in each restore.
                content = far | wide if target == ("--latest",) else far
                assert_all_but_the_ledger(found, content, catalogue)
            assert_pages_clean(found)
            if target == ("--latest",):
                assert_page_checks_can_fail(found)


# ---- promotion ---------------------------------------------------------------------------------------------


def url_of_both(primary: Cluster, standby: Cluster) -> str:
    """A URL that leads to whichever of two servers accepts writes."""
    hosts = ",".join(quote(str(one.home), safe="") for one in (primary, standby))
    return f"postgresql://postgres@/postgres?host={hosts}&port=5432,5432&target_session_attrs=read-write"


@contextmanager
def replicated(clusters: ClusterFactory, major: str) -> Iterator[tuple[Cluster, Cluster]]:
    """A primary whose every acknowledged commit is on its standby as well."""
    primary = clusters.create(major)
    standby = primary.make_standby(conf={"synchronous_standby_names": ""})
    primary.configure({"synchronous_standby_names": "walreceiver"})
    primary.reload()
    state = "SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync'"
    poll(lambda: primary.psql(state) == "1", "the standby is synchronous")
    yield primary, standby


def test_a_promotion_is_followed_and_both_sides_of_it_are_reachable(
    clusters: ClusterFactory, postgresql_major: str, command_lines: OpenCommandLine, tmp_path: Path
) -> None:
    record = tmp_path / "ledger.jsonl"
    with replicated(clusters, postgresql_major) as (primary, standby):
        primary.pgbench_init(1)
        user = command_lines(primary, url=url_of_both(primary, standby))
        user.prepare()
        url = url_of_both(primary, standby)
        with user.captured() as capture, LedgerClients(lambda: url, record, clients=2) as clients:
            load = primary.pgbench_run(clients=1, rate=100)
            clients.wait_for(20)
            user.run("backup", SOURCE)
            clients.wait_for(100)
            before = now()
            clients.wait_for(100)
            primary.crash()
            load.stop()
            standby.promote()
            clients.wait_for(100)
            after = now()
            clients.wait_for(100)
            clients.stop()
            user.catch_up(standby)
            assert capture.running()
    ledger = Ledger.read(record)
    user.cluster = standby
    (backup,) = user.run("list", SOURCE)
    backup_end = backup["stop_position"]
    targets = {
        ("--immediate",): (ledger.expected_at_position(backup_end), ["00000001"]),
        ("--time", text_of(before)): (ledger.expected_ids(before), ["00000001"]),
        ("--time", text_of(after)): (ledger.expected_ids(after), ["00000001", "00000002"]),
        ("--latest",): (ledger.expected_latest(), ["00000001", "00000002"]),
    }
    for target, (expectation, branches) in targets.items():
        with user.restored(*target) as found:
            assert_ledger_of(found.server, expectation)
            with found.server.connect() as connection:
                assert_pgbench_consistent(connection)
            assert_pages_clean(found)
            assert [step[0] for step in found.facts["plan"]["path"]] == branches
            assert found.facts["branch"] == "00000003"
    (history,) = user.store.glob("lineages/*/logs/00000002/history")
    history.unlink()
    into = user.place()
    error = user.refused(*user.restore_command(into, "--latest", "--start"), exit_code=4)
    assert "history of branch 00000002" in error["message"]
    assert list(into.parent.iterdir()) == []


# ---- further backups, damage -------------------------------------------------------------------------------


def flip_a_byte(path: Path) -> None:
    """Damage a stored object in its middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_further_backup_is_small_and_equal_and_damage_is_found(
    cluster: Cluster, command_lines: OpenCommandLine
) -> None:
    cluster.pgbench_init(4)
    user = command_lines(cluster)
    user.prepare()
    accounts = "SELECT * FROM pgbench_accounts"
    with user.captured():
        first = user.run("backup", SOURCE, "--mode", "local")
        cluster.run("pgbench", "-n", "-c", "2", "-t", "200")
        second = user.run("backup", SOURCE, "--mode", "remote")
        wanted = digest(cluster, accounts)
        user.catch_up()
    assert (first["kind"], second["kind"]) == ("full", "incremental")
    assert second["parent"] == first["backup_id"]
    stored = second["statistics"]["bytes_stored"]
    assert stored < first["statistics"]["bytes_stored"] / 4, (stored, first["statistics"])
    assert [one["backup_id"] for one in user.run("list", SOURCE)] == [first["backup_id"], second["backup_id"]]
    for backup in (first, second):
        with user.restored("--latest", "--backup", backup["backup_id"]) as found:
            assert digest(found.server, accounts) == wanted
            with found.server.connect() as connection:
                assert_pgbench_consistent(connection)
            found.server.psql("UPDATE pgbench_accounts SET abalance = abalance + 1 WHERE aid = 1")
            assert digest(found.server, accounts) != wanted, "the comparison sees no change"
    assert user.run("verify", "--read-all")["sound"]
    largest = max(user.store.glob("lineages/*/packs/**/*"), key=lambda path: path.stat().st_size)
    flip_a_byte(largest)
    assert not user.run("verify", "--read-all", exit_code=3)["sound"]
    into = user.place()
    error = user.refused(*user.restore_command(into, "--latest", "--start"), exit_code=5)
    assert error["code"] == "CS-6001", error
    assert not (into / "global/pg_control").exists(), "a server could be started on damaged files"


# ---- what must end in a refusal ----------------------------------------------------------------------------


class Refusals:
    """Asks for restores that must be refused with the nearest states and nothing touched."""

    def __init__(self, user: CommandLine) -> None:
        self._user = user

    def accepted(self, *target: str) -> None:
        """Negative control: this target can be reached."""
        self._user.run("restore", SOURCE, "--dry-run", *target)

    def refused(self, *target: str, before: bool, after: bool) -> dict[str, object]:
        """This target cannot be reached; reachable states lie before and after it, or not."""
        user = self._user
        stored = sorted(path for path in user.store.rglob("*") if path.is_file())
        into = user.place()
        error = user.refused(*user.restore_command(into, *target, "--start"), exit_code=4)
        assert error["code"] == "CS-5001", error
        assert (error["before"] is not None, error["after"] is not None) == (before, after), error
        for side in ("before", "after"):
            assert error[side] is None or (error[side]["position"] and error[side]["instant"]), error
        assert list(into.parent.iterdir()) == [], "a refused restore has touched something"
        assert sorted(path for path in user.store.rglob("*") if path.is_file()) == stored
        return error


def test_targets_that_cannot_be_reached_are_refused_and_nothing_is_touched(
    cluster: Cluster, command_lines: OpenCommandLine
) -> None:
    user = command_lines(cluster)
    user.prepare(rpo_seconds=0.1)
    cluster.psql("CREATE TABLE t (i int)")
    with cluster.connect() as connection:
        row = connection.execute("INSERT INTO t VALUES (0) RETURNING pg_current_xact_id()::text").fetchone()
    assert row is not None
    early_xid, early, early_lsn = row[0], now(), cluster.lsn()
    cluster.psql("SELECT pg_create_restore_point('early')")
    with user.captured():
        user.run("backup", SOURCE)
        instants = []
        for number in range(1, 9):
            cluster.psql(f"INSERT INTO t VALUES ({number})")
            instants.append(now())
            user.catch_up()
        cluster.psql("SELECT pg_create_restore_point('late')")
        user.catch_up()
    refusals = Refusals(user)
    # Before the end of the first backup.
    refusals.refused("--time", text_of(early), before=False, after=True)
    refusals.refused("--position", early_lsn, before=False, after=True)
    refusals.refused("--transaction", early_xid, before=False, after=False)
    refusals.refused("--name", "early", before=False, after=False)
    # After the end.
    refusals.refused("--time", text_of(now() + timedelta(days=1)), before=True, after=False)
    refusals.refused("--position", "FF/0", before=True, after=False)
    refusals.refused("--transaction", "4000000000", before=False, after=False)
    # With a log object gone that lies between the rows.
    for target in (("--time", text_of(instants[5])), ("--name", "late"), ("--latest",)):
        refusals.accepted(*target)
    lost, aside = lose_log_object(user, after_us=int(instants[3].timestamp() * 1e6))
    error = refusals.refused("--time", text_of(instants[5]), before=True, after=False)
    nearest = error["before"]
    assert isinstance(nearest, dict)
    assert nearest["instant"] < text_of(instants[4])
    refusals.refused("--latest", before=True, after=False)
    refusals.refused("--name", "late", before=False, after=False)
    assert not user.run("verify", exit_code=3)["sound"]
    user.run("logs", "status", SOURCE, exit_code=3)
    refusals.accepted("--time", text_of(instants[1]))
    with user.restored("--position", nearest["position"], "--exclusive") as found:
        count = int(found.server.psql("SELECT count(*) FROM t"))
        assert 3 <= count <= 6, count
    aside.rename(lost)
    refusals.accepted("--latest")
    with user.restored("--time", text_of(instants[5])) as found:
        assert found.server.psql("SELECT max(i) FROM t") == "6"


def lose_log_object(user: CommandLine, *, after_us: int) -> tuple[Path, Path]:
    """Take away the first log object whose first commit is later; where it was, and where it is."""
    objects = sorted(user.store.glob("lineages/*/logs/*/*/*"))
    lost = next(path for path in objects if int(path.name.split("-")[2], 16) > after_us)
    aside = user.store.parent / "aside"
    lost.rename(aside)
    return lost, aside


# ---- the same on S3 ----------------------------------------------------------------------------------------


@pytest.mark.postgresql_majors("16")
def test_the_same_story_with_the_repository_on_s3(
    cluster: Cluster, command_lines: OpenCommandLine, tmp_path: Path
) -> None:
    record = tmp_path / "ledger.jsonl"
    cluster.pgbench_init(1)
    with running_s3_server() as server:
        server.create_bucket("backups")
        user = command_lines(
            cluster, repository=server.url("backups", "house/main"), environment=S3_ENVIRONMENT
        )
        spool = cluster.factory.folder() / "spool"
        user.prepare(spool=spool)
        with user.captured(), LedgerClients(lambda: cluster.url, record, clients=2) as clients:
            with cluster.pgbench_run(clients=1, rate=100):
                clients.wait_for(50)
                user.run("backup", SOURCE)
                clients.wait_for(50)
                instant = now()
                clients.wait_for(50)
            clients.stop()
            user.catch_up()
        ledger = Ledger.read(record)
        assert user.run("verify", "--read-all")["sound"]
        targets = {
            ("--time", text_of(instant)): ledger.expected_ids(instant),
            ("--latest",): ledger.expected_latest(),
        }
        for target, expectation in targets.items():
            with user.restored(*target) as found:
                assert_ledger_of(found.server, expectation)
                with found.server.connect() as connection:
                    assert_pgbench_consistent(connection)
                assert_pages_clean(found)
            assert list(spool.iterdir()) == [], (
                "the log was not fetched to the configured place, or left there"
            )
