"""Which objects are taken out of a restored server."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class DumpFormat(StrEnum):
    """How objects are written."""

    SQL = "sql"
    ARCHIVE = "archive"
    """The engine's own archive, compressed, for its own loading program."""


@dataclass(frozen=True, slots=True)
class Selection:
    """A whole database, or some of its tables."""

    database: str
    tables: tuple[str, ...] = ()
    """As a person names them, with or without the schema; empty: the whole database."""
    keep_owners: bool = True
    """Whether owners and rights go along."""


@dataclass(frozen=True, slots=True)
class NeededObject:
    """Something that a table cannot do without: a type, a function, a sequence, a schema, an extension."""

    kind: str
    identity: str
    catalogue: int
    number: int
    """The oids of the system catalogue and of the object in it."""


@dataclass(frozen=True, slots=True)
class FoundObjects:
    """A selection as it was found."""

    selection: Selection
    tables: tuple[tuple[str, str], ...] = ()
    """(schema, name), partitions included; empty: the whole database."""
    needs: tuple[NeededObject, ...] = ()
    removals: tuple[str, ...] = ()
    """Statements that make room for the tables where they are to replace others."""
