"""To what a restore is possible."""

from __future__ import annotations

from dataclasses import dataclass

from cloudsave.model.position import Position


@dataclass(frozen=True, slots=True)
class BackupSpan:
    """Of a base backup, what decides which log it needs."""

    backup_id: str
    start: Position
    """Replay begins here."""
    stop: Position
    """The backup is consistent from here on."""
    finished_us: int


@dataclass(frozen=True, slots=True)
class RecoverableRange:
    """
    Positions [begin, end) to which a restore is possible, of the history that ends on `branch` (`begin` may
    lie on an ancestor). The instants are of the source's clock: the end of the oldest backup, and the last
    commit that is known by then.
    """

    branch: str
    begin: Position
    begin_us: int
    end: Position
    end_us: int
    backups: tuple[str, ...]
    """The base backups inside, oldest first."""
