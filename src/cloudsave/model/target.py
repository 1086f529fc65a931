"""The wanted state of a restore."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from cloudsave.model.position import Position


class TargetKind(StrEnum):
    """How a wanted state can be named."""

    TIME = "time"
    POSITION = "position"
    TRANSACTION = "transaction"
    NAME = "name"
    LATEST = "latest"
    IMMEDIATE = "immediate"


@dataclass(frozen=True, slots=True)
class Target:
    """
    A wanted state. Exactly the field that belongs to `kind` is set (none for latest and immediate).

    Inclusive (the default): a time includes the commits stamped with exactly that time; a position includes
    the record that begins there; a transaction is included; a named restore point is always the point
    itself. `branch` is the line of history to follow; None means the newest. `backup_id` restricts the
    choice of the base backup.
    """

    kind: TargetKind
    time: datetime | None = None
    position: Position | None = None
    transaction: int | None = None
    name: str | None = None
    inclusive: bool = True
    branch: str | None = None
    backup_id: str | None = None
