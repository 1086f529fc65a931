"""
Which blocks of relations' main forks the records of PostgreSQL's log change: the twin of kernels.c.

    fragment headers, behind the 24 bytes of a record's header, until only payload is left
    253: u16 origin; 252: u32 top transaction; 255: u8 or 254: u32 length of the main data, which ends them;
    0 to 32, ascending, a block: u8 fork (low half) and flags, u16 data length, then
         flag 0x10: u16 image length, u16 hole offset, u8 image info (1 has a hole; compressed: 2 in version
                    14, 4, 8, 16 since), and u16 hole length where it has a hole and is compressed
         without flag 0x80 (same relation as before): u32 tablespace, u32 database, u32 relation
         u32 block
    then each block's image and data, and the main data, which together are the rest of the record

    special records       what they change
    storage create        all blocks of the relation (main data: tablespace, database, relation, fork)
    storage truncate      all blocks from one on (block, tablespace, database, relation, flags: 1 main fork)
    commit, abort         all blocks of the relations that they drop
    database, any         all blocks of the database that is named first
    tablespace, any       all blocks in the tablespace that is named first
    parameters            everything where wal_level is minimal: what a transaction wrote into a relation of
                          its own is not logged then
    any other one with info bit 0x01 (files change beside the blocks that are named), and any that cannot be
    parsed: everything

What is promised: after a record, a block of a main fork that no change names is the same as before, but for
what is never logged: hint bits (where the cluster has neither checksums nor wal_log_hints), and blocks of
zeros by which a relation was extended. Nothing is promised of other forks: redo clears bits of the visibility
map by heap records that do not name its blocks, and the free space map is hardly logged at all.
Source: PostgreSQL src/include/access/xlogrecord.h; DecodeXLogRecord(); walsummarizer.c.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from cloudsave.model.changes import ANY, CHANGE_BLOCK, CHANGE_FROM, EVERYTHING, Change

_MAGIC_14 = 0xD10D
_SPECIAL_UPDATE = 0x01
_XLOG, _XACT, _SMGR, _DBASE, _TBLSPC = 0, 1, 2, 4, 5
_PARAMETERS = 0x60
_COMMITS_AND_ABORTS = (0x00, 0x20, 0x30, 0x40)
_BLOCK_ID_MAX = 32
_HEADER_BYTES = 24
_HEADERS_MAX = 1024
"""Limit: bytes of fragment headers looked at; no record that a server writes has more than 904."""


def changes_of(record: bytes, magic: int) -> set[Change]:
    """What one whole record changes. `magic`: of the log's pages; 0 while unknown."""
    found = [
        blocks
        for old in (False, True)
        if (not magic or old == (magic == _MAGIC_14)) and (blocks := _blocks(record, old=old)) is not None
    ]
    changes = {block for blocks in found for block in blocks}
    special = _special(record)
    if not found or special is None:
        return {*changes, EVERYTHING}
    return changes | special


def _blocks(record: bytes, *, old: bool) -> list[Change] | None:
    """The blocks named by the fragment headers; None where they do not fit the record."""
    try:
        return list(_read_blocks(record, compressed=0x02 if old else 0x1C))
    except (struct.error, ValueError):
        return None


class _Headers:
    """The fragment headers of a record, taken from the front."""

    def __init__(self, record: bytes) -> None:
        self._headers = record[: _HEADER_BYTES + _HEADERS_MAX]
        self.at = _HEADER_BYTES

    def take(self, layout: str) -> tuple[int, ...]:
        """The next fields. Raises: struct.error."""
        values = struct.unpack_from(layout, self._headers, self.at)
        self.at += struct.calcsize(layout)
        return values

    def image_bytes(self, *, compressed: int) -> int:
        """The payload of a page image, whose header is next."""
        size, _, info = self.take("<HHB")
        if info & 1 and info & compressed:
            self.take("<H")
        return size


def _read_blocks(record: bytes, *, compressed: int) -> Iterator[Change]:
    headers = _Headers(record)
    payload, last_id = 0, -1
    relation: tuple[int, ...] = ()
    while len(record) - headers.at > payload:
        (fragment,) = headers.take("<B")
        if fragment in (254, 255):
            payload += headers.take("<I" if fragment == 254 else "<B")[0]
            break
        if fragment in (252, 253):
            headers.take("<I" if fragment == 252 else "<H")
            continue
        if not last_id < fragment <= _BLOCK_ID_MAX:
            raise ValueError
        last_id = fragment
        flags, length = headers.take("<BH")
        payload += length + (headers.image_bytes(compressed=compressed) if flags & 0x10 else 0)
        relation = relation if flags & 0x80 else headers.take("<III")
        space, database, number = relation
        (block,) = headers.take("<I")
        if flags & 0x0F == 0:
            yield (space, database, number, block, CHANGE_BLOCK)
    if len(record) - headers.at != payload:
        raise ValueError


def _special(record: bytes) -> set[Change] | None:
    """What a record changes beside the blocks that it names; None where that is not understood."""
    info, manager = record[16], record[17]
    operation, flagged = info & 0xF0, bool(info & _SPECIAL_UPDATE)
    if not (
        manager in (_SMGR, _DBASE, _TBLSPC)
        or (manager == _XACT and flagged)
        or (manager == _XLOG and operation == _PARAMETERS)
    ):
        return None if flagged else set()
    data = main_data(record)
    if data is None or len(data) < 4:
        return None
    (first,) = struct.unpack_from("<I", data)
    if manager == _XACT:
        return _dropped(data, info)
    if manager == _SMGR:
        return _storage(data, operation)
    if manager == _DBASE:
        return {(ANY, first, ANY, 0, CHANGE_FROM)}
    if manager == _TBLSPC:
        return {(first, ANY, ANY, 0, CHANGE_FROM)}
    logged = len(data) >= 24 and struct.unpack_from("<I", data, 20)[0] != 0
    return set() if logged and not flagged else None


def _dropped(data: bytes, info: int) -> set[Change] | None:
    if info & 0x70 not in _COMMITS_AND_ABORTS or not info & 0x80 or len(data) < 12:
        return None
    (parts,) = struct.unpack_from("<I", data, 8)
    if not parts & 4:
        return None
    at = 12 + (8 if parts & 1 else 0)
    try:
        if parts & 2:
            at += 4 + 4 * struct.unpack_from("<I", data, at)[0]
        (count,) = struct.unpack_from("<I", data, at)
        numbers = (
            struct.unpack_from(f"<{3 * count}I", data, at + 4) if at + 4 + 12 * count <= len(data) else None
        )
    except struct.error:
        return None
    if numbers is None:
        return None
    return {(*numbers[n : n + 3], 0, CHANGE_FROM) for n in range(0, len(numbers), 3)}


def _storage(data: bytes, operation: int) -> set[Change] | None:
    if operation == 0x10 and len(data) >= 16:
        space, database, relation, fork = struct.unpack_from("<IIII", data)
        return {(space, database, relation, 0, CHANGE_FROM)} if fork == 0 else set()
    if operation == 0x20 and len(data) >= 20:
        block, space, database, relation, flags = struct.unpack_from("<IIIII", data)
        return {(space, database, relation, block, CHANGE_FROM)} if flags & 1 else set()
    return None


def main_data(record: bytes) -> bytes | None:
    """The main data of a record without blocks; None where it has none or does not end with it."""
    at = _HEADER_BYTES
    while at < len(record) and record[at] in (252, 253):
        at += 5 if record[at] == 252 else 3
    body = None
    if at + 1 < len(record) and record[at] == 255:
        body, size = record[at + 2 :], record[at + 1]
    elif at + 4 < len(record) and record[at] == 254:
        body, size = record[at + 5 :], struct.unpack_from("<I", record, at + 1)[0]
    return body if body is not None and len(body) == size else None
