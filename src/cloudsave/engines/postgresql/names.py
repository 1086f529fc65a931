"""
Names for the numbers that log has: of files, schemas and databases.

The log itself is believed first, since it tells what a relation was called at that moment; then base backups,
whose catalogues are read from their pages, whatever the visibility of a row: a file number is given to one
relation only, so each version of a row names it rightly, if not by its last name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from cloudsave.engines.postgresql.format_catalogue import (
    CATALOGUES,
    FIRST_NORMAL_OID,
    LARGE_OBJECTS,
    PG_CLASS,
    PG_DATABASE,
    PG_NAMESPACE,
    TRANSIENT_PREFIX,
    NamingRow,
    parse_map,
    parse_row,
    tuples_of,
)
from cloudsave.engines.postgresql.format_page import PAGE_BYTES
from cloudsave.engines.search_api import StoredFiles
from cloudsave.model.found import RelationName

DEFAULT_TABLESPACE, GLOBAL_TABLESPACE = 1663, 1664
_DATABASE_MAP = re.compile(r"((?:base|pg_tblspc/\d+/PG_[^/]+)/(\d+)/)pg_filenode\.map")
_KINDS = {
    "r": "table",
    "i": "index",
    "S": "sequence",
    "t": "toast table",
    "v": "view",
    "m": "materialized view",
    "c": "type",
    "f": "foreign table",
    "p": "partitioned table",
    "I": "partitioned index",
}
_FIXED_SCHEMAS = {11: "pg_catalog", 99: "pg_toast", 2200: "public"}
BY_LOG, BY_BACKUP = "log", "backup"


@dataclass(slots=True)
class _Known:
    row: NamingRow
    by: str


@dataclass(slots=True)
class NameBook:
    """What numbers stand for. Shared relations belong to database 0."""

    major: int
    _files: dict[tuple[int, int], _Known] = field(default_factory=dict)
    """By (database, file)."""
    _relations: dict[tuple[int, int], _Known] = field(default_factory=dict)
    """By (database, oid)."""
    _schemas: dict[tuple[int, int], str] = field(default_factory=dict)
    _databases: dict[int, str] = field(default_factory=dict)

    def add(self, database: int, row: NamingRow, *, by: str) -> None:
        """Learn a row; what is known already is kept."""
        if row.catalogue == PG_NAMESPACE:
            self._schemas.setdefault((database, row.oid), row.name)
        elif row.catalogue == PG_DATABASE:
            self._databases.setdefault(row.oid, row.name)
        elif row.catalogue == PG_CLASS and not row.name.startswith(TRANSIENT_PREFIX):
            known = _Known(row, by)
            self._relations.setdefault((database, row.oid), known)
            if row.file:
                self._files.setdefault((database, row.file), known)

    def database(self, oid: int) -> str:
        """A database's name, or its number."""
        return self._databases.get(oid, str(oid))

    def schema(self, database: int, oid: int) -> str:
        """A schema's name, or its number."""
        known = self._schemas.get((database, oid)) or _FIXED_SCHEMAS.get(oid)
        return known or (str(oid) if oid else "")

    def lacks_schema(self, database: int, oid: int) -> bool:
        """Whether a schema has no name."""
        return bool(oid) and oid not in _FIXED_SCHEMAS and (database, oid) not in self._schemas

    def has_file(self, database: int, file: int) -> bool:
        """Whether a file has a name."""
        return (database, file) in self._files

    def by_file(self, tablespace: int, database: int, file: int) -> RelationName:
        """The relation of a file."""
        numbers = f"{tablespace}/{database}/{file}"
        known = self._files.get((database, file))
        if known is not None:
            return self._named(database, numbers, known)
        if file < FIRST_NORMAL_OID:
            name = "pg_largeobject" if file == LARGE_OBJECTS else CATALOGUES.get(file, str(file))
            return RelationName(self.database(database), numbers, "pg_catalog", name, "catalogue")
        return RelationName(self.database(database), numbers)

    def by_oid(self, database: int, oid: int) -> RelationName:
        """A relation by its oid."""
        known = self._relations.get((database, oid))
        if known is None:
            return RelationName(self.database(database), "", kind=f"relation with oid {oid}")
        return self._named(database, _file_of(database, known.row), known)

    def by_row(self, database: int, row: NamingRow) -> RelationName:
        """The relation of a row that the log told."""
        return self._named(database, _file_of(database, row), _Known(row, BY_LOG))

    def all_names(self) -> Iterator[RelationName]:
        """All relations that have a name."""
        for (database, _), known in self._relations.items():
            yield self._named(database, _file_of(database, known.row), known)

    def _named(self, database: int, numbers: str, known: _Known) -> RelationName:
        row = known.row
        return RelationName(
            database=self.database(database),
            file=numbers,
            schema=self.schema(database, row.schema),
            name=row.name,
            kind=_KINDS.get(row.kind, "relation"),
            known_by=known.by,
        )

    # ---- base backups

    def learn_databases(self, files: StoredFiles) -> None:
        """The databases' names from a base backup."""
        mapping = parse_map(files.read("global/pg_filenode.map"))
        for row in _rows(files, "global/", PG_DATABASE, mapping.get(PG_DATABASE, PG_DATABASE), self.major):
            self.add(0, row, by=BY_BACKUP)

    def learn_relations(self, files: StoredFiles, databases: Iterable[int]) -> None:
        """The relations' and schemas' names of some databases from a base backup."""
        wanted = set(databases)
        for folder, database in database_folders(files):
            if database not in wanted:
                continue
            mapping = parse_map(files.read(f"{folder}pg_filenode.map"))
            schemas = PG_NAMESPACE
            rows = _rows(files, folder, PG_CLASS, mapping.get(PG_CLASS, PG_CLASS), self.major)
            for row in rows:
                self.add(database, row, by=BY_BACKUP)
                schemas = row.file if row.oid == PG_NAMESPACE and row.file else schemas
            for row in _rows(files, folder, PG_NAMESPACE, schemas, self.major):
                self.add(database, row, by=BY_BACKUP)


def _file_of(database: int, row: NamingRow) -> str:
    tablespace = row.tablespace or DEFAULT_TABLESPACE
    return f"{tablespace}/{database}/{row.file}" if row.file else ""


def database_folders(files: StoredFiles) -> Iterator[tuple[str, int]]:
    """The folder and the oid of each database of a backup."""
    for path in files.paths():
        found = _DATABASE_MAP.fullmatch(path)
        if found is not None:
            yield found[1], int(found[2])


def relation_maps(files: StoredFiles) -> Iterator[tuple[int, Mapping[int, int]]]:
    """The relation map of each database, and of the shared catalogues as that of database 0."""
    yield 0, parse_map(files.read("global/pg_filenode.map"))
    for folder, database in database_folders(files):
        yield database, parse_map(files.read(f"{folder}pg_filenode.map"))


def _rows(files: StoredFiles, folder: str, catalogue: int, file: int, major: int) -> list[NamingRow]:
    """The rows of a naming catalogue; of several versions of one, that which nobody deleted is the first."""
    # Limit: the first file, 1 GiB, is read: four million relations.
    content = memoryview(files.read(f"{folder}{file}"))
    live: list[NamingRow] = []
    dead: list[NamingRow] = []
    for begin in range(0, len(content) - PAGE_BYTES + 1, PAGE_BYTES):
        for one in tuples_of(content[begin : begin + PAGE_BYTES]):
            row = parse_row(catalogue, one.columns, major=major)
            if row is not None:
                (live if one.undeleted else dead).append(row)
    return live + dead
