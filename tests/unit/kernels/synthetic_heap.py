"""Records of tables, files and transactions for `WalWriter`, as a server writes them."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from cloudsave.kernels.wal_walk import MAGIC_BY_MAJOR
from tests.unit.kernels.synthetic_wal import WalWriter

Relation = tuple[int, int, int]
TABLE: Relation = (1663, 5, 16_384)
OTHER: Relation = (1663, 5, 16_390)
PG_CLASS: Relation = (1663, 5, 1259)


@dataclass(frozen=True)
class Image:
    """A page image as it is stored."""

    stored: bytes
    hole_begin: int = 0
    hole_bytes: int = 0
    compression: str = ""
    applied: bool = True


def block(
    number: int,
    relation: Relation | None,
    *,
    data: bytes = b"",
    image: Image | None = None,
    page: int = 7,
    major: int = 18,
    anew: bool = False,
) -> tuple[bytes, bytes]:
    """A block's fragment header and its payload; without a relation that of the block before."""
    flags = (0x10 if image else 0) | (0x20 if data else 0) | (0 if relation else 0x80) | (0x40 if anew else 0)
    head = struct.pack("<BBH", number, flags, len(data))
    if image is not None:
        bits = {"": 0, "pglz": 4, "lz4": 8, "zstd": 16}[image.compression] | (2 if image.applied else 0)
        if major == 14:
            bits = (2 if image.compression else 0) | (4 if image.applied else 0)
        how = bits | (1 if image.hole_bytes else 0)
        head += struct.pack("<HHB", len(image.stored), image.hole_begin, how)
        if image.hole_bytes and image.compression:
            head += struct.pack("<H", image.hole_bytes)
    if relation:
        head += struct.pack("<III", *relation)
    return head + struct.pack("<I", page), (image.stored if image else b"") + data


def record(
    wal: WalWriter,
    manager: int,
    info: int,
    *,
    xid: int = 0,
    main: bytes = b"",
    blocks: Sequence[tuple[bytes, bytes]] = (),
) -> int:
    """Append a record; where it begins."""
    body = b"".join(head for head, _ in blocks)
    if main:
        body += bytes([255, len(main)]) if len(main) < 256 else b"\xfe" + struct.pack("<I", len(main))
    body += b"".join(payload for _, payload in blocks) + main
    wal.raw_record(manager, info, body, xid=xid)
    return wal.records[-1][0]


def insert(
    wal: WalWriter, xid: int, relation: Relation = TABLE, *, line: int = 1, columns: bytes = b"abcd"
) -> int:
    """A row inserted."""
    data = struct.pack("<HHBB", 1, 0, 24, 0) + columns
    return record(
        wal, 10, 0, xid=xid, main=struct.pack("<HB", line, 0), blocks=[block(0, relation, data=data)]
    )


def delete(wal: WalWriter, xid: int, relation: Relation = TABLE, *, line: int = 1, flags: int = 0) -> int:
    """A row deleted."""
    main = struct.pack("<IHBB", xid, line, 0, flags)
    return record(wal, 10, 0x10, xid=xid, main=main, blocks=[block(0, relation)])


def update(
    wal: WalWriter,
    xid: int,
    relation: Relation = TABLE,
    *,
    old: int = 1,
    line: int = 2,
    columns: bytes = b"abcd",
    prefix: int = 0,
    suffix: int = 0,
) -> int:
    """A row updated within its page; `columns` are those between prefix and suffix."""
    flags = (0x20 if prefix else 0) | (0x40 if suffix else 0)
    data = struct.pack("<H", prefix) if prefix else b""
    data += struct.pack("<H", suffix) if suffix else b""
    data += struct.pack("<HHBB", 1, 0, 24, 0) + columns
    main = struct.pack("<IHBBIH", xid, old, 0, flags, 0, line)
    return record(wal, 10, 0x40, xid=xid, main=main, blocks=[block(0, relation, data=data)])


def insert_many(wal: WalWriter, xid: int, rows: int, relation: Relation = TABLE) -> int:
    """Rows inserted at once."""
    return record(
        wal, 9, 0x50, xid=xid, main=struct.pack("<BxH", 0, rows), blocks=[block(0, relation, data=b"x")]
    )


def running(wal: WalWriter, *, oldest: int, following: int) -> int:
    """The running transactions."""
    return record(wal, 8, 0x10, main=struct.pack("<iiB3xIII", 0, 0, 0, following, oldest, following - 1))


def end(
    wal: WalWriter,
    xid: int,
    time: int,
    *,
    operation: int = 0x00,
    children: Sequence[int] = (),
    dropped: Sequence[Relation] = (),
    of: int | None = None,
) -> int:
    """A commit or an abort; `of`: the prepared transaction that it ends."""
    parts = (
        1 | (2 if children else 0) | (4 if dropped else 0) | (256 | 8 if dropped else 0) | (16 if of else 0)
    )
    main = struct.pack("<qIII", time, parts, 5, 1663)
    if children:
        main += struct.pack(f"<I{len(children)}I", len(children), *children)
    if dropped:
        main += struct.pack("<I", len(dropped)) + b"".join(struct.pack("<III", *one) for one in dropped)
        main += struct.pack("<I", 1) + bytes(16 if wal.major >= 18 else 12)
        main += struct.pack("<I", 1) + bytes(16)
    if of:
        main += struct.pack("<I", of)
    return record(wal, 1, operation | 0x80, xid=xid, main=main)


def relation_map(wal: WalWriter, database: int, mapping: dict[int, int]) -> int:
    """Catalogues get new files."""
    content = struct.pack("<ii", 0x592717, len(mapping))
    content += b"".join(struct.pack("<II", *pair) for pair in mapping.items())
    return record(wal, 7, 0, xid=9, main=struct.pack("<IIi", database, 1663, len(content)) + content)


def magic(wal: WalWriter) -> int:
    """Of its pages."""
    return MAGIC_BY_MAJOR[wal.major]


def busy_log(major: int = 18) -> WalWriter:
    """A log with every record that the pass reads, and others between."""
    wal = WalWriter(major=major)
    running(wal, oldest=700, following=700)
    for number in range(300):
        insert(wal, 700 + number % 3)
        wal.noise(number * 5)
        if number % 50 == 0:
            image = Image(bytes(3000), 100, 5192, "pglz" if number % 100 else "")
            head = block(0, PG_CLASS, image=image, major=major)
            record(wal, 10, 0x10, xid=701, main=struct.pack("<IHBB", 701, 1, 0, 0), blocks=[head])
    insert_many(wal, 700, 40)
    update(wal, 701, OTHER)
    update(wal, 701, PG_CLASS, prefix=4, suffix=2)
    delete(wal, 702, flags=8)
    delete(wal, 702, flags=0)
    record(wal, 10, 0x30, xid=702, main=struct.pack("<IIB3xII", 5, 2, 0, 16_384, 16_390))
    record(wal, 2, 0x10, xid=702, main=struct.pack("<IIIi", *TABLE, 0))
    record(wal, 2, 0x10, xid=702, main=struct.pack("<IIIi", *TABLE, 1))
    record(wal, 2, 0x20, xid=702, main=struct.pack("<IIIIi", 3, *TABLE, 1))
    record(wal, 4, 0x10 if major == 14 else 0x20, xid=703, main=struct.pack("<IiI", 16_500, 1, 1663))
    record(wal, 4, 0x00, xid=703, main=struct.pack("<IIII", 16_500, 1663, 1, 1663))
    relation_map(wal, 5, {1259: 20_000})
    delete(wal, 703, (1663, 5, 20_000))
    end(wal, 702, 5, operation=0x20)
    end(wal, 700, 6, children=[701], dropped=[TABLE, OTHER])
    record(wal, 1, 0x10, xid=703, main=bytes(100))
    end(wal, 0, 7, operation=0x30, of=703)
    end(wal, 0, 8, operation=0x40, of=704)
    wal.commit(705, 9)
    wal.switch()
    wal.commit(706, 10)
    return wal
