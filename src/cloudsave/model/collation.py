"""Sort orders that differ between two hosts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CollationChange:
    """One sort order whose library is of another version here than when its indexes were built."""

    database: str
    collation: str
    """Its name; "": the database's default."""
    recorded: str
    """The version that the indexes were built with; "": unknown."""
    actual: str
    statements: tuple[str, ...]
    """What puts the indexes right, and then says so to the server; to be run in the database."""
