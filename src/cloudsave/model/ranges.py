"""To what a restore is possible."""

from __future__ import annotations

from dataclasses import dataclass

from cloudsave.model.position import Position


@dataclass(frozen=True, slots=True)
class RecoverableRange:
    """
    Positions [begin, end) to which a restore is possible, of the history that ends on `branch` (`begin` may
    lie on an ancestor). The instants are of the source's clock: the earliest time that a restore can stand
    for, and the last one up to which all commits are known to be there; both 0 where none is known yet.
    """

    branch: str
    begin: Position
    begin_us: int
    end: Position
    end_us: int
    backups: tuple[str, ...]
    """The base backups inside, oldest first."""
