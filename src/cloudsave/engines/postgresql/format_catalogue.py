"""
Rows of the catalogues that name things, as they stand in pages and log records.

    tuple
    0    18   who made and deleted it, and where a newer version stands
    18   2    u16 number of columns, and flags
    20   2    u16 flags; 0x0800: nobody has deleted it
    22   1    u8 where the columns begin
    ..   ..   the columns, host order, aligned; the first ones are never null

    pg_class            pg_namespace      pg_database
    0    u32 oid        0   u32 oid       0    u32 oid
    4    64  name       4   64  name      4    64  name
    68   u32 schema                       208  i32 connections allowed (version 14)
    88   u32 file                         80   i32 the same (since 15); -2: being dropped
    92   u32 tablespace
    114  u8  persistence (118 since version 18); "t": temporary
    115  u8  kind (119 since version 18)

    pg_filenode.map, and the record of the relation map behind 12 bytes (database, tablespace, length)
    0    4    i32 magic 0x592717
    4    4    i32 entries
    8    8    each: u32 oid of the catalogue, u32 its file

Source: PostgreSQL src/include/catalog/{pg_class.h, pg_namespace.h, pg_database.h}, access/htup_details.h,
storage/itemid.h, src/backend/utils/cache/relmapper.c.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from cloudsave.engines.postgresql.format_page import PAGE_BYTES, PAGE_HEADER_BYTES

PG_CLASS, PG_NAMESPACE, PG_DATABASE = 1259, 2615, 1262
NAMING = (PG_CLASS, PG_NAMESPACE, PG_DATABASE)
"""The catalogues whose rows are read."""
TUPLE_HEADER_BYTES = 23
FIRST_NORMAL_OID = 16_384
"""Files with a smaller number are catalogues, numbered by their oid."""
BEING_DROPPED = -2
MAP_ENTRIES_MAX = 64
CATALOGUES = {
    1259: "pg_class",
    1249: "pg_attribute",
    1247: "pg_type",
    1255: "pg_proc",
    1260: "pg_authid",
    1261: "pg_auth_members",
    1262: "pg_database",
    1213: "pg_tablespace",
    2604: "pg_attrdef",
    2606: "pg_constraint",
    2607: "pg_conversion",
    2612: "pg_language",
    2615: "pg_namespace",
    2616: "pg_opclass",
    2617: "pg_operator",
    2618: "pg_rewrite",
    2620: "pg_trigger",
    2224: "pg_sequence",
    2328: "pg_foreign_data_wrapper",
    1417: "pg_foreign_server",
    3079: "pg_extension",
    3118: "pg_foreign_table",
    3256: "pg_policy",
    3350: "pg_partitioned_table",
    3381: "pg_statistic_ext",
    3466: "pg_event_trigger",
    3501: "pg_enum",
    3541: "pg_range",
    2610: "pg_index",
    6104: "pg_publication",
    6106: "pg_publication_rel",
    6100: "pg_subscription",
    2964: "pg_db_role_setting",
}
"""The catalogues that define things, by oid; statistics and dependencies are no definitions."""
LARGE_OBJECTS = 2613
"""pg_largeobject: a catalogue by its number, and data by what it holds."""
TRANSIENT_PREFIX = "pg_temp_"
"""What a relation is called, with an oid behind, that takes the place of another one and goes again."""
_NAME_BYTES = 64
_MAP_MAGIC = 0x592717
_UNDELETED = 0x0800
_LINE_NORMAL = 1
_U32 = struct.Struct("<I")
_I32 = struct.Struct("<i")
_PAIR = struct.Struct("<II")


@dataclass(frozen=True, slots=True)
class NamingRow:
    """A row of one of the naming catalogues."""

    catalogue: int
    oid: int
    name: str
    schema: int = 0
    file: int = 0
    """0: it has none, or it is mapped."""
    tablespace: int = 0
    kind: str = ""
    """As `pg_class.relkind`."""
    temporary: bool = False
    being_dropped: bool = False


@dataclass(frozen=True, slots=True)
class PageTuple:
    """A tuple of a page: the number of its line pointer, and its columns."""

    line: int
    columns: bytes
    undeleted: bool


def tuples_of(page: bytes | memoryview) -> Iterator[PageTuple]:
    """The tuples of a heap page, whatever their visibility; what is malformed is passed over."""
    (lower,) = struct.unpack_from("<H", page, 12)
    for place in range(PAGE_HEADER_BYTES, min(lower, PAGE_BYTES) - 3, 4):
        (pointer,) = _U32.unpack_from(page, place)
        begin, flags, length = pointer & 0x7FFF, pointer >> 15 & 3, pointer >> 17
        if flags != _LINE_NORMAL or length <= TUPLE_HEADER_BYTES or begin + length > PAGE_BYTES:
            continue
        columns_at = page[begin + 22]
        if TUPLE_HEADER_BYTES <= columns_at <= length:
            (infomask,) = struct.unpack_from("<H", page, begin + 20)
            yield PageTuple(
                (place - PAGE_HEADER_BYTES) // 4 + 1,
                bytes(page[begin + columns_at : begin + length]),
                bool(infomask & _UNDELETED),
            )


def parse_row(catalogue: int, columns: bytes, *, major: int) -> NamingRow | None:
    """The row in the columns of a tuple; None where they are too few, or the name is none."""
    try:
        (oid,) = _U32.unpack_from(columns)
        name = _name(columns[4 : 4 + _NAME_BYTES])
        if not name or not oid:
            return None
        if catalogue == PG_NAMESPACE:
            return NamingRow(catalogue, oid, name)
        if catalogue == PG_DATABASE:
            (connections,) = _I32.unpack_from(columns, 208 if major == 14 else 80)
            return NamingRow(catalogue, oid, name, being_dropped=connections == BEING_DROPPED)
        file, tablespace = _PAIR.unpack_from(columns, 88)
        (schema,) = _U32.unpack_from(columns, 68)
        persistence, kind = columns[118:120] if major >= 18 else columns[114:116]
    except (struct.error, ValueError):
        return None
    return NamingRow(catalogue, oid, name, schema, file, tablespace, chr(kind), persistence == ord("t"))


def parse_map(content: bytes) -> Mapping[int, int]:
    """Catalogue oid to its file, from a relation map; nothing where it is none."""
    if len(content) < 8:
        return {}
    magic, entries = struct.unpack_from("<ii", content)
    if magic != _MAP_MAGIC or not 0 <= entries <= MAP_ENTRIES_MAX or len(content) < 8 + 8 * entries:
        return {}
    return dict(_PAIR.unpack_from(content, 8 + 8 * number) for number in range(entries))


def _name(field: bytes) -> str:
    """A name from its zero-padded bytes; the database's encoding is unknown here, mostly it is UTF-8."""
    return field.partition(b"\0")[0].decode("utf-8", "replace")
