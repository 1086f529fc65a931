"""
The canary commit of PostgreSQL, and the log that a slot holds back.

A transactional message makes a commit record without any table, and every role may write one (seen on 14 to
18). The session commits with synchronous_commit = local: a canary must not wait for standbys.
Source: LogLogicalMessage(), src/backend/replication/logical/message.c.
"""

from __future__ import annotations

from contextlib import suppress

import psycopg

from cloudsave.engines.postgresql.connection import connect, translate
from cloudsave.engines.postgresql.format_wal import parse_lsn

STATEMENT_TIMEOUT_MS = 10_000
"""Limit: a server that answers at all answers within this."""
PREFIX = "cloudsave"
_SETTINGS = f"set synchronous_commit = local; set statement_timeout = {STATEMENT_TIMEOUT_MS}"
_EMIT = "select pg_logical_emit_message(true, %s, 'canary')"
_RETAINED = """
select pg_wal_lsn_diff(
    case when pg_is_in_recovery() then pg_last_wal_replay_lsn() else pg_current_wal_lsn() end, restart_lsn
)::bigint from pg_replication_slots where slot_name = %s
"""


class PostgresWatch:
    """See `engines.watch_api.SourceWatch`."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._connection: psycopg.Connection | None = None

    def beat(self) -> int | None:
        """See `SourceWatch.beat`."""
        if self._value("select pg_is_in_recovery()"):
            return None
        self._value(_EMIT, PREFIX)
        return parse_lsn(str(self._value("select pg_current_wal_flush_lsn()::text")))

    def retained_bytes(self, slot: str) -> int | None:
        """See `SourceWatch.retained_bytes`."""
        found = self._value(_RETAINED, slot)
        return None if found is None else int(str(found))

    def close(self) -> None:
        """See `SourceWatch.close`."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(psycopg.Error):
                connection.close()

    def _value(self, statement: str, *parameters: str) -> object:
        """The one value of a statement; after an error the next one connects anew."""
        if self._connection is None:
            self._connection = connect(self._url, application_name="cloudsave watch")
        try:
            self._connection.execute(_SETTINGS)
            row = self._connection.execute(statement, parameters).fetchone()
        except psycopg.Error as error:
            self.close()
            raise translate(error, "watch the source") from None
        return row[0] if row else None
