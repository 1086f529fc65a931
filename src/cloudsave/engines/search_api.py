"""
The seam of the search: what an engine can say of transactions in its log. Beside `api.py`, which is full.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from cloudsave.model.found import FoundTransaction, RelationName, SearchQuery


@dataclass(frozen=True, slots=True)
class Horizon:
    """
    What the log at `offset` says of running transactions. Ids as the engine counts them: only `reaches`
    compares them.
    """

    offset: int
    oldest_running: int
    """Every transaction before this one had ended."""
    next: int
    """This transaction and later ones had not begun."""


class StoredFiles(Protocol):
    """The files of one base backup."""

    def paths(self) -> Collection[str]:
        """Their paths, relative to the data directory."""

    def read(self, path: str) -> bytes:
        """
        One of them, whole; nothing where there is none. For small ones. Raises: IntegrityError, StoreError.
        """


class LogReading(Protocol):
    """
    One search through consecutive log. Order: `learn`, `feed` (in log order), `feed_earlier` (as long as it
    lacks something), `learn` again while names are unknown, `found`.
    """

    def learn(self, files: StoredFiles, *, everything: bool = False) -> None:
        """
        Take names from a base backup, of what was found or of `everything`; what is known already is kept.
        Before the first `feed` this also tells where the catalogues are.
        """

    def feed(self, log: bytes | memoryview) -> None:
        """The next bytes. Raises: LogDamaged."""

    def lacks_earlier(self) -> bool:
        """Whether log before the first that was fed could tell more of what was found."""

    def feed_earlier(self, log: bytes | memoryview, offset: int) -> None:
        """
        A stretch from the record boundary `offset` up to where the earliest one begins. Raises: LogDamaged.
        """

    def lacks_names(self) -> bool:
        """Whether a relation of what was found has no name yet."""

    def found(self) -> Sequence[FoundTransaction]:
        """The transactions that are wanted, by the offset of their end; those that have not ended last."""

    def shortcomings(self) -> Sequence[str]:
        """Why the answer may not be whole, one sentence each."""

    def names(self) -> Sequence[RelationName]:
        """All relations whose name is known."""


class LogSearch(Protocol):
    """What an engine's log says of transactions."""

    def horizons(self, log: bytes | memoryview, offset: int) -> Sequence[Horizon]:
        """Those of a stretch of log that begins at the record boundary `offset`, in order."""

    def reaches(self, earlier: Horizon, later: Horizon) -> bool:
        """Whether every transaction that ended after `later` began after `earlier`."""

    def begin(self, query: SearchQuery, offset: int) -> LogReading:
        """A search from the record boundary `offset` on."""
