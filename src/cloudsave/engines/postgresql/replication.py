"""
The replication protocol over `psycopg.pq`: commands, COPY OUT (base backups), COPY BOTH (the log).

One thread uses a connection; only `wake` may be called from others. Every wait is a poll on the socket, so
that other threads run meanwhile: `get_copy_data` in blocking mode would hold the interpreter's lock.
Source: PostgreSQL manual, Streaming Replication Protocol; libpq, asynchronous command processing.
"""

from __future__ import annotations

import contextlib
import re
import select
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

import psycopg
from psycopg import pq
from psycopg.conninfo import make_conninfo

from cloudsave.clock import SYSTEM_CLOCK, Clock
from cloudsave.engines.postgresql.connection import with_database
from cloudsave.errors import (
    CaptureRunning,
    CloudsaveError,
    EngineError,
    EngineUnavailable,
    LogRemoved,
    PermissionMissing,
    SlotLost,
    UnsuitableSettings,
)

CONNECT_SECONDS_MAX = 30.0
"""Limit: a connection is established within this."""
COMMAND_SECONDS_MAX = 120.0
"""Limit: silence of the server after a command; a base backup's checkpoint has its own."""
_FINISH_SECONDS_MAX = 10.0
"""Limit: waiting for the server to leave COPY mode when we end it."""

_ROWS = (pq.ExecStatus.TUPLES_OK,)
_NOTHING = (pq.ExecStatus.COMMAND_OK, pq.ExecStatus.EMPTY_QUERY)
_COPIES = (pq.ExecStatus.COPY_IN, pq.ExecStatus.COPY_OUT, pq.ExecStatus.COPY_BOTH)

_NO_REPLICATION = re.compile("superuser or replication role|start WAL sender")
_NO_WAL_SENDERS = re.compile(r"max_wal_senders\W+currently 0\)")
_LOG_FILE = re.compile(r"\b[0-9A-F]{24}\b")
"""The name of a WAL segment, which is the same in every language that a server speaks."""
_REMOVED = re.compile("WAL segment [0-9A-F]{24} has already been removed")
"""
The state is that of an internal error where the server notices it only after it has read the segment: it is
made of an `errno` that nothing has set. Source: CheckXLogRemoved(), src/backend/access/transam/xlog.c.
"""
_RETRYABLE_CLASSES = ("08", "53", "57")
"""SQLSTATE classes: connection, resources, operator intervention."""


@dataclass(frozen=True, slots=True)
class Rows:
    """A result set in text form."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str | None, ...], ...]

    def mappings(self) -> list[dict[str, str | None]]:
        """Each row by column name."""
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]


class CopyMark(Enum):
    """Where a stream of copy data begins and ends (before PostgreSQL 15 a base backup has several)."""

    BEGIN = "begin"
    END = "end"


CopyEvent = Rows | CopyMark | memoryview


def literal(text: str) -> str:
    """A string constant of the replication command grammar."""
    return "'" + text.replace("'", "''") + "'"


def translate_error(message: str, sqlstate: str, *, doing: str) -> CloudsaveError:
    """The error of ours for what a server said while `doing` something."""
    text = " ".join(message.split()).removeprefix("ERROR:").removeprefix("FATAL:").strip()
    detail = f"The server said: {text}" if text else "The server closed the connection."
    if (sqlstate == "58P01" and _LOG_FILE.search(text)) or (sqlstate == "XX000" and _REMOVED.search(text)):
        return LogRemoved("the server has removed log that is needed", detail=detail)
    if sqlstate == "55006":
        return CaptureRunning("replication slot is in use", detail=detail)
    if sqlstate in ("42704", "55000") and "slot" in text.lower():
        return SlotLost("replication slot cannot be used", detail=detail)
    if sqlstate == "42501" or sqlstate.startswith("28"):
        return PermissionMissing(
            f"role may not {doing}",
            detail=detail,
            hints=[
                "as a superuser: ALTER ROLE <role> REPLICATION;"
                if _NO_REPLICATION.search(text)
                else "does the role have LOGIN and REPLICATION?",
                'does pg_hba.conf have a line for database "replication" and this role?',
            ],
        )
    if not sqlstate or sqlstate[:2] in _RETRYABLE_CLASSES:
        return EngineUnavailable(f"could not {doing}", detail=detail)
    return EngineError(f"could not {doing}", detail=f"{detail} (SQLSTATE {sqlstate})")


class ReplicationConnection:
    """A connection in physical replication mode."""

    def __init__(self, pgconn: pq.abc.PGconn, *, clock: Clock) -> None:
        self._pgconn = pgconn
        self._clock = clock
        self._poll = select.poll()
        self._poll.register(pgconn.socket, select.POLLIN)
        self._wake_receiver, self._wake_sender = socket.socketpair()
        self._wake_receiver.settimeout(0)
        self._wake_sender.settimeout(0)
        self._poll.register(self._wake_receiver.fileno(), select.POLLIN)
        self._heard_at = clock.monotonic()

    @classmethod
    def open(
        cls,
        conninfo: str,
        *,
        replication: bool = True,
        clock: Clock = SYSTEM_CLOCK,
        timeout_seconds: float = CONNECT_SECONDS_MAX,
    ) -> ReplicationConnection:
        """
        Connect with `replication=true` added to `conninfo`; without `replication`, for plain SQL by `query`.

        Raises: EngineUnavailable, PermissionMissing.
        """
        try:
            wanted = make_conninfo(
                conninfo if replication else with_database(conninfo),
                replication="true" if replication else "false",
                client_encoding="UTF8",
            )
        except psycopg.Error:
            # No text of libpq: it quotes what it could not parse, which may be a password.
            raise EngineError("cannot use connection string") from None
        pgconn = _connect(wanted, clock=clock, timeout_seconds=timeout_seconds)
        return cls(pgconn, clock=clock)

    @property
    def server_version(self) -> int:
        """Such as 180006."""
        return self._pgconn.server_version

    def parameter(self, name: str) -> str | None:
        """A setting that the server reported when connecting."""
        value = self._pgconn.parameter_status(name.encode())
        return None if value is None else value.decode()

    @property
    def silent_seconds(self) -> float:
        """Time since the server last sent anything."""
        return self._clock.monotonic() - self._heard_at

    def wake(self) -> None:
        """Let a `receive` that waits in another thread return now."""
        with contextlib.suppress(OSError):
            self._wake_sender.send(b"w")

    def query(self, sql: str, *, timeout_seconds: float = COMMAND_SECONDS_MAX) -> list[Rows]:
        """Run one replication command to its end; all its result sets."""
        found: list[Rows] = []
        for event in self.copy_out(sql, timeout_seconds=timeout_seconds):
            if not isinstance(event, Rows):
                raise EngineError("server began to copy unasked", detail=f"The command was: {sql}")
            found.append(event)
        return found

    def begin_query(self, sql: str) -> None:
        """Send one command; `poll_query` gives its result sets."""
        self._send(sql)

    def poll_query(self) -> list[Rows] | None:
        """The result sets of what `begin_query` sent; None as long as they have not come. Never waits."""
        try:
            self._pgconn.consume_input()
            if self._pgconn.is_busy():
                return None
        except psycopg.Error as error:
            raise self._lost(error, doing="hear the server's answer") from None
        found = []
        while (
            result := self._next_result(COMMAND_SECONDS_MAX, doing="hear the server's answer")
        ) is not None:
            if result.status not in _ROWS:
                raise self._refused(result, doing="hear the server's answer")
            found.append(_rows(result))
        return found

    def beside(self, conninfo: str) -> str:
        """`conninfo`, which may name several servers, of the one that this connection is with."""
        place = {
            name: value.decode()
            for name in ("host", "hostaddr", "port")
            if (value := getattr(self._pgconn, name))
        }
        return make_conninfo(conninfo, **place)

    def copy_out(self, sql: str, *, timeout_seconds: float = COMMAND_SECONDS_MAX) -> Iterator[CopyEvent]:
        """
        Run a command that may copy data to us, such as BASE_BACKUP.

        Yields result sets, `CopyMark.BEGIN`, each copy message as a read-only view (valid for as long as it
        is referenced), `CopyMark.END`, in the order of the protocol. Ends when the command is complete.
        `timeout_seconds` bounds each silence of the server, not the whole. Abandoning the iteration leaves
        the connection unusable but for `close`.
        """
        self._send(sql)
        while True:
            result = self._next_result(timeout_seconds, doing=_name(sql))
            if result is None:
                return
            if result.status in _ROWS:
                yield _rows(result)
            elif result.status == pq.ExecStatus.COPY_OUT:
                yield CopyMark.BEGIN
                while (data := self._copy_message(timeout_seconds, doing=_name(sql))) is not None:
                    yield data
                yield CopyMark.END
            elif result.status not in _NOTHING:
                raise self._refused(result, doing=_name(sql))

    def begin_copy_both(self, sql: str, *, timeout_seconds: float = COMMAND_SECONDS_MAX) -> list[Rows] | None:
        """
        Run START_REPLICATION. None: the stream is open. Rows: the server had nothing to stream (the
        position was the end of an old timeline) and the command is complete.
        """
        self._send(sql)
        result = self._next_result(timeout_seconds, doing=_name(sql))
        if result is not None and result.status == pq.ExecStatus.COPY_BOTH:
            return None
        rows: list[Rows] = []
        while result is not None:
            if result.status in _ROWS:
                rows.append(_rows(result))
            elif result.status not in _NOTHING:
                raise self._refused(result, doing=_name(sql))
            result = self._next_result(timeout_seconds, doing=_name(sql))
        return rows

    def receive(self, *, wait_seconds: float) -> memoryview | list[Rows] | None:
        """
        The next message of an open stream; None when nothing came within `wait_seconds` or `wake` was
        called; result sets when the server ended the stream (they say where to go on).
        """
        size, data = self._get_copy_data()
        if size == 0:
            if not self._wait(wait_seconds):
                return None
            size, data = self._get_copy_data()
            if size == 0:
                return None
        if size > 0:
            return data
        return self._finish_copy(COMMAND_SECONDS_MAX)

    def send(self, message: bytes) -> None:
        """Send one message on an open stream."""
        try:
            self._pgconn.put_copy_data(message)
            self._pgconn.flush()
        except psycopg.Error as error:
            raise self._lost(error, doing="send to the server") from None

    def end_copy_both(self) -> None:
        """End an open stream from our side, discarding what still comes; gives up after a moment."""
        try:
            self._pgconn.put_copy_end()
            deadline = self._clock.monotonic() + _FINISH_SECONDS_MAX
            while self._clock.monotonic() < deadline:
                size, _ = self._get_copy_data()
                if size < 0:
                    self._finish_copy(_FINISH_SECONDS_MAX)
                    return
                if size == 0:
                    self._wait(1.0)
        except (psycopg.Error, CloudsaveError):
            return

    def close(self) -> None:
        """Leave. Never raises."""
        with contextlib.suppress(psycopg.Error):
            self._pgconn.finish()
        self._wake_receiver.close()
        self._wake_sender.close()

    def _send(self, sql: str) -> None:
        try:
            self._pgconn.send_query(sql.encode())
            while self._pgconn.flush():
                self._wait(1.0)
        except psycopg.Error as error:
            raise self._lost(error, doing=_name(sql)) from None
        self._heard_at = self._clock.monotonic()

    def _next_result(self, timeout_seconds: float, *, doing: str) -> pq.abc.PGresult | None:
        try:
            while self._pgconn.is_busy():
                self._await_server(timeout_seconds, doing=doing)
            return self._pgconn.get_result()
        except psycopg.Error as error:
            raise self._lost(error, doing=doing) from None

    def _copy_message(self, timeout_seconds: float, *, doing: str) -> memoryview | None:
        while True:
            size, data = self._get_copy_data()
            if size > 0:
                return data
            if size < 0:
                return None
            self._await_server(timeout_seconds, doing=doing)

    def _get_copy_data(self) -> tuple[int, memoryview]:
        try:
            return self._pgconn.get_copy_data(1)
        except psycopg.Error as error:
            raise self._lost(error, doing="receive from the server") from None

    def _finish_copy(self, timeout_seconds: float) -> list[Rows]:
        """The server ended COPY: read the results that follow (an error among them raises)."""
        rows: list[Rows] = []
        answered = False
        while (result := self._next_result(timeout_seconds, doing="stream the log")) is not None:
            if result.status in _ROWS:
                rows.append(_rows(result))
            elif result.status in _COPIES:
                # The server has sent CopyDone and waits for ours.
                if not answered:
                    self._pgconn.put_copy_end()
                    self._pgconn.flush()
                    answered = True
                else:
                    raise EngineError("server left the protocol", detail="A second COPY began unasked.")
            elif result.status not in _NOTHING:
                raise self._refused(result, doing="stream the log")
        return rows

    def _await_server(self, timeout_seconds: float, *, doing: str) -> None:
        if not self._wait(min(1.0, timeout_seconds)) and self.silent_seconds > timeout_seconds:
            raise EngineUnavailable(
                f"could not {doing}", detail=f"The server was silent for {timeout_seconds:.0f} s."
            )

    def _wait(self, seconds: float) -> bool:
        """Wait for input and take it in; False when none came."""
        ready = dict(self._poll.poll(max(0, int(seconds * 1000))))
        if self._wake_receiver.fileno() in ready:
            with contextlib.suppress(BlockingIOError):
                self._wake_receiver.recv(4096)
        if self._pgconn.socket not in ready:
            return False
        try:
            self._pgconn.consume_input()
        except psycopg.Error as error:
            raise self._lost(error, doing="receive from the server") from None
        self._heard_at = self._clock.monotonic()
        return True

    def _refused(self, result: pq.abc.PGresult, *, doing: str) -> CloudsaveError:
        """The error that `result` carries; what follows it is drained, so that a next command can run."""
        error = _result_error(result, doing=doing)
        with contextlib.suppress(CloudsaveError):
            while self._next_result(_FINISH_SECONDS_MAX, doing=doing) is not None:
                pass
        return error

    def _lost(self, error: psycopg.Error, *, doing: str) -> CloudsaveError:
        return translate_error(str(error), "", doing=doing)


def _connect(conninfo: str, *, clock: Clock, timeout_seconds: float) -> pq.abc.PGconn:
    """Connect without ever waiting longer than the deadline."""
    deadline = clock.monotonic() + timeout_seconds
    try:
        pgconn = pq.PGconn.connect_start(conninfo.encode())
        state: int = pq.PollingStatus.WRITING
        while pgconn.status != pq.ConnStatus.BAD and state != pq.PollingStatus.OK:
            left = deadline - clock.monotonic()
            if left <= 0:
                pgconn.finish()
                raise EngineUnavailable(
                    "could not connect to the server",
                    detail=f"There was no answer within {timeout_seconds:.0f} s.",
                )
            poll = select.poll()
            poll.register(
                pgconn.socket, select.POLLIN if state == pq.PollingStatus.READING else select.POLLOUT
            )
            if poll.poll(int(left * 1000) + 1):
                state = pgconn.connect_poll()
                if state == pq.PollingStatus.FAILED:
                    break
        if pgconn.status != pq.ConnStatus.OK:
            raise _connect_error(pgconn)
        pgconn.nonblocking = 1
        return pgconn
    except psycopg.Error as error:
        raise translate_error(str(error), "", doing="connect to the server") from None


def _connect_error(pgconn: pq.abc.PGconn) -> CloudsaveError:
    """Connection failures carry no SQLSTATE in libpq; rights are told from the text."""
    text = pgconn.get_error_message()
    refused = ("password authentication failed", "no pg_hba.conf entry", "must be superuser or replication")
    sqlstate = "28000" if any(part in text for part in (*refused, "permission denied to start WAL")) else ""
    pgconn.finish()
    if _NO_WAL_SENDERS.search(text):
        return UnsuitableSettings(
            "server cannot stream its log with its present settings",
            detail="max_wal_senders is 0, as it must be with wal_level = minimal.",
            hints=["set wal_level = replica and max_wal_senders = 10, and restart the server"],
        )
    return translate_error(text, sqlstate, doing="connect for replication")


def _rows(result: pq.abc.PGresult) -> Rows:
    columns = tuple((result.fname(i) or b"").decode() for i in range(result.nfields))
    rows = tuple(
        tuple(_text(result.get_value(row, column)) for column in range(result.nfields))
        for row in range(result.ntuples)
    )
    return Rows(columns, rows)


def _text(value: bytes | None) -> str | None:
    """Text of a cell; a timeline history may hold any bytes, so that nothing is lost in decoding."""
    return None if value is None else value.decode("utf-8", "surrogateescape")


def _result_error(result: pq.abc.PGresult, *, doing: str) -> CloudsaveError:
    primary = result.error_field(pq.DiagnosticField.MESSAGE_PRIMARY) or b""
    detail = result.error_field(pq.DiagnosticField.MESSAGE_DETAIL) or b""
    sqlstate = result.error_field(pq.DiagnosticField.SQLSTATE) or b""
    text = ". ".join(part.decode("utf-8", "replace") for part in (primary, detail) if part)
    return translate_error(text or result.get_error_message(), sqlstate.decode(), doing=doing)


def _name(sql: str) -> str:
    """The command's first word, for messages."""
    return f"run {sql.split(None, 1)[0]}"
