"""The manifest of a base backup: everything that a restore needs to know."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from cloudsave.model.item import CorruptPage, ItemKind
from cloudsave.model.position import Position


@dataclass(frozen=True, slots=True)
class FileEntry:
    """
    One thing to restore. For a non-empty file, `map_index` and `map_ordinal` name its segment map: the map
    object `Manifest.maps[map_index]` and the place in it.
    """

    path: str
    kind: ItemKind
    mode: int
    size_bytes: int = 0
    modified_us: int = 0
    page_bytes: int = 0
    link_target: str = ""
    outside: bool = False
    map_index: int = -1
    map_ordinal: int = -1


@dataclass(frozen=True, slots=True)
class BackupStatistics:
    """What a backup did, in bytes and blocks of 8192."""

    bytes_read: int = 0
    bytes_stored: int = 0
    """Bytes of packs and maps that this backup added."""
    blocks_total: int = 0
    blocks_stored: int = 0
    blocks_zero: int = 0
    blocks_reused: int = 0
    seconds: float = 0.0


class Rung(StrEnum):
    """How a backup learned what had changed since its parent."""

    UNKNOWN = "unknown"
    """Written before this was recorded."""
    FULL = "full"
    """There is no parent."""
    COMPARE = "compare"
    """Everything was read, and each block compared with the parent's by its fingerprint."""
    LOG = "log"
    """Blocks that the captured log does not name were taken from the parent without being read."""
    SUMMARIES = "summaries"
    """The same by the source's own summaries of its log, since not all of that is stored."""


@dataclass(frozen=True, slots=True)
class ChangeDetection:
    """How a backup learned what had changed."""

    rung: Rung = Rung.UNKNOWN
    reason: str = ""
    """Why not by a better way."""
    whole_files: tuple[str, ...] = ()
    """With rung LOG or SUMMARIES, files that the log says may have changed as a whole: they were compared."""
    bytes_unread: int = 0
    """Blocks taken from the parent without being read."""
    blocks_unlogged: int = 0
    """Blocks that were read to prove the log right, and differ by what is never logged, such as hint bits."""
    contradicted: bool = False
    """A block had changed of which the log knew nothing: this backup was made anew by COMPARE."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """A base backup. Complete by itself: a restore reads one manifest, never a chain."""

    backup_id: str
    lineage: str
    source: str
    engine: str
    server_version: str
    kind: str
    """"full" or "incremental": how it was written; to the reader every backup is a full."""
    parent: str
    """The backup whose pages were reused, or ""."""
    method: str
    """How the data files were read: "local" or "remote"."""
    tool_version: str
    started_us: int
    """The source's clock when the backup had begun: no commit before `start` has a later instant."""
    finished_us: int
    start: Position
    """Replay begins here (the redo position of the backup's checkpoint)."""
    stop: Position
    """The data files are consistent once replay has reached this."""
    log_file_bytes: int
    page_bytes: int
    page_checksums: bool
    tablespaces: Mapping[str, str]
    """Tablespace oid to the directory that it had on the source."""
    settings: Mapping[str, str]
    """Server settings that matter to a restore."""
    packs: tuple[str, ...]
    """Names of all packs that the maps refer to."""
    maps: tuple[str, ...]
    """Ids of the map objects."""
    files: tuple[FileEntry, ...]
    corrupt_pages: tuple[CorruptPage, ...]
    statistics: BackupStatistics
    detection: ChangeDetection = ChangeDetection()
    notes: tuple[str, ...] = ()
    """Facts that a reader should be told, such as a fallback that was taken."""
    complete_until_us: int = 0
    """
    Every commit that was acknowledged before this instant lies before `stop`; 0: unknown. A replica does not
    know what its primary acknowledges.
    """

    @property
    def log_begin(self) -> int:
        """The begin of the log file in which replay starts: servers read log files from their begin."""
        return self.start.offset - self.start.offset % self.log_file_bytes
