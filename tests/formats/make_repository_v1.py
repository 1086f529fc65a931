"""
Makes the small repository of format 1 that every release must open (`python -m` with this module's name).

Run once, when format 1 was final; its result is committed and never made again. (Compressors and the age
program may give other bytes tomorrow; readers must read the old ones.)
"""

from __future__ import annotations

import json
import sys
import tarfile
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from blake3 import blake3

from cloudsave.model.item import CorruptPage, Item, ItemKind
from cloudsave.model.log import LogHole
from cloudsave.model.manifest import Manifest
from cloudsave.repository.lineage import Lineage
from cloudsave.repository.repository import Repository
from cloudsave.repository.writer import WriterOptions
from cloudsave.store.posix import PosixStore
from tests.unit.repository.samples import (
    BLOCK,
    IDENTITY,
    SEGMENT,
    BytesPiece,
    SeededClock,
    draft_manifest,
    noise,
    open_writer,
    pieces_of,
    sample_log,
    store_files,
)

DATA = Path(__file__).parent / "data"
ARCHIVE = DATA / "repository_v1.tar"
EXPECTED = DATA / "repository_v1.json"
PASSPHRASE = "a golden passphrase"
FIRST, SECOND, REVOKED, UNFINISHED = (f"2026010{n}T000000Z-000{n}" for n in range(1, 5))
OUTSIDE = "/etc/postgresql/18/main/pg_hba.conf"
HISTORY = b"1\t0/1000200\tno recovery target specified\n"


def files_of(backup_id: str) -> dict[str, bytes]:
    """The data directory at the time of a backup."""
    heap = bytearray(noise(1, 9 * BLOCK) + bytes(4 * BLOCK) + b"all the same " * 900)
    if backup_id != FIRST:
        heap[3 * BLOCK + 99] ^= 0xFF
        heap += noise(2, 2 * BLOCK)
    return {
        "PG_VERSION": b"18\n",
        "backup_label": b"START WAL LOCATION: 0/1000028 (file 000000010000000000000001)\n",
        "base/5/16384": bytes(heap),
        "base/5/16385": bytes(30 * BLOCK),
        "base/5/16386": b"",
        "global/pg_control": noise(3, BLOCK),
        "name that is not UTF-8 \udcff\udcfe": b"x" * 100,
        "pg_tblspc/16390/PG_18_202506291/5/16391": noise(4, BLOCK + 77),
    }


ENTRIES = (
    Item("base", ItemKind.DIRECTORY, 0o700),
    Item("base/5", ItemKind.DIRECTORY, 0o750),
    Item("pg_wal", ItemKind.DIRECTORY, 0o700),
    Item("pg_tblspc", ItemKind.DIRECTORY, 0o700),
    Item("pg_tblspc/16390", ItemKind.LINK, 0o777, link_target="/srv/space"),
)


def back_up(lineage: Lineage, backup_id: str, parent: Manifest | None) -> Manifest:
    """One backup with things of every kind."""
    writer = open_writer(lineage, backup_id, parent, WriterOptions(workers=1))
    try:
        writer.open()
        store_files(writer, files_of(backup_id), ENTRIES)
        outside = Item(OUTSIDE, ItemKind.FILE, 0o640, size_bytes=18, outside=True)
        writer.store(BytesPiece(outside, 0, b"local all all peer"))
        writer.settle()
        writer.drain()
        draft = replace(
            draft_manifest(backup_id, parent),
            tablespaces={"16390": "/srv/space"},
            corrupt_pages=(CorruptPage("base/5/16384", 2, "checksum"),),
            notes=("a note",),
        )
        return writer.commit(draft)
    finally:
        writer.abort()


def fill(lineage: Lineage) -> None:
    """All kinds of objects."""
    lineage.record_identity(IDENTITY, source="orders")
    first = back_up(lineage, FIRST, None)
    back_up(lineage, SECOND, first)
    for backup_id in (REVOKED, UNFINISHED):
        writer = open_writer(lineage, backup_id, first, WriterOptions(workers=1))
        writer.open()
        for piece in pieces_of("base/5/17000", noise(7, 2 * BLOCK)):
            writer.store(piece)
        writer.settle()
        writer.drain()
    lineage.revoke(REVOKED)
    _, log, _ = sample_log(SEGMENT, 3000)
    for begin, end in ((0, 1000), (1000, 2000), (0, 2000), (2500, 3000)):
        segment, _, index = sample_log(SEGMENT + begin, end - begin)
        lineage.put_log(segment, [log[begin:end]], index)
    segment, other, index = sample_log(SEGMENT, 900, seed=2)
    lineage.put_log(replace(segment, branch="00000002"), [log[:512] + other[512:]], index)
    lineage.put_history("00000002", HISTORY)
    lineage.put_hole(LogHole("00000001", SEGMENT + 2000, SEGMENT + 2500, "the server removed it"))
    lineage.store.put(
        "tombs/0001", [json.dumps({"objects": [lineage.root + "packs/000000ff-00000000"]}).encode()]
    )


def expected_of(lineage: Lineage, recovery_key: str) -> dict[str, Any]:
    """What readers of all times must find."""
    manifests = {name: lineage.manifest(name) for name in lineage.backup_ids()}
    return {
        "passphrase": PASSPHRASE,
        "recovery_key": recovery_key,
        "lineage": lineage.id,
        "lineage_key": lineage.keys.lineage_key.hex(),
        "public_key": lineage.keys.public_key().hex(),
        "manifests": {name: json.loads(json.dumps(asdict(one))) for name, one in manifests.items()},
        "files": {
            name: {path: blake3(content).hexdigest() for path, content in files_of(name).items()}
            for name in manifests
        },
        "logs": [
            [one.branch, one.first, one.last, one.commit_first_us, one.commit_last_us]
            for one in lineage.logs()
        ],
        "log_digests": [blake3(lineage.read_log(one)).hexdigest() for one in lineage.logs()],
        "log_indexes": [
            json.loads(
                json.dumps(
                    asdict(lineage.log_index(one)),
                    default=lambda commits: [asdict(commit) for commit in commits],
                )
            )
            for one in lineage.logs()
        ],
    }


def main() -> int:
    """Make it, unless it is there."""
    if ARCHIVE.exists():
        sys.stderr.write(f"{ARCHIVE} is there and must stay as it is\n")
        return 1
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "repository"
        clock = SeededClock(2026)
        created = Repository.create(PosixStore(root), passphrase=PASSPHRASE, clock=clock)
        lineage = created.repository.lineage(IDENTITY.lineage)
        fill(lineage)
        expected = expected_of(lineage, created.recovery_key.identity)
        DATA.mkdir(exist_ok=True)
        EXPECTED.write_text(json.dumps(expected, indent=1, sort_keys=True) + "\n")
        with tarfile.open(ARCHIVE, "w", format=tarfile.GNU_FORMAT) as archive:
            for path in sorted(root.rglob("*")):
                if path.is_file() and ".tmp" not in path.parts:
                    member = tarfile.TarInfo(str(path.relative_to(root)))
                    member.size = path.stat().st_size
                    with path.open("rb") as file:
                        archive.addfile(member, file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
