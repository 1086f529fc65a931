"""What a backup will do: pure, so that a dry run can print it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cloudsave.model.identity import SourceIdentity


@dataclass(frozen=True, slots=True)
class BackupRequest:
    """What the user asked for."""

    source: str
    """The name of the source."""
    mode: str = "auto"
    """How to read: "auto", "local" or "remote"."""
    full: bool = False
    """Store every page again instead of reusing stored ones."""
    fast_checkpoint: bool = False
    """Begin with an immediate checkpoint instead of one that is spread over time."""
    workers: int = 3
    level: int = 1
    paranoid: bool = False
    prove_all: bool = False
    """Read every page, also where the log says that it has not changed, and see whether that is true."""


@dataclass(frozen=True, slots=True)
class BackupPlan:
    """What will be done."""

    request: BackupRequest
    identity: SourceIdentity
    parent: str
    """The backup whose pages may be reused; "" for a full backup."""
    reason: str

    @property
    def kind(self) -> str:
        """ "full" or "incremental"."""
        return "incremental" if self.parent else "full"


def plan_backup(request: BackupRequest, identity: SourceIdentity, backup_ids: Sequence[str]) -> BackupPlan:
    """
    Choose full or incremental. Pure.

    Args:
        backup_ids: Committed backups of the lineage, oldest first. Any of them is a sound parent: a page is
            reused where its fingerprint is the same, or where the log proves that nothing changed it.
    """
    if request.full:
        return BackupPlan(request, identity, "", "a full backup was asked for")
    if not backup_ids:
        return BackupPlan(request, identity, "", "the first backup of this lineage is full")
    return BackupPlan(request, identity, backup_ids[-1], "pages that are stored already are reused")
