"""What is to be kept: the rules, and what they are applied to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cloudsave.model.position import Position

Page = tuple[str, int]
"""(path, block)."""


@dataclass(frozen=True, slots=True)
class RetentionRules:
    """
    How long backups and log are kept. A backup stays as long as any rule keeps it; without a rule nothing is
    ever removed.
    """

    days: float = 0.0
    """The recovery window: every moment of the last so many days stays reachable. 0: no window."""
    last: int = 0
    """So many of the newest backups stay, and every moment since the oldest of them."""
    hourly: int = 0
    """Of so many hours the newest backup stays, for its own moment; hours without one do not count."""
    daily: int = 0
    weekly: int = 0
    monthly: int = 0
    yearly: int = 0
    proved: int = 0
    """So many of the newest backups that a drill has proved stay."""

    @property
    def any(self) -> bool:
        """Whether there is a rule."""
        return self != RetentionRules()


@dataclass(frozen=True, slots=True)
class StoredBackup:
    """What retention needs to know of a backup."""

    backup_id: str
    start: Position
    stop: Position
    log_begin: int
    """Where the log begins that a restore needs, on the way to `start`."""
    finished_us: int
    """Source's clock when it had ended, as its signed manifest says."""
    reached_us: int
    """No commit that it contains is later. Also by the names of log objects, which anybody could have put."""
    trouble: str = ""
    """Why it cannot be restored now; "": it can."""
    proved: bool = False
    holds: tuple[str, ...] = ()
    """Why somebody holds it."""
    children: tuple[str, ...] = ()
    """Unfinished backups that build on it."""
    corrupt: frozenset[Page] = frozenset()
    """Pages that were damaged in the source already."""
    good: Mapping[Page, bool] = field(default_factory=dict)
    """
    Of the pages that are damaged in any backup those that this one has undamaged; true: they were checked.
    """


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is to become of a backup, and why."""

    backup_id: str
    keep: bool
    with_log: bool
    """Whether all log from its start on is kept, so that every moment since can be reached."""
    reasons: tuple[str, ...]
