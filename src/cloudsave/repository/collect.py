"""
Garbage collection: deletes packs and maps that nothing needs, while backups are written.

Order, for one lineage: 1. list packs and maps; 2. look (`alive.py`); 3. put tombs for what is not needed;
4. look again; 5. delete what is in the tombs and still not needed; then the tombs.
Invariant: everything between is repeated by the next run wherever this one was killed. A tomb that was left
behind keeps what it names from being reused until that is deleted, and then goes as well.
Clocks only decide when an unfinished backup is given up; that it cannot commit then is certain, since its
name is taken by a revocation first.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from cloudsave.errors import ObjectExists, StorePermission, StoreUnfit
from cloudsave.repository.alive import Look, Watcher
from cloudsave.repository.lineage import Lineage
from cloudsave.repository.parallel import map_ahead, reads_in_flight
from cloudsave.repository.sparse import sparse_packs
from cloudsave.repository.tombs import Tomb, condemned_in, put_tombs, tombs_of
from cloudsave.store.api import ObjectInfo, ObjectStore

GRACE = timedelta(hours=24)
"""An unfinished backup that has stored nothing for so long is given up."""
_COLLECTED = re.compile(r"(packs|maps)/[0-9a-f]{8}-[0-9a-f]{8}")


@dataclass(frozen=True, slots=True)
class CollectRequest:
    """How to collect."""

    grace: timedelta = GRACE
    dry_run: bool = False
    sparse_share: float = 0.0
    """Packs of which less than this share is needed are to be left by coming backups; 0: none."""
    advance: Callable[[int], None] = lambda _: None
    """Told of objects deleted."""


@dataclass(slots=True)
class Collected:
    """What was deleted, or with a dry run would be."""

    lineage: str
    packs: int = 0
    maps: int = 0
    bytes_freed: int = 0
    bytes_kept: int = 0
    given_up: list[str] = field(default_factory=list)
    """Unfinished backups that can never be committed now."""
    waiting: list[str] = field(default_factory=list)
    """Unfinished backups that may still be running: what they stored stays."""
    spared: int = 0
    """Objects that turned out to be needed at the second look."""
    sparse: int = 0
    """Packs that coming backups will leave."""
    sparse_bytes: int = 0
    """What can be freed when the present backups have gone."""
    blocked: str = ""
    """Why nothing may be deleted at present."""


def refuse_unfit(store: ObjectStore) -> None:
    """Raises: StoreUnfit where two processes could not exclude each other's puts."""
    if not store.capabilities.conditional_put:
        raise StoreUnfit(
            "store does not offer put-if-absent",
            detail="A backup that is given up could still be committed, and lose what it names.",
            hints=["run `cloudsave store validate URL`"],
        )


def delete_objects(
    store: ObjectStore, names: Iterable[str], advance: Callable[[int], None] = lambda _: None
) -> None:
    """Delete objects by their full names. Raises: StorePermission, StoreError."""

    def delete(name: str) -> None:
        try:
            store.delete(name)
        except StorePermission as error:
            raise StorePermission(
                "the store does not let us delete",
                detail=error.detail,
                hints=[
                    "expire and gc need the right to delete, which backup and capture do without",
                    "are the objects under a retention lock? They can go when it has run out",
                ],
            ) from error
        advance(1)

    for _ in map_ahead(delete, names, in_flight=reads_in_flight(store)):
        pass


def collect(lineage: Lineage, request: CollectRequest) -> Collected:
    """
    Delete what is not needed any more.

    Raises: StoreUnfit, StorePermission, StoreError; ReferencesUnknown and IntegrityError where a manifest
    or a tomb cannot be read. Whatever is raised, nothing that is needed has been deleted.
    """
    refuse_unfit(lineage.store)
    return _Collection(lineage, request).run()


class _Collection:
    def __init__(self, lineage: Lineage, request: CollectRequest) -> None:
        self._lineage = lineage
        self._request = request
        self._watcher = Watcher(lineage)
        self._result = Collected(lineage.id)

    def run(self) -> Collected:
        """See `collect`."""
        result, dry = self._result, self._request.dry_run
        old_tombs = list(tombs_of(self._lineage))
        # Listed before the first look, so that whoever put them had put the pin by then.
        there = self._listed()
        look = self._give_up(self._watcher.look(), there)
        result.blocked = look.everything
        dead = sorted(name for name in there if not look.needs(name))
        if dead and not dry:
            tombs = put_tombs(self._lineage, dead)
            second = self._watcher.look()
            spared = {name for name in dead if second.needs(name)}
            dead = [name for name in dead if name not in spared]
            result.spared, result.blocked = len(spared), second.everything
            self._delete(dead)
            delete_objects(self._lineage.store, tombs)
        self._count(there, dead)
        if self._request.sparse_share:
            self._leave_sparse(look, {name: info for name, info in there.items() if name not in set(dead)})
        if not dry:
            self._sweep(old_tombs, set(there) - set(dead))
        return result

    def _listed(self) -> dict[str, ObjectInfo]:
        root = self._lineage.root
        infos = [info for kind in ("packs/", "maps/") for info in self._lineage.store.list(root + kind)]
        named = {info.name[len(root) :]: info for info in infos}
        return {name: info for name, info in named.items() if _COLLECTED.fullmatch(name)}

    def _give_up(self, look: Look, there: dict[str, ObjectInfo]) -> Look:
        """
        Revoke unfinished backups that have been silent for too long, and forget pins without effect.

        A revocation comes before the look that counts, the deletion of the pin after it.
        """
        silent = self._silent(look, there)
        self._result.given_up = silent
        self._result.waiting = sorted(set(look.unfinished) - set(silent))
        if self._request.dry_run:
            return look
        for backup_id in silent:
            with suppress(ObjectExists):
                self._lineage.revoke(backup_id)
        look = self._watcher.look()
        pins = [f"{self._lineage.root}pins/{backup_id}" for backup_id in look.ineffective]
        delete_objects(self._lineage.store, pins)
        return look

    def _silent(self, look: Look, there: dict[str, ObjectInfo]) -> list[str]:
        newest: dict[str, datetime] = {}
        for name, info in there.items():
            generation = name.partition("/")[2].partition("-")[0]
            newest[generation] = max(newest.get(generation, info.modified_utc), info.modified_utc)
        limit = self._lineage.clock.now() - self._request.grace
        silent = []
        for backup_id, pin in look.unfinished.items():
            put_utc = self._watcher.pinned_utc[backup_id]
            stored_utc = put_utc if pin.generation is None else newest.get(f"{pin.generation:08x}", put_utc)
            if max(put_utc, stored_utc) < limit:
                silent.append(backup_id)
        return silent

    def _count(self, there: dict[str, ObjectInfo], dead: list[str]) -> None:
        result = self._result
        result.packs = sum(name.startswith("packs/") for name in dead)
        result.maps = len(dead) - result.packs
        result.bytes_freed = sum(there[name].size_bytes for name in dead)
        result.bytes_kept = sum(info.size_bytes for info in there.values()) - result.bytes_freed

    def _leave_sparse(self, look: Look, there: dict[str, ObjectInfo]) -> None:
        """Put a tomb for packs that are mostly dead, of finished backups, so that nobody reuses them."""
        known = condemned_in(self._lineage).objects
        sizes = {
            name.removeprefix("packs/"): info.size_bytes
            for name, info in there.items()
            if name in look.objects and name.startswith("packs/") and not look.is_unfinished(name)
        }
        found = sparse_packs(self._lineage, look.backups, sizes, self._request.sparse_share)
        new = [f"packs/{name}" for name in sorted(found) if f"packs/{name}" not in known]
        self._result.sparse = len(new)
        self._result.sparse_bytes = sum(there[name].size_bytes for name in new)
        if new and not self._request.dry_run:
            put_tombs(self._lineage, new)

    def _delete(self, names: list[str]) -> None:
        full = [self._lineage.root + name for name in names]
        delete_objects(self._lineage.store, full, self._request.advance)

    def _sweep(self, tombs: list[Tomb], left: set[str]) -> None:
        """Remove tombs of others whose objects, packs and maps of this lineage, are all gone."""
        for tomb in tombs:
            collected = all(_COLLECTED.fullmatch(name) for name in tomb.objects)
            if collected and not tomb.log and not tomb.foreign and not tomb.objects & left:
                delete_objects(self._lineage.store, [tomb.name])
