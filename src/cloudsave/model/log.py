"""Pieces of the log and what is known of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def instant_from_us(microseconds: int) -> datetime:
    """An aware UTC instant from microseconds since 1970."""
    return _EPOCH + timedelta(microseconds=microseconds)


def us_from_instant(instant: datetime) -> int:
    """Microseconds since 1970 of an aware instant, exact."""
    return (instant - _EPOCH) // timedelta(microseconds=1)


@dataclass(frozen=True, slots=True)
class Commit:
    """
    One committed transaction as the log shows it.

    `offset` is where the commit record begins, `end_offset` where the next record begins; `instant_us` is
    the commit's own time stamp (microseconds since 1970, the source's clock), not monotonic along the log.
    """

    offset: int
    end_offset: int
    instant_us: int
    transaction: int


@dataclass(frozen=True, slots=True)
class RestorePoint:
    """A named restore point in the log."""

    offset: int
    end_offset: int
    instant_us: int
    name: str


@dataclass(frozen=True, slots=True)
class LogIndex:
    """
    What a stretch of log contains, in log order.

    `record_first` is the offset of the first record that begins in the stretch (None: none does);
    `record_last` that of the last one that begins in it, and `records_end` the end of the last record that
    is complete within the log up to the end of the stretch. `complete_until_us` is an instant of the
    source's clock such that every commit acknowledged before it lies before the end of the stretch; 0 where
    unknown.
    """

    commits: tuple[Commit, ...] = ()
    restore_points: tuple[RestorePoint, ...] = ()
    record_first: int | None = None
    record_last: int | None = None
    records_end: int = 0
    complete_until_us: int = 0


@dataclass(frozen=True, slots=True)
class LogSegment:
    """
    A stored contiguous stretch of log: [first, last) of one branch, with the earliest and the latest instant
    of its commits (0: it has none). Instants do not ascend along the log, so these bound all of them.
    """

    branch: str
    first: int
    last: int
    commit_first_us: int = 0
    commit_last_us: int = 0
    size_bytes: int = field(default=0, compare=False)
    """Stored size."""


@dataclass(frozen=True, slots=True)
class LogHole:
    """A stretch of log that is not stored and never will be, and why."""

    branch: str
    first: int
    last: int
    cause: str
