"""Capture of real binlogs: byte-exact, without a hole, alarmed where the server lost or changed something."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from cloudsave.engines.binlog.position import format_offset
from tests.integration.mysql.cluster import BinlogCluster
from tests.integration.mysql.product import Product, closed_content
from tests.integration.postgresql.cluster import poll

BIG_BYTES = 20 << 20
"""More than one packet of the protocol, and more than one object of the log."""


@pytest.fixture
def product(binlog_cluster: BinlogCluster, tmp_path: Path) -> Iterator[Product]:
    made = Product(tmp_path, binlog_cluster)
    yield made
    made.close()


def _table(cluster: BinlogCluster) -> None:
    cluster.sql("CREATE DATABASE d", "CREATE TABLE d.t (id INT PRIMARY KEY AUTO_INCREMENT, x LONGTEXT)")


def _insert(cluster: BinlogCluster, text: str) -> None:
    cluster.sql(f"INSERT INTO d.t (x) VALUES ('{text}')")


def _assert_same(product: Product) -> None:
    stored = product.stored_files()
    on_disk = {int(path.suffix[1:]): closed_content(path) for path in product.cluster.binlogs()}
    assert sorted(stored) == sorted(on_disk)
    for number, content in on_disk.items():
        assert stored[number] == content, f"file {number} differs"


def test_stored_log_is_the_servers_files_byte_for_byte(product: Product) -> None:
    cluster = product.cluster
    capture = product.capture()
    _table(cluster)
    product.wait_for(b"CREATE TABLE d.t")
    for number in range(3):
        _insert(cluster, f"row-{number}")
        cluster.sql(f"INSERT INTO d.t (x) VALUES (REPEAT('{number}', {BIG_BYTES}))")
        cluster.sql("FLUSH BINARY LOGS")
    product.wait_for(b"row-2")
    capture.kill()
    capture.wait()
    _insert(cluster, "while-nobody-listened")
    cluster.crash()
    cluster.start()
    _insert(cluster, "after-the-crash")
    capture = product.capture()
    product.wait_for(b"after-the-crash")
    product.stop(capture)
    _assert_same(product)
    status = product.json("logs", "status", "db")
    assert status["holes"] == []
    assert [one["bytes"] for one in status["ranges"]] == [sum(map(len, product.stored_files().values()))]


def test_index_names_every_transaction_where_the_servers_own_program_sees_it(product: Product) -> None:
    cluster = product.cluster
    _table(cluster)
    cluster.sql("CREATE TABLE d.m (x INT) ENGINE = MyISAM")
    capture = product.capture()
    product.wait_for(b"CREATE TABLE d.m")
    cluster.sql(
        "BEGIN",
        "INSERT INTO d.t (x) VALUES ('one')",
        "INSERT INTO d.t (x) VALUES ('two')",
        "COMMIT",
        "INSERT INTO d.m VALUES (1)",
        "XA START 'a'",
        "INSERT INTO d.t (x) VALUES ('xa')",
        "XA END 'a'",
        "XA PREPARE 'a'",
        "XA COMMIT 'a'",
        "TRUNCATE d.m",
        "FLUSH BINARY LOGS",
    )
    _insert(cluster, "last-one")
    product.wait_for(b"last-one")
    product.stop(capture)
    _assert_same(product)
    printed = []
    for path in cluster.binlogs():
        number = int(path.suffix[1:])
        text = cluster.print_binlog(path)
        for place, line in re.findall(r"^# at (\d+)\n#(.*)$", text, re.MULTILINE):
            if "\tGTID" in line or "\tAnonymous_GTID" in line:
                printed.append(f"{number:06}:{place}")
    commits = [commit for index in product.indexes() for commit in index.commits]
    assert [format_offset(commit.offset) for commit in commits] == printed
    assert len(printed) >= 8
    assert all(one.end_offset <= two.offset for one, two in itertools.pairwise(commits))


@pytest.mark.fault("binlog-purged-uncaptured")
def test_log_that_the_server_purged_is_a_hole_that_is_told(product: Product) -> None:
    cluster = product.cluster
    capture = product.capture()
    _table(cluster)
    product.wait_for(b"CREATE TABLE d.t")
    product.stop(capture)
    for number in range(3):
        _insert(cluster, f"lost-{number}")
        cluster.sql("FLUSH BINARY LOGS")
    cluster.sql(f"PURGE BINARY LOGS TO '{cluster.binlogs()[-1].name}'")
    _insert(cluster, "kept")
    capture = product.capture()
    product.wait_for(b"kept")
    product.stop(capture)
    assert "is lost for good" in product.said()
    (hole,) = product.json("logs", "status", "db", status=3)["holes"]
    assert "removed log" in hole["cause"]
    assert not any(b"lost-1" in log for log in product.stored_files().values())


@pytest.mark.fault("binlog-reset")
def test_reset_binlog_is_refused_and_not_mixed_in(product: Product) -> None:
    cluster = product.cluster
    capture = product.capture()
    _table(cluster)
    _insert(cluster, "before")
    product.wait_for(b"before")
    product.stop(capture)
    reset = "RESET BINARY LOGS AND GTIDS" if cluster.engine == "mysql" else "RESET MASTER"
    cluster.sql(reset)
    assert "CS-6005" in product.run("logs", "capture", "db", status=5)
    for number in range(30):
        _insert(cluster, f"after the reset, number {number}")
    assert "CS-6005" in product.run("logs", "capture", "db", status=5)
    assert not any(b"after the reset" in log for log in product.stored_files().values())


@pytest.mark.fault("binlog-captured-twice")
def test_second_capture_is_refused_until_the_first_has_ended(product: Product) -> None:
    capture = product.capture()
    _table(product.cluster)
    product.wait_for(b"CREATE TABLE d.t")
    assert "CS-7002" in product.run("logs", "capture", "db", status=6)
    capture.kill()
    capture.wait()
    second = product.capture()
    _insert(product.cluster, "by-the-second")
    product.wait_for(b"by-the-second")
    product.stop(second)


@pytest.mark.fault("binlog-account-lacks-rights")
def test_check_prints_the_grants_that_an_account_needs_and_they_suffice(
    binlog_cluster: BinlogCluster, tmp_path: Path
) -> None:
    cluster = binlog_cluster
    cluster.sql("CREATE USER 'it''s me'@'localhost'")
    if cluster.engine == "mysql":
        cluster.sql("INSTALL PLUGIN clone SONAME 'mysql_clone.so'")
    product = Product(tmp_path, cluster, url=cluster.url_of("it%27s%20me"))
    try:
        findings = product.json("check", "db", status=3)["findings"]
        grants = [one["hint"] for one in findings if one["subject"] == "rights"]
        assert len(grants) == {"mysql": 4, "mariadb": 5}[cluster.engine]
        assert "CS-2003" in product.run("logs", "capture", "db", status=1)
        cluster.sql(*grants)
        after = product.json("check", "db", status=3)["findings"]
        assert [one["severity"] for one in after if one["subject"] == "rights"] == ["ok"]
        capture = product.capture()
        poll(lambda: "streaming" in product.said(), "capture streams")
        product.run("backup", "db")
        product.stop(capture)
    finally:
        product.close()


@pytest.mark.fault("binlog-without-checksums")
def test_server_that_writes_no_checksums_is_refused(product: Product) -> None:
    product.cluster.sql("SET GLOBAL binlog_checksum = 'NONE'")
    findings = product.json("check", "db", status=3)["findings"]
    assert any(one["subject"] == "binlog_checksum" and one["severity"] == "problem" for one in findings)
