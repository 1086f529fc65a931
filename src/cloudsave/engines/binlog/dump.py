"""
The binlog of a server as a stream of events: a connection that has been told to dump.

    command, in one packet
    0     1    u8 0x12 COM_BINLOG_DUMP
    1     4    u32 place in the file
    5     2    u16 flags (MariaDB 2: send ANNOTATE_ROWS events too)
    7     4    u32 our server id
    11    ..   name of the file

    packets from the server, each behind u24 length and u8 sequence; after a payload of 0xFFFFFF bytes comes
    the rest of it in the next packet
    0     1    u8 0x00 an event follows, 0xFF an error, 0xFE the end
    1     2    with semi-synchronous replication: u8 0xEF, u8 1 where an acknowledgement is wanted
    ..         the event

    acknowledgement, in one packet with sequence 0: u8 0xEF, u64 end of the event, name of the file

Events that stand in no file: heartbeats, artificial ones, and the FORMAT event that is repeated with the
end 0 when a stream begins within a file.
Source: MySQL and MariaDB manuals, replication protocol; semisync of both.
"""

from __future__ import annotations

import os
import select
import socket
import ssl
import struct
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from cloudsave.clock import Clock
from cloudsave.engines.binlog.connection import Session
from cloudsave.engines.binlog.format_event import (
    ARTIFICIAL,
    FORMAT,
    HEARTBEAT,
    HEARTBEAT_V2,
    MAGIC,
    ROTATE,
    parse_header,
    rotate_target,
)
from cloudsave.errors import EngineError, EngineUnavailable, LogConflict, LogRemoved
from cloudsave.kernels.binlog import take_packets
from cloudsave.kernels.native import NativeKernels, native

COM_BINLOG_DUMP = 0x12
HEARTBEAT_SECONDS = 0.2
"""How often a server without new log gives a sign of life."""
SILENCE_SECONDS_MAX = 30.0
"""Limit: a server that says nothing for so long is taken for lost."""
RECEIVE_BYTES = 1 << 20
_PACKET_BYTES_MAX = 0xFFFFFF
_SEMI_SYNC = 0xEF
_FATAL_READING = 1236
_PASSING_TROUBLE = ("I/O error", "memory allocation")


@dataclass(frozen=True, slots=True)
class DumpRequest:
    """Where to begin, and as whom."""

    file: str
    place: int
    server_id: int
    flags: int
    semi_sync: bool


@dataclass(frozen=True, slots=True)
class DumpEvent:
    """One event that stands in `file`, or several, one behind the other; `data` empty: a sign of life."""

    file: str
    data: memoryview | bytes
    wants_answer: bool = False


class Dump:
    """One dumping connection. Events belong to one thread; `wake` may be called from any."""

    def __init__(
        self,
        session: Session,
        request: DumpRequest,
        *,
        clock: Clock,
        kernels: NativeKernels | None = native,
    ) -> None:
        """Plain events are taken by a kernel where there is one."""
        self._session = session
        # PyMySQL has no public way to its socket. Nothing of it is in PyMySQL's buffer here, since every
        # answer to a statement has been read, and PyMySQL does not touch it from here on.
        self._socket: socket.socket = session.connection._sock  # type: ignore[attr-defined]
        self._request = request
        self._clock = clock
        self._kernels = kernels
        self._lead = 3 if request.semi_sync else 1
        """Bytes of a packet before its event."""
        self._file = request.file
        self._begun = False
        """Whether an event has come that stands in the file."""
        self._received = bytearray()
        self._parts: list[bytes] = []
        """Of the payload that goes on in the next packet."""
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_write, False)
        self._wake_lock = threading.Lock()
        self._open = True
        command = struct.pack(
            "<BIHI", COM_BINLOG_DUMP, max(request.place, 4), request.flags, request.server_id
        )
        try:
            self._send(command + request.file.encode("utf-8", "surrogateescape"))
        except BaseException:
            self.close()
            raise

    def events(self) -> Iterator[list[DumpEvent]]:
        """Batches of events as they come; an empty batch is a sign of life. Raises as `_error` tells."""
        heard_at = self._clock.monotonic()
        while True:
            received = self._receive()
            now = self._clock.monotonic()
            if received:
                heard_at = now
            elif now - heard_at > SILENCE_SECONDS_MAX:
                raise EngineUnavailable(
                    "server has fallen silent", detail=f"Nothing came for {SILENCE_SECONDS_MAX:.0f} s."
                )
            yield self._unpack()

    def answer(self, file: str, place: int) -> None:
        """Tell a server that waits that all up to `place` of `file` is durable."""
        self._send(struct.pack("<BQ", _SEMI_SYNC, place) + file.encode("utf-8", "surrogateescape"))

    def wake(self) -> None:
        """Let `events` give a sign of life at once."""
        # A descriptor that is closed may be another file's by now.
        with self._wake_lock:
            if self._open:
                with suppress(BlockingIOError):
                    os.write(self._wake_write, b"\0")

    def close(self) -> None:
        """End the connection. Never raises."""
        self._session.close()
        with self._wake_lock:
            self._open = False
            os.close(self._wake_read)
            os.close(self._wake_write)

    def _send(self, payload: bytes) -> None:
        try:
            self._socket.settimeout(SILENCE_SECONDS_MAX)
            self._socket.sendall(struct.pack("<I", len(payload)) + payload)
            self._socket.settimeout(0)
        except OSError as error:
            raise _lost(error) from error

    def _receive(self) -> bool:
        """Wait for bytes; False when none came."""
        try:
            if not (isinstance(self._socket, ssl.SSLSocket) and self._socket.pending()):
                readable = [self._socket.fileno(), self._wake_read]
                ready, _, _ = select.select(readable, [], [], HEARTBEAT_SECONDS)
                if self._wake_read in ready:
                    os.read(self._wake_read, 4096)
                if readable[0] not in ready:
                    return False
            data = self._socket.recv(RECEIVE_BYTES)
        except (BlockingIOError, ssl.SSLWantReadError):
            return False
        except OSError as error:
            raise _lost(error) from error
        if not data:
            raise EngineUnavailable("server closed the connection", detail="It sent no reason.")
        self._received += data
        return True

    def _unpack(self) -> list[DumpEvent]:
        """What is complete."""
        found: list[DumpEvent] = []
        cursor = 0
        with memoryview(self._received) as received:
            while True:
                if not self._parts:
                    plain, taken = take_packets(received[cursor:], lead=self._lead, kernels=self._kernels)
                    if taken:
                        self._begun = True
                        found.append(DumpEvent(self._file, plain))
                        cursor += taken
                packet_bytes = self._take_packet(received[cursor:])
                if not packet_bytes:
                    break
                cursor += packet_bytes
                if packet_bytes - 4 < _PACKET_BYTES_MAX:
                    packet, self._parts = b"".join(self._parts), []
                    found.append(self._event(memoryview(packet)))
        del self._received[:cursor]
        return found

    def _take_packet(self, received: memoryview) -> int:
        """Put the next packet among the parts of a payload; how many bytes it has, 0: it is not complete."""
        length = int.from_bytes(received[:3], "little")
        if len(received) < 4 + length or len(received) < 4:
            return 0
        self._parts.append(bytes(received[4 : 4 + length]))
        return 4 + length

    def _event(self, packet: memoryview) -> DumpEvent:
        if packet[0] == 0xFF:
            raise self._error(packet)
        if packet[0] != 0:
            raise EngineUnavailable("server ended the stream", detail="Is it shutting down?")
        wants_answer = False
        if self._request.semi_sync:
            if packet[1] != _SEMI_SYNC:
                raise EngineError(
                    "server does not replicate semi-synchronously", detail="Its packets lack the mark of it."
                )
            wants_answer = packet[2] == 1
        data = packet[self._lead :]
        header = parse_header(data)
        if header.kind == ROTATE and header.flags & ARTIFICIAL:
            self._file, _ = rotate_target(data)
        # MariaDB since 11 leaves the end out of events within a transaction, which do stand in the file.
        repeated = header.kind in (ROTATE, FORMAT) and header.end == 0
        if header.kind in (HEARTBEAT, HEARTBEAT_V2) or header.flags & ARTIFICIAL or repeated:
            return DumpEvent(self._file, b"", wants_answer)
        self._begun = True
        return DumpEvent(self._file, data, wants_answer)

    def _error(self, packet: memoryview) -> EngineError | LogConflict:
        """Server errors while it reads its log. Source: sql/rpl_binlog_sender.cc, sql/sql_repl.cc."""
        (number,) = struct.unpack_from("<H", packet, 1)
        text = bytes(packet[3:]).decode("utf-8", "replace")
        text = text[6:] if text.startswith("#") else text
        detail = f"The server said of {self._request.file}: {text}"
        if number == _FATAL_READING and "first log file" in text:
            return LogRemoved("server has removed log that is wanted", detail=detail)
        # Stored log ends between two events: a server that finds none there has written other log since.
        foreign = self._request.place > len(MAGIC) and not self._begun
        if number == _FATAL_READING and foreign and not any(one in text for one in _PASSING_TROUBLE):
            return LogConflict(
                "server cannot go on where the stored log ends",
                detail=detail,
                hints=[
                    "was RESET BINARY LOGS (RESET MASTER) run, or an older state of the server restored?",
                    "is the server's own binlog file damaged? mysqlbinlog --verify-binlog-checksum tells",
                ],
            )
        return EngineUnavailable("server could not send its log", detail=f"{detail} (error {number})")


def _lost(error: OSError) -> EngineUnavailable:
    return EngineUnavailable("connection to the server was lost", detail=str(error))
