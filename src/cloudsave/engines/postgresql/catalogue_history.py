"""
What the log says of the rows that name things: pg_class, pg_namespace and pg_database.

A record of a change names a place (block and line), not a row, and an update may hold just the bytes that
differ. So the rows are kept by their place: each image of a page gives all of its rows, each insert and
update one. The server writes an image with the first change of a page after each checkpoint; log that reaches
back to a checkpoint therefore tells every row that it changes. A row that is not known stays unknown: nothing
is guessed.

Source: PostgreSQL heap_xlog_insert(), heap_xlog_delete(), heap_xlog_update(),
src/backend/access/heap/heapam_xlog.c.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum

from cloudsave.engines.postgresql.format_catalogue import (
    NAMING,
    PG_CLASS,
    PG_NAMESPACE,
    TRANSIENT_PREFIX,
    TUPLE_HEADER_BYTES,
    NamingRow,
    parse_map,
    parse_row,
    tuples_of,
)
from cloudsave.kernels.page_images import page_of
from cloudsave.kernels.wal_facts import Block, Fragments, read_fragments
from cloudsave.kernels.wal_walk import MAGIC_BY_MAJOR

_HEAP, _RELATION_MAP = 10, 7
_INSERT, _DELETE, _UPDATE, _HOT_UPDATE, _IN_PLACE = 0x00, 0x10, 0x20, 0x40, 0x70
_PREFIX_FROM_OLD, _SUFFIX_FROM_OLD = 0x20, 0x40
_TUPLE_HEAD_BYTES = 5
"""In front of a tuple in a record: two u16 of flags, u8 where the columns begin."""
_U16 = struct.Struct("<H")
_U32 = struct.Struct("<I")


class Operation(IntEnum):
    """What was done with a row."""

    INSERT = 1
    UPDATE = 2
    DELETE = 3
    IN_PLACE = 4
    """Without a new version of it, and never undone."""


@dataclass(frozen=True, slots=True)
class RowChange:
    """One change of a naming row. `old` and `new` are None where there is none, or where it is not known."""

    start: int
    database: int
    catalogue: int
    operation: Operation
    old: NamingRow | None
    new: NamingRow | None

    @property
    def known(self) -> bool:
        """Whether the rows are known that the operation has; in place nothing changes that would matter."""
        if self.operation is Operation.IN_PLACE:
            return True
        old_known = self.old is not None or self.operation is Operation.INSERT
        return old_known and (self.new is not None or self.operation is Operation.DELETE)


@dataclass(slots=True)
class CatalogueHistory:
    """Follows the catalogues through records in log order."""

    major: int
    moved: dict[tuple[int, int], int] = field(default_factory=dict)
    """(database, file) of each catalogue whose file has another number than its oid, to the oid."""
    changes: dict[int, list[RowChange]] = field(default_factory=dict)
    """By transaction (or sub-transaction), in log order."""
    rows: dict[tuple[int, int, int], NamingRow] = field(default_factory=dict)
    """The last row seen of each (database, catalogue, oid), and of each file by (database, 0, file)."""
    _places: dict[tuple[int, int, int], dict[int, bytes]] = field(default_factory=dict)
    """The columns at each line of a block (database, file, block), as far as they are known."""

    def follow_map(self, database: int, mapping: Mapping[int, int]) -> None:
        """Catalogues of a database (0: the shared ones) have these files."""
        for oid, file in mapping.items():
            if file != oid:
                self.moved[database, file] = oid

    def watched(self) -> frozenset[int]:
        """Relation numbers whose records are wanted."""
        return frozenset(NAMING) | {file for (_, file), oid in self.moved.items() if oid in NAMING}

    def catalogue_of(self, database: int, file: int) -> int:
        """The oid of the catalogue that has this file, or the file's own number."""
        return self.moved.get((database, file), file)

    def apply(self, start: int, record: bytes) -> None:
        """The next record; what cannot be understood is passed over."""
        found = read_fragments(record, MAGIC_BY_MAJOR[self.major])
        if found is None:
            return
        manager, operation = record[17], record[16] & 0x70
        if manager == _RELATION_MAP:
            if len(found.main) > 12:
                self.follow_map(_U32.unpack_from(found.main)[0], parse_map(found.main[12:]))
            return
        imaged = {number for number, block in enumerate(found.blocks) if self._take_image(block)}
        if manager == _HEAP and found.blocks:
            try:
                self._take_change(start, _U32.unpack_from(record, 4)[0], operation, found, imaged)
            except (struct.error, IndexError):
                return

    def _take_image(self, block: Block) -> bool:
        """Whether the block's image told all of its rows."""
        if block.made_anew:
            self._places[_place(block)] = {}
        if block.fork or block.image is None or self._catalogue(block) is None:
            return False
        page = page_of(block)
        if page is None:
            self._places.pop(_place(block), None)
            return False
        self._places[_place(block)] = {one.line: one.columns for one in tuples_of(page)}
        return True

    def _catalogue(self, block: Block) -> int | None:
        oid = self.catalogue_of(block.relation[1], block.relation[2])
        return oid if oid in NAMING else None

    def _take_change(self, start: int, xid: int, operation: int, found: Fragments, imaged: set[int]) -> None:
        block, main = found.blocks[0], found.main
        catalogue = self._catalogue(block)
        if catalogue is None:
            return
        lines = self._places.setdefault(_place(block), {})
        old: bytes | None = None
        new: bytes | None = None
        if operation in (_INSERT, _IN_PLACE):
            (line,) = _U16.unpack_from(main)
            if 0 not in imaged:
                lines[line] = block.data if operation == _IN_PLACE else _inserted(block.data)
            new = lines.get(line)
            kind = Operation.INSERT if operation == _INSERT else Operation.IN_PLACE
        elif operation == _DELETE:
            (line,) = _U16.unpack_from(main, 4)
            old, kind = lines.get(line), Operation.DELETE
        elif operation in (_UPDATE, _HOT_UPDATE):
            (old_line,), (line,) = _U16.unpack_from(main, 4), _U16.unpack_from(main, 12)
            old = self._places.get(_place(found.blocks[-1]), {}).get(old_line)
            if 0 not in imaged:
                lines.pop(line, None)
                updated = _updated(block.data, main[7], old)
                if updated is not None:
                    lines[line] = updated
            new, kind = lines.get(line), Operation.UPDATE
        else:
            return
        database = block.relation[1]
        rows = [None if one is None else parse_row(catalogue, one, major=self.major) for one in (old, new)]
        for row in rows:
            if row is not None:
                self._learn(database, row)
        self.changes.setdefault(xid, []).append(RowChange(start, database, catalogue, kind, rows[0], rows[1]))

    def _learn(self, database: int, row: NamingRow) -> None:
        self.rows[database, row.catalogue, row.oid] = row
        if row.catalogue == PG_CLASS and row.file and not row.name.startswith(TRANSIENT_PREFIX):
            self.rows[database, 0, row.file] = row

    def learn_images(self) -> None:
        """Add what the known places say of rows that nothing changed."""
        for (database, file, _), lines in self._places.items():
            catalogue = self.catalogue_of(database, file)
            for columns in lines.values():
                row = parse_row(catalogue, columns, major=self.major)
                if row is None or catalogue not in (PG_CLASS, PG_NAMESPACE):
                    continue
                self.rows.setdefault((database, catalogue, row.oid), row)
                if row.file:
                    self.rows.setdefault((database, 0, row.file), row)


def _place(block: Block) -> tuple[int, int, int]:
    return block.relation[1], block.relation[2], block.number


def _inserted(data: bytes) -> bytes:
    """The columns of an inserted tuple."""
    return data[_TUPLE_HEAD_BYTES + data[4] - TUPLE_HEADER_BYTES :]


def _updated(data: bytes, flags: int, old: bytes | None) -> bytes | None:
    """The columns of a tuple's new version; None where it takes bytes from an old one that is not known."""
    at, prefix, suffix = 0, 0, 0
    if flags & _PREFIX_FROM_OLD:
        (prefix,), at = _U16.unpack_from(data, at), at + 2
    if flags & _SUFFIX_FROM_OLD:
        (suffix,), at = _U16.unpack_from(data, at), at + 2
    middle = _inserted(data[at:])
    if not prefix and not suffix:
        return middle
    if old is None or prefix > len(old) or suffix > len(old):
        return None
    return old[:prefix] + middle + (old[-suffix:] if suffix else b"")
