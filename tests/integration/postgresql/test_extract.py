"""Single databases and tables out of a backup, as they were, into files and servers; by the command line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest

from cloudsave.clock import SYSTEM_CLOCK
from cloudsave.store.posix import PosixStore
from tests.integration.postgresql.cluster import Cluster, poll
from tests.integration.postgresql.recoveries import Protected
from tests.integration.postgresql.test_restore_command import PASSPHRASE, Site, Typed

ODD = 'Odd "Name".with *'
SCHEMA = """
CREATE SCHEMA "weird schema";
CREATE TYPE mood AS ENUM ('sad', 'ok', 'glad');
CREATE TYPE "weird schema".pair AS (a int, m mood);
CREATE DOMAIN positive AS int CHECK (value > 0);
CREATE SEQUENCE tickets START 100;
CREATE FUNCTION twice(i int) RETURNS int LANGUAGE sql IMMUTABLE AS 'SELECT 2 * i';
CREATE TABLE users (id serial PRIMARY KEY, name text NOT NULL, m mood DEFAULT 'ok', moods mood[],
                    ticket int DEFAULT nextval('tickets'), p positive, d int DEFAULT twice(21));
CREATE TABLE "weird schema"."Odd ""Name"".with *" (i int, pair "weird schema".pair);
CREATE TABLE orders (id int PRIMARY KEY, user_id int REFERENCES users);
CREATE TABLE parts (i int, at int) PARTITION BY RANGE (at);
CREATE TABLE parts_1 PARTITION OF parts FOR VALUES FROM (0) TO (10);
CREATE TABLE parts_2 PARTITION OF parts FOR VALUES FROM (10) TO (20);
CREATE UNLOGGED TABLE cache AS SELECT 1 AS i;
INSERT INTO users (name, moods, p) SELECT 'user ' || g, ARRAY['sad', 'glad']::mood[], g
       FROM generate_series(1, 50) g;
INSERT INTO "weird schema"."Odd ""Name"".with *" VALUES (7, ROW(1, 'glad'));
INSERT INTO orders VALUES (1, 1);
INSERT INTO parts SELECT g, g FROM generate_series(0, 19) g;
"""


@dataclass
class Shop(Site):
    """A database of many kinds of objects, and the accident after `amid`: a row, then tables are gone."""

    sandboxes: Path = Path()

    def take(self, *arguments: str, into: str = "rescued") -> Typed:
        """Take out of the shop into a database of the same server."""
        url = self.cluster.url.replace("/postgres?", f"/{into}?")
        bins = ["--bin-dir", str(self.cluster.bindir), "--into", str(self.sandboxes)]
        time = ["--time", self.amid.isoformat()]
        return self.type(
            "--json", "restore", "db", "--database", "shop", *arguments, "--to-url", url, *time, *bins
        )

    def make(self, name: str) -> None:
        """An empty database."""
        self.cluster.psql(f"DROP DATABASE IF EXISTS {name}")
        self.cluster.psql(f"CREATE DATABASE {name}")

    def objects(self, name: str) -> str:
        """All that people have made in a database."""
        return self.cluster.psql(
            "SELECT relkind, relname FROM pg_class WHERE relnamespace >= 2200 AND oid >= 16384"
            " UNION SELECT 'T', typname FROM pg_type WHERE oid >= 16384 ORDER BY 1, 2",
            dbname=name,
        )


@pytest.fixture
def shop(cluster: Cluster, tmp_path: Path) -> Shop:
    """A backup, a moment, and an accident."""
    store = PosixStore(tmp_path / "repository", clock=SYSTEM_CLOCK)
    cluster.psql("CREATE DATABASE shop")
    cluster.psql("CREATE ROLE clerk")
    cluster.psql(SCHEMA, dbname="shop")
    protected = Protected.begin(cluster, store, passphrase=PASSPHRASE)
    with protected.captured() as capture:
        protected.back_up()
        cluster.psql("INSERT INTO users (name) VALUES ('the last one')", dbname="shop")
        cluster.psql("ALTER TABLE orders OWNER TO clerk", dbname="shop")
        amid = datetime.now(UTC)
        cluster.psql("DROP TABLE parts; DELETE FROM users WHERE id > 10; DROP TABLE orders", dbname="shop")
        protected.catch_up(capture)
    secret = tmp_path / "passphrase"
    secret.write_text(PASSPHRASE + "\n")
    secret.chmod(0o600)
    config = tmp_path / "cloudsave.toml"
    config.write_text(
        f'[repository]\nurl = "{tmp_path}/repository"\npassphrase_file = "{secret}"\n'
        f'[sources.db]\nurl = "{cluster.url}"\n'
    )
    return Shop(cluster, config, amid, cluster.factory.folder() / "sandboxes")


def test_tables_come_back_with_what_they_need_and_only_once(shop: Shop) -> None:
    psql = shop.cluster.psql
    shop.make("rescued")
    tables = ["--table", "users", "--table", f"weird schema.{ODD}", "--table", "public.parts"]
    done = shop.take(*tables).json()
    assert done["tables"] == [
        "public.parts",
        "public.parts_1",
        "public.parts_2",
        "public.users",
        f"weird schema.{ODD}",
    ]
    assert {"type public.mood", "function public.twice(integer)", "sequence public.tickets"} <= set(
        done["needs"]
    )
    assert psql("SELECT count(*), max(name) FROM users WHERE id > 50", dbname="rescued") == "1|the last one"
    assert (
        psql("SELECT count(*), sum(d), max(moods::text) FROM users", dbname="rescued") == "51|2142|{sad,glad}"
    )
    assert psql("SELECT count(*) FROM parts_2", dbname="rescued") == "10"
    assert psql('SELECT (pair).m FROM "weird schema"."Odd ""Name"".with *"', dbname="rescued") == "glad"
    # Sequences go on; a server logs them ahead of their use.
    following = psql(
        "INSERT INTO users (name) VALUES ('new') RETURNING id > 51, ticket > 150", dbname="rescued"
    )
    assert following == "t|t"
    # The tables as they are now: the check above can fail.
    assert psql("SELECT count(*) FROM users", dbname="shop") == "10"
    assert list(shop.sandboxes.iterdir()) == []


@pytest.mark.postgresql_majors("15")
def test_what_is_there_is_replaced_when_asked_and_left_alone_when_something_fails(shop: Shop) -> None:
    psql = shop.cluster.psql
    shop.make("rescued")
    psql("CREATE TABLE users (mine int)", dbname="rescued")
    before = shop.objects("rescued")
    refused = shop.take("--table", "users")
    assert refused.code == 2
    assert "in the destination already" in refused.stderr
    assert shop.objects("rescued") == before
    shop.take("--table", "users", "--replace").json()
    assert psql("SELECT count(*) FROM users", dbname="rescued") == "51"
    # What fails half-way leaves no trace: the table that a foreign key leads to is missing.
    shop.make("empty")
    failed = shop.take("--table", "parts", "--table", "orders", into="empty")
    assert failed.code == 1
    assert "users" in failed.stderr
    assert shop.objects("empty") == ""
    wrong = shop.take("--table", "user", "--table", "parts", into="empty")
    assert wrong.code == 2
    assert "public.users" in wrong.stderr
    assert shop.objects("empty") == ""
    assert list(shop.sandboxes.iterdir()) == []


@pytest.mark.postgresql_majors("15")
def test_a_database_and_tables_as_files(shop: Shop, tmp_path: Path) -> None:
    psql, run = shop.cluster.psql, shop.cluster.run
    bins = ["--bin-dir", str(shop.cluster.bindir), "--time", shop.amid.isoformat()]
    folder = shop.cluster.factory.folder()
    command = [
        "--json",
        "restore",
        "db",
        "--database",
        "shop",
        "--into",
        str(shop.sandboxes),
        *bins,
        "--output",
    ]
    whole = shop.type(*command, str(folder / "shop.dump")).json()
    assert whole["format"] == "archive"
    assert (folder / "shop.dump").stat().st_mode & 0o777 == 0o600
    table = shop.type(*command, str(folder / "users.sql"), "--table", "users", "--no-owner").json()
    assert table["format"] == "sql"
    assert shop.type(*command, str(folder / "users.sql"), "--table", "users").code == 2, (
        "a file was overwritten"
    )
    missing = shop.type(*command, str(folder / "x.sql"), "--database", "shopp")
    assert missing.code == 2
    assert "shop" in missing.stderr
    shop.cluster.user.own(folder)
    assert sorted(os.listdir(folder)) == ["shop.dump", "users.sql"]
    shop.make("whole")
    run("pg_restore", "-1", "-d", "whole", str(folder / "shop.dump"))
    assert psql("SELECT count(*) FROM users", dbname="whole") == "51"
    assert psql("SELECT tableowner FROM pg_tables WHERE tablename = 'orders'", dbname="whole") == "clerk"
    shop.make("loaded")
    run("psql", "-X", "-1", "-v", "ON_ERROR_STOP=1", "-d", "loaded", "-f", str(folder / "users.sql"))
    assert psql("SELECT count(*) FROM users", dbname="loaded") == "51"
    url = shop.cluster.url.replace("/postgres?", "/copied?")
    shop.make("copied")
    arguments = ["restore", "db", "--database", "shop", "--into", str(shop.sandboxes), *bins, "--to-url", url]
    assert "copied" in shop.type(*arguments).stdout
    assert shop.objects("copied") == shop.objects("whole")
    assert list(shop.sandboxes.iterdir()) == []


@pytest.mark.postgresql_majors("15")
def test_a_killed_extraction_leaves_no_server_and_no_data(shop: Shop) -> None:
    shop.make("rescued")
    url = shop.cluster.url.replace("/postgres?", "/rescued?")
    command = [
        sys.executable,
        "-m",
        "cloudsave",
        "--config",
        str(shop.config),
        "--no-progress",
        "restore",
        "db",
    ]
    command += ["--database", "shop", "--to-url", url, "--bin-dir", str(shop.cluster.bindir)]
    process = subprocess.Popen([*command, "--into", str(shop.sandboxes)], stderr=subprocess.DEVNULL)
    try:
        poll(lambda: bool(list(shop.sandboxes.glob("*/data/postmaster.pid"))), "the restored server starts")
        (pid_file,) = shop.sandboxes.glob("*/data/postmaster.pid")
        server = int(pid_file.read_text().split()[0])
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    poll(lambda: not list(shop.sandboxes.iterdir()), "the sandbox is removed")
    assert not Path(f"/proc/{server}/cwd").exists()
    assert shop.objects("rescued") == ""


REFUSED: list[tuple[list[str], str]] = [
    (["--table", "t"], "--table goes with --database"),
    (["--replace"], "--replace goes with --database"),
    (["--database", "postgres"], "needs a place"),
    (["--database", "postgres", "--output", "x", "--to-url", "y"], "needs a place"),
    (["--database", "postgres", "--output", "x", "--start"], "--start"),
    (["--database", "postgres", "--output", "x", "--delta"], "--delta"),
    (["--database", "postgres", "--output", "/absent/x"], "cannot write"),
    (["--database", "postgres", "--to-url", "postgresql://u:secret@h/d"], "password"),
    (["--database", "postgres", "--to-url", "postgresql:///x?host=/absent"], "could not connect"),
]
"""Arguments and what the error says."""


@pytest.mark.postgresql_majors("15")
def test_what_cannot_be_taken_out_is_refused_before_a_restore(shop: Shop) -> None:
    bins = ["--bin-dir", str(shop.cluster.bindir), "--into", str(shop.sandboxes)]
    for arguments, text in REFUSED:
        done = shop.type("restore", "db", *arguments, *bins)
        assert done.code in (1, 2), (arguments, done.stderr)
        assert text in done.stderr, (arguments, done.stderr)
        assert "secret" not in done.stderr
    assert not shop.sandboxes.exists()
