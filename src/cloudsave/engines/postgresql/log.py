"""
A server's write-ahead log as a stream, held by a physical replication slot.

    stream, from the server
    'w'   1    XLogData: i64 first LSN, i64 end of log on the server, i64 clock, log bytes
    'k'   1    keep-alive: i64 end of log, i64 clock, u8 reply wanted
    stream, to the server
    'r'   1    status: i64 written, i64 flushed, i64 applied, i64 clock, u8 reply wanted

Clocks are microseconds since 2000-01-01 UTC. The flushed LSN moves the slot and releases synchronous
commits, so that it only ever says what was acknowledged as durable.
Source: PostgreSQL manual, Streaming Replication Protocol; src/backend/replication/walsender.c.
"""

from __future__ import annotations

import contextlib
import re
import struct
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from datetime import UTC, datetime

from cloudsave.clock import SYSTEM_CLOCK, Clock
from cloudsave.engines.postgresql.completeness import Completeness
from cloudsave.engines.postgresql.replication import ReplicationConnection, Rows, literal
from cloudsave.errors import (
    CaptureRunning,
    EngineError,
    EngineUnavailable,
    ForeignSystem,
    LogRemoved,
    SlotLost,
    UsageError,
)
from cloudsave.model.engine_facts import BranchEnd, LogChunk, LogHead, SlotState
from cloudsave.model.identity import SourceIdentity
from cloudsave.model.log import us_from_instant
from cloudsave.model.position import Position

STATUS_SECONDS = 1.0
"""How often the server is told where we are and asked for a sign of life."""
SILENCE_SECONDS_MAX = 30.0
"""Limit: a server that was asked and says nothing for so long is taken for lost."""
BESIDE_SECONDS_MAX = 5.0
"""Limit: so long the stream waits for a second connection to the server that sends it."""
WAIT_SECONDS = 0.2
"""How long one wait for log lasts before the stream gives a sign of life."""

_XLOG_DATA = struct.Struct(">cQQq")
_KEEPALIVE = struct.Struct(">cQqB")
_STATUS = struct.Struct(">cQQQqB")
_EPOCH_2000_US = us_from_instant(datetime(2000, 1, 1, tzinfo=UTC))
_SLOT_NAME = re.compile(r"[a-z0-9_]{1,63}")
_FIRST_BRANCH = "00000001"


def parse_lsn(text: str) -> int:
    """An LSN from the server's text form "16/B374D848"."""
    high, _, low = text.partition("/")
    return (int(high, 16) << 32) | int(low, 16)


def format_lsn(offset: int) -> str:
    """The server's text form of an LSN."""
    return f"{offset >> 32:X}/{offset & 0xFFFFFFFF:X}"


def branch_of(timeline: int) -> str:
    """The branch that a timeline is to us."""
    return f"{timeline:08X}"


class PostgresLogSource:
    """`LogSource` of a PostgreSQL server, primary or standby."""

    def __init__(
        self,
        conninfo: str,
        *,
        slot: str,
        temporary: bool,
        identify: Callable[[], SourceIdentity],
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        if not _SLOT_NAME.fullmatch(slot):
            raise UsageError(
                f"cannot use replication slot name {slot!r}",
                hints=["a slot name has lower-case letters, digits and underscores"],
            )
        self._conninfo = conninfo
        self._slot = slot
        self._temporary = temporary
        self._identify = identify
        self._clock = clock
        self._connection: ReplicationConnection | None = None
        self._branch = ""
        self._durable = 0
        self._acknowledged = False
        self._log_file_bytes = 0

    def connect(self) -> LogHead:
        """See `LogSource.connect`. Also raises ForeignSystem when two connections reach two clusters."""
        self.close()
        identity = self._identify()
        connection = ReplicationConnection.open(self._conninfo, clock=self._clock)
        self._connection = connection
        system = connection.query("IDENTIFY_SYSTEM")[0].mappings()[0]
        if system["systemid"] != identity.system_identifier:
            raise ForeignSystem(
                "two connections to the source reached two clusters",
                detail=f"System identifiers {identity.system_identifier} and {system['systemid']}.",
                hints=["does the URL name several hosts, or a load balancer?"],
            )
        self._log_file_bytes = identity.log_file_bytes
        held, created = self._claim_slot(connection)
        current = Position(branch_of(int(system["timeline"] or 0)), parse_lsn(system["xlogpos"] or "0/0"))
        return LogHead(identity=identity, current=current, slot_offset=held, slot_created=created)

    def replace_slot(self) -> None:
        """Drop the slot, which has been lost, so that the next `connect` makes a new one."""
        connection = ReplicationConnection.open(self._conninfo, clock=self._clock)
        try:
            if self._read_slot() is not None:
                connection.query(f"DROP_REPLICATION_SLOT {self._slot}")
        finally:
            connection.close()

    def stream(self, start: Position) -> Generator[LogChunk | BranchEnd, None, None]:
        """See `LogSource.stream`. `start` may be any position, also inside a WAL segment."""
        try:
            yield from self._stream(start)
        except LogRemoved:
            self._renew_temporary_slot()
            raise

    def _stream(self, start: Position) -> Iterator[LogChunk | BranchEnd]:
        connection = self._connected()
        self._branch, self._durable, self._acknowledged = start.branch, 0, False
        timeline = int(start.branch, 16)
        ended = connection.begin_copy_both(
            f"START_REPLICATION SLOT {self._slot} PHYSICAL {format_lsn(start.offset)} TIMELINE {timeline}"
        )
        if ended is not None:
            yield _branch_end(start.branch, ended)
            return
        streaming = True
        try:
            for event in self._messages(connection, start):
                streaming = isinstance(event, LogChunk)
                yield event
        except EngineError:
            streaming = False
            raise
        finally:
            if streaming:
                self._leave(connection)

    def history(self, branch: str) -> bytes:
        """The raw history file; empty for the first timeline, which has none."""
        if branch == _FIRST_BRANCH:
            return b""
        rows = self._connected().query(f"TIMELINE_HISTORY {int(branch, 16)}")
        content = rows[0].rows[0][1] or ""
        return content.encode("utf-8", "surrogateescape")

    def acknowledge(self, position: Position) -> None:
        """
        See `LogSource.acknowledge`. Thread-safe; the server is told at once. What is said of another branch
        than the one that is streamed says nothing of this one.
        """
        if position.branch == self._branch:
            self._durable = max(self._durable, position.offset)
        self._acknowledged = True
        connection = self._connection
        if connection is not None:
            connection.wake()

    def close(self) -> None:
        """See `LogSource.close`."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _connected(self) -> ReplicationConnection:
        if self._connection is None:
            raise EngineUnavailable("could not reach the source's log", detail="It is not connected.")
        return self._connection

    # ---- the slot

    def slot_state(self) -> SlotState:
        """What the server says of the slot."""
        row = self._read_slot()
        if row is None:
            return SlotState.ABSENT
        return SlotState.ACTIVE if row["active"] == "t" else SlotState.IDLE

    def _claim_slot(self, connection: ReplicationConnection) -> tuple[int | None, bool]:
        """The LSN that the slot holds, and whether it was created now."""
        row = None if self._temporary else self._read_slot()
        if row is None:
            self._create_slot(connection)
            row = self._read_slot()
            if row is None:
                raise SlotLost(f"replication slot {self._slot!r} vanished after it was created")
            return _held(row), True
        if row["slot_type"] != "physical":
            raise EngineError(
                f"replication slot {self._slot!r} is not a physical one",
                hints=["drop it, or configure another slot name for this source"],
            )
        if row["active"] == "t":
            raise CaptureRunning(
                f"replication slot {self._slot!r} is in use",
                detail=f"Server process {row['active_pid']} streams from it.",
                hints=["does another `cloudsave logs capture` run for this source?"],
            )
        if row["wal_status"] == "lost":
            raise SlotLost(
                f"replication slot {self._slot!r} has been invalidated by the server",
                detail="The log that it held was removed: capture was away for longer than the server's "
                "limits (max_slot_wal_keep_size, idle_replication_slot_timeout) allow.",
                hints=["take a base backup after capture runs again"],
            )
        return _held(row), False

    def _renew_temporary_slot(self) -> None:
        """
        After any error of a session the server has dropped its temporary slots.

        Source: WalSndErrorCleanup(), src/backend/replication/walsender.c.
        """
        if self._temporary and self._read_slot() is None:
            self._claim_slot(self._connected())

    def _create_slot(self, connection: ReplicationConnection) -> None:
        kind = "TEMPORARY " if self._temporary else ""
        connection.query(f"CREATE_REPLICATION_SLOT {self._slot} {kind}PHYSICAL RESERVE_WAL")

    def _read_slot(self) -> dict[str, str | None] | None:
        """The slot as `pg_replication_slots` shows it; None where there is none."""
        connection = ReplicationConnection.open(self._conninfo, replication=False, clock=self._clock)
        try:
            rows = connection.query(
                "SELECT slot_type, active, active_pid, wal_status, restart_lsn"  # noqa: S608 - quoted
                f" FROM pg_catalog.pg_replication_slots WHERE slot_name = {literal(self._slot)}"
            )[0].mappings()
        finally:
            connection.close()
        return rows[0] if rows else None

    # ---- the stream

    def _messages(self, connection: ReplicationConnection, start: Position) -> Iterator[LogChunk | BranchEnd]:
        """Messages of an open stream, with status sent when due."""
        reader = _Reader(start)
        due = self._clock.monotonic()
        beside = connection.beside(self._conninfo)
        with contextlib.closing(
            Completeness(
                lambda: ReplicationConnection.open(
                    beside, replication=False, clock=self._clock, timeout_seconds=BESIDE_SECONDS_MAX
                ),
                branch=start.branch,
                log_file_bytes=self._log_file_bytes,
                clock=self._clock,
            )
        ) as completeness:
            while True:
                now = self._clock.monotonic()
                ask = now >= due
                if ask or self._acknowledged or reader.reply_wanted:
                    self._acknowledged = False
                    reader.reply_wanted = False
                    self._send_status(connection, written=reader.end, ask=ask)
                    due = now + STATUS_SECONDS if ask else due
                message = connection.receive(wait_seconds=WAIT_SECONDS)
                if isinstance(message, list):
                    yield _branch_end(start.branch, message)
                    return
                if message is None and connection.silent_seconds > SILENCE_SECONDS_MAX:
                    raise EngineUnavailable(
                        "could not receive log from the server",
                        detail=f"The server was silent for {SILENCE_SECONDS_MAX:.0f} s.",
                    )
                chunk = reader.read(message) if message is not None else reader.silence()
                until_us = completeness.until_us(reader.end, now=now)
                yield replace(chunk, complete_until_us=until_us) if until_us else chunk

    def _leave(self, connection: ReplicationConnection) -> None:
        """End the stream from our side; the last acknowledgement still goes out."""
        with contextlib.suppress(EngineError):
            self._send_status(connection, written=self._durable, ask=False)
        connection.end_copy_both()

    def _send_status(self, connection: ReplicationConnection, *, written: int, ask: bool) -> None:
        clock = us_from_instant(self._clock.now()) - _EPOCH_2000_US
        connection.send(_STATUS.pack(b"r", written, self._durable, 0, clock, int(ask)))


class _Reader:
    """Decodes messages and checks that they touch."""

    def __init__(self, start: Position) -> None:
        self.end = start.offset
        self.reply_wanted = False
        self._branch = start.branch

    def read(self, message: memoryview) -> LogChunk:
        """The chunk that a message carries; empty for a keep-alive."""
        kind = bytes(message[:1])
        if kind == b"w":
            _, first, server_end, _ = _XLOG_DATA.unpack_from(message)
            data = bytes(message[_XLOG_DATA.size :])
            if first != self.end:
                raise EngineError(
                    "server left a gap in the stream of log",
                    detail=f"Expected LSN {format_lsn(self.end)}, received {format_lsn(first)}.",
                )
            self.end += len(data)
            return LogChunk(self._branch, first, data, server_end)
        if kind == b"k":
            _, server_end, _, reply = _KEEPALIVE.unpack_from(message)
            self.reply_wanted = self.reply_wanted or bool(reply)
            return LogChunk(self._branch, self.end, b"", server_end)
        raise EngineError("server left the protocol", detail=f"Unknown stream message {kind!r}.")

    def silence(self) -> LogChunk:
        """The sign of life where the server said nothing."""
        return LogChunk(self._branch, self.end, b"", 0)


def _held(row: dict[str, str | None]) -> int | None:
    return parse_lsn(row["restart_lsn"]) if row["restart_lsn"] else None


def _branch_end(branch: str, rows: list[Rows]) -> BranchEnd:
    """What the server said when it ended the stream of `branch`."""
    if not rows or not rows[0].rows:
        raise EngineUnavailable(
            "could not go on receiving log", detail="The server ended the stream: it shuts down."
        )
    next_timeline, switch = rows[0].rows[0][:2]
    return BranchEnd(branch, parse_lsn(switch or "0/0"), branch_of(int(next_timeline or 0)))
