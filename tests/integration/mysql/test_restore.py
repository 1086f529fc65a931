"""
Servers are backed up under load and come back as they were at any transaction; what cannot be is refused.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from tools.provision_binlog import BinlogServer

from tests.integration.mysql.cluster import BinlogCluster, BinlogClusterFactory
from tests.integration.mysql.load import SCHEMAS, Acknowledged, Load
from tests.integration.mysql.product import Product
from tests.integration.mysql.restored import Restores, quoted, tables
from tests.integration.postgresql.cluster import poll

TARGETS = int(os.environ.get("CLOUDSAVE_TARGETS", "6"))
"""Random targets of each kind."""
BACKUPS = int(os.environ.get("CLOUDSAVE_BACKUPS", "2"))
"""Backups under DDL that are each restored."""
CONF = {
    # mariadb-backup reads the redo log once a second: with less of it the load would overtake it.
    "mariadb": {"innodb_log_file_size": "512M"},
    "mysql": {"innodb_redo_log_capacity": "512M"},
}
DONOR_TIMEOUT = "clone_donor_timeout_after_network_failure"
_GTID_LINE = re.compile(r"GTID_NEXT\s*=\s*'([^']+:\d+)'|^#\d.*\tGTID (\d+-\d+-\d+)")


@pytest.fixture
def product(
    binlog_clusters: BinlogClusterFactory, binlog_server: BinlogServer, tmp_path: Path
) -> Iterator[Product]:
    cluster = binlog_clusters.create(binlog_server, conf=CONF[binlog_server.engine])
    if cluster.engine == "mysql":
        cluster.sql("INSTALL PLUGIN clone SONAME 'mysql_clone.so'")
    made = Product(tmp_path, cluster)
    yield made
    made.close()


@pytest.fixture
def restores(product: Product) -> Restores:
    return Restores(product)


def small(cluster: BinlogCluster) -> None:
    cluster.sql("CREATE DATABASE d", "CREATE TABLE d.t (id INT PRIMARY KEY AUTO_INCREMENT, x TEXT)")


def insert(cluster: BinlogCluster, text: str) -> str:
    """Commit a row; its GTID."""
    with cluster.connect() as session, session.cursor() as cursor:
        cursor.execute("INSERT INTO d.t (x) VALUES (%s)", (text,))
        if cluster.engine == "mariadb":
            cursor.execute("SELECT @@last_gtid")
            return str(cursor.fetchone()[0])
        cursor.execute("SELECT @@GLOBAL.gtid_executed")
        source, _, span = cursor.fetchone()[0].rpartition(":")
        return f"{source}:{span.rpartition('-')[2]}"


def fill(cluster: BinlogCluster, count: int) -> None:
    """So many rows of 3 kB that do not compress to nothing."""
    depth = "cte_max_recursion_depth" if cluster.engine == "mysql" else "max_recursive_iterations"
    cluster.sql(
        "USE d",
        f"SET SESSION {depth} = {count}",
        "INSERT INTO d.t (x) WITH RECURSIVE s (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM s WHERE n <"
        f" {count}) SELECT REPEAT(SHA2(RAND(), 256), 50) FROM s",
    )


def gtids(cluster: BinlogCluster) -> dict[int, str]:
    """The GTID of the transaction that made each row of `ledger.rows`, by the server's own program."""
    found: dict[int, str] = {}
    for path in cluster.binlogs():
        gtid, inside = "", False
        for line in cluster.print_binlog(path, "--verbose", "--base64-output=DECODE-ROWS").splitlines():
            if named := _GTID_LINE.search(line):
                gtid = named[1] or named[2]
            elif line.startswith("### "):
                inside = line.endswith("INSERT INTO `ledger`.`rows`") or (inside and "INTO" not in line)
                if inside and line.startswith("###   @1="):
                    found[int(line.partition("=")[2])] = gtid
    return found


def rows(cluster: BinlogCluster) -> list[str]:
    return [row[0] for row in cluster.sql("SELECT x FROM d.t ORDER BY id")]


def ids(cluster: BinlogCluster) -> set[int]:
    return {row[0] for row in cluster.sql("SELECT id FROM ledger.`rows`")}


def newest(product: Product) -> str:
    """The id of the newest backup."""
    return max(one["backup_id"] for one in product.json("list", "db"))


def in_log(product: Product, marker: str) -> None:
    product.wait_for(marker.encode())


def captured(product: Product) -> None:
    """Return when all that is committed by now is stored."""
    product.cluster.sql("CREATE TABLE ledger.the_end (i INT)")
    in_log(product, "CREATE TABLE ledger.the_end")


def reached(process: subprocess.Popen[bytes], path: Path) -> None:
    """Return when `path` is there, or the process has ended."""
    poll(lambda: path.exists() or process.poll() is not None, f"{path} is there")


# ---- the oracle


@pytest.mark.fault("binlog-ddl-during-backup")
def test_every_random_target_has_what_was_acknowledged_and_nothing_after(
    product: Product, restores: Restores
) -> None:
    cluster, load = product.cluster, Load(product.cluster)
    capture = product.capture()
    load.start()
    load.wait_for(60)
    product.run("backup", "db")
    load.wait_for(60)
    product.run("backup", "db")
    load.wait_for(250)
    load.stop()
    captured(product)
    product.stop(capture)
    (span,) = product.json("ranges", "db")["ranges"]
    assert len(span["backups"]) == 2
    first = datetime.fromisoformat(span["begin"]).timestamp()
    later = [one for one in load.acknowledged if one.sent > first + 1]
    assert len(later) > 200
    chance = random.Random(product.cluster.server.major)
    names = gtids(cluster)
    by_gtid(load, names, restores, chance.sample(later, TARGETS))
    by_time(load, restores, chance.sample(later, TARGETS))
    whole = restores.restore("--latest")
    with restores.server(whole) as server:
        assert tables(server, SCHEMAS) == tables(cluster, SCHEMAS)
        assert ids(server) == {one.id for one in load.acknowledged}


def test_every_backup_taken_while_ddl_goes_on_starts_and_is_sound(
    product: Product, restores: Restores
) -> None:
    load = Load(product.cluster)
    capture = product.capture()
    load.start()
    load.wait_for(20)
    taken = []
    for _ in range(BACKUPS):
        begun = {one.id for one in load.acknowledged}
        product.run("backup", "db")
        taken.append((newest(product), begun, time.time()))
        load.wait_for(5)
    load.wait_for(20)
    load.stop()
    captured(product)
    product.stop(capture)
    for backup_id, begun, ended in taken:
        made = restores.restore("--backup", backup_id, "--immediate")
        with restores.server(made) as server:
            assert tables(server, SCHEMAS)
            found = ids(server)
        assert begun <= found, backup_id
        assert found <= {one.id for one in load.acknowledged if one.sent < ended}, backup_id
        assert found < {one.id for one in load.acknowledged}, "control: it is not the state of the end"


def by_gtid(load: Load, names: dict[int, str], restores: Restores, chosen: list[Acknowledged]) -> None:
    """One domain, one server: transactions are in the order of their numbers."""
    numbers = {row: int(re.split("[-:]", gtid)[-1]) for row, gtid in names.items()}
    for number, one in enumerate(chosen):
        exclusive = number % 2 == 0
        made = restores.restore("--transaction", names[one.id], *(["--exclusive"] if exclusive else []))
        with restores.server(made) as server:
            found = ids(server)
            tables(server, SCHEMAS)
        end = numbers[one.id] + (not exclusive)
        wanted = {other.id for other in load.acknowledged if numbers[other.id] < end}
        assert found == wanted
        assert found != wanted ^ {one.id}, "one transaction more or less would have been seen"


def by_time(load: Load, restores: Restores, chosen: list[Acknowledged]) -> None:
    """Instants of MariaDB are whole seconds, the begin of which a commit bears; MySQL's are exact."""
    whole = restores.product.cluster.engine == "mariadb"
    for one in chosen:
        at = float(int(one.answered)) if whole else one.answered
        made = restores.restore("--time", datetime.fromtimestamp(at, UTC).isoformat())
        with restores.server(made) as server:
            found = ids(server)
        must = {other.id for other in load.acknowledged if other.answered < at}
        must_not = {other.id for other in load.acknowledged if other.sent > at + whole}
        assert must <= found
        assert not must_not & found


# ---- what is stored


def test_the_next_backup_stores_the_changed_pages_only(product: Product) -> None:
    cluster = product.cluster
    small(cluster)
    fill(cluster, 20_000)
    cluster.restart()  # Else pages are in memory and in the redo log alone.
    product.run("backup", "db")
    first = product.json("show", newest(product))
    cluster.sql("UPDATE d.t SET x = REPEAT(SHA2(RAND(), 256), 50) WHERE id % 2000 = 0")
    cluster.restart()
    product.run("backup", "db")
    second = product.json("show", newest(product))
    assert second["statistics"]["blocks_stored"] < first["statistics"]["blocks_stored"] / 20
    assert second["corrupt_pages"] == []


def severities(product: Product) -> dict[str, str]:
    """What `check` says of each subject."""
    findings = product.json("check", "db", status=3)["findings"]
    return {one["subject"]: one["severity"] for one in findings}


@pytest.mark.fault("binlog-backup-killed")
def test_backup_that_is_killed_leaves_no_lock_and_the_next_one_is_complete(
    product: Product, restores: Restores
) -> None:
    cluster = product.cluster
    if cluster.engine == "mysql":
        assert severities(product)[DONOR_TIMEOUT] == "warning"
        cluster.sql(f"SET GLOBAL {DONOR_TIMEOUT} = 0")  # The default is five minutes.
        assert DONOR_TIMEOUT not in severities(product)
    small(cluster)
    fill(cluster, 20_000)
    process = restores.product.begin("backup", "db")
    poll(
        lambda: (
            any("BACKUP" in str(row) for row in cluster.sql("SHOW PROCESSLIST"))
            or process.poll() is not None
            or any(product.repository.glob("lineages/*/generations/*"))
        ),
        "the backup is under way",
    )
    process.kill()
    process.wait()
    insert(cluster, "after the kill")
    cluster.sql("CREATE TABLE d.made (i INT)")
    product.run("backup", "db")
    with restores.server(restores.restore("--immediate")) as server:
        assert rows(server)[-1] == "after the kill"
        tables(server, ["d"])


# ---- restores that are interrupted, and what is refused


@pytest.mark.fault("binlog-restore-killed-in-replay")
def test_restore_that_is_killed_while_it_replays_begins_anew(product: Product, restores: Restores) -> None:
    cluster = product.cluster
    small(cluster)
    capture = product.capture()
    product.run("backup", "db")
    for number in range(300):
        insert(cluster, f"row {number}")
    insert(cluster, "the last one")
    in_log(product, "the last one")
    product.stop(capture)
    into = restores.new()
    killed = 0
    for name in ("cloudsave.restore.json", "cloudsave.restore.applying", "ibdata1"):
        process = restores.begin(into, "--latest")
        reached(process, into / name)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            killed += 1
        process.wait()
    assert killed >= 2
    if not into.exists() or (into / "cloudsave.restore.json").exists():
        restores.restore("--latest", into=into)
    with restores.server(into) as server:
        assert rows(server) == [f"row {number}" for number in range(300)] + ["the last one"]


@pytest.mark.fault("binlog-two-restores-one-directory")
def test_two_restores_into_one_directory_do_not_meet(product: Product, restores: Restores) -> None:
    """The second one took the first one's mark for that of a killed restore, and removed its files."""
    cluster = product.cluster
    small(cluster)
    capture = product.capture()
    product.run("backup", "db")
    for number in range(20):
        insert(cluster, f"row {number}")
    insert(cluster, "the last one")
    in_log(product, "the last one")
    product.stop(capture)
    into = restores.new()
    first = restores.begin(into, "--latest", "--look")
    reached(first, into / "cloudsave.restore.applying")
    assert "CS-7001" in product.run(*restores.arguments(into, "--latest"), status=6)
    assert first.poll() is None
    first.send_signal(signal.SIGINT)
    first.wait(timeout=120)
    restores.restore("--latest", into=into)
    with restores.server(into) as server:
        assert len(rows(server)) == 21


@pytest.mark.fault("binlog-replayed-under-other-settings")
def test_settings_on_which_replayed_statements_depend_are_the_sources(
    binlog_clusters: BinlogClusterFactory, binlog_server: BinlogServer, tmp_path: Path
) -> None:
    conf = {"default_time_zone": "+09:00", "innodb_strict_mode": "OFF"}
    cluster = binlog_clusters.create(binlog_server, conf=conf)
    if cluster.engine == "mysql":
        cluster.sql("INSTALL PLUGIN clone SONAME 'mysql_clone.so'")
    product = Product(tmp_path, cluster)
    try:
        small(cluster)
        cluster.sql("CREATE TABLE d.w (w DATETIME)", "INSERT INTO d.w VALUES ('2026-06-01 12:00:00')")
        capture = product.capture()
        product.run("backup", "db")
        cluster.sql("ALTER TABLE d.w MODIFY w TIMESTAMP NULL")
        cluster.sql("CREATE TABLE d.lax (i INT) ROW_FORMAT = COMPRESSED KEY_BLOCK_SIZE = 32")
        insert(cluster, "the last one")
        in_log(product, "the last one")
        product.stop(capture)
        restores = Restores(product)
        with restores.server(restores.restore("--latest")) as server:
            asked = "SELECT UNIX_TIMESTAMP(w) FROM d.w"
            assert server.sql(asked) == cluster.sql(asked)
            assert server.sql("SELECT COUNT(*) FROM d.lax") == [(0,)]
    finally:
        product.close()


@pytest.mark.fault("binlog-schema-without-tables")
def test_schemas_without_tables_are_there_and_can_be_used(product: Product, restores: Restores) -> None:
    cluster = product.cluster
    used, unused = ["plain", "übung", "a-b`c", "日本 語"], ["empty", "ülle", "Ω"]
    for name in [*used, *unused]:
        cluster.sql(f"CREATE DATABASE {quoted(name)} CHARACTER SET utf8mb4")
    capture = product.capture()
    product.run("backup", "db")
    for name in used:
        cluster.sql(f"CREATE TABLE {quoted(name)}.t (i INT)", f"INSERT INTO {quoted(name)}.t VALUES (1)")
    cluster.sql("CREATE DATABASE marker")
    in_log(product, "CREATE DATABASE marker")
    product.stop(capture)
    with restores.server(restores.restore("--latest")) as restored:
        for name in used:
            assert restored.sql(f"SELECT i FROM {quoted(name)}.t") == [(1,)]
        for name in unused:
            table = f"{quoted(name)}.t"
            assert restored.sql(f"CREATE TABLE {table} (i INT)", f"SELECT i FROM {table}") == []


@pytest.mark.fault("binlog-hole-asked-across")
def test_a_hole_in_the_log_is_refused_before_anything_is_touched(
    product: Product, restores: Restores
) -> None:
    cluster = product.cluster
    small(cluster)
    capture = product.capture()
    product.run("backup", "db")
    before = insert(cluster, "before the hole")
    in_log(product, "before the hole")
    cluster.sql("FLUSH BINARY LOGS")
    insert(cluster, "in the hole")
    in_log(product, "in the hole")
    cluster.sql("FLUSH BINARY LOGS")
    after = insert(cluster, "after the hole")
    in_log(product, "after the hole")
    product.stop(capture)
    for path in product.repository.glob("lineages/*/logs/*/*/*"):
        if path.name.startswith(f"{2 << 32:016x}"[:8]):
            path.unlink()
    into = restores.new()
    told = product.run(*restores.arguments(into, "--transaction", after), status=4)
    assert "CS-5001" in told
    assert not into.exists()
    with restores.server(restores.restore("--transaction", before)) as server:
        assert rows(server) == ["before the hole"]


@pytest.mark.fault("binlog-gtid-of-another-server")
def test_a_transaction_of_another_server_is_not_taken_for_ours(product: Product, restores: Restores) -> None:
    cluster = product.cluster
    small(cluster)
    capture = product.capture()
    product.run("backup", "db")
    gtid = insert(cluster, "ours")
    in_log(product, "ours")
    product.stop(capture)
    if cluster.engine == "mysql":
        foreign = f"{uuid.UUID(int=7)}:{gtid.rpartition(':')[2]}"
    else:
        domain, _, number = gtid.split("-")
        foreign = f"{domain}-999-{number}"
    told = product.run(*restores.arguments(restores.new(), "--transaction", foreign), status=4)
    assert gtid in told
    too_early = (datetime.now(UTC) - timedelta(days=1)).isoformat()
    product.run(*restores.arguments(restores.new(), "--time", too_early), status=4)
    with restores.server(restores.restore("--transaction", gtid)) as server:
        assert rows(server) == ["ours"]


@pytest.mark.fault("clone-leaves-tables-out", "clone-plugin-absent")
@pytest.mark.engine("mysql")
def test_what_a_clone_cannot_do_is_refused(product: Product) -> None:
    cluster = product.cluster
    small(cluster)
    cluster.sql("CREATE TABLE d.other (i INT) ENGINE = MyISAM")
    told = product.run("backup", "db", status=1)
    assert "CS-2004" in told
    assert "d.other (MyISAM)" in told
    assert severities(product)["clone"] == "ok"
    cluster.sql("DROP TABLE d.other", "UNINSTALL PLUGIN clone")
    assert severities(product)["clone"] == "problem"
    assert "INSTALL PLUGIN clone" in product.run("backup", "db", status=1)
    cluster.sql(
        "INSTALL PLUGIN clone SONAME 'mysql_clone.so'",
        "CREATE USER weak@localhost",
        "GRANT REPLICATION SLAVE, REPLICATION CLIENT, SELECT ON *.* TO weak@localhost",
    )
    product.run("source", "remove", "db", "--yes")
    product.run("source", "add", "db", cluster.url_of("weak"))
    assert "CS-2003" in product.run("backup", "db", status=1)
    cluster.sql("GRANT BACKUP_ADMIN ON *.* TO weak@localhost")
    product.run("backup", "db")


@pytest.mark.fault("backup-program-of-another-series")
@pytest.mark.engine("mariadb")
def test_programs_of_another_series_and_missing_rights_are_told(product: Product, tmp_path: Path) -> None:
    cluster = product.cluster
    small(cluster)
    empty = tmp_path / "bin"
    empty.mkdir()
    (empty / "mariadb-backup").write_text(
        "#!/bin/sh\necho mariadb-backup based on MariaDB server 10.4.1-MariaDB\n"
    )
    (empty / "mariadb-backup").chmod(0o755)
    path = product.environment["PATH"]
    product.environment["PATH"] = f"{empty}:/bin"
    told = product.run("backup", "db", status=1)
    assert "CS-2010" in told
    assert "10.4.1" in told
    product.environment["PATH"] = path
    cluster.sql(
        "CREATE USER weak@localhost", "GRANT REPLICATION SLAVE, BINLOG MONITOR ON *.* TO weak@localhost"
    )
    product.run("source", "remove", "db", "--yes")
    product.run("source", "add", "db", cluster.url_of("weak"))
    assert "CS-2003" in product.run("backup", "db", status=1)
    assert product.json("list", "db") == []
    shutil.rmtree(empty)
