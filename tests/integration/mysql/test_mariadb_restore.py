"""MariaDB is backed up under load and comes back as it was at any transaction; what cannot be is refused."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from tools.provision_binlog import BinlogServer

from tests.integration.mysql.cluster import BinlogCluster, BinlogClusterFactory
from tests.integration.mysql.load import SCHEMAS, Acknowledged, Load
from tests.integration.mysql.product import Product
from tests.integration.mysql.restored import Restores, tables
from tests.integration.postgresql.cluster import poll

pytestmark = pytest.mark.engine("mariadb")
TARGETS = int(os.environ.get("CLOUDSAVE_TARGETS", "8"))
"""Random targets of each kind."""
PAGE_BYTES = 16384


@pytest.fixture
def product(
    binlog_clusters: BinlogClusterFactory, binlog_server: BinlogServer, tmp_path: Path
) -> Iterator[Product]:
    # The program reads the redo log once a second: with less of it the load would overtake it.
    made = Product(tmp_path, binlog_clusters.create(binlog_server, conf={"innodb_log_file_size": "512M"}))
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
        cursor.execute("SELECT @@last_gtid")
        gtid: str = cursor.fetchone()[0]
        return gtid


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
    by_gtid(load, restores, chance.sample(later, TARGETS))
    by_time(load, restores, chance.sample(later, TARGETS))
    whole = restores.restore("--latest")
    with restores.server(whole) as server:
        assert tables(server, SCHEMAS) == tables(cluster, SCHEMAS)
        assert ids(server) == {one.id for one in load.acknowledged}


def by_gtid(load: Load, restores: Restores, chosen: list[Acknowledged]) -> None:
    """One domain: transactions are in the order of their numbers."""
    for number, one in enumerate(chosen):
        exclusive = number % 2 == 0
        made = restores.restore("--transaction", one.gtid, *(["--exclusive"] if exclusive else []))
        with restores.server(made) as server:
            found = ids(server)
            tables(server, SCHEMAS)
        wanted = {other.id for other in load.acknowledged if other.number < one.number + (not exclusive)}
        assert found == wanted
        assert found != wanted ^ {one.id}, "one transaction more or less would have been seen"


def by_time(load: Load, restores: Restores, chosen: list[Acknowledged]) -> None:
    """Instants of MariaDB are whole seconds, the begin of which a commit bears."""
    for one in chosen:
        instant = datetime.fromtimestamp(int(one.answered), UTC)
        made = restores.restore("--time", instant.isoformat())
        with restores.server(made) as server:
            found = ids(server)
        must = {other.id for other in load.acknowledged if other.answered < int(one.answered)}
        must_not = {other.id for other in load.acknowledged if other.sent >= int(one.answered) + 1}
        assert must <= found
        assert not must_not & found


# ---- what is stored


def test_the_next_backup_stores_the_changed_pages_only(product: Product) -> None:
    cluster = product.cluster
    small(cluster)
    cluster.sql("INSERT INTO d.t (x) SELECT REPEAT(MD5(RAND()), 100) FROM d.seq_1_to_20000")
    cluster.restart()  # Else pages are in memory and in the redo log alone.
    product.run("backup", "db")
    first = product.json("show", newest(product))
    cluster.sql("UPDATE d.t SET x = REPEAT(MD5(RAND()), 100) WHERE id % 2000 = 0")
    cluster.restart()
    product.run("backup", "db")
    second = product.json("show", newest(product))
    assert second["statistics"]["blocks_stored"] < first["statistics"]["blocks_stored"] / 20
    assert second["corrupt_pages"] == []


def test_backup_that_is_killed_leaves_no_lock_and_the_next_one_is_complete(
    product: Product, restores: Restores
) -> None:
    cluster = product.cluster
    small(cluster)
    cluster.sql("INSERT INTO d.t (x) SELECT REPEAT('x', 1000) FROM d.seq_1_to_50000")
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


def test_a_transaction_of_another_server_is_not_taken_for_ours(product: Product, restores: Restores) -> None:
    cluster = product.cluster
    small(cluster)
    capture = product.capture()
    product.run("backup", "db")
    gtid = insert(cluster, "ours")
    in_log(product, "ours")
    product.stop(capture)
    domain, _, number = gtid.split("-")
    told = product.run(
        *restores.arguments(restores.new(), "--transaction", f"{domain}-999-{number}"), status=4
    )
    assert gtid in told
    too_early = (datetime.now(UTC) - timedelta(days=1)).isoformat()
    product.run(*restores.arguments(restores.new(), "--time", too_early), status=4)
    with restores.server(restores.restore("--transaction", gtid)) as server:
        assert rows(server) == ["ours"]


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
