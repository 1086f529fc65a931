"""
Takes backups out of a repository: their manifests, which make them exist. Packs and maps are left to
`collect.py`.

Order: put a tomb; look again whether anybody holds one or builds on one; for each, the oldest first: delete
the manifest, take its name by a revocation, delete its pin; at last the tomb.
Invariant: a pin goes only when its backup's name is taken. Consequence: a writer that was suspended while
it put its manifest, and puts it once more, is refused; until then its pin protects what that names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from cloudsave.errors import ObjectExists, StoreUnavailable
from cloudsave.repository.alive import Pin, Watcher
from cloudsave.repository.collect import delete_objects, refuse_unfit
from cloudsave.repository.holds import holds_of
from cloudsave.repository.lineage import Lineage
from cloudsave.repository.tombs import put_tombs, tombs_of

REVOKE_TRIES_MAX = 5
"""Limit: how often a writer may put the manifest again that is being removed."""


def remove_backups(
    lineage: Lineage, backup_ids: Sequence[str], advance: Callable[[int], None] = lambda _: None
) -> list[str]:
    """
    Remove committed backups, in the order given; those that were removed: others are held or built on now.

    Raises: StoreUnfit, StorePermission, StoreError. Killed at any time it may be run again.
    """
    refuse_unfit(lineage.store)
    if not backup_ids:
        return []
    tombs = put_tombs(lineage, [f"backups/{name}" for name in backup_ids])
    pins = Watcher(lineage).unfinished()
    spoken_for = {hold.backup_id for hold in holds_of(lineage)} | built_on(pins).keys()
    removed = [backup_id for backup_id in backup_ids if backup_id not in spoken_for]
    for backup_id in removed:
        _remove(lineage, backup_id)
        advance(1)
    delete_objects(lineage.store, tombs)
    return removed


def built_on(pins: Mapping[str, Pin]) -> dict[str, list[str]]:
    """Backups that unfinished ones, given with their pins, build on, with these."""
    found: dict[str, list[str]] = {}
    for child, pin in pins.items():
        for parent in pin.parents:
            found.setdefault(parent, []).append(child)
    return found


def sweep_tombs(lineage: Lineage) -> None:
    """Remove tombs that killed runs of expiry left behind, once what they name is gone."""
    tombs = [one for one in tombs_of(lineage) if not one.foreign and (one.objects or one.log)]
    mine = [one for one in tombs if all(name.startswith("backups/") for name in one.objects)]
    if not mine:
        return
    backups = {f"backups/{backup_id}" for backup_id in lineage.backup_ids()}
    log = lineage.logs()
    done = [one.name for one in mine if not one.objects & backups and not any(map(one.names_log, log))]
    delete_objects(lineage.store, done)


def _remove(lineage: Lineage, backup_id: str) -> None:
    for _ in range(REVOKE_TRIES_MAX):
        delete_objects(lineage.store, [lineage.manifest_name(backup_id)])
        try:
            lineage.revoke(backup_id)
        except ObjectExists:
            if backup_id in lineage.backup_ids():
                continue  # Its writer, suspended until now, has put it once more.
        delete_objects(lineage.store, [f"{lineage.root}pins/{backup_id}"])
        return
    raise StoreUnavailable(
        f"could not remove backup {backup_id!r}: somebody puts it again and again",
        hints=["is a backup process running that cannot be reached otherwise? End it, and try again"],
    )
