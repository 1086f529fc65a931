"""What is stored of one lineage, as retention needs it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import tzinfo
from functools import partial

from cloudsave.engines.dialect_api import Dialect
from cloudsave.errors import IntegrityError, UnknownBackup
from cloudsave.model.history import Ancestry
from cloudsave.model.ledger import Ledger
from cloudsave.model.log import LogSegment, us_from_instant
from cloudsave.model.manifest import Manifest
from cloudsave.model.retention import Page, StoredBackup
from cloudsave.policy.retention import RetentionHistory
from cloudsave.repository.alive import Watcher
from cloudsave.repository.expire import built_on
from cloudsave.repository.holds import holds_of, proved_backups
from cloudsave.repository.lineage import Lineage
from cloudsave.repository.maps import BLOCK_BYTES
from cloudsave.repository.parallel import map_ahead

MANIFESTS_IN_FLIGHT = 8
"""Limit: manifests that are read at once."""


@dataclass(frozen=True, slots=True)
class _Known:
    """What one manifest says; it never changes."""

    backup: StoredBackup
    missing: tuple[str, ...]
    """Packs and maps that it names and that were not there when it was read."""


@dataclass(frozen=True, slots=True)
class Stored:
    """One look at a lineage."""

    history: RetentionHistory
    unreadable: tuple[str, ...]
    """Backups whose manifests are damaged: nothing is known of them."""
    unfinished: tuple[str, ...]
    """Backups that may be running: what log they will need is not known."""


@dataclass(slots=True)
class HistoryReader:
    """Reads it again and again; each manifest only once."""

    lineage: Lineage
    dialect: Dialect
    zone: tzinfo
    _known: dict[str, _Known | None] = field(default_factory=dict)
    """None: it cannot be read."""

    def read(self) -> Stored:
        """
        What is stored now; pins before manifests, as garbage collection does.

        Raises: IntegrityError where a branch's history is damaged: no line of history can be told then.
        """
        lineage = self.lineage
        pins = Watcher(lineage).unfinished()
        children = built_on(pins)
        known = self._read_manifests(lineage.backup_ids(), self._objects())
        segments = tuple(lineage.logs())
        ancestry, ledger = self.ancestry(), Ledger(segments)
        held: dict[str, list[str]] = {}
        for hold in holds_of(lineage):
            held.setdefault(hold.backup_id, []).append(hold.reason)
        proved, pages = proved_backups(lineage), self._damaged_pages(known)
        backups = [
            replace(
                one.backup,
                reached_us=_reached_us(one.backup, segments, ancestry),
                trouble=self._trouble(one, ledger, ancestry),
                proved=name in proved,
                holds=tuple(held.get(name, ())),
                children=tuple(children.get(name, ())),
                good=self._good_pages(name, pages - one.backup.corrupt),
            )
            for name, one in known.items()
            if one is not None
        ]
        now_us = us_from_instant(lineage.clock.now())
        return Stored(
            RetentionHistory(tuple(backups), segments, ancestry, now_us, self.zone),
            unreadable=tuple(name for name, one in known.items() if one is None),
            unfinished=tuple(pins),
        )

    @property
    def first_branch(self) -> str:
        """The branch that has no history."""
        return self.dialect.first_branch(self.lineage.id.partition("-")[2])

    def ancestry(self) -> Ancestry:
        """The family tree of branches. Raises: IntegrityError."""
        histories = self.lineage.histories()
        return Ancestry({name: self.dialect.parse_history(raw) for name, raw in histories.items()})

    def _trouble(self, one: _Known, ledger: Ledger, ancestry: Ancestry) -> str:
        """Why a backup cannot be restored; "" where it can."""
        backup = one.backup
        if one.missing:
            return f"{len(one.missing)} of its objects are missing, such as {one.missing[0]}"
        branch = backup.stop.branch
        if branch != self.first_branch and branch not in ancestry.ancestors:
            return f"the history of branch {branch} is not stored"
        cover = ledger.cover(ancestry.lineage_of(branch), backup.log_begin, backup.stop.offset)
        if not cover.complete:
            return f"log from {cover.end:#x} of branch {cover.branch} on is missing"
        return ""

    def _read_manifests(self, backup_ids: list[str], there: set[str]) -> dict[str, _Known | None]:
        new = [name for name in backup_ids if name not in self._known]
        read = partial(self._read_one, there)
        for name, found in zip(new, map_ahead(read, new, in_flight=MANIFESTS_IN_FLIGHT), strict=True):
            if not isinstance(found, UnknownBackup):
                self._known[name] = found
        return {name: self._known[name] for name in backup_ids if name in self._known}

    def _read_one(self, there: set[str], backup_id: str) -> _Known | UnknownBackup | None:
        try:
            manifest = self.lineage.manifest(backup_id)
        except UnknownBackup as gone:
            return gone
        except IntegrityError:
            return None
        objects = [*(f"packs/{name}" for name in manifest.packs), *(f"maps/{name}" for name in manifest.maps)]
        return _Known(_stored(manifest), tuple(name for name in objects if name not in there))

    def _objects(self) -> set[str]:
        root = self.lineage.root
        kinds = ("packs/", "maps/")
        return {info.name[len(root) :] for kind in kinds for info in self.lineage.store.list(root + kind)}

    @staticmethod
    def _damaged_pages(known: dict[str, _Known | None]) -> frozenset[Page]:
        return frozenset().union(*(one.backup.corrupt for one in known.values() if one is not None))

    def _good_pages(self, backup_id: str, pages: frozenset[Page]) -> dict[Page, bool]:
        """Which of `pages`, which this backup does not list as damaged, it has."""
        if not pages:
            return {}
        manifest = self.lineage.manifest(backup_id)
        sizes = {entry.path: entry.size_bytes for entry in manifest.files}
        page_bytes = manifest.page_bytes or BLOCK_BYTES
        return {
            (path, block): manifest.page_checksums
            for path, block in pages
            if sizes.get(path, 0) >= (block + 1) * page_bytes
        }


def _stored(manifest: Manifest) -> StoredBackup:
    return StoredBackup(
        backup_id=manifest.backup_id,
        start=manifest.start,
        stop=manifest.stop,
        log_begin=manifest.log_begin,
        finished_us=manifest.finished_us,
        reached_us=manifest.finished_us,
        corrupt=frozenset((page.path, page.block) for page in manifest.corrupt_pages),
    )


def _reached_us(backup: StoredBackup, segments: tuple[LogSegment, ...], ancestry: Ancestry) -> int:
    """
    No commit in the backup is later: by the clock when it ended, and by the names of the log objects that it
    needs, which may hold later commits too. Too late a time only keeps more.
    """
    names = {name for name, _, _ in ancestry.lineage_of(backup.stop.branch)}
    inside = [
        one.commit_last_us
        for one in segments
        if one.last > backup.start.offset and one.first < backup.stop.offset and one.branch in names
    ]
    return max([backup.reached_us, *inside])
