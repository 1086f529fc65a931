"""A workload of everything that changes files in an own way, decided by a seed."""

from __future__ import annotations

import random
from collections.abc import Callable

import psycopg

from tests.integration.postgresql.cluster import Cluster

CONF = {"autovacuum": "off", "max_prepared_transactions": "5", "checkpoint_timeout": "1h"}
TABLESPACES = ("apart", "aside")
TABLES = ("plain", "wide")
ROWS = 4000


class Shaker:
    """Shakes a server that was made with CONF and TABLESPACES."""

    def __init__(self, cluster: Cluster, seed: int) -> None:
        self.cluster = cluster
        self.random = random.Random(seed)
        self.databases: list[str] = []
        self.number = 0
        self.done: list[str] = []

    def prepare(self) -> None:
        """Make the tables."""
        with self.cluster.connect() as connection:
            for table in TABLES:
                connection.execute(f"CREATE TABLE {table} (id int, note text, place point, words text[])")
                self._fill(connection, table, ROWS)
                connection.execute(f"CREATE INDEX {table}_id ON {table} (id)")
            connection.execute("CREATE INDEX plain_hash ON plain USING hash (id)")
            connection.execute("CREATE INDEX plain_brin ON plain USING brin (id) WITH (pages_per_range = 4)")
            connection.execute("CREATE INDEX wide_gin ON wide USING gin (words)")
            connection.execute("CREATE INDEX wide_gist ON wide USING gist (place)")
            connection.execute("CREATE INDEX wide_spgist ON wide USING spgist (place)")
            connection.execute("CREATE UNLOGGED TABLE fleeting (id int, note text)")
            connection.execute("CREATE SEQUENCE counter")
            self._fill_fleeting(connection)

    def shake(self, steps: int) -> None:
        """Do some of everything; at last a small update and a read of everything."""
        actions = self._actions()
        with self.cluster.connect() as connection:
            for _ in range(steps):
                action = self.random.choice(actions)
                self.done.append(action.__name__)
                action(connection)
            self._update(connection)
            self._read(connection)

    def everything(self) -> None:
        """Each action once, in an order of chance."""
        actions = self._actions()
        self.random.shuffle(actions)
        with self.cluster.connect() as connection:
            for action in actions:
                self.done.append(action.__name__)
                action(connection)

    def _actions(self) -> list[Callable[[psycopg.Connection], None]]:
        return [
            self._insert,
            self._update,
            self._update,
            self._delete,
            self._vacuum,
            self._vacuum_full,
            self._cluster,
            self._truncate,
            self._truncate_and_roll_back,
            self._shrink,
            self._index,
            self._reindex,
            self._switch_logged,
            self._move,
            self._make_database,
            self._move_database,
            self._drop_database,
            self._make_and_drop,
            self._roll_back,
            self._two_phases,
            self._count,
            self._read,
            self._checkpoint,
        ]

    def _table(self) -> str:
        return self.random.choice(TABLES)

    def _fill(self, connection: psycopg.Connection, table: str, rows: int) -> None:
        first = self.random.randrange(1_000_000)
        connection.execute(
            f"INSERT INTO {table} SELECT n, repeat(md5(n::text), 1 + n %% 20), point(n %% 100, n / 100),"
            " ARRAY['word' || n %% 50, 'other' || n] FROM generate_series(%s::int, %s) n",
            (first, first + rows - 1),
        )

    def _fill_fleeting(self, connection: psycopg.Connection) -> None:
        connection.execute("INSERT INTO fleeting SELECT n, md5(n::text) FROM generate_series(1, 3000) n")

    def _insert(self, connection: psycopg.Connection) -> None:
        self._fill(connection, self._table(), self.random.choice([1, 50, 2000]))

    def _update(self, connection: psycopg.Connection) -> None:
        part = self.random.choice([3, 40, 400])
        connection.execute(
            f"UPDATE {self._table()} SET note = note || 'x' WHERE id % {part} = {self.random.randrange(3)}"
        )

    def _delete(self, connection: psycopg.Connection) -> None:
        connection.execute(f"DELETE FROM {self._table()} WHERE id % 17 = {self.random.randrange(17)}")

    def _vacuum(self, connection: psycopg.Connection) -> None:
        connection.execute(f"VACUUM {self.random.choice(['', '(FREEZE)', 'ANALYZE'])} {self._table()}")

    def _vacuum_full(self, connection: psycopg.Connection) -> None:
        connection.execute(f"VACUUM FULL {self._table()}")

    def _cluster(self, connection: psycopg.Connection) -> None:
        table = self._table()
        connection.execute(f"CLUSTER {table} USING {table}_id")

    def _truncate(self, connection: psycopg.Connection) -> None:
        table = self._table()
        with connection.transaction():
            connection.execute(f"TRUNCATE {table}")
            self._fill(connection, table, 100)
        self._fill(connection, table, ROWS)

    def _truncate_and_roll_back(self, connection: psycopg.Connection) -> None:
        with connection.transaction(force_rollback=True):
            connection.execute("TRUNCATE plain")
            self._fill(connection, "plain", 500)

    def _shrink(self, connection: psycopg.Connection) -> None:
        """Delete the end, let VACUUM cut it off, and let the file grow again."""
        table = self._table()
        connection.execute(
            f"DELETE FROM {table} WHERE (ctid::text::point)[0] >"
            f" (SELECT max((ctid::text::point)[0]) / 2 FROM {table})"
        )
        connection.execute(f"VACUUM {table}")
        self._fill(connection, table, self.random.choice([10, 3000]))

    def _index(self, connection: psycopg.Connection) -> None:
        self.number += 1
        how = self.random.choice(["", "CONCURRENTLY"])
        connection.execute(f"CREATE INDEX {how} more_{self.number} ON plain (note, id)")

    def _reindex(self, connection: psycopg.Connection) -> None:
        connection.execute(f"REINDEX TABLE {self._table()}")

    def _switch_logged(self, connection: psycopg.Connection) -> None:
        connection.execute("ALTER TABLE fleeting SET LOGGED")
        self._fill_fleeting(connection)
        if self.random.random() < 0.5:
            connection.execute("ALTER TABLE fleeting SET UNLOGGED")

    def _move(self, connection: psycopg.Connection) -> None:
        space = self.random.choice(["pg_default", *TABLESPACES])
        connection.execute(f"ALTER TABLE {self._table()} SET TABLESPACE {space}")

    def _make_database(self, connection: psycopg.Connection) -> None:
        self.number += 1
        name = f"made_{self.number}"
        strategies = (
            ["", " STRATEGY wal_log", " STRATEGY file_copy"] if int(self.cluster.major) >= 15 else [""]
        )
        space = self.random.choice(["", " TABLESPACE apart"])
        connection.execute(f"CREATE DATABASE {name}{self.random.choice(strategies)}{space}")
        self.databases.append(name)
        self._use_database(name)

    def _move_database(self, connection: psycopg.Connection) -> None:
        if self.databases:
            name = self.random.choice(self.databases)
            space = self.random.choice(["pg_default", *TABLESPACES])
            connection.execute(f"ALTER DATABASE {name} SET TABLESPACE {space}")
            self._use_database(name)

    def _use_database(self, name: str) -> None:
        self.number += 1
        with self.cluster.connect(dbname=name) as inside:
            inside.execute(f"CREATE TABLE t_{self.number} AS SELECT generate_series(1, 500)")

    def _drop_database(self, connection: psycopg.Connection) -> None:
        if self.databases:
            connection.execute(f"DROP DATABASE {self.databases.pop()}")

    def _make_and_drop(self, connection: psycopg.Connection) -> None:
        self.number += 1
        connection.execute(f"CREATE TABLE brief_{self.number} AS SELECT generate_series(1, 2000) n")
        if self.number % 2:
            connection.execute(f"DROP TABLE brief_{self.number}")

    def _roll_back(self, connection: psycopg.Connection) -> None:
        with connection.transaction(force_rollback=True):
            connection.execute("CREATE TABLE never AS SELECT generate_series(1, 2000) n")
            self._update(connection)

    def _two_phases(self, connection: psycopg.Connection) -> None:
        self.number += 1
        connection.execute(f"CREATE TABLE doomed_{self.number} AS SELECT generate_series(1, 900) n")
        connection.execute("BEGIN")
        connection.execute(f"DROP TABLE doomed_{self.number}")
        connection.execute(f"CREATE TABLE second_{self.number} AS SELECT generate_series(1, 900) n")
        connection.execute(f"PREPARE TRANSACTION 'both_{self.number}'")
        connection.execute(f"{self.random.choice(['COMMIT', 'ROLLBACK'])} PREPARED 'both_{self.number}'")

    def _count(self, connection: psycopg.Connection) -> None:
        connection.execute("SELECT nextval('counter') FROM generate_series(1, 100)")

    def _read(self, connection: psycopg.Connection) -> None:
        """Sets hint bits, and marks index entries of dead rows."""
        for table in TABLES:
            connection.execute(f"SELECT count(*) FROM {table}")
            with connection.transaction():
                connection.execute("SET LOCAL enable_seqscan = off")
                connection.execute(f"SELECT count(*) FROM {table} WHERE id > 0")

    def _checkpoint(self, connection: psycopg.Connection) -> None:
        connection.execute("CHECKPOINT")
