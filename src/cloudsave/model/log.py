"""Pieces of the log and what is known of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import overload

import numpy as np
import numpy.typing as npt

from cloudsave.model.changes import LogChanges

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
INSTANT_US_MAX = 253_402_300_799_999_999
"""Limit: the last instant of the year 9999."""


def instant_from_us(microseconds: int) -> datetime:
    """
    An aware UTC instant from microseconds since 1970; one after the year 9999, which only a broken clock or a
    stranger's object has, is shown as the last that there is.
    """
    return _EPOCH + timedelta(microseconds=min(microseconds, INSTANT_US_MAX))


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


class Commits(Sequence[Commit]):
    """
    Commits in log order, kept as four rows of 64-bit integers (offset, end offset, instant, transaction).

    A busy hour has millions of them: an object is made only of those that are looked at.
    """

    __slots__ = ("rows",)

    def __init__(self, rows: npt.NDArray[np.int64]) -> None:
        self.rows = rows

    @classmethod
    def of(cls, commits: Iterable[Commit]) -> Commits:
        """From single commits."""
        if isinstance(commits, Commits):
            return commits
        values = [(c.offset, c.end_offset, c.instant_us, c.transaction) for c in commits]
        return cls(np.array(values, np.int64).reshape(len(values), 4).T)

    @classmethod
    def joined(cls, parts: Sequence[Commits]) -> Commits:
        """The commits of several stretches as one."""
        return cls(
            np.concatenate([part.rows for part in parts], axis=1) if parts else np.empty((4, 0), np.int64)
        )

    @property
    def instants(self) -> npt.NDArray[np.int64]:
        """Their time stamps, in log order (which is not the order of time)."""
        instants: npt.NDArray[np.int64] = self.rows[2]
        return instants

    def __len__(self) -> int:
        return int(self.rows.shape[1])

    def __iter__(self) -> Iterator[Commit]:
        return itertools.starmap(Commit, self.rows.T.tolist())

    @overload
    def __getitem__(self, index: int) -> Commit: ...
    @overload
    def __getitem__(self, index: slice) -> Commits: ...
    def __getitem__(self, index: int | slice) -> Commit | Commits:
        if isinstance(index, slice):
            return Commits(self.rows[:, index])
        return Commit(*self.rows[:, index].tolist())

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Commits):
            return np.array_equal(self.rows, other.rows)
        return isinstance(other, tuple) and tuple(self) == other

    def __hash__(self) -> int:
        return hash(self.rows.tobytes())

    def __repr__(self) -> str:
        return f"Commits({list(self)!r})"


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
    unknown. `changes` is None where nobody noted them.
    """

    commits: Commits = field(default_factory=lambda: Commits.of(()))
    """Given as any sequence of commits."""
    restore_points: tuple[RestorePoint, ...] = ()
    record_first: int | None = None
    record_last: int | None = None
    records_end: int = 0
    complete_until_us: int = 0
    changes: LogChanges | None = None
    padding_bytes: int = 0
    """The last bytes of the stretch that the log file has not: it was ended before it was full."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "commits", Commits.of(self.commits))


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
    expired: bool = False
    """Whether it was removed on purpose, since nothing that is to be kept needs it."""
