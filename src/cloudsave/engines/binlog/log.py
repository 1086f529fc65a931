"""
A server's binlog as a stream for capture: the source that MySQL and MariaDB share.

Nothing is kept for us on the server but by its own expiry of binlogs. A named lock of ours says that a
capture runs; it ends with the session that holds it.
"""

from __future__ import annotations

import math
import threading
import uuid
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass

from cloudsave.clock import SYSTEM_CLOCK, Clock
from cloudsave.engines.binlog.connection import Session, connect
from cloudsave.engines.binlog.dump import HEARTBEAT_SECONDS, SILENCE_SECONDS_MAX, Dump, DumpRequest
from cloudsave.engines.binlog.format_event import MAGIC
from cloudsave.engines.binlog.locks import capture_lock, reader_lock
from cloudsave.engines.binlog.position import file_number, number_of, offset_of, place_of
from cloudsave.errors import (
    CaptureRunning,
    EngineError,
    EngineUnavailable,
    LogRemoved,
    UnsuitableSettings,
)
from cloudsave.model.engine_facts import BranchEnd, LogChunk, LogHead, SlotState
from cloudsave.model.identity import SourceIdentity
from cloudsave.model.position import Position

ASK_SECONDS = 1.0
"""How often the server is asked for the end of its log and its clock."""
MARKS_MAX = 3600
"""Limit: answers kept until the stream has come to them."""
_CLOCK = "SELECT CAST(UNIX_TIMESTAMP(SYSDATE(6)) * 1000000 AS UNSIGNED)"


@dataclass(frozen=True, slots=True)
class Flavour:
    """In what MySQL and MariaDB differ for the stream."""

    status_statement: str
    """Gives the current file and place."""
    session_settings: tuple[str, ...]
    """
    What the server must know of a client that is sent its binlog; {uuid} is ours, {heartbeat} nanoseconds.
    """
    dump_flags: int
    semi_sync_settings: str = ""
    semi_sync_variable: str = ""
    """Both empty: commits cannot be made to wait for us."""


@dataclass(frozen=True, slots=True)
class _Mark:
    """The server's log ended at `end` after its clock had shown `instant_us`."""

    end: int
    instant_us: int


def ask_end(session: Session, statement: str) -> int:
    """The end of the binlog, by the server's `statement` for it. Raises: UnsuitableSettings, EngineError."""
    rows = session.rows(statement, doing="read the end of the log")
    if not rows:
        raise UnsuitableSettings(
            "server writes no binlog",
            detail="Without one nothing can be restored but the moments of base backups.",
            hints=["set log_bin in the server's configuration, and restart it"],
        )
    name, place = str(rows[0][0]), int(rows[0][1])
    try:
        number = file_number(name)
    except ValueError as error:
        raise EngineError("binlog has a name that cannot be understood", detail=str(error)) from error
    return offset_of(number, place)


def ask_clock(session: Session) -> int:
    """The server's clock, microseconds since 1970."""
    (instant_us,) = session.row(_CLOCK, doing="read the server's clock")
    return int(instant_us)


class BinlogLogSource:
    """`LogSource` of a MySQL or MariaDB server."""

    def __init__(
        self,
        url: str,
        flavour: Flavour,
        *,
        slot: str,
        synchronous: bool,
        identify: Callable[[], SourceIdentity],
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._url = url
        self._flavour = flavour
        self._lock_name = capture_lock(slot)
        self._reader_lock = reader_lock(slot)
        self._server_id = 0x80000000 | zlib.crc32(slot.encode())
        self._uuid = uuid.uuid5(uuid.NAMESPACE_URL, f"cloudsave:{slot}")
        self._synchronous = synchronous
        self._identify = identify
        self._clock = clock
        self._session: Session | None = None
        self._dump: Dump | None = None
        self._branch = ""
        self._marks: deque[_Mark] = deque(maxlen=MARKS_MAX)
        self._durable = Position("", 0)
        self._durable_lock = threading.Lock()
        self._unanswered: deque[tuple[int, str]] = deque()
        """End and file of events for whose acknowledgement commits wait."""

    def connect(self) -> LogHead:
        """See `LogSource.connect`."""
        self.close()
        identity = self._identify()
        session = connect(self._url)
        self._session = session
        (got,) = session.row("SELECT GET_LOCK(%s, 0)", self._lock_name, doing="take the lock of capture")
        if got != 1:
            raise CaptureRunning(
                "log of this source is being captured already",
                detail=f"Another session holds the lock {self._lock_name!r} on the server.",
                hints=["does another `cloudsave logs capture` run for this source?"],
            )
        self._branch = identity.branch
        if self._synchronous:
            self._require_semi_sync(session)
        current = ask_end(session, self._flavour.status_statement)
        return LogHead(identity, Position(identity.branch, current), slot_offset=None, slot_created=False)

    def stream(self, start: Position) -> Generator[LogChunk | BranchEnd, None, None]:
        """See `LogSource.stream`. `start` is the begin of a file or of an event."""
        request = DumpRequest(
            file=self._file_name(start),
            place=place_of(start.offset),
            server_id=self._server_id,
            flags=self._flavour.dump_flags,
            semi_sync=self._synchronous,
        )
        self._end_dump()
        self._marks.clear()
        self._unanswered.clear()
        self._dump = dump = Dump(self._dumping_session(), request, clock=self._clock)
        try:
            yield from self._chunks(dump, start)
        finally:
            self._end_dump()

    def history(self, branch: str) -> bytes:  # noqa: ARG002
        """See `LogSource.history`: servers keep no record of it."""
        return b""

    def acknowledge(self, position: Position) -> None:
        """See `LogSource.acknowledge`. Thread-safe; the stream passes it on to a server that waits."""
        with self._durable_lock:
            self._durable = position
        dump = self._dump
        if dump is not None and self._synchronous:
            dump.wake()

    def replace_slot(self) -> None:
        """See `LogSource.replace_slot`: servers keep none."""

    def close(self) -> None:
        """See `LogSource.close`."""
        self._end_dump()
        session, self._session = self._session, None
        if session is not None:
            session.close()

    def slot_state(self) -> SlotState:
        """Whether somebody holds the lock of capture."""
        with connect(self._url) as session:
            (holder,) = session.row(
                "SELECT IS_USED_LOCK(%s)", self._lock_name, doing="look at the lock of capture"
            )
        return SlotState.ABSENT if holder is None else SlotState.ACTIVE

    # ---- streaming

    def _chunks(self, dump: Dump, start: Position) -> Iterator[LogChunk]:
        end = start.offset
        asked_at = 0.0
        for batch in dump.events():
            parts: list[bytes | memoryview] = []
            begin = end
            for event in batch:
                if not event.data:
                    continue
                if (number := file_number(event.file)) != number_of(end) or place_of(end) == 0:
                    if parts:
                        yield self._chunk(begin, parts)
                    begin, parts = offset_of(number, 0), [MAGIC]
                    end = begin + len(MAGIC)
                parts.append(event.data)
                end += len(event.data)
                if event.wants_answer:
                    self._unanswered.append((end, event.file))
            if (now := self._clock.monotonic()) - asked_at >= ASK_SECONDS:
                self._mark()
                asked_at = now
            yield self._chunk(begin if parts else end, parts, complete_until_us=self._passed(end))
            self._answer(dump)

    def _chunk(self, begin: int, parts: list[bytes | memoryview], *, complete_until_us: int = 0) -> LogChunk:
        server_end = self._marks[-1].end if self._marks else 0
        return LogChunk(self._branch, begin, b"".join(parts), server_end, complete_until_us)

    def _mark(self) -> None:
        """Ask for the clock first: what was acknowledged before lies before the end that is told then."""
        session = self._connected()
        instant_us = ask_clock(session)
        self._marks.append(_Mark(ask_end(session, self._flavour.status_statement), instant_us))

    def _passed(self, end: int) -> int:
        """The instant of the last mark that the stream has come to; 0 for none new."""
        instant_us = 0
        while self._marks and self._marks[0].end <= end:
            if len(self._marks) == 1:
                return self._marks[0].instant_us
            instant_us = self._marks.popleft().instant_us
        return instant_us

    def _answer(self, dump: Dump) -> None:
        """Pass on to a waiting server what has become durable."""
        with self._durable_lock:
            durable = self._durable
        answered: tuple[int, str] | None = None
        while self._unanswered and self._unanswered[0][0] <= durable.offset:
            answered = self._unanswered.popleft()
        if answered is not None and durable.branch == self._branch:
            dump.answer(answered[1], place_of(answered[0]))

    def _dumping_session(self) -> Session:
        session = connect(self._url, read_timeout_seconds=int(SILENCE_SECONDS_MAX))
        # Without it a purge takes us for a stranger. One that we left just now may hold it for a moment.
        wait = math.ceil(10 * HEARTBEAT_SECONDS)
        session.row("SELECT GET_LOCK(%s, %s)", self._reader_lock, wait, doing="take the lock of our reader")
        for setting in self._flavour.session_settings:
            filled = setting.format(heartbeat=int(HEARTBEAT_SECONDS * 1e9), uuid=self._uuid)
            session.rows(f"SET {filled}", doing="get ready to receive the log")
        if self._synchronous:
            session.rows(f"SET {self._flavour.semi_sync_settings}", doing="get ready to acknowledge the log")
        return session

    def _end_dump(self) -> None:
        dump, self._dump = self._dump, None
        if dump is not None:
            dump.close()

    # ---- questions

    def _connected(self) -> Session:
        if self._session is None:
            raise EngineUnavailable("could not reach the source's log", detail="It is not connected.")
        return self._session

    def _file_name(self, start: Position) -> str:
        """
        The file that holds a position, by its number: the base name may have changed. Raises: LogRemoved.
        """
        rows = self._connected().rows("SHOW BINARY LOGS", doing="list the binlog files")
        names = [str(row[0]) for row in rows]
        wanted = number_of(start.offset)
        for name in names:
            if file_number(name) == wanted:
                return name
        raise LogRemoved(
            "server has removed log that is wanted",
            detail=f"It has no binlog file number {wanted}; it has {names[0]} to {names[-1]}.",
        )

    def _require_semi_sync(self, session: Session) -> None:
        name = self._flavour.semi_sync_variable
        if session.variables(name).get(name) != "ON":
            raise UnsuitableSettings(
                "server does not wait for acknowledgements",
                detail=f"The setting {name} is not on.",
                hints=[f"SET GLOBAL {name} = ON", "or capture without --synchronous"],
            )
