"""
Holds and proofs: objects beside a backup that speak for keeping it.

A hold is put once and stays until somebody who may delete releases it.
Invariant: put the hold, then list tombs. Consequence: expiry either sees the hold at its second look, or
the hold sees its tomb and is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cloudsave.errors import BackupCondemned, IntegrityError, ObjectMissing, UnknownBackup
from cloudsave.repository.lineage import Lineage
from cloudsave.repository.tombs import condemned_in

DAMAGED = "its record is damaged"


@dataclass(frozen=True, slots=True)
class Hold:
    """One reason to keep a backup."""

    name: str
    """Of the object, relative to the lineage."""
    backup_id: str
    reason: str
    since_utc: str


def put_hold(lineage: Lineage, backup_id: str, reason: str) -> Hold:
    """
    Hold a backup until the hold is released. Raises: UnknownBackup; BackupCondemned where it is being
    expired.
    """
    now = lineage.clock.now()
    name = f"holds/{backup_id}/{now:%Y%m%dT%H%M%SZ}-{lineage.clock.random_bytes(4).hex()}"
    since = now.isoformat(timespec="seconds")
    if backup_id not in lineage.backup_ids():
        raise _unknown(backup_id)
    lineage.put_record_json(name, {"reason": reason, "since_utc": since})
    if f"backups/{backup_id}" in condemned_in(lineage).objects:
        raise BackupCondemned(
            f"backup {backup_id!r} is being expired and cannot be held",
            detail="A run of `cloudsave expire` has announced that it removes it.",
            hints=["`cloudsave list` shows in a while whether it is still there"],
        )
    if backup_id not in lineage.backup_ids():
        raise _unknown(backup_id)
    return Hold(name, backup_id, reason, since)


def holds_of(lineage: Lineage) -> list[Hold]:
    """All holds, by backup. A damaged one holds all the same."""
    return list(_holds(lineage, f"{lineage.root}holds/"))


def release_holds(lineage: Lineage, backup_id: str) -> list[Hold]:
    """Remove all holds of a backup; those that there were. Raises: StorePermission."""
    found = list(_holds(lineage, f"{lineage.root}holds/{backup_id}/"))
    for hold in found:
        lineage.store.delete(lineage.root + hold.name)
    return found


def _holds(lineage: Lineage, prefix: str) -> Iterator[Hold]:
    for info in lineage.store.list(prefix):
        name = info.name[len(lineage.root) :]
        parts = name.split("/")
        if len(parts) != 3:
            continue
        try:
            fields = lineage.get_record_json(name)
            yield Hold(name, parts[1], str(fields["reason"]), str(fields["since_utc"]))
        except (IntegrityError, KeyError):
            yield Hold(name, parts[1], DAMAGED, "")
        except ObjectMissing:
            continue


def proved_backups(lineage: Lineage) -> set[str]:
    """Backups that a drill has restored: those with a record of it that is intact and says so."""
    proved = set()
    for info in lineage.store.list(f"{lineage.root}proofs/"):
        name = info.name[len(lineage.root) :]
        parts = name.split("/")
        if len(parts) != 3 or parts[1] in proved:
            continue
        try:
            if lineage.get_record_json(name).get("passed") is True:
                proved.add(parts[1])
        except (IntegrityError, ObjectMissing):
            continue
    return proved


def _unknown(backup_id: str) -> UnknownBackup:
    return UnknownBackup(
        f"backup {backup_id!r} is not in the repository", hints=["`cloudsave list` shows the backups"]
    )
