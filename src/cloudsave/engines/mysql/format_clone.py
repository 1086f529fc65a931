"""
Messages of MySQL's CLONE protocol, version 0x0102, as a recipient sends and reads them.

After COM_CLONE (32) on two connections of one user, each message is a packet of the usual protocol; its
first byte says what it is, and 0xFF is the usual error.

    to the server 1 INIT      u32 version, u32 seconds to wait for DDL to end (bit 31: do not block DDL),
    locator of each engine 4 EXECUTE   nothing more 5 ACK       u32 error, locator, u32 length, descriptor
    of the state with the ACK flag 6 EXIT      nothing more

    from the server
    1 LOCATORS  u32 version, locator
    2 DESCRIPTOR u8 engine, u8 number of the locator, descriptor
    3 DATA      bytes, as many as the descriptor before says
    4 5 6 7 8   plugins, settings and collations of the donor
    99 COMPLETE the command is done      100 ERROR i32 code, text

    locator, little-endian: u8 engine (12: InnoDB), u32 length, bytes

    descriptor, big-endian: u32 version, u32 length, u32 type, then 3 state     u32 state, u32 task, u32
    chunks, u32 files, u64 bytes, u64 bytes on disk, u16 flags (1 begin, 2 ACK) 4 file      u32 state, u64
    size, u64 allocated, u32 flags of the space, u32 block, u16 flags, u32 space, u32 index,
                u32 first chunk, u32 last chunk, u32 length of the name, name
    5 data      u32 state, u32 task, u32 chunk, u32 block, u32 index of the file, u32 length, u64 offset,
    u64 file size

States: 1 INIT, 2 FILE (all files, as they change), 3 PAGE (what changed meanwhile), 4 REDO, 5 DONE. A state
begins with the begin flag and ends with neither flag; its end is acknowledged on the other connection.
Source: measured on MySQL 9.7.4; the statement CLONE is described in the MySQL manual.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

from cloudsave.errors import EngineError

COM_CLONE = 32
VERSION = 0x0102
INNODB = 12
NO_BACKUP_LOCK = 1 << 31
INIT, EXECUTE, ACK, EXIT = 1, 4, 5, 6
LOCATORS, DESCRIPTOR, DATA, COMPLETE, ERROR = 1, 2, 3, 99, 100
STATE_BEGIN, STATE_ACK = 1, 2
NAME_BYTES_MAX = 4096
DATA_BYTES_MAX = 64 << 20
_LOCATOR = struct.Struct("<BI")
_VERSION_LOCATOR = struct.pack(">III", 100, 34, 1) + bytes(22)
_HEAD = struct.Struct(">III")
_STATE = struct.Struct(">IIIIQQH")
_FILE = struct.Struct(">IQQIIHIIIII")
_DATA = struct.Struct(">IIIIIIQQ")


class State(IntEnum):
    """What the server sends."""

    INIT = 1
    FILE = 2
    PAGE = 3
    REDO = 4
    DONE = 5


@dataclass(frozen=True, slots=True)
class StateDescriptor:
    """A state begins or ends. `raw`: all of it."""

    state: int
    flags: int
    bytes_estimated: int
    raw: bytes


@dataclass(frozen=True, slots=True)
class FileDescriptor:
    """A file of the copy."""

    state: int
    size_bytes: int
    space_flags: int
    flags: int
    index: int
    name: str


@dataclass(frozen=True, slots=True)
class DataDescriptor:
    """So many bytes of a file follow."""

    state: int
    index: int
    length: int
    offset: int
    file_bytes: int


def init_message(*, timeout_seconds: int) -> bytes:
    """Asks for a copy; DDL is blocked once what runs has ended, which is waited for so long."""
    locator = _LOCATOR.pack(INNODB, len(_VERSION_LOCATOR)) + _VERSION_LOCATOR
    return struct.pack("<BII", INIT, VERSION, timeout_seconds) + locator


def ack_message(locator: bytes, state: StateDescriptor) -> bytes:
    """Says that all of a state has arrived."""
    told = state.raw[:-2] + struct.pack(">H", state.flags | STATE_ACK)
    head = struct.pack("<BI", ACK, 0) + _LOCATOR.pack(INNODB, len(locator)) + locator
    return head + struct.pack("<I", len(told)) + told


def parse_locators(message: bytes) -> bytes:
    """The donor's locator of InnoDB. Raises: EngineError."""
    try:
        kind, length = _LOCATOR.unpack_from(message, 5)
    except struct.error as error:
        raise _malformed(f"its locators are cut off ({error})") from error
    locator = message[5 + _LOCATOR.size :]
    if kind != INNODB or len(locator) < length:
        raise _malformed("its locator is of another engine")
    return locator[:length]


def parse_descriptor(message: bytes) -> StateDescriptor | FileDescriptor | DataDescriptor | None:
    """What a DESCRIPTOR message says; None for those that say nothing to us. Raises: EngineError."""
    raw = message[3:]
    try:
        _, length, kind = _HEAD.unpack_from(raw)
        if length != len(raw):
            raise _malformed(f"a descriptor of {len(raw)} bytes claims {length}")
        if kind == 3:
            state, _, _, _, estimated, _, flags = _STATE.unpack_from(raw, _HEAD.size)
            return StateDescriptor(state, flags, estimated, bytes(raw))
        if kind == 4:
            return _file(raw)
        if kind == 5:
            state, _, _, _, index, data, offset, size = _DATA.unpack_from(raw, _HEAD.size)
            if data > DATA_BYTES_MAX:
                raise _malformed(f"a descriptor announces {data} bytes")
            return DataDescriptor(state, index, data, offset, size)
    except struct.error as error:
        raise _malformed(f"a descriptor is cut off ({error})") from error
    return None


def _file(raw: bytes) -> FileDescriptor:
    state, size, _, space_flags, _, flags, _, index, _, _, length = _FILE.unpack_from(raw, _HEAD.size)
    name = bytes(raw[_HEAD.size + _FILE.size :])
    if length > NAME_BYTES_MAX or len(name) != length:
        raise _malformed(f"a name of {len(name)} bytes claims {length}")
    text = name.rstrip(b"\0").decode("utf-8", "surrogateescape").removeprefix("./")
    return FileDescriptor(state, size, space_flags, flags, index, text)


def parse_error(message: bytes) -> str:
    """The text of an ERROR message."""
    return message[5:].decode("utf-8", "replace").strip("\0 ")


def _malformed(why: str) -> EngineError:
    return EngineError(
        "cannot understand the server's CLONE stream",
        detail=f"It is not of protocol {VERSION:#x}: {why}.",
        hints=["which release is the server? docs/guides/mysql.md lists those that were tried"],
    )
