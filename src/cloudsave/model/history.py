"""The family tree of branches: which branch left which, and where."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

FIRST_BRANCH = "00000001"
"""The branch that has no ancestors by nature and needs no history file."""


@dataclass(frozen=True, slots=True)
class BranchPoint:
    """One ancestor of a branch: the history on `branch` counts up to `end_offset` (exclusive)."""

    branch: str
    end_offset: int


@dataclass(frozen=True, slots=True)
class Ancestry:
    """
    For each branch its ancestors, oldest first (a branch without an entry has none known).

    Source: PostgreSQL timeline history files, src/backend/access/transam/timeline.c.
    """

    ancestors: Mapping[str, tuple[BranchPoint, ...]] = field(default_factory=dict)

    def path(self, branch: str) -> tuple[BranchPoint, ...]:
        """The ancestors of `branch`, oldest first, without itself."""
        return self.ancestors.get(branch, ())

    def lineage_of(self, branch: str) -> tuple[tuple[str, int, int | None], ...]:
        """
        The stretches (branch, begin offset, end offset) that make the history of `branch`, oldest first.

        The begin of the oldest is 0; the end of `branch` itself is None (open).
        """
        stretches: list[tuple[str, int, int | None]] = []
        begin = 0
        for point in self.path(branch):
            stretches.append((point.branch, begin, point.end_offset))
            begin = point.end_offset
        stretches.append((branch, begin, None))
        return tuple(stretches)
