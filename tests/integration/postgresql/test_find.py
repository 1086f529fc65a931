"""
`cloudsave find` on real log: what each statement did is found and named, and the restore that it proposes has
the data back.
"""

from __future__ import annotations

import contextlib
import io
import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest

from cloudsave.cli.main import run
from tests.integration.postgresql.cluster import Cluster, ClusterFactory
from tests.integration.postgresql.command_line import SOURCE, CommandLine

COMPRESSION = {"14": "on", "15": "lz4", "16": "pglz", "17": "off", "18": "zstd"}
"""How each version's server is to compress the page images that names are taken from."""
ROWS = 3000


@dataclass
class Site:
    """A protected server, and the transactions that were made on purpose."""

    line: CommandLine
    cluster: Cluster
    made: dict[str, int] = field(default_factory=dict)
    """What was done, by the word for it, and its transaction."""

    def do(self, word: str, *statements: str, dbname: str = "postgres", end: str = "COMMIT") -> None:
        """Run statements in one transaction."""
        with self.cluster.connect(dbname=dbname) as connection:
            connection.execute("BEGIN")
            for statement in statements:
                connection.execute(statement)
            self.made[word] = _xid(connection)
            connection.execute(end)

    def find(self, *options: str, exit_code: int = 0) -> dict[str, Any]:
        """What `cloudsave find` says."""
        result = self.line.run("find", SOURCE, *options, exit_code=exit_code)
        assert isinstance(result, dict)
        return result

    def asked(self, *options: str, exit_code: int = 0) -> dict[str, Any]:
        """The same, in this process: there is no start-up to wait for."""
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            code = run(["--config", str(self.line.config), "--json", "find", SOURCE, *options])
        assert code == exit_code, out.getvalue()
        result = json.loads(out.getvalue())
        assert isinstance(result, dict)
        return result

    def by_transaction(self, *options: str) -> dict[int, dict[str, Any]]:
        """The hits, by transaction id."""
        return {hit["transaction"]: hit for hit in self.asked(*options)["hits"]}


def _xid(connection: psycopg.Connection[Any]) -> int:
    row = connection.execute("SELECT pg_current_xact_id()::text::bigint % 4294967296").fetchone()
    assert row is not None
    return int(row[0])


def _texts(hit: dict[str, Any]) -> list[str]:
    return [change["text"] for change in hit["changes"]]


@pytest.fixture
def site(clusters: ClusterFactory, postgresql_major: str, tmp_path: Path) -> Iterator[Site]:
    """Tables with rows, a backup of them, and a capture that is stopped by `site.line`."""
    conf = {"max_prepared_transactions": "5", "wal_compression": COMPRESSION[postgresql_major]}
    conf["wal_level"] = "logical" if postgresql_major == "16" else "replica"
    cluster = clusters.create(postgresql_major, conf={**conf, "autovacuum": "off"})
    line = CommandLine(tmp_path, cluster)
    try:
        line.prepare()
        cluster.psql("CREATE DATABASE shop")
        with cluster.connect(dbname="shop") as connection:
            for table in ("orders", "parcels", "ledger", "stock"):
                connection.execute(f"CREATE TABLE {table} (id int PRIMARY KEY, note text)")
                connection.execute(f"INSERT INTO {table} SELECT n, 'n' FROM generate_series(1, {ROWS}) n")
        yield Site(line, cluster)
    finally:
        line.close()


def make_accidents(site: Site) -> None:
    """One of everything, in two databases."""
    shop = "shop"
    site.do("delete", "DELETE FROM orders WHERE id % 3 = 0", dbname=shop)
    site.do("few", "DELETE FROM orders WHERE id = 1", dbname=shop)
    site.do("truncate", "TRUNCATE parcels", dbname=shop)
    site.do("truncate again", "TRUNCATE parcels", dbname=shop)
    site.do(
        "parts",
        "SAVEPOINT a",
        f"DELETE FROM ledger WHERE id <= {ROWS // 2}",
        "RELEASE a",
        "SAVEPOINT b",
        "UPDATE ledger SET note = 'x'",
        "ROLLBACK TO b",
        f"DELETE FROM ledger WHERE id > {ROWS // 2}",
        dbname=shop,
    )
    site.do("alter", "ALTER TABLE orders ADD COLUMN price int", dbname=shop)
    site.do("rewrite", "ALTER TABLE orders ALTER COLUMN id TYPE bigint", dbname=shop)
    site.do("index", "CREATE INDEX stock_note ON stock (note)", dbname=shop)
    site.do("rename", "ALTER TABLE stock RENAME TO goods", dbname=shop)
    site.do(
        "schema",
        "CREATE SCHEMA old",
        "CREATE TABLE old.a (i int)",
        "CREATE VIEW old.v AS SELECT 1 AS x",
        dbname=shop,
    )
    site.do("drop schema", "DROP SCHEMA old CASCADE", dbname=shop)
    site.do("prepared", "DELETE FROM goods", dbname=shop, end="PREPARE TRANSACTION 'two phases'")
    with site.cluster.connect(dbname=shop) as connection:
        connection.execute("COMMIT PREPARED 'two phases'")
        connection.execute("CREATE TEMP TABLE fleeting (i int)")
        connection.execute("DROP TABLE fleeting")
    site.do("aborted", "DROP TABLE orders", dbname=shop, end="ROLLBACK")
    site.do(
        "update",
        "UPDATE parcels SET note = 'y'",
        "INSERT INTO parcels SELECT n FROM generate_series(1, 2000) n",
        dbname=shop,
    )
    site.do("role", "CREATE ROLE clerk")
    site.do("drop role", "DROP ROLE clerk")
    site.do("drop", "DROP TABLE parcels", dbname=shop)
    site.do("drop late", "CREATE TABLE late (i int)", dbname=shop)
    site.cluster.psql("CHECKPOINT")
    site.do("drop late", "DROP TABLE late", dbname=shop)
    site.cluster.psql("CREATE DATABASE spare")
    site.cluster.psql("DROP DATABASE spare")


def test_what_each_statement_did_is_found_and_named(site: Site) -> None:
    line = site.line
    with line.captured():
        line.run("backup", SOURCE)
        before = datetime.now(UTC)
        make_accidents(site)
        with site.cluster.connect(dbname="shop") as connection:
            connection.execute("BEGIN")
            connection.execute("DELETE FROM orders")
            site.made["open"] = _xid(connection)
            site.cluster.psql("SELECT pg_switch_wal()")
            line.catch_up()
            connection.execute("ROLLBACK")
    found = site.find("--from", before.isoformat())
    made = site.made
    hits = {hit["transaction"]: hit for hit in found["hits"]}
    assert found["complete"], found
    of = {word: _texts(hits[xid]) for word, xid in made.items() if xid in hits}
    in_shop = "in database shop"
    assert of["delete"] == [f"{ROWS // 3} rows deleted from table public.orders {in_shop}"]
    assert "few" not in of
    assert of["truncate"] == of["truncate again"] == [f"truncated table public.parcels {in_shop}"]
    assert of["parts"] == [f"{ROWS} rows deleted from table public.ledger {in_shop}"]
    assert of["alter"] == [f"altered table public.orders {in_shop}"]
    assert of["rewrite"] == [
        f"rewrote (ALTER TABLE, VACUUM FULL, CLUSTER or REFRESH) table public.orders {in_shop}"
    ]
    assert of["rename"] == [f"renamed stock to goods: table public.goods {in_shop}"]
    assert sorted(of["drop schema"]) == [
        f"dropped schema old {in_shop}",
        f"dropped table old.a {in_shop}",
        f"dropped view old.v {in_shop}",
    ]
    assert of["prepared"] == [f"{ROWS} rows deleted from table public.goods {in_shop}"]
    assert "ROLLBACK PREPARED" in hits[made["prepared"]]["notes"][0]
    assert of["drop"] == [f"dropped table public.parcels {in_shop}"]
    assert of["drop late"] == [f"dropped table public.late {in_shop}"]
    assert [text.partition(" (")[0] for text in of["drop role"]] == ["dropped 1 role"]
    assert not {"aborted", "update", "schema", "index"} & set(of)
    dropped = [text for hit in hits.values() for text in _texts(hit) if text.startswith("dropped database")]
    assert [text.partition(" (")[0] for text in dropped] == ["dropped database spare"]
    assert not any("fleeting" in text for hit in hits.values() for text in _texts(hit))
    assert [hit["transaction"] for hit in found["under_way"]] == [made["open"]]
    assert all(hit["restorable"] for hit in hits.values())
    if site.cluster.major == "15":
        _check_filters(site, before)


def _check_filters(site: Site, before: datetime) -> None:
    made = site.made
    drops = site.by_transaction("--kind", "drop", "--relation", "public.parcels")
    assert list(drops) == [made["drop"]]
    (file,) = {change["relation"]["file"] for change in drops[made["drop"]]["changes"]}
    assert made["drop"] in site.by_transaction("--relation-file", file, "--database", "shop")
    assert site.by_transaction("--relation-file", file, "--database", "postgres") == {}
    few = site.by_transaction("--transaction", str(made["few"]))
    assert _texts(few[made["few"]]) == ["1 row deleted from table public.orders in database shop"]
    few = site.by_transaction("--kind", "delete", "--rows-at-least", "1", "--relation", "orders")
    assert set(few) == {made["delete"], made["few"]}
    assert made["aborted"] in site.by_transaction("--kind", "drop", "--aborted")
    inserted = site.by_transaction("--kind", "insert,create", "--database", "shop")
    assert "2000 rows inserted into table public.parcels in database shop" in _texts(inserted[made["update"]])
    assert "created index public.stock_note in database shop" in _texts(inserted[made["index"]])
    commits = site.by_transaction("--kind", "commit")
    assert set(commits) >= {xid for word, xid in made.items() if word not in ("aborted", "open")}
    assert made["aborted"] not in commits
    early = (before - timedelta(days=1)).isoformat()
    assert "is not stored" in site.asked("--from", early, exit_code=3)["unsearched"][0]["text"]


@pytest.mark.postgresql_majors("14", "18")
def test_the_proposed_restore_has_the_table_back_and_all_before(site: Site) -> None:
    line = site.line
    with line.captured():
        line.run("backup", SOURCE)
        site.do("last row", "INSERT INTO orders VALUES (100000, 'the last one')", dbname="shop")
        site.do("drop", "DROP TABLE orders", dbname="shop")
        site.do("after", "CREATE TABLE after (i int)", dbname="shop")
        site.cluster.psql("CREATE DATABASE spare")
        site.cluster.psql("CREATE TABLE kept (i int)", dbname="spare")
        site.cluster.psql("DROP DATABASE spare")
        line.catch_up()
    hits = site.find("--kind", "drop")["hits"]
    (hit,) = [hit for hit in hits if hit["transaction"] == site.made["drop"]]
    words = shlex.split(shlex.join(hit["restore"]))
    options = words[words.index(SOURCE) + 1 : words.index("--into")]
    with line.restored(*options) as restored:
        assert _count(restored.server, "orders", "shop") == ROWS + 1
        assert _count(restored.server, "pg_class WHERE relname = 'after'", "shop") == 0
    # The check can fail: with the transaction included, the table is gone.
    with line.restored("--position", hit["position"]) as restored:
        assert _count(restored.server, "pg_class WHERE relname = 'orders'", "shop") == 0
    (hit,) = [hit for hit in hits if hit["changes"][0]["text"].startswith("dropped database spare")]
    with line.restored("--position", hit["stop_position"], "--exclusive") as restored:
        assert _count(restored.server, "kept", "spare") == 0
    # The check can fail: before the commit, but after the files are gone, the database cannot be used.
    with line.restored("--position", hit["position"], "--exclusive") as restored:
        server = restored.server
        with pytest.raises(psycopg.OperationalError):
            _count(server, "kept", "spare")


def _count(server: Cluster, what: str, dbname: str) -> int:
    with server.connect(dbname=dbname) as connection:
        row = connection.execute(f"SELECT count(*) FROM {what}").fetchone()
        assert row is not None
        return int(row[0])
