"""
Every parser of bytes that are stored or received, with samples to start from.

A target takes any bytes and returns, or raises an error of cloudsave. What is behind a seal or a checksum is
mutated in front of it, so that the bytes reach the parser: whoever holds the key could have written them.
"""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
from blake3 import blake3

from cloudsave.engines.binlog.cut import MARIADB_GTID_LIST, GtidSet, cut_mariadb, cut_mysql
from cloudsave.engines.mariadb.backup_program import _next_chunk
from cloudsave.engines.mysql.format_changes import MAGIC, encode_end, encode_write, read_changes
from cloudsave.engines.mysql.format_clone import parse_descriptor
from cloudsave.engines.postgresql.dialect import PostgresDialect, followed_branch, last_ancestor
from cloudsave.engines.postgresql.format_catalogue import parse_map, parse_row, tuples_of
from cloudsave.engines.postgresql.format_control import parse_control
from cloudsave.engines.postgresql.format_manifest import parse_manifest
from cloudsave.engines.postgresql.format_tablespace import tablespaces_made
from cloudsave.engines.postgresql.format_tar import TarParser
from cloudsave.engines.postgresql.format_wal import WalIndexer, parse_segment_name
from cloudsave.engines.postgresql.log_search import PostgresLogSearch
from cloudsave.kernels.checksums import crc32c
from cloudsave.model.found import ChangeKind, SearchQuery
from cloudsave.model.position import Position
from cloudsave.repository.container import Arena, ContainerWriter, Kind
from cloudsave.repository.head import REPOSITORY_OBJECT, read_head
from cloudsave.repository.keys import Secret, key_id, new_recovery_key, open_slots, recipient_slot
from cloudsave.repository.lineage import Lineage
from cloudsave.repository.log_objects import _encode_index, log_object_name, parse_log_object_name
from cloudsave.repository.manifests import decode_manifest, encode_manifest
from cloudsave.repository.maps import decode_map_object
from cloudsave.repository.packs import PackBuilder, Stretch, read_trailer
from cloudsave.repository.plain import read_plain, write_plain
from cloudsave.repository.tombs import condemned_in
from cloudsave.store.api import ObjectInfo
from cloudsave.store.memory import MemoryStore
from tests.unit.engines.binlog.synthetic import File
from tests.unit.engines.mariadb.test_mbstream import end, payload
from tests.unit.engines.postgresql.test_format_control import control_file
from tests.unit.engines.postgresql.test_format_manifest import RECEIVED, manifest_text
from tests.unit.engines.postgresql.test_format_tar import FILES, archive
from tests.unit.kernels.built import built_kernels
from tests.unit.kernels.synthetic_heap import busy_log
from tests.unit.kernels.synthetic_wal import SEGMENT_BYTES, SYSTEM, eventful_log
from tests.unit.repository.samples import (
    REPOSITORY_KEY,
    SeededClock,
    draft_manifest,
    lineage_on,
    noise,
    sample_log,
    write_backup,
)

SEGMENT, LOG, INDEX = sample_log(16 << 20, 4096)
RECOVERY = new_recovery_key()
HISTORY = b"1\t0/3000000\tno recovery target specified\n2\t0/5000000\tbefore \xc3\xa4\n"
EVERYTHING = SearchQuery(0, 1 << 62, frozenset(ChangeKind), 1, aborted=True)


@dataclass(frozen=True)
class Parser:
    """One target: what is called, and bytes that it takes gladly."""

    parse: Callable[[bytes], object]
    samples: tuple[bytes, ...]


def _sealed(name: str, kind: Kind, content: bytes, *, first: bytes | None = None) -> Lineage:
    """A lineage with one object, whose frames are `first` (where given) and `content`."""
    lineage = lineage_on(MemoryStore())
    full = lineage.root + name
    writer = ContainerWriter(lineage.keys, full, kind, clock=SeededClock(1), arena=Arena(), level=1)
    if first is not None:
        writer.add(first, proof=False)
    writer.add_blob(content)
    lineage.store.put(full, writer.finish(sign=kind is Kind.MANIFEST))
    return lineage


def _manifest(content: bytes) -> object:
    return _sealed("backups/20260101T000000Z-0001", Kind.MANIFEST, content).manifest("20260101T000000Z-0001")


def _log_index(content: bytes) -> object:
    lineage = lineage_on(MemoryStore())
    name = log_object_name(lineage.id, SEGMENT)[len(lineage.root) :]
    lineage = _sealed(name, Kind.LOG, LOG, first=content)
    return [*lineage.log_index(SEGMENT).commits], lineage.read_log(SEGMENT)


def _trailer(content: bytes) -> object:
    """The trailer of a pack, sealed as the last frame."""

    class Forged(PackBuilder):
        def _trailer(self) -> bytes:
            return content

    store = MemoryStore()
    lineage = lineage_on(store)
    made = _pack(lineage)
    size = Forged(made.name, made.container, made.bytes_target, made.frames, made.stretches).put(store)
    return read_trailer(lineage.keys, store, made.name, size)


def _pack(lineage: Lineage) -> PackBuilder:
    pack = PackBuilder.open(
        lineage.keys, "00000001-00000000", clock=SeededClock(1), level=1, bytes_target=1 << 20, arena=Arena()
    )
    prints = np.arange(2, dtype=np.uint64)
    pack.add(
        bytes(32768), [Stretch("base/1", 0, 2, 0, prints), Stretch("b", 7, 2, 16384, prints)], proof=False
    )
    return pack


def _mbstream(content: bytes) -> object:
    stream, chunks = io.BytesIO(content), []
    while (chunk := _next_chunk(stream)) is not None:
        chunks.append(chunk)
    return chunks


def _clone_messages() -> tuple[bytes, ...]:
    head = b"\x02\x0c\x00"
    state = struct.pack(">IIIIIIIQQH", 100, 46, 3, 2, 0, 1, 1, 9, 9, 1)
    name = b"./d/t.ibd\0"
    file = (
        struct.pack(">IIIIQQIIHIIIII", 100, 62 + len(name), 4, 2, 9, 9, 0, 0, 0, 5, 1, 1, 1, len(name)) + name
    )
    data = struct.pack(">IIIIIIIIIQQ", 100, 52, 5, 2, 0, 1, 1, 1, 16384, 0, 16384)
    return head + state, head + file, head + data


def _clone_changes(content: bytes) -> object:
    return list(read_changes(io.BytesIO(content)))


def _mysql_binlog() -> bytes:
    made = File()
    made.mysql(5, instant_us=1)
    made.mysql(6, instant_us=2)
    return bytes(made.content)


def _cut_mysql(content: bytes) -> object:
    gtids = GtidSet()
    return cut_mysql(content, gtids, stop=1 << 32, inclusive=False), str(gtids)


def _binlog() -> bytes:
    made = File()
    made.add(MARIADB_GTID_LIST, struct.pack("<IIIQ", 1, 0, 9, 4))
    made.mariadb(5)
    made.mariadb(6, standalone=True)
    return bytes(made.content)


def _holes(content: bytes) -> object:
    return _sealed(f"logs/00000001/holes/{1:016x}-{2:016x}", Kind.RECORD, content).holes()


def _origin(content: bytes) -> object:
    return _sealed("logs/00000002/origin", Kind.RECORD, content).origin("00000002")


def _condemned(content: bytes) -> object:
    lineage = lineage_on(MemoryStore())
    lineage.store.put("tombs/1", [_resealed(content)])
    return condemned_in(lineage)


def _identity(content: bytes) -> object:
    lineage = lineage_on(MemoryStore())
    lineage.store.put(lineage.root + "identity", [_resealed(content)])
    return lineage.identity()


def _head(content: bytes) -> object:
    store = MemoryStore()
    store.put(REPOSITORY_OBJECT, [_resealed(content)])
    return read_head(store)


def _resealed(content: bytes) -> bytes:
    """A plain object with the right digest, where it is one."""
    found = read_plain(content)
    return content if found is None else write_plain(found.fields)


def _slots(content: bytes) -> object:
    return open_slots([_resealed(content)], key_id(REPOSITORY_KEY), Secret(recovery_key=RECOVERY.identity))


def _container(content: bytes) -> object:
    """A whole object whose digest is right again."""
    lineage = lineage_on(MemoryStore())
    if len(content) > 104:
        fixed = content[:-104] + blake3(content[:-104]).digest() + content[-72:]
    else:
        fixed = content
    lineage.store.put(lineage.root + "logs/00000002/history", [fixed])
    return lineage.history("00000002")


def _log_name(content: bytes) -> object:
    name = content.decode("latin-1")
    info = ObjectInfo(f"lineages/x/logs/00000001/00000000/{name}", 1, SeededClock(1).now())
    return parse_log_object_name(info), parse_segment_name(name, segment_bytes=16 << 20)


def _history(content: bytes) -> object:
    return PostgresDialect().parse_history(content), followed_branch(content), last_ancestor(content)


def _tar(content: bytes) -> object:
    parser = TarParser()
    return [list(parser.feed(memoryview(content))), parser.finish()]


def _control(content: bytes) -> object:
    """With a checksum that is right again, as far as it has one."""
    fixed = bytearray(content)
    for at in (288, 292):
        if len(fixed) >= 8192:
            fixed[at : at + 4] = crc32c(bytes(fixed[:at])).to_bytes(4, "little")
    return parse_control(bytes(fixed))


def _wal(content: bytes) -> object:
    indexer = WalIndexer(
        Position("00000001", 16 << 20), log_file_bytes=SEGMENT_BYTES, system_identifier=str(SYSTEM)
    )
    indexer.feed(content)
    return indexer.take()


def _search(content: bytes) -> object:
    search = PostgresLogSearch("18.1", log_file_bytes=SEGMENT_BYTES, kernels=built_kernels())
    return search.begin(EVERYTHING, 16 << 20).feed(content)


def _catalogue(content: bytes) -> object:
    page = (content + bytes(8192))[:8192]
    rows = [
        [parse_row(oid, one.columns, major=major) for major in (14, 18)]
        for one in tuples_of(page)
        for oid in (1259, 2615, 1262)
    ]
    return rows, parse_map(content)


def _tablespaces(content: bytes) -> object:
    return tablespaces_made(content, until=len(content), log_file_bytes=16 << 20)


def _maps() -> tuple[bytes, ...]:
    """Real map objects, in the clear."""
    lineage = lineage_on(MemoryStore())
    files = {"base/1": noise(1, 40 * 8192), "base/2": bytes(9 * 8192) + noise(2, 100), "empty": b""}
    manifest = write_backup(lineage, "20260101T000000Z-0001", files)
    return tuple(lineage.get_blob(f"maps/{name}", Kind.MAP) for name in manifest.maps)


def _stored_history() -> bytes:
    lineage = lineage_on(MemoryStore())
    lineage.put_history("00000002", HISTORY)
    return lineage.store.get(lineage.root + "logs/00000002/history")


def _identity_sample() -> bytes:
    lineage = lineage_on(MemoryStore())
    record = {"engine": "postgresql", "system_identifier": "1", "source": "db"}
    return write_plain({**record, "first_seen_utc": "2026", "public_key": lineage.keys.public_key().hex()})


def _text(**fields: object) -> tuple[bytes, ...]:
    return (json.dumps(fields).encode(),)


HEAD = {"format": 1, "repository_id": "0" * 32, "key_id": "1" * 32, "features": [], "created_utc": "2026"}
PARSERS = {
    "plain object": Parser(read_plain, (write_plain(HEAD),)),
    "head": Parser(_head, (write_plain(HEAD),)),
    "key slot": Parser(_slots, (recipient_slot(REPOSITORY_KEY, RECOVERY.recipient),)),
    "identity": Parser(_identity, (_identity_sample(),)),
    "tomb": Parser(_condemned, (write_plain({"objects": ["lineages/x/packs/1"]}),)),
    "container": Parser(_container, (_stored_history(),)),
    "manifest": Parser(_manifest, (encode_manifest(draft_manifest("20260101T000000Z-0001")),)),
    "manifest in the clear": Parser(
        partial(decode_manifest, what="manifest"), (encode_manifest(draft_manifest("20260101T000000Z-0001")),)
    ),
    "map": Parser(partial(decode_map_object, what="map"), _maps()),
    "trailer": Parser(_trailer, (_pack(lineage_on(MemoryStore()))._trailer(),)),
    "log index": Parser(_log_index, (_encode_index(SEGMENT, INDEX),)),
    "hole": Parser(_holes, _text(first=1, last=2, cause="gone")),
    "origin": Parser(_origin, _text(offset=16 << 20, bytes="00" * 32)),
    "log name": Parser(_log_name, (b"0" * 16 + b"-" + b"1" * 16 + b"-" + b"0" * 16 + b"-" + b"0" * 16,)),
    "history": Parser(_history, (HISTORY,)),
    "mbstream": Parser(_mbstream, (payload(b"./d/t.ibd", 0, b"abc") + end(b"d/t.ibd"),)),
    "end of a binlog": Parser(partial(cut_mariadb, stop=1 << 32, inclusive=False), (_binlog(),)),
    "message of a clone": Parser(parse_descriptor, _clone_messages()),
    "changes of a clone": Parser(_clone_changes, (MAGIC + encode_write("d/t", 0, b"abc") + encode_end(),)),
    "end of a binlog of MySQL": Parser(_cut_mysql, (_mysql_binlog(),)),
    "tar": Parser(_tar, (archive(FILES),)),
    "control file": Parser(_control, (control_file(), control_file(1300))),
    "server's manifest": Parser(parse_manifest, (manifest_text(RECEIVED),)),
    "log": Parser(_wal, (bytes(eventful_log().log), bytes(busy_log(18).log))),
    "log that is searched": Parser(_search, (bytes(busy_log(18).log),)),
    "catalogue": Parser(_catalogue, (bytes(8192), noise(3, 8192))),
    "tablespaces in log": Parser(_tablespaces, (noise(4, 16384),)),
}


def samples() -> Iterator[tuple[str, bytes]]:
    """All samples by parser."""
    for name, parser in PARSERS.items():
        for sample in parser.samples:
            yield name, sample
