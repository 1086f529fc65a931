"""
A load that a database may have, whose clients note outside of it what was acknowledged.

Each transaction adds one row to `ledger.rows` and works on other tables beside; DDL goes on all the time.
"""

from __future__ import annotations

import random
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field

import pymysql

from tests.integration.mysql.cluster import BinlogCluster

CLIENTS = 3
BIG_BYTES = 17 << 20
"""Above 16 MiB, where a packet of the protocol ends."""
SCHEMAS = ("ledger", "odd `name", "größe")
TABLES = (
    "CREATE DATABASE ledger CHARACTER SET utf8mb4",
    "CREATE DATABASE `odd ``name` CHARACTER SET utf8mb4",
    "CREATE DATABASE `größe` CHARACTER SET utf8mb4",
    "CREATE TABLE ledger.`rows` (id INT PRIMARY KEY, client INT, x VARCHAR(200))",
    "CREATE TABLE ledger.big (id INT PRIMARY KEY AUTO_INCREMENT, x LONGTEXT)",
    "CREATE TABLE ledger.parts (id INT PRIMARY KEY, x VARCHAR(50)) PARTITION BY HASH (id) PARTITIONS 3",
    "CREATE TABLE ledger.packed (id INT PRIMARY KEY AUTO_INCREMENT, x TEXT) ROW_FORMAT = COMPRESSED",
    "CREATE TABLE `odd ``name`.`ta``ble` (a INT, b INT AS (a * 2) STORED, c INT AS (a + 1) VIRTUAL)",
    "CREATE TABLE `größe`.`tisch` (id INT PRIMARY KEY AUTO_INCREMENT, x VARCHAR(50))",
)


@dataclass(frozen=True)
class Acknowledged:
    """A committed row, and the instants between which the server committed it."""

    id: int
    sent: float
    answered: float


@dataclass
class Load:
    """Clients and a thread of DDL. Order: start, wait_for..., stop."""

    cluster: BinlogCluster
    acknowledged: list[Acknowledged] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _failures: list[BaseException] = field(default_factory=list)

    def start(self) -> None:
        """Make the tables, and begin."""
        self.cluster.sql(*TABLES)
        # A clone of MySQL has no other tables than InnoDB's; it is refused where there are such.
        engine = "MyISAM" if self.cluster.engine == "mariadb" else "InnoDB"
        self.cluster.sql(f"CREATE TABLE ledger.beside (id INT) ENGINE = {engine}")
        works = [*(lambda n=number: self._client(n) for number in range(CLIENTS)), self._ddl]
        self._threads = [threading.Thread(target=self._guard, args=(work,)) for work in works]
        for thread in self._threads:
            thread.start()

    def wait_for(self, count: int) -> None:
        """Return when so many rows more are acknowledged."""
        wanted = len(self.acknowledged) + count
        deadline = time.monotonic() + 120
        while len(self.acknowledged) < wanted and not self._failures:
            assert time.monotonic() < deadline, "the load stands still"
            self._stop.wait(0.02)

    def stop(self) -> None:
        """End; every commit that was answered is noted."""
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=120)
            assert not thread.is_alive()
        if self._failures:
            raise self._failures[0]

    def _guard(self, work: object) -> None:
        try:
            work()  # type: ignore[operator]
        except BaseException as error:  # noqa: BLE001 - raised again by `stop`
            self._failures.append(error)

    def _client(self, number: int) -> None:
        chance = random.Random(number)
        count = 0
        with self.cluster.connect() as session, session.cursor() as cursor:
            while not self._stop.is_set():
                row = count * CLIENTS + number
                sent = time.time()
                cursor.execute("BEGIN")
                self._work(cursor, chance, row)
                cursor.execute(
                    "INSERT INTO ledger.`rows` VALUES (%s, %s, %s)", (row, number, f"zeile-{row}-äöü-😀")
                )
                cursor.execute("COMMIT")
                answered = time.time()
                with self._lock:
                    self.acknowledged.append(Acknowledged(row, sent, answered))
                self._beside(cursor, chance, row)
                count += 1
                self._stop.wait(chance.random() / 50)

    @staticmethod
    def _work(cursor: pymysql.cursors.Cursor, chance: random.Random, row: int) -> None:
        cursor.execute("INSERT INTO ledger.parts VALUES (%s, 'p')", (row,))
        cursor.execute("INSERT INTO ledger.packed (x) VALUES (REPEAT(%s, 300))", (f"{row}",))
        cursor.execute("INSERT INTO `odd ``name`.`ta``ble` (a) VALUES (%s)", (row,))
        if chance.random() < 0.3:
            cursor.execute("CREATE TEMPORARY TABLE IF NOT EXISTS ledger.tmp (x INT)")
            cursor.execute("INSERT INTO ledger.tmp VALUES (%s)", (row,))
            cursor.execute("INSERT INTO `größe`.`tisch` (x) SELECT x FROM ledger.tmp")
            cursor.execute("DROP TEMPORARY TABLE ledger.tmp")
        if chance.random() < 0.3:
            cursor.execute("DELETE FROM ledger.parts WHERE id = %s", (row - CLIENTS,))

    @staticmethod
    def _beside(cursor: pymysql.cursors.Cursor, chance: random.Random, row: int) -> None:
        if chance.random() < 0.2:
            cursor.execute("INSERT INTO ledger.beside VALUES (%s)", (row,))
        if chance.random() < 0.1:
            name = f"xa-{row}"
            cursor.execute(f"XA START '{name}'")
            cursor.execute("INSERT INTO `größe`.`tisch` (x) VALUES ('xa')")
            cursor.execute(f"XA END '{name}'")
            cursor.execute(f"XA PREPARE '{name}'")
            cursor.execute(f"XA {'COMMIT' if chance.random() < 0.7 else 'ROLLBACK'} '{name}'")

    def _ddl(self) -> None:
        number = 0
        with self.cluster.connect() as session, session.cursor() as cursor:
            cursor.execute("SET SESSION lock_wait_timeout = 60")
            while not self._stop.is_set():
                number += 1
                table = f"ledger.ddl_{number % 7}"
                cursor.execute(f"DROP TABLE IF EXISTS {table}, {table}_b")
                cursor.execute(f"CREATE TABLE {table} (i INT PRIMARY KEY, x TEXT)")
                cursor.execute(f"INSERT INTO {table} VALUES ({number}, REPEAT('d', 3000))")
                cursor.execute(f"ALTER TABLE {table} ADD COLUMN y INT DEFAULT 7")
                if number % 3 == 0:
                    cursor.execute(f"RENAME TABLE {table} TO {table}_b")
                elif number % 3 == 1:
                    cursor.execute(f"TRUNCATE TABLE {table}")
                if number % 10 == 0:
                    cursor.execute("INSERT INTO ledger.big (x) VALUES (REPEAT('B', %s))", (BIG_BYTES,))
                if number % 12 == 0:
                    with suppress(pymysql.Error):
                        cursor.execute("FLUSH BINARY LOGS")
                self._stop.wait(0.02)
