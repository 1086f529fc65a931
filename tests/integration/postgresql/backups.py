"""Base backups by the engine alone: pieces into a plain directory, log added, ready to be started."""

from __future__ import annotations

import itertools
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from cloudsave.engines.api import BackupSource
from cloudsave.model.engine_facts import BackupStart, BackupStop
from cloudsave.model.item import Item, ItemKind, Piece
from tests.integration.postgresql.cluster import Cluster

READ_BYTES = 1 << 20
READERS = 2
SEGMENT_NAME_LENGTH = 24
_NUMBERS = itertools.count(1)


@dataclass
class Taken:
    """A backup in a directory."""

    directory: Path
    start: BackupStart
    stop: BackupStop
    files: dict[str, Item]
    outside: dict[str, bytes]


def take_backup(source: BackupSource, cluster: Cluster) -> Taken:
    """Run a source to its end as the flow does."""
    root = cluster.factory.folder()
    taken_files: dict[str, Item] = {}
    outside: dict[str, bytes] = {}
    start = source.begin()
    with ThreadPoolExecutor(READERS) as readers:
        waiting = []
        for piece in source.pieces():
            taken_files[piece.item.path] = piece.item
            waiting.append(readers.submit(_store, piece, root, outside))
            if len(waiting) > 4:
                waiting.pop(0).result()
        for future in waiting:
            future.result()
    stop = source.finish()
    for item in stop.directories:
        _make(item, root)
    for late in stop.late_files:
        (root / late.item.path).write_bytes(late.content)
        taken_files[late.item.path] = late.item
    # The map would lead the restored server to the directories of the source's tablespaces.
    (root / "tablespace_map").unlink(missing_ok=True)
    return Taken(root, start, stop, taken_files, outside)


def started(taken: Taken, cluster: Cluster) -> Cluster:
    """The backup as a running server, with all log of the (quiet) server that it is of."""
    for segment in (cluster.data / "pg_wal").iterdir():
        if len(segment.name) == SEGMENT_NAME_LENGTH:
            shutil.copy(segment, taken.directory / "pg_wal" / segment.name)
    cluster.user.own(taken.directory)
    return cluster.factory.adopt(cluster.major, taken.directory)


def _store(piece: Piece, root: Path, outside: dict[str, bytes]) -> None:
    content = bytearray()
    done = 0
    while done < piece.length:
        buffer = memoryview(bytearray(min(READ_BYTES, piece.length - done)))
        got = piece.read_into(buffer, offset=done)
        content += buffer[:got]
        done += got
        if got < len(buffer):
            break
    if piece.item.outside:
        outside[piece.item.path] = bytes(content)
        return
    path = root / piece.item.path
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("r+b" if path.exists() else "wb") as file:
        file.seek(piece.offset)
        file.write(content)


def _make(item: Item, root: Path) -> None:
    """Directories as they were; a tablespace's contents stay below pg_tblspc, reached by a link elsewhere."""
    path = root / item.path
    if item.kind == ItemKind.DIRECTORY:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    elif item.kind == ItemKind.LINK:
        place = root.parent / f"{root.name}-space-{next(_NUMBERS)}"
        path.mkdir(parents=True, exist_ok=True)
        path.rename(place)
        path.symlink_to(place)
