"""A point in a source's log."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Position:
    """
    A point in the log of one source: a branch and an offset on it.

    `branch` is the engine's name of a line of history (a PostgreSQL timeline as 8 upper-case hex digits);
    `offset` counts bytes of log (a PostgreSQL LSN). Engines give positions their text form. Positions of
    different branches have no order: comparing them raises, since the answer needs the ancestry (see
    `model.history`).
    """

    branch: str
    offset: int

    def _check(self, other: Position) -> None:
        if self.branch != other.branch:
            raise ValueError(f"positions of branches {self.branch} and {other.branch} have no order")

    def __lt__(self, other: Position) -> bool:
        self._check(other)
        return self.offset < other.offset

    def __le__(self, other: Position) -> bool:
        self._check(other)
        return self.offset <= other.offset

    def __gt__(self, other: Position) -> bool:
        self._check(other)
        return self.offset > other.offset

    def __ge__(self, other: Position) -> bool:
        self._check(other)
        return self.offset >= other.offset
