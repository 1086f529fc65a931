"""Small repositories for tests: lineages on any store, backups of files given as bytes, and all read back."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cloudsave.clock import Clock
from cloudsave.model.identity import Role, SourceIdentity
from cloudsave.model.item import Item, ItemKind
from cloudsave.model.log import Commit, LogIndex, LogSegment, RestorePoint
from cloudsave.model.manifest import BackupStatistics, Manifest
from cloudsave.model.position import Position
from cloudsave.repository.crypto import LineageKeys
from cloudsave.repository.lineage import Lineage
from cloudsave.repository.reader import BackupReader
from cloudsave.repository.writer import BackupWriter, WriterOptions
from cloudsave.store.api import ObjectStore

LINEAGE = "postgresql-7561234567890123456"
REPOSITORY_KEY = bytes(range(32))
PIECE_BYTES = 1 << 20
BLOCK = 8192
SEGMENT = 16 << 20
IDENTITY = SourceIdentity(
    engine="postgresql",
    system_identifier="7561234567890123456",
    version="18.6",
    major=18,
    branch="00000001",
    role=Role.PRIMARY,
    data_directory="/var/lib/postgresql/18/main",
    page_bytes=BLOCK,
    log_file_bytes=SEGMENT,
    page_checksums=True,
)


class SeededClock(Clock):
    """A clock whose instants and random bytes follow from a seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._now = datetime(2026, 1, 1, tzinfo=UTC)
        self._lock = threading.Lock()

    def now(self) -> datetime:
        """One second later at each call."""
        with self._lock:
            self._now += timedelta(seconds=1)
            return self._now

    def random_bytes(self, count: int) -> bytes:
        """Bytes that the seed decides."""
        with self._lock:
            return self._random.randbytes(count)


@dataclass(frozen=True)
class BytesPiece:
    """A piece of a file whose bytes are at hand; `missing` bytes of its end cannot be read any more."""

    item: Item
    offset: int
    content: bytes
    missing: int = 0

    @property
    def length(self) -> int:
        """As promised before the file shrank."""
        return len(self.content)

    def read_into(self, target: memoryview, *, offset: int) -> int:
        """What is left of the piece from `offset` on."""
        part = self.content[offset : min(offset + len(target), len(self.content) - self.missing)]
        target[: len(part)] = part
        return len(part)

    def close(self) -> None:
        """Nothing to do."""


def noise(seed: int, count: int) -> bytes:
    """Bytes that do not compress."""
    return random.Random(seed).randbytes(count)


def lineage_on(store: ObjectStore, *, seed: int = 1) -> Lineage:
    """The sample lineage on a store."""
    return Lineage(store, LineageKeys.derive(REPOSITORY_KEY, LINEAGE), clock=SeededClock(seed))


def file_item(path: str, size_bytes: int = 0) -> Item:
    """A regular file of the data directory."""
    return Item(path, ItemKind.FILE, 0o600, size_bytes=size_bytes, modified_us=1_700_000_000_000_000)


def pieces_of(path: str, content: bytes) -> list[BytesPiece]:
    """A file in pieces; one empty piece for an empty file."""
    item = file_item(path, len(content))
    offsets = range(0, len(content), PIECE_BYTES) or (0,)
    return [BytesPiece(item, offset, content[offset : offset + PIECE_BYTES]) for offset in offsets]


def draft_manifest(backup_id: str, parent: Manifest | None = None) -> Manifest:
    """What a backup knows of itself before it is committed."""
    return Manifest(
        backup_id=backup_id,
        lineage=LINEAGE,
        source="orders",
        engine="postgresql",
        server_version="18.6",
        kind="incremental" if parent else "full",
        parent=parent.backup_id if parent else "",
        method="local",
        tool_version="0",
        started_us=1_700_000_000_000_000,
        finished_us=1_700_000_001_500_000,
        start=Position("00000001", 0x1000028),
        stop=Position("00000001", 0x1000200),
        log_file_bytes=SEGMENT,
        page_bytes=BLOCK,
        page_checksums=True,
        tablespaces={},
        settings={"max_connections": "100"},
        packs=(),
        maps=(),
        files=(),
        corrupt_pages=(),
        statistics=BackupStatistics(),
    )


def open_writer(
    lineage: Lineage, backup_id: str, parent: Manifest | None = None, options: WriterOptions | None = None
) -> BackupWriter:
    """A writer that is not open yet."""
    options = options or WriterOptions(workers=2)
    return BackupWriter(lineage, backup_id, parent=parent, options=options, advance=lambda count: None)


def store_files(writer: BackupWriter, files: Mapping[str, bytes], entries: Iterable[Item] = ()) -> None:
    """Give a writer whole files, and things without content."""
    for path, content in files.items():
        for piece in pieces_of(path, content):
            writer.store(piece)
    for item in entries:
        writer.add_entry(item)


def write_backup(
    lineage: Lineage,
    backup_id: str,
    files: Mapping[str, bytes],
    parent: Manifest | None = None,
    options: WriterOptions | None = None,
) -> Manifest:
    """A committed backup of `files`; whatever goes wrong, no thread is left behind."""
    writer = open_writer(lineage, backup_id, parent, options)
    try:
        writer.open()
        store_files(writer, files, [Item("base", ItemKind.DIRECTORY, 0o700)])
        writer.settle()
        writer.drain()
        return writer.commit(draft_manifest(backup_id, parent))
    finally:
        writer.abort()


def read_backup(lineage: Lineage, manifest: Manifest) -> dict[str, bytes]:
    """All files of a backup, read in parallel; and each compared with its reading one by one."""
    contents = [bytearray(entry.size_bytes) for entry in manifest.files]
    reader = BackupReader(lineage, manifest)

    def write(file_index: int, offset: int, data: memoryview) -> None:
        contents[file_index][offset : offset + len(data)] = data

    reader.read_all(write, workers=lambda: 2)
    found = {}
    for index, entry in enumerate(manifest.files):
        if entry.kind == ItemKind.FILE:
            found[entry.path] = bytes(contents[index])
            assert reader.read_file(index) == found[entry.path]
    return found


def sample_log(first: int, length: int, *, seed: int = 1) -> tuple[LogSegment, bytes, LogIndex]:
    """A stretch of log with two commits, whose instants do not ascend."""
    instants = (1_700_000_000_000_009, 1_700_000_000_000_001)
    index = LogIndex(
        commits=(
            Commit(first + 8, first + 48, instants[0], 700),
            Commit(first + 48, first + 96, instants[1], 701),
        ),
        restore_points=(RestorePoint(first + 96, first + 200, instants[0], "before the change"),),
        record_first=first + 8,
        record_last=first + 200,
        records_end=first + 300,
        complete_until_us=instants[1],
    )
    segment = LogSegment("00000001", first, first + length, min(instants), max(instants))
    return segment, random.Random(seed).randbytes(length), index
