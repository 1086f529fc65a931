"""
No acknowledged commit is lost: clients note outside what was acknowledged; capture and server are killed.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pymysql
import pytest
from tools.provision_binlog import BinlogServer

from tests.integration.mysql.cluster import BinlogCluster, BinlogClusterFactory
from tests.integration.mysql.product import Product
from tests.integration.postgresql.cluster import poll

CLIENTS = 3
ROUNDS = 4
COMMITS_PER_ROUND = 60
WAIT_FOR_EVER_MS = "1000000000"
SEMI_SYNC = {
    "mysql": {
        "plugin_load_add": "semisync_source.so",
        "rpl_semi_sync_source_enabled": "ON",
        "rpl_semi_sync_source_timeout": WAIT_FOR_EVER_MS,
    },
    "mariadb": {
        "rpl_semi_sync_master_enabled": "ON",
        "rpl_semi_sync_master_timeout": WAIT_FOR_EVER_MS,
        "rpl_semi_sync_master_wait_point": "AFTER_SYNC",
    },
}


class Clients:
    """Commit rows with markers of their own, and note each that was acknowledged."""

    def __init__(self, cluster: BinlogCluster, name: str) -> None:
        self.acknowledged: list[bytes] = []
        self._cluster = cluster
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._work, args=(f"{name}-{number}",)) for number in range(CLIENTS)
        ]
        for thread in self._threads:
            thread.start()

    def wait_for(self, count: int, product: Product) -> None:
        """Return when so many commits are acknowledged."""
        poll(
            lambda: len(self.acknowledged) >= count,
            f"{count} commits are acknowledged; capture said: {product.said()[-800:]}",
        )

    def join(self) -> None:
        """End; what is not acknowledged by then is not noted."""
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=60)
            assert not thread.is_alive()

    def _work(self, name: str) -> None:
        number = 0
        with suppress(pymysql.Error, OSError), self._cluster.connect() as session, session.cursor() as cursor:
            while not self._stop.is_set():
                marker = f"<{name}-{number}>"
                cursor.execute("INSERT INTO d.t (x) VALUES (%s)", (marker,))
                self.acknowledged.append(marker.encode())
                number += 1


def _lost(product: Product, acknowledged: list[bytes]) -> list[bytes]:
    log = b"".join(product.stored_files().values())
    return [marker for marker in acknowledged if marker not in log]


@pytest.fixture
def waiting_server(binlog_clusters: BinlogClusterFactory, binlog_server: BinlogServer) -> BinlogCluster:
    cluster = binlog_clusters.create(binlog_server)
    cluster.sql("CREATE DATABASE d", "CREATE TABLE d.t (id INT PRIMARY KEY AUTO_INCREMENT, x TEXT)")
    cluster.stop()
    cluster.conf.update(SEMI_SYNC[cluster.engine])
    cluster.start()
    return cluster


@pytest.fixture
def product(waiting_server: BinlogCluster, tmp_path: Path) -> Iterator[Product]:
    made = Product(tmp_path, waiting_server)
    yield made
    made.close()


@pytest.mark.fault(
    "binlog-server-and-capture-killed", control="test_oracle_notices_commits_that_capture_alone_would_lose"
)
def test_every_acknowledged_commit_is_stored_when_both_are_killed(product: Product) -> None:
    if product.cluster.engine == "mariadb":
        # It could not be told where its log ends while a commit waits: refused, not tried.
        said = product.run("logs", "capture", "db", "--synchronous", status=2)
        assert "cannot capture mariadb with --synchronous" in said
        return
    cluster, chance = product.cluster, random.Random(7)
    acknowledged: list[bytes] = []
    for number in range(ROUNDS):
        capture = product.capture("--synchronous")
        clients = Clients(cluster, f"round{number}")
        clients.wait_for(chance.randrange(COMMITS_PER_ROUND // 2, COMMITS_PER_ROUND), product)
        if chance.random() < 0.5:
            capture.kill()
            cluster.crash()
        else:
            cluster.crash()
            capture.kill()
        capture.wait()
        clients.join()
        acknowledged += clients.acknowledged
        # Neither has run since: what is stored now was stored before each of them was acknowledged.
        assert _lost(product, acknowledged) == []
        cluster.start()
    assert len(acknowledged) >= ROUNDS * COMMITS_PER_ROUND // 2


def test_oracle_notices_commits_that_capture_alone_would_lose(
    binlog_cluster: BinlogCluster, tmp_path: Path
) -> None:
    cluster = binlog_cluster
    cluster.sql("CREATE DATABASE d", "CREATE TABLE d.t (id INT PRIMARY KEY AUTO_INCREMENT, x TEXT)")
    product = Product(tmp_path, cluster, rpo_seconds=600)
    try:
        first = product.capture()
        poll(lambda: "streaming" in product.said(), "capture streams")
        product.stop(first)
        capture = product.capture()
        clients = Clients(cluster, "late")
        clients.wait_for(20, product)
        capture.kill()
        capture.wait()
        clients.join()
        assert _lost(product, clients.acknowledged)
    finally:
        product.close()
