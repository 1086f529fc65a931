"""What is known of one lineage, as recovery needs it: frozen values, and how to read them once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from cloudsave.engines.dialect_api import Dialect
from cloudsave.errors import IntegrityError, TargetUnreachable, UnknownBackup
from cloudsave.model.history import FIRST_BRANCH, Ancestry
from cloudsave.model.item import ItemKind
from cloudsave.model.log import LogHole, LogIndex, LogSegment
from cloudsave.model.manifest import Manifest
from cloudsave.model.position import Position
from cloudsave.repository.lineage import Lineage
from cloudsave.repository.parallel import map_ahead


class Indexes(Protocol):
    """What stored segments contain; asked for only where their names do not suffice."""

    def __call__(self, segment: LogSegment) -> LogIndex:
        """The index of a segment."""

    def last_record(self, segment: LogSegment, end: int) -> int | None:
        """
        The begin of the last record that begins in `segment` before `end`, a record boundary in or after it.
        """

    def begins(self, segment: LogSegment, offset: int) -> bool:
        """Whether a record begins at `offset`, which lies in `segment`."""


MANIFESTS_IN_FLIGHT = 8
"""Limit: manifests that are read at once."""
RECORD_SEEN_BYTES = 8
"""So much of a record must be read for it to count as begun."""


def _plain_text(position: Position) -> str:
    return f"{position.branch}:{position.offset:#x}"


@dataclass(frozen=True, slots=True)
class BackupSummary:
    """What planning needs of a manifest."""

    backup_id: str
    start: Position
    stop: Position
    started_us: int
    finished_us: int
    data_bytes: int
    """Bytes of all files when restored."""
    log_file_bytes: int
    server_version: str = ""
    settings: Mapping[str, str] = field(default_factory=dict)
    corrupt_pages: int = 0
    notes: tuple[str, ...] = ()
    complete_until_us: int = 0
    """See `Manifest.complete_until_us`."""

    @property
    def log_begin(self) -> int:
        """The begin of the log file in which the backup starts: servers read log files from their begin."""
        return self.start.offset - self.start.offset % self.log_file_bytes


@dataclass(frozen=True, slots=True)
class History:
    """All that is stored of one lineage, in any order."""

    backups: tuple[BackupSummary, ...]
    segments: tuple[LogSegment, ...]
    ancestry: Ancestry = field(default_factory=Ancestry)
    """An entry for each branch whose history file is stored, and for no other."""
    holes: tuple[LogHole, ...] = ()
    unreadable: tuple[str, ...] = ()
    """Backups whose manifests are damaged."""
    unreadable_branches: tuple[str, ...] = ()
    """Branches whose history files are damaged."""
    first_branch: str = FIRST_BRANCH
    instants_at_commit: bool = True
    """See `Dialect.instants_at_commit`."""
    position_text: Callable[[Position], str] = _plain_text
    """Positions in the engine's text form."""


def summary_of(manifest: Manifest) -> BackupSummary:
    """The summary of a manifest."""
    return BackupSummary(
        backup_id=manifest.backup_id,
        start=manifest.start,
        stop=manifest.stop,
        started_us=manifest.started_us,
        finished_us=manifest.finished_us,
        data_bytes=sum(entry.size_bytes for entry in manifest.files if entry.kind is ItemKind.FILE),
        log_file_bytes=manifest.log_file_bytes,
        server_version=manifest.server_version,
        settings=manifest.settings,
        corrupt_pages=len(manifest.corrupt_pages),
        notes=manifest.notes,
        complete_until_us=manifest.complete_until_us,
    )


def read_history(lineage: Lineage, dialect: Dialect) -> History:
    """
    Read what is stored of a lineage. A damaged manifest stops nothing but the use of its own backup, a
    damaged history nothing but the use of its branch.

    Raises: TargetUnreachable where there is no backup; IntegrityError where none can be read.
    """
    backup_ids = lineage.backup_ids()
    read = map_ahead(partial(_summary_or_error, lineage), backup_ids, in_flight=MANIFESTS_IN_FLIGHT)
    found = dict(zip(backup_ids, read, strict=True))
    backups = [one for one in found.values() if isinstance(one, BackupSummary)]
    unreadable = {name: one for name, one in found.items() if isinstance(one, IntegrityError)}
    if not backups and unreadable:
        raise next(iter(unreadable.values()))
    if not backups:
        raise TargetUnreachable(
            f"lineage {lineage.id!r} has no backup to restore",
            hints=["`cloudsave backup NAME` takes one", "`cloudsave list` shows what is stored"],
        )
    histories = lineage.readable_histories()
    ancestors = {branch: dialect.parse_history(raw) for branch, raw in histories.items()}
    return History(
        backups=tuple(backups),
        segments=tuple(lineage.logs()),
        ancestry=Ancestry(ancestors),
        holes=_known_holes(lineage),
        unreadable=tuple(unreadable),
        unreadable_branches=tuple(sorted(set(lineage.branches_with_history()) - set(histories))),
        first_branch=dialect.first_branch(lineage.id.partition("-")[2]),
        instants_at_commit=dialect.instants_at_commit,
        position_text=dialect.format_position,
    )


def _summary_or_error(lineage: Lineage, backup_id: str) -> BackupSummary | IntegrityError | None:
    """None: it was expired since it was listed."""
    try:
        return summary_of(lineage.manifest(backup_id))
    except UnknownBackup:
        return None
    except IntegrityError as error:
        return error


def _known_holes(lineage: Lineage) -> tuple[LogHole, ...]:
    """They explain refusals and decide nothing: what is durable is told by the log itself."""
    try:
        return tuple(lineage.holes())
    except IntegrityError:
        return ()


class IndexReader:
    """
    Indexes of stored segments, each read once. Where the last record of a segment is not complete in it, the
    last complete one is found by reading the log itself, so that "latest" means the last record.
    """

    def __init__(self, lineage: Lineage, dialect: Dialect, *, log_file_bytes: int) -> None:
        self._lineage = lineage
        self._dialect = dialect
        self._log_file_bytes = log_file_bytes
        self._known: dict[LogSegment, LogIndex] = {}
        self.unreadable: set[LogSegment] = set()
        """Segments whose index could not be opened."""

    def __call__(self, segment: LogSegment) -> LogIndex:
        """The index as stored."""
        if segment not in self._known:
            try:
                self._known[segment] = self._lineage.log_index(segment)
            except IntegrityError:
                self.unreadable.add(segment)
                raise
        return self._known[segment]

    def last_record(self, segment: LogSegment, end: int) -> int | None:
        """As in `Indexes`; reads the segment where its index does not tell."""
        index = self(segment)
        if index.record_first is None or index.record_first >= end:
            return None
        if index.record_last is not None and index.record_last < end:
            return index.record_last
        found = self._walked(segment, index.record_first, end)
        return found if found is not None and found < end else None

    def begins(self, segment: LogSegment, offset: int) -> bool:
        """As in `Indexes`; reads the segment where its index does not tell."""
        index = self(segment)
        if index.record_first is None or offset < index.record_first:
            return False
        if offset in (index.record_first, index.record_last):
            return True
        return self._walked(segment, index.record_first, offset + RECORD_SEEN_BYTES) == offset

    def _walked(self, segment: LogSegment, begin: int, end: int) -> int | None:
        """The last record that begins between the record boundary `begin` and `end`, by the log itself."""
        identifier = self._lineage.id.partition("-")[2]
        indexer = self._dialect.indexer(
            Position(segment.branch, begin),
            log_file_bytes=self._log_file_bytes,
            system_identifier=identifier,
        )
        log = self._lineage.read_log(segment)
        indexer.feed(log[begin - segment.first : end - segment.first])
        return indexer.take().record_last


class KnownIndexes:
    """Indexes that are already in memory: for plans over given values."""

    def __init__(self, indexes: Mapping[LogSegment, LogIndex]) -> None:
        self._indexes = dict(indexes)

    def __call__(self, segment: LogSegment) -> LogIndex:
        """The index of a segment."""
        return self._indexes[segment]

    def last_record(self, segment: LogSegment, end: int) -> int | None:
        """As in `Indexes`, as far as the index tells."""
        index = self(segment)
        known = [one.offset for one in index.commits if one.end_offset <= end]
        known += [one.offset for one in index.restore_points if one.end_offset <= end]
        if index.record_last is not None and index.record_last < end:
            known.append(index.record_last)
        return max(known, default=None)

    def begins(self, segment: LogSegment, offset: int) -> bool:
        """Whether the index shows a record that begins at `offset`."""
        index = self(segment)
        known = {one.offset for one in index.commits} | {one.offset for one in index.restore_points}
        return offset in known | {index.record_first, index.record_last}
