"""Single databases and tables come out of a restored server, into the one they were lost from or a file."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tools.provision_binlog import BinlogServer

from tests.integration.mysql.cluster import BinlogCluster, BinlogClusterFactory
from tests.integration.mysql.product import Product
from tests.integration.mysql.restored import Restores
from tests.integration.postgresql.cluster import poll

ORDERS = 500
ODD_TEXT = "it''s \\\\ ☃"
SHOP = (
    "CREATE DATABASE shop CHARACTER SET utf8mb4",
    "CREATE TABLE shop.customers (id INT PRIMARY KEY, name VARCHAR(100), photo BLOB)",
    "CREATE TABLE shop.orders (id INT PRIMARY KEY AUTO_INCREMENT, customer INT, total DECIMAL(9, 2))",
    "ALTER TABLE shop.orders ADD FOREIGN KEY (customer) REFERENCES shop.customers (id)",
    "CREATE TABLE shop.seen (n INT)",
    "INSERT INTO shop.seen VALUES (0)",
    "USE shop",  # what names its database is tied to it
    "CREATE TRIGGER count_orders AFTER INSERT ON orders FOR EACH ROW UPDATE seen SET n = n + 1",
    "CREATE VIEW dear AS SELECT * FROM orders WHERE total > 100",
    "CREATE PROCEDURE nothing () SELECT 1",
    "CREATE EVENT never ON SCHEDULE EVERY 1 YEAR STARTS '2037-01-01' DO DELETE FROM seen",
    f"INSERT INTO shop.customers VALUES (1, '{ODD_TEXT}', 0x00ff0a0d1a5c27)",
)


class Shop:
    """A server with a database, and how to take parts of it out of the repository."""

    def __init__(self, product: Product) -> None:
        self.product = product
        self.cluster: BinlogCluster = product.cluster
        self.restores = Restores(product)
        self.sandboxes = self.restores.place / "sandboxes"
        self.sandboxes.mkdir(mode=0o711)

    def arguments(self, *words: str) -> list[str]:
        return self.restores.arguments(self.sandboxes, "--database", "shop", *words)

    def take(self, *words: str, status: int = 0) -> str:
        """Extract with these options; what was said."""
        return self.product.run(*self.arguments(*words), status=status)

    def facts(self, database: str = "shop") -> list[object]:
        """All that is to come back."""
        sql = self.cluster.sql
        return [
            sql(f"SELECT id, name, photo FROM {database}.customers"),
            sql(f"SELECT id, customer, total FROM {database}.orders ORDER BY id"),
            sql(f"SELECT n FROM {database}.seen"),
        ]

    def objects(self, database: str = "shop") -> list[str]:
        """Names of all objects."""
        sql, where = self.cluster.sql, f"_schema = '{database}'"
        return sorted(
            str(name)
            for kind in ("table", "routine", "event", "trigger")
            for (name,) in sql(f"SELECT {kind}_name FROM information_schema.{kind}s WHERE {kind}{where}")
        )

    def empty(self) -> None:
        """Nothing of an extraction may be left."""
        assert list(self.sandboxes.iterdir()) == []
        assert not running_below(self.sandboxes)


def running_below(place: Path) -> list[str]:
    """Servers that run on data in `place`."""
    listed = subprocess.run(["ps", "-eww", "-o", "args"], check=True, capture_output=True, text=True).stdout
    return [line for line in listed.splitlines() if f"--datadir={place}" in line]


@pytest.fixture
def shop(
    binlog_clusters: BinlogClusterFactory, binlog_server: BinlogServer, tmp_path: Path
) -> Iterator[Shop]:
    cluster = binlog_clusters.create(binlog_server)
    if cluster.engine == "mysql":
        cluster.sql("INSTALL PLUGIN clone SONAME 'mysql_clone.so'")
    product = Product(tmp_path, cluster)
    capture = product.capture()
    cluster.sql(*SHOP)
    product.run("backup", "db")
    with cluster.connect() as session, session.cursor() as cursor:
        for number in range(ORDERS):
            cursor.execute("INSERT INTO shop.orders (customer, total) VALUES (1, %s)", (number,))
    cluster.sql("CREATE DATABASE marker")
    product.wait_for(b"CREATE DATABASE marker")
    product.stop(capture)
    yield Shop(product)
    product.close()


def test_dropped_tables_come_back_into_the_server_they_were_lost_from(shop: Shop) -> None:
    wanted, objects = shop.facts(), shop.objects()
    shop.cluster.sql("DROP TABLE shop.orders, shop.customers")
    shop.take("--table", "orders", "--table", "shop.customers", "--to-url", shop.cluster.url)
    assert (shop.facts(), shop.objects()) == (wanted, objects)
    shop.cluster.sql("INSERT INTO shop.orders (customer, total) VALUES (1, 1)")
    assert shop.cluster.sql("SELECT n FROM shop.seen") == [(ORDERS + 1,)]
    shop.empty()


def test_a_whole_database_comes_back_and_goes_into_a_file(shop: Shop, tmp_path: Path) -> None:
    wanted, objects, file = shop.facts(), shop.objects(), tmp_path / "shop.sql"
    shop.cluster.sql("DROP DATABASE shop", "CREATE DATABASE other CHARACTER SET utf8mb4")
    shop.take("--to-url", shop.cluster.url.replace("?", "/other?"))
    assert shop.objects("other") == objects
    assert shop.facts("other") == wanted
    shop.take("--output", str(file))
    shop.cluster.sql("CREATE DATABASE shop CHARACTER SET utf8mb4")
    client = "mysql" if shop.cluster.engine == "mysql" else "mariadb"
    with file.open("rb") as dump:
        subprocess.run(
            [
                f"{shop.cluster.server.bindir}/{client}",
                "--no-defaults",
                "-uroot",
                f"--socket={shop.cluster.socket}",
                "shop",
            ],
            stdin=dump,
            check=True,
        )
    assert (shop.facts(), shop.objects()) == (wanted, objects)
    shop.empty()


@pytest.mark.fault("binlog-extract-over-tables")
def test_what_cannot_be_taken_out_or_put_in_is_refused(shop: Shop, tmp_path: Path) -> None:
    url = shop.cluster.url
    before = shop.facts(), shop.objects()
    assert "in the destination already" in shop.take("--table", "orders", "--to-url", url, status=2)
    assert "in the destination already" in shop.take("--to-url", url, status=2)
    assert "no database 'gone'" in shop.take("--to-url", url.replace("?", "/gone?"), status=2)
    assert "--replace" in shop.take("--table", "orders", "--to-url", url, "--replace", status=2)
    assert "archive" in shop.take("--output", str(tmp_path / "x"), "--format", "archive", status=2)
    said = shop.take("--table", "order", "--output", str(tmp_path / "x"), status=2)
    assert "'order'" in said
    assert "orders" in said
    assert not (tmp_path / "x").exists()
    assert (shop.facts(), shop.objects()) == before
    shop.empty()


@pytest.mark.fault("binlog-extract-load-fails")
def test_a_load_that_fails_leaves_the_destination_as_it_was(shop: Shop) -> None:
    cluster = shop.cluster
    cluster.sql(
        "CREATE DATABASE other CHARACTER SET utf8mb4",
        "CREATE TABLE other.mine (n INT)",
        "CREATE USER weak@localhost",
        "GRANT CREATE, DROP, INSERT, SELECT, ALTER, REFERENCES, LOCK TABLES ON other.* TO weak@localhost",
    )
    url = cluster.url_of("weak").replace("?", "/other?")
    tables = ["--table", "orders", "--table", "customers"]
    said = shop.take(*tables, "--to-url", url, status=1)
    assert "CS-2020" in said
    assert shop.objects("other") == ["mine"]
    # Control: with all rights it goes in.
    cluster.sql("GRANT ALL PRIVILEGES ON *.* TO weak@localhost")
    shop.take(*tables, "--to-url", url)
    assert shop.objects("other") == ["count_orders", "customers", "mine", "orders"]
    shop.empty()


@pytest.mark.fault("binlog-extract-killed")
def test_a_killed_extraction_leaves_no_server_and_no_data(shop: Shop, tmp_path: Path) -> None:
    process = shop.product.begin(*shop.arguments("--output", str(tmp_path / "x.sql")))
    poll(lambda: bool(running_below(shop.sandboxes)) or process.poll() is not None, "the server runs")
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    poll(lambda: not running_below(shop.sandboxes), "the server is gone")
    poll(lambda: not list(shop.sandboxes.iterdir()), "the data are gone")
    shop.take("--output", str(tmp_path / "x.sql"))
    shop.empty()
