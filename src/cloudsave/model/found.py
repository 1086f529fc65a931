"""What a search of the log asks for, and what it finds."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class ChangeKind(StrEnum):
    """What can have happened to a relation, or to the definitions of a database."""

    DROP = "drop"
    TRUNCATE = "truncate"
    ALTER = "alter"
    CREATE = "create"
    DELETE = "delete"
    UPDATE = "update"
    INSERT = "insert"
    COMMIT = "commit"
    """A transaction ended, whatever it did."""


class TransactionEnd(StrEnum):
    """How a transaction ended, as far as the log was read."""

    COMMITTED = "committed"
    ABORTED = "aborted"
    OPEN = "open"
    PREPARED = "prepared"


DESTRUCTIVE = frozenset({ChangeKind.DROP, ChangeKind.TRUNCATE, ChangeKind.ALTER, ChangeKind.DELETE})
"""What is searched for when nothing else is asked."""
ROW_KINDS = frozenset({ChangeKind.DELETE, ChangeKind.UPDATE, ChangeKind.INSERT})
"""The kinds that have a number of rows."""


@dataclass(frozen=True, slots=True)
class SearchQuery:
    """Which transactions are wanted. Instants are microseconds since 1970, both included."""

    first_us: int
    last_us: int
    kinds: frozenset[ChangeKind] = DESTRUCTIVE
    rows_min: int = 1
    """Rows of one relation, for the kinds that have them."""
    transaction: int | None = None
    aborted: bool = False
    """Show those that were rolled back, too."""


@dataclass(frozen=True, slots=True)
class RelationName:
    """A relation as people know it, as far as it could be found out."""

    database: str
    """Its name, or its number where that is unknown."""
    file: str
    """Numbers of tablespace, database and file, with slashes between; "" for one that has no file."""
    schema: str = ""
    name: str = ""
    """"": unknown."""
    kind: str = "relation"
    """"table", "index" and so on."""
    known_by: str = ""
    """What the name was taken from."""

    @property
    def text(self) -> str:
        """Kind, name and database."""
        if not self.name:
            return f"{self.kind} with file {self.file} (name unknown) in database {self.database}"
        schema = f"{self.schema}." if self.schema else ""
        return f"{self.kind} {schema}{self.name} in database {self.database}"


@dataclass(frozen=True, slots=True)
class Change:
    """One thing that a transaction did."""

    kind: ChangeKind
    text: str
    relation: RelationName | None = None
    rows: int = 0


@dataclass(frozen=True, slots=True)
class FoundTransaction:
    """One transaction that was searched for."""

    transaction: int
    end: TransactionEnd
    offset: int
    """Where the record of its end begins; of one that has not ended, its first record that was read."""
    instant_us: int
    """Of its end; 0 where it has not ended."""
    stop_offset: int
    """A restore up to here, exclusive, is the state just before it."""
    changes: tuple[Change, ...]
    notes: tuple[str, ...] = ()
