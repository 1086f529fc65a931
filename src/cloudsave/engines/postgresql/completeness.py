"""
Up to which instant the received log is complete: asked of the server, beside the stream.

A commit is acknowledged when its record has been inserted into the log, and by default written to disk as
well. With synchronous_commit = off it is acknowledged before it is written: up to three times
wal_writer_delay earlier when all goes well, by any time when a disk is slow. So neither the end of what is
written, which is all that the stream tells, nor a delay taken off the clock proves anything. The insert
position does:

Invariant: of an answer (instant, position), the instant was read before the position. Every commit
acknowledged before the instant was inserted before it, and so ends at or before the position, whatever its
setting. Once the log is received up to the position, it holds every commit acknowledged before the instant.

A standby knows nothing of what its primary acknowledges: it answers nothing.
Source: PostgreSQL RecordTransactionCommit(), src/backend/access/transam/xact.c; XLogBackgroundFlush(),
src/backend/access/transam/xlog.c.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from cloudsave.clock import Clock
from cloudsave.engines.postgresql.format_wal import parse_lsn
from cloudsave.engines.postgresql.replication import ReplicationConnection
from cloudsave.errors import CloudsaveError, EngineUnavailable

ASK_SECONDS = 0.5
"""The server is asked so long after it was asked last, or after log has come."""
ASK_SECONDS_MAX = 60.0
"""Limit: the pause between two questions, which doubles as long as no log comes."""
RETRY_SECONDS = 30.0
"""After a failure, such as a server without a free connection, the next attempt is made so much later."""
ANSWER_SECONDS_MAX = 30.0
"""Limit: an answer that has not come by then is given up, and so is the connection."""
_PAGE_BYTES = 8192
_SHORT_HEADER_BYTES, _LONG_HEADER_BYTES = 24, 40
"""Of a page, and of the first page of a log file."""

# `statement_timestamp()` is the time at which the question arrived: before any part of it is answered.
_QUESTION = """
SELECT (extract(epoch FROM pg_catalog.statement_timestamp()) * 1000000)::bigint AS instant_us,
       CASE WHEN NOT pg_catalog.pg_is_in_recovery()
            THEN pg_catalog.pg_current_wal_insert_lsn() END AS inserted,
       CASE WHEN NOT pg_catalog.pg_is_in_recovery()
            THEN pg_catalog.substr(pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_insert_lsn()), 1, 8)
            END AS branch
"""

_log = logging.getLogger("cloudsave.engines.postgresql")


class Completeness:
    """
    Asks one server about the log of one branch. Belongs to the thread that streams, and never keeps it
    waiting for an answer; only a new connection takes its time.
    """

    def __init__(
        self,
        connect: Callable[[], ReplicationConnection],
        *,
        branch: str,
        log_file_bytes: int,
        clock: Clock,
    ) -> None:
        """`connect` opens an SQL connection to the server that streams."""
        self._connect = connect
        self._branch = branch
        self._log_file_bytes = log_file_bytes
        self._connection: ReplicationConnection | None = None
        self._waiting = False
        self._answer: tuple[int, int] | None = None
        """(position, instant) that waits for the log."""
        self._received = 0
        self._asked_at = clock.monotonic()
        self._pause_seconds = ASK_SECONDS

    def until_us(self, received: int, *, now: float) -> int:
        """
        An instant such that every commit acknowledged before it is in the log before `received`; 0: nothing
        new is known.
        """
        if received > self._received:
            self._received, self._pause_seconds = received, ASK_SECONDS
        try:
            if self._waiting:
                self._listen(now)
            elif self._answer is None and now - self._asked_at >= self._pause_seconds:
                self._ask(now)
        except CloudsaveError as error:
            _log.warning("the server does not say how far its log goes: %s (%s)", error.message, error.detail)
            self.close()
            self._asked_at = now + RETRY_SECONDS
        if self._answer is None or self._answer[0] > received:
            return 0
        (_, instant_us), self._answer = self._answer, None
        return instant_us

    def close(self) -> None:
        """Leave the server. Never raises."""
        connection, self._connection = self._connection, None
        self._waiting = False
        if connection is not None:
            connection.close()

    def _ask(self, now: float) -> None:
        if self._connection is None:
            self._connection = self._connect()
        self._asked_at = now
        self._pause_seconds = min(2 * self._pause_seconds, ASK_SECONDS_MAX)
        self._connection.begin_query(_QUESTION)
        self._waiting = True

    def _listen(self, now: float) -> None:
        if self._connection is None:
            return
        answer = self._connection.poll_query()
        if answer is None:
            if now - self._asked_at > ANSWER_SECONDS_MAX:
                raise EngineUnavailable("could not hear the answer of the server", detail="It is silent.")
            return
        self._waiting = False
        row = answer[0].mappings()[0]
        if row["inserted"] and row["instant_us"] and row["branch"] == self._branch:
            inserted = parse_lsn(row["inserted"])
            needed = end_of_last_record(inserted, log_file_bytes=self._log_file_bytes)
            self._answer = (needed, int(row["instant_us"]))


def end_of_last_record(inserted: int, *, log_file_bytes: int) -> int:
    """
    Where the log ends that must be there. An insert position at the begin of a page is shown behind the
    page's header, which is written with the next record only.

    Source: PostgreSQL XLogBytePosToRecPtr(), src/backend/access/transam/xlog.c.
    """
    within = inserted % _PAGE_BYTES
    begin = inserted - within
    header = _LONG_HEADER_BYTES if begin % log_file_bytes == 0 else _SHORT_HEADER_BYTES
    return begin if within == header else inserted
