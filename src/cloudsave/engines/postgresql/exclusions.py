"""
Which files of a data directory belong into a base backup, and which of them consist of checked pages.

Pure: names in, decisions out. Paths are relative to the data directory, "/"-separated; the contents of a
tablespace appear below `pg_tblspc/<oid>/`.
Source: PostgreSQL src/backend/backup/basebackup.c (excludeDirContents, excludeFiles, sendDir,
is_checksummed_file), src/backend/storage/file/reinit.c.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from cloudsave.model.changes import StorageKey

PAGE_BYTES = 8192
SEGMENT_BLOCKS = 131072
"""Blocks in a file of a relation (1 GiB); block numbers count on through a relation's files."""

EMPTIED_DIRECTORIES = frozenset(
    {
        "pg_wal",
        "pg_dynshmem",
        "pg_notify",
        "pg_replslot",
        "pg_serial",
        "pg_snapshots",
        "pg_stat_tmp",
        "pg_subtrans",
    }
)
"""Directories that are backed up without their contents."""

NEEDED_DIRECTORIES = (*sorted(EMPTIED_DIRECTORIES), "pg_wal/archive_status")
"""Directories that PostgreSQL needs although a backup holds nothing in them."""

DATA_DIRECTORIES = frozenset(
    {
        "base",
        "global",
        "pg_commit_ts",
        "pg_logical",
        "pg_multixact",
        "pg_stat",
        "pg_tblspc",
        "pg_twophase",
        "pg_xact",
    }
)
"""Directories whose contents must be complete: a link among them that we cannot follow is refused."""

CONTROL_FILE = "global/pg_control"

_EXCLUDED_NAMES = frozenset(
    {
        "postmaster.pid",
        "postmaster.opts",
        "backup_manifest",
        "postgresql.auto.conf.tmp",
        "current_logfiles.tmp",
        ".DS_Store",
    }
)
_EXCLUDED_AT_TOP = frozenset({"backup_label", "backup_label.old", "tablespace_map", "tablespace_map.old"})
_EXCLUDED_PREFIXES = ("pgsql_tmp", "pg_internal.init")

_DEFAULT_SPACE, _GLOBAL_SPACE = 1663, 1664
"""Source: src/include/catalog/pg_tablespace.dat."""
_RELATION = re.compile(r"(\d+)(?:_(fsm|vm|init))?(?:\.(\d+))?")
_TEMPORARY_RELATION = re.compile(r"t\d+_\d+(?:_(?:fsm|vm|init))?(?:\.\d+)?")
_DATABASE_DIRECTORY = re.compile(r"(?:base|pg_tblspc/\d+/PG_[0-9.]+_\d+)/\d+")


@dataclass(frozen=True, slots=True)
class RelationFile:
    """A relation file's name taken apart."""

    number: int
    fork: str
    """"" for the main fork, else "fsm", "vm" or "init"."""
    segment: int

    @property
    def first_block(self) -> int:
        """The relation's block number with which the file begins."""
        return self.segment * SEGMENT_BLOCKS


def parse_relation_name(name: str) -> RelationFile | None:
    """The parts of a relation file's name; None where it is not one."""
    found = _RELATION.fullmatch(name)
    return None if found is None else RelationFile(int(found[1]), found[2] or "", int(found[3] or 0))


def is_database_directory(directory: str) -> bool:
    """Whether `directory` holds the relations of one database."""
    return _DATABASE_DIRECTORY.fullmatch(directory) is not None


def relation_of(path: str) -> RelationFile | None:
    """The relation file at `path`, so that its pages can be checked; None for any other file."""
    directory, _, name = path.rpartition("/")
    if directory == "global" or is_database_directory(directory):
        return parse_relation_name(name)
    return None


def storage_of(path: str) -> StorageKey | None:
    """
    How the log names the blocks of the relation file at `path`; None for all but main forks.

    Records about the heap clear bits of the visibility map without naming its blocks, and the free space map
    is hardly logged at all.
    """
    relation, directory = relation_of(path), path.rpartition("/")[0]
    if relation is None or relation.fork:
        return None
    if directory == "global":
        return StorageKey((_GLOBAL_SPACE, 0, relation.number), relation.first_block)
    parts = directory.split("/")
    space = _DEFAULT_SPACE if parts[0] == "base" else int(parts[1])
    return StorageKey((space, int(parts[-1]), relation.number), relation.first_block)


def unlogged_relations(directory: str, names: Collection[str]) -> frozenset[int]:
    """The relations of a database directory that are unlogged: those with an init fork."""
    if not is_database_directory(directory):
        return frozenset()
    parsed = (parse_relation_name(name) for name in names if "_init" in name)
    return frozenset(relation.number for relation in parsed if relation and relation.fork == "init")


def is_excluded(directory: str, name: str, *, unlogged: Collection[int] = ()) -> bool:
    """
    Whether the entry `name` of `directory` ("" is the data directory itself) stays out of a backup.

    `unlogged` are the unlogged relations of that directory: recovery builds them anew from their init forks.
    """
    if name in _EXCLUDED_NAMES or name.startswith(_EXCLUDED_PREFIXES):
        return True
    if directory.partition("/")[0] in EMPTIED_DIRECTORIES:
        return True
    if not directory:
        return name in _EXCLUDED_AT_TOP
    if directory == "global":
        return name == "pg_control.tmp"
    if not is_database_directory(directory):
        return False
    if _TEMPORARY_RELATION.fullmatch(name):
        return True
    relation = parse_relation_name(name)
    return relation is not None and relation.fork != "init" and relation.number in unlogged
