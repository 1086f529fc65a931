"""
The plan of a restore that was begun before: the same command must go on where it was.

Since then backups and log may have been added, with which a fresh plan begins and ends elsewhere; but the
files in the directory are of one backup, and its server may have replayed log up to one place. So what was
begun is planned again, where it still answers what is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from cloudsave.errors import TargetUnreachable, UnknownBackup
from cloudsave.model.position import Position
from cloudsave.model.target import Target, TargetKind
from cloudsave.recovery.journal import JournalHead, read_head
from cloudsave.recovery.plan import RecoveryPlan

Planner = Callable[[Target], RecoveryPlan]


def plan_or_continue(target: Target, planner: Planner, directory: Path | None) -> RecoveryPlan:
    """
    The plan for `target` into `directory`, the one that was begun there where it serves.

    Raises: what `planner` raises, TargetDirectoryInUse.
    """
    head = read_head(directory) if directory is not None else None
    if head is None or not head.backup_id or target.backup_id not in (None, head.backup_id):
        return planner(target)
    try:
        fresh = planner(replace(target, backup_id=head.backup_id))
    except (TargetUnreachable, UnknownBackup):
        # Another target than before: planned freely, the directory is refused with the reason.
        return planner(target)
    begun = _begun(head, planner)
    if begun is not None and (target.kind is TargetKind.LATEST or begun.last_commit == fresh.last_commit):
        return begun
    return fresh


def _begun(head: JournalHead, planner: Planner) -> RecoveryPlan | None:
    """The plan whose replay was begun; None where it is not possible any more."""
    if head.recovery_end is None:
        return None
    stop = Target(
        TargetKind.POSITION,
        position=Position(head.branch, head.recovery_end),
        inclusive=head.inclusive,
        branch=head.branch,
        backup_id=head.backup_id,
    )
    try:
        return planner(stop)
    except (TargetUnreachable, UnknownBackup):
        return None
