"""
What a lineage still needs: the look that a collector takes, twice.

Invariant: pins are listed before manifests. Consequence: a backup that commits in between is seen as the
one or as the other; listed the other way round it could be missed.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from datetime import datetime

from cloudsave.errors import IntegrityError, ObjectMissing, ReferencesUnknown, UnknownBackup
from cloudsave.repository.container import REVOCATION_BYTES
from cloudsave.repository.lineage import Lineage
from cloudsave.repository.parallel import map_ahead, reads_in_flight


@dataclass(frozen=True, slots=True)
class Pin:
    """What an unfinished backup may come to name; None: its pin cannot be read, it may be anything."""

    generation: int | None
    parents: tuple[str, ...] = ()
    adopts: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Look:
    """What was seen to be needed."""

    objects: Collection[str]
    """Packs and maps ("packs/...", "maps/...") that manifests name."""
    generations: frozenset[str]
    """All packs and maps of these are needed, too: 8 hex digits each."""
    everything: str
    """Why nothing at all may be deleted; "": something may."""
    unfinished: dict[str, Pin]
    """By backup id."""
    backups: tuple[str, ...]
    """Committed ones."""
    ineffective: frozenset[str]
    """Pins that protect nothing, since their backups can never be committed (again)."""

    def needs(self, name: str) -> bool:
        """Whether a pack or map is needed."""
        return bool(self.everything) or name in self.objects or self.is_unfinished(name)

    def is_unfinished(self, name: str) -> bool:
        """Whether an unfinished backup has stored it, or takes it over."""
        return name.partition("/")[2].partition("-")[0] in self.generations


@dataclass(slots=True)
class Watcher:
    """
    Looks at one lineage; what was read once is not read again: nothing stored ever changes. What a backup
    named that has gone since the first look counts as needed until the next watcher: one set serves for all.
    """

    lineage: Lineage
    pinned_utc: dict[str, datetime] = field(default_factory=dict)
    """When the pins of the last look were put, by the store's clock."""
    _read: set[str] = field(default_factory=set)
    """Backups whose manifests were read."""
    _named: set[str] = field(default_factory=set)
    """What they name."""
    _pins: dict[str, Pin | None] = field(default_factory=dict)

    def unfinished(self) -> dict[str, Pin]:
        """Pins of backups that are neither committed nor revoked, without reading any manifest."""
        pinned = self._list_pins()
        return self._unfinished(pinned - self.lineage.decided_backup_ids())

    def look(self) -> Look:
        """
        See what is needed now.

        Raises: ReferencesUnknown where a manifest cannot be read: whatever it names could be lost.
        """
        pinned = self._list_pins()
        committed, revoked = self._decided()
        unfinished = self._unfinished(pinned - committed - revoked)
        everything = ""
        generations: set[int] = set()
        for backup_id, pin in unfinished.items():
            if pin.generation is None:
                everything = f"the pin of unfinished backup {backup_id} cannot be read"
                continue
            generations |= {pin.generation, *pin.adopts}
            for parent in set(pin.parents) - committed:
                everything = f"unfinished backup {backup_id} builds on backup {parent}, which is gone"
        return Look(
            objects=self._named,
            generations=frozenset(f"{number:08x}" for number in generations),
            everything=everything,
            unfinished=unfinished,
            backups=tuple(sorted(committed)),
            ineffective=frozenset(pinned & revoked),
        )

    def _list_pins(self) -> set[str]:
        prefix = self.lineage.root + "pins/"
        infos = self.lineage.store.list(prefix)
        self.pinned_utc = {info.name[len(prefix) :]: info.modified_utc for info in infos}
        return set(self.pinned_utc)

    def _decided(self) -> tuple[set[str], set[str]]:
        """
        The committed backups, with what they name taken in, and the revoked ones. One that has gone since it
        was listed is neither: its name may not be taken yet.
        """
        prefix = self.lineage.root + "backups/"
        sizes = {info.name[len(prefix) :]: info.size_bytes for info in self.lineage.store.list(prefix)}
        ids = sorted(sizes)
        new = [name for name in ids if name not in self._read]
        found = map_ahead(self._references_of, new, in_flight=reads_in_flight(self.lineage.store))
        for name, named in zip(new, found, strict=True):
            if named is not None:
                self._read.add(name)
                self._named.update(named)
        committed = self._read & sizes.keys() - {n for n in ids if sizes[n] == REVOCATION_BYTES}
        revoked = {name for name in ids if name not in committed and sizes[name] == REVOCATION_BYTES}
        return committed, revoked

    def _references_of(self, backup_id: str) -> list[str] | None:
        try:
            packs, maps = self.lineage.references(backup_id)
        except UnknownBackup:
            return None
        except IntegrityError as error:
            raise ReferencesUnknown(
                f"cannot tell what backup {backup_id!r} needs: its manifest is damaged",
                detail=f"{error.message}. Nothing was deleted.",
                hints=[
                    "restore the object from a copy of the repository",
                    f"or give the backup up: `cloudsave expire NAME --remove {backup_id}`",
                ],
            ) from error
        return [*(f"packs/{name}" for name in packs), *(f"maps/{name}" for name in maps)]

    def _unfinished(self, backup_ids: set[str]) -> dict[str, Pin]:
        pins = {}
        for backup_id in sorted(backup_ids):
            if backup_id not in self._pins:
                self._pins[backup_id] = self._read_pin(backup_id)
            pin = self._pins[backup_id]
            if pin is not None:
                pins[backup_id] = pin
        return pins

    def _read_pin(self, backup_id: str) -> Pin | None:
        """None where it has been swept since it was listed, which is done only when it is without effect."""
        try:
            fields = self.lineage.get_record_json(f"pins/{backup_id}")
            return Pin(
                int(fields["generation"]),
                tuple(map(str, fields["parents"])),
                tuple(map(int, fields["adopts"])),
            )
        except ObjectMissing:
            return None
        except (IntegrityError, KeyError, TypeError, ValueError):
            return Pin(None)
