"""Binlogs removed from real servers: what is stored, old and read by all, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pymysql
import pytest
from tools.provision_binlog import BinlogServer

from tests.integration.mysql.cluster import BinlogCluster, BinlogClusterFactory
from tests.integration.mysql.product import Product
from tests.integration.postgresql.cluster import poll, reserved_port

HOST = "127.0.0.1"
PURGE = ("logs", "purge", "db", "--keep-hours", "0")


class Source:
    """A server that is captured from its first file on."""

    def __init__(self, product: Product) -> None:
        self.product = product
        self.cluster = product.cluster
        self.capture = product.capture()
        self._rows = 0
        self.cluster.sql("CREATE DATABASE d", "CREATE TABLE d.t (x VARCHAR(40))")
        product.wait_for(b"CREATE TABLE d.t")

    def commit(self) -> None:
        """One commit, and wait until it is stored."""
        self._rows += 1
        self.cluster.sql(f"INSERT INTO d.t VALUES ('row {self._rows} of the load')")
        self.product.wait_for(f"row {self._rows} of the load".encode())

    def fill(self, count: int) -> None:
        """So many files more."""
        for _ in range(count):
            self.commit()
            self.cluster.sql("FLUSH BINARY LOGS")
        self.commit()

    def files(self) -> list[str]:
        return [one.name for one in self.cluster.binlogs()]

    def readers(self) -> int:
        """How many sessions are sent the binlog."""
        return sum(str(row[4]).startswith("Binlog Dump") for row in self.cluster.sql("SHOW PROCESSLIST"))

    def purge(self, *options: str, status: int = 0) -> dict[str, Any]:
        said: dict[str, Any] = self.product.json(*PURGE, *options, status=status)
        return said

    def reason(self, *options: str) -> str:
        """Why nothing goes; exit code 3, and every file is still there."""
        before = self.files()
        said = self.purge(*options, status=3)
        assert self.files() == before
        assert {one["state"] for one in said["files"]} == {"kept"}
        (blocked,) = [one["reason"] for one in said["files"] if one["blocked"]]
        return str(blocked)


@pytest.fixture
def source(
    binlog_clusters: BinlogClusterFactory, binlog_server: BinlogServer, tmp_path: Path
) -> Iterator[Source]:
    with reserved_port() as port:
        conf = {"skip_networking": "0", "bind_address": HOST, "port": str(port.getsockname()[1])}
        cluster = binlog_clusters.create(binlog_server, conf=conf)
        product = Product(tmp_path, cluster)
        yield Source(product)
        product.close()


def replica_of(source: Source, clusters: BinlogClusterFactory) -> BinlogCluster:
    """A server that replicates all of the source's log from its oldest file on."""
    cluster = source.cluster
    replica = clusters.create(cluster.server)
    cluster.sql("CREATE USER r@'%' IDENTIFIED BY 'r'", "GRANT REPLICATION SLAVE ON *.* TO r@'%'")
    port, first = cluster.conf["port"], source.files()[0]
    if cluster.engine == "mysql":
        replica.sql(
            f"CHANGE REPLICATION SOURCE TO SOURCE_HOST='{HOST}', SOURCE_PORT={port}, SOURCE_USER='r',"
            f" SOURCE_PASSWORD='r', SOURCE_LOG_FILE='{first}', SOURCE_LOG_POS=4, GET_SOURCE_PUBLIC_KEY=1",
            "START REPLICA",
        )
    else:
        replica.sql(
            f"CHANGE MASTER TO MASTER_HOST='{HOST}', MASTER_PORT={port}, MASTER_USER='r',"
            f" MASTER_PASSWORD='r', MASTER_LOG_FILE='{first}', MASTER_LOG_POS=4, MASTER_USE_GTID=NO",
            "START SLAVE",
        )
    _await_rows(source, replica)
    return replica


def _await_rows(source: Source, replica: BinlogCluster) -> None:
    wanted = source.cluster.sql("SELECT COUNT(*) FROM d.t")

    def has_all() -> bool:
        with suppress(pymysql.err.ProgrammingError):  # It has no such table yet.
            return replica.sql("SELECT COUNT(*) FROM d.t") == wanted
        return False

    poll(has_all, f"the replica has all rows; its log: {replica.log_tail()[-1500:]}")


def test_what_is_stored_goes_and_capture_goes_on(source: Source) -> None:
    source.fill(3)
    before = source.files()
    young = source.product.json("logs", "purge", "db")
    assert next(one["reason"] for one in young["files"]) == "younger than the keep time"
    assert {one["state"] for one in source.purge("--dry-run")["files"]} == {"would be removed", "kept"}
    assert source.files() == before, "a dry run removes nothing"

    said = source.purge()

    assert source.files() == before[-1:]
    assert [one["name"] for one in said["files"] if one["state"] == "removed"] == before[:-1]
    assert said["removed_bytes"] > 0
    assert said["free_bytes"] is not None
    # MariaDB's commits are stamped with whole seconds, in which all files of a test may fall.
    assert said["seconds_until_full"] or source.cluster.engine == "mariadb"
    source.commit()
    source.product.stop(source.capture)
    assert source.product.json("logs", "status", "db")["holes"] == []
    stored = source.product.stored_files()
    assert set(stored) >= {int(name.rpartition(".")[2]) for name in before}


@pytest.mark.fault("purge-not-stored")
def test_a_file_of_which_the_repository_lacks_a_piece_stays(source: Source) -> None:
    source.fill(3)
    before = source.files()
    number = int(before[1].rpartition(".")[2])
    (stored,) = source.product.repository.glob(f"lineages/*/logs/*/{number << 4:08x}")
    whole = f"{number << 32:016x}-{number + 1 << 32:016x}-*"
    poll(lambda: bool(list(stored.glob(whole))), "the pieces of the file are joined")
    aside = source.product.folder / "aside"
    stored.rename(aside)
    said = source.purge(status=3)
    assert source.files() == before[1:], "the one before it is stored"
    assert [one["reason"] for one in said["files"] if one["blocked"]] == [
        "not all of it is stored, and never will be"
    ]
    aside.rename(stored)
    source.purge()
    assert source.files() == before[-1:], "control: with the piece it goes"


@pytest.mark.fault("purge-without-capture")
def test_nothing_goes_while_nobody_captures_or_the_binlog_was_reset(source: Source) -> None:
    source.fill(2)
    source.product.stop(source.capture)
    assert source.reason() == "no capture of this source runs"
    source.product.capture()
    poll(lambda: source.readers() == 1, "it is captured again")
    reset = "RESET BINARY LOGS AND GTIDS" if source.cluster.engine == "mysql" else "RESET MASTER"
    source.cluster.sql(reset, "FLUSH BINARY LOGS")
    assert source.reason() in (
        "the server has less log than is stored of it: was its binlog reset?",
        "no capture of this source runs",
    )


@pytest.mark.fault("purge-ahead-of-replica")
def test_nothing_goes_that_a_replica_needs(source: Source, binlog_clusters: BinlogClusterFactory) -> None:
    source.fill(2)
    replica = replica_of(source, binlog_clusters)
    assert "r@" in source.reason(), "it is connected, and nobody named it"
    right = "REPLICATION CLIENT" if source.cluster.engine == "mysql" else "SLAVE MONITOR"
    mine = ("SET sql_log_bin = 0", "CREATE USER m@localhost", f"GRANT {right} ON *.* TO m@localhost")
    replica.sql(*mine)
    named = ("--replica", replica.url_of("m"))
    other = binlog_clusters.create(source.cluster.server)
    source.product.run(*PURGE, *named, "--replica", "elsewhere", status=2)
    assert "does not replicate from this server" in source.reason(*named, "--replica", other.url)

    word = "REPLICA" if source.cluster.engine == "mysql" else "SLAVE"
    replica.sql(f"STOP {word} SQL_THREAD")
    applied = source.files()[-1]
    source.fill(2)
    said = source.purge(*named, status=3)
    assert source.files()[0] == applied, "what it has fetched and not applied stays"
    assert [one["reason"] for one in said["files"] if one["blocked"]] == [
        f"replica {replica.socket} has not applied all of it"
    ]
    replica.crash()
    assert f"replica {replica.socket} may need it" in source.reason(*named)

    replica.start()
    replica.sql(f"START {word}")
    _await_rows(source, replica)
    poll(lambda: source.readers() == 2, "the reader that was cut off is gone")
    source.purge(*named)
    assert len(source.files()) == 1
    source.commit()
    _await_rows(source, replica)


def test_who_may_not_see_the_readers_may_not_purge(source: Source) -> None:
    cluster = source.cluster
    source.fill(1)
    before = source.files()
    rights = "REPLICATION CLIENT" if cluster.engine == "mysql" else "BINLOG MONITOR"
    purging = "BINLOG_ADMIN" if cluster.engine == "mysql" else "BINLOG ADMIN"
    cluster.sql("CREATE USER p@localhost", f"GRANT {rights} ON *.* TO p@localhost")
    file = source.product.folder / "cloudsave.toml"
    file.write_text(file.read_text().replace("root@", "p@"))
    said = source.product.run(*PURGE, status=1)
    assert f"GRANT PROCESS, {purging} ON *.* TO 'p'@'localhost';" in said
    cluster.sql(f"GRANT {purging} ON *.* TO p@localhost")
    assert "GRANT PROCESS ON" in source.product.run(*PURGE, status=1)
    assert source.files() == before
    cluster.sql("GRANT PROCESS ON *.* TO p@localhost")
    source.purge()
    assert source.files() == before[-1:]
