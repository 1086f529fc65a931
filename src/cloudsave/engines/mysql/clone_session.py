"""
A recipient of MySQL's CLONE over two connections: one for what comes, one to say that it has come.

While it runs the server holds its backup lock: DDL waits, other statements do not.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from cloudsave.clock import Clock
from cloudsave.engines.binlog.connection import Session
from cloudsave.engines.mysql.format_clone import (
    COM_CLONE,
    COMPLETE,
    DATA,
    DESCRIPTOR,
    ERROR,
    EXECUTE,
    EXIT,
    LOCATORS,
    DataDescriptor,
    FileDescriptor,
    StateDescriptor,
    ack_message,
    init_message,
    parse_descriptor,
    parse_error,
    parse_locators,
)
from cloudsave.errors import EngineError, EngineUnavailable, PermissionMissing

SILENCE_SECONDS_MAX = 600.0
"""Limit: a server that says nothing for so long is taken for lost."""
DDL_SECONDS_MAX = 300
"""Limit: DDL that runs already is waited for so long."""
_PACKET_BYTES_MAX = 0xFFFFFF
_RECEIVE_BYTES = 1 << 20
_DENIED = (1044, 1045, 1142, 1227)
_CLONE_RUNNING = 3865


@dataclass(frozen=True, slots=True)
class Received:
    """A descriptor with the bytes that belong to it."""

    descriptor: StateDescriptor | FileDescriptor | DataDescriptor
    data: memoryview


class CloneSession:
    """One clone. Order: begin, received to the end, finish; `close` at any time. One thread."""

    def __init__(self, data: Session, acknowledge: Session, clock: Clock) -> None:
        self._sessions = (data, acknowledge)
        self._data = _Wire(data)
        self._acknowledge = _Wire(acknowledge)
        self._clock = clock
        self._locator = b""
        self.waited_seconds = 0.0
        """How long DDL that ran already was waited for, with the server's own preparation."""

    def begin(self) -> None:
        """Turn both connections into those of a clone, and have DDL blocked. Raises: EngineError."""
        for wire in (self._data, self._acknowledge):
            wire.send(bytes([COM_CLONE]))
            self._until_complete(wire)
        begun = self._clock.monotonic()
        self._data.send(init_message(timeout_seconds=DDL_SECONDS_MAX))
        self._until_complete(self._data)
        self.waited_seconds = self._clock.monotonic() - begun
        if not self._locator:
            raise EngineError("server began a clone without a locator")

    def received(self) -> Iterator[Received]:
        """All that the server sends; the end of each state is acknowledged once it has been taken."""
        self._data.send(bytes([EXECUTE]))
        while True:
            message = self._data.receive()
            if message[0] == COMPLETE:
                return
            if message[0] != DESCRIPTOR:
                self._raise_error(message)
                continue
            descriptor = parse_descriptor(bytes(message))
            if descriptor is None:
                continue
            data = memoryview(b"")
            if isinstance(descriptor, DataDescriptor) and descriptor.length:
                body = self._data.receive()
                if body[0] != DATA or len(body) != descriptor.length + 1:
                    self._raise_error(body)
                    raise EngineError("server sent other bytes of a clone than it announced")
                data = memoryview(body)[1:]
            yield Received(descriptor, data)
            if isinstance(descriptor, StateDescriptor) and not descriptor.flags:
                self._acknowledge.send(ack_message(self._locator, descriptor))
                self._until_complete(self._acknowledge)

    def finish(self) -> None:
        """Leave the clone, which unblocks DDL."""
        for wire in (self._data, self._acknowledge):
            wire.send(bytes([EXIT]))
            self._until_complete(wire)

    def close(self) -> None:
        """Leave both connections. Never raises."""
        for session in self._sessions:
            with suppress(OSError):
                session.connection._force_close()  # type: ignore[attr-defined]

    def _until_complete(self, wire: _Wire) -> None:
        while True:
            message = wire.receive()
            if message[0] in (0, COMPLETE):
                return
            if message[0] == LOCATORS:
                self._locator = parse_locators(bytes(message))
            self._raise_error(message)

    @staticmethod
    def _raise_error(message: bytearray) -> None:
        """Raises: EngineError, PermissionMissing where the message is an error."""
        if message[0] == ERROR:
            raise EngineError("server gave up a clone", detail=f"It said: {parse_error(bytes(message))}")
        if message[0] != 0xFF:
            return
        (number,) = struct.unpack_from("<H", message, 1)
        text = bytes(message[3:]).decode("utf-8", "replace")
        text = text[6:] if text.startswith("#") else text
        if number in _DENIED:
            raise PermissionMissing(
                "account may not clone the server",
                detail=f"The server said: {text}",
                hints=["GRANT BACKUP_ADMIN ON *.* TO the account", "cloudsave check prints what is missing"],
            )
        hints = ["another clone or backup runs: wait for it"] if number == _CLONE_RUNNING else []
        raise EngineError("server refused a clone", detail=f"It said: {text} (error {number}).", hints=hints)


class _Wire:
    """Packets of the protocol on the socket of a session that PyMySQL does not touch any more."""

    def __init__(self, session: Session) -> None:
        # PyMySQL has no public way to its socket, and nothing of it is in its buffer between two statements.
        self._socket: socket.socket = session.connection._sock  # type: ignore[attr-defined]
        self._socket.settimeout(SILENCE_SECONDS_MAX)

    def send(self, payload: bytes) -> None:
        """One command. Raises: EngineUnavailable."""
        try:
            self._socket.sendall(struct.pack("<I", len(payload))[:3] + b"\0" + payload)
        except OSError as error:
            raise _lost(error) from error

    def receive(self) -> bytearray:
        """One message, never empty. Raises: EngineUnavailable."""
        message = bytearray()
        while True:
            head = self._exactly(4)
            length = int.from_bytes(head[:3], "little")
            message += self._exactly(length)
            if length < _PACKET_BYTES_MAX:
                break
        if not message:
            raise EngineError("server sent an empty message during a clone")
        return message

    def _exactly(self, count: int) -> bytearray:
        data = bytearray(count)
        view, got = memoryview(data), 0
        try:
            while got < count:
                part = self._socket.recv_into(view[got:], min(count - got, _RECEIVE_BYTES))
                if not part:
                    raise ConnectionError("it closed the connection")
                got += part
        except OSError as error:
            raise _lost(error) from error
        return data


def _lost(error: OSError) -> EngineUnavailable:
    return EngineUnavailable(
        "lost the connection to the server during a clone",
        detail=f"{error}.",
        hints=["run the backup again: what is stored is not stored again"],
    )
