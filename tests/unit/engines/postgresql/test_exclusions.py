"""Which files a backup holds, by PostgreSQL's own rules."""

from __future__ import annotations

import pytest

from cloudsave.engines.postgresql.exclusions import (
    SEGMENT_BLOCKS,
    is_database_directory,
    is_excluded,
    relation_of,
    storage_of,
    unlogged_relations,
)
from cloudsave.model.changes import StorageKey

TABLESPACE_DATABASE = "pg_tblspc/16385/PG_18_202506291/5"


@pytest.mark.parametrize(
    ("directory", "name"),
    [
        ("", "postmaster.pid"),
        ("", "postmaster.opts"),
        ("", "backup_label"),
        ("", "backup_label.old"),
        ("", "tablespace_map"),
        ("", "backup_manifest"),
        ("", "postgresql.auto.conf.tmp"),
        ("", "current_logfiles.tmp"),
        ("", "pgsql_tmp"),
        ("base", "pgsql_tmp"),
        ("base/pgsql_tmp", "pgsql_tmp123.0"),
        ("global", "pg_internal.init"),
        ("base/5", "pg_internal.init.4711"),
        ("base/5", "t3_16384"),
        ("base/5", "t3_16384_fsm"),
        ("base/5", "t3_16384.1"),
        (TABLESPACE_DATABASE, "t12_99_vm"),
        ("pg_wal", "000000010000000000000001"),
        ("pg_wal/archive_status", "000000010000000000000001.ready"),
        ("pg_replslot", "slot"),
        ("pg_replslot/slot", "state"),
        ("pg_subtrans", "0000"),
        ("pg_stat_tmp", "global.stat"),
        ("pg_snapshots", "00000003-1"),
    ],
)
def test_names_that_stay_out(directory: str, name: str) -> None:
    assert is_excluded(directory, name)


@pytest.mark.parametrize(
    ("directory", "name"),
    [
        ("", "PG_VERSION"),
        ("", "postgresql.auto.conf"),
        ("", "pg_wal"),
        ("", "pg_stat_tmp"),
        ("global", "pg_control"),
        ("global", "pg_filenode.map"),
        ("base/5", "16384"),
        ("base/5", "16384_init"),
        ("base/5", "16384.12"),
        ("base/5", "PG_VERSION"),
        ("pg_xact", "0000"),
        ("pg_stat", "pgstat.stat"),
        ("base", "t3_16384"),
        ("log", "t3_16384"),
        ("extension", "backup_label"),
    ],
)
def test_names_that_belong_in(directory: str, name: str) -> None:
    assert not is_excluded(directory, name)


def test_unlogged_relation_leaves_only_its_init_fork() -> None:
    names = ["100", "100_init", "100_fsm", "100.1", "101", "101_vm", "t1_102_init"]
    unlogged = unlogged_relations("base/5", names)
    assert unlogged == {100}
    kept = [name for name in names if not is_excluded("base/5", name, unlogged=unlogged)]
    assert kept == ["100_init", "101", "101_vm"]


def test_init_fork_outside_of_a_database_means_nothing() -> None:
    assert unlogged_relations("log", ["100_init"]) == frozenset()


@pytest.mark.parametrize(
    ("path", "first_block"),
    [
        ("base/5/16384", 0),
        ("base/5/16384.3", 3 * SEGMENT_BLOCKS),
        ("base/5/16384_fsm", 0),
        ("base/5/16384_vm.1", SEGMENT_BLOCKS),
        ("base/5/16384_init", 0),
        ("global/1260", 0),
        (f"{TABLESPACE_DATABASE}/20000.1", SEGMENT_BLOCKS),
    ],
)
def test_pages_of_relations_are_checked(path: str, first_block: int) -> None:
    relation = relation_of(path)
    assert relation is not None
    assert relation.first_block == first_block


@pytest.mark.parametrize(
    "path",
    [
        "global/pg_control",
        "global/pg_filenode.map",
        "base/5/PG_VERSION",
        "base/5/pg_filenode.map",
        "pg_xact/0000",
        "pg_multixact/offsets/0000",
        "base/16384",
        "pg_tblspc/16385/16384",
        "16384",
        "base/5/16384_foo",
        "base/5/16384.x",
    ],
)
def test_other_files_have_no_pages(path: str) -> None:
    assert relation_of(path) is None


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ("base/5/16384", StorageKey((1663, 5, 16384), 0)),
        ("base/5/16384.2", StorageKey((1663, 5, 16384), 2 * 131072)),
        ("global/1262", StorageKey((1664, 0, 1262), 0)),
        ("pg_tblspc/16999/PG_18_202506291/5/16384.1", StorageKey((16999, 5, 16384), 131072)),
        ("base/5/16384_vm", None),
        ("base/5/16384_fsm", None),
        ("base/5/16384_init", None),
        ("base/5/pg_filenode.map", None),
        ("pg_xact/0000", None),
    ],
)
def test_how_the_log_names_blocks(path: str, key: StorageKey | None) -> None:
    assert storage_of(path) == key


def test_database_directories() -> None:
    assert is_database_directory("base/5")
    assert is_database_directory(TABLESPACE_DATABASE)
    assert not is_database_directory("base")
    assert not is_database_directory("global")
    assert not is_database_directory("pg_tblspc/16385/5")
