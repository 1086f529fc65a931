"""What the engine makes of a server's answers, without a server."""

from __future__ import annotations

from typing import Any

import pytest

from cloudsave.engines.postgresql.backup_session import BackupSession, is_outside, label_start
from cloudsave.engines.postgresql.engine import PostgresEngine
from cloudsave.engines.postgresql.source_remote import base_backup_command
from cloudsave.errors import IntegrityError, UnsuitableSettings, UnsupportedVersion, UsageError
from cloudsave.model.identity import Role, SourceIdentity
from cloudsave.model.position import Position

LABEL = """START WAL LOCATION: 1A/2000028 (file 000000030000001A00000002)
CHECKPOINT LOCATION: 1A/2000080
BACKUP METHOD: streamed
START TIMELINE: 3
"""


class Answering(BackupSession):
    """A session that answers every question with one row."""

    def __init__(self, row: tuple[Any, ...]) -> None:
        self.answer = row

    def row(self, query: str, parameters: tuple[object, ...] = (), *, doing: str) -> tuple[Any, ...]:
        return self.answer

    def close(self) -> None:
        pass


class Engine(PostgresEngine):
    """An engine whose sessions answer with one row."""

    answer: tuple[Any, ...]

    def _open(self, application_name: str) -> BackupSession:
        return Answering(self.answer)


def identify(*, number: int = 180006, geometry: tuple[int, ...] = (8192, 131072, 8192)) -> SourceIdentity:
    """The identity that follows from a server's answer."""
    engine = Engine("postgresql://h/d")
    engine.answer = ("7561", "18.6 (Debian)", number, False, None, list(geometry), 1 << 24, 1, "00000002")
    return engine.identify()


def test_identity_of_an_answer() -> None:
    identity = identify()
    assert (identity.version, identity.major, identity.branch) == ("18.6", 18, "00000002")
    assert (identity.role, identity.data_directory) == (Role.PRIMARY, "")
    assert identity.lineage == "postgresql-7561"


@pytest.mark.parametrize("number", [130020, 190000, 90624])
def test_versions_that_we_never_tested_are_refused(number: int) -> None:
    with pytest.raises(UnsupportedVersion):
        identify(number=number)


@pytest.mark.parametrize("geometry", [(16384, 131072, 8192), (8192, 262144, 8192), (8192, 131072, 16384)])
def test_servers_built_with_other_sizes_are_refused(geometry: tuple[int, ...]) -> None:
    """No package has such a server; what the usual ones answer is asked of real ones elsewhere."""
    with pytest.raises(UnsuitableSettings) as refused:
        identify(geometry=geometry)
    assert str(max(set(geometry) - {131072, 8192})) in refused.value.detail


def test_unknown_mode_is_refused_before_connecting() -> None:
    with pytest.raises(UsageError):
        PostgresEngine("postgresql://h/d").backup_source(mode="magic", fast=True, label="x")


def test_backup_label_says_where_replay_begins() -> None:
    assert label_start(LABEL) == Position("00000003", 0x1A02000028)
    with pytest.raises(IntegrityError):
        label_start("LABEL: x\n")


def test_base_backup_in_both_grammars() -> None:
    new = base_backup_command("it's", fast=True, version=150000, tablespace_map=True)
    assert new.startswith(
        "BASE_BACKUP (LABEL 'it''s', PROGRESS true, CHECKPOINT 'fast', WAL false, WAIT false,"
    )
    old = base_backup_command("it's", fast=False, version=140005, tablespace_map=False)
    assert old == "BASE_BACKUP LABEL 'it''s' PROGRESS NOWAIT MANIFEST 'yes' MANIFEST_CHECKSUMS 'CRC32C'"


def test_only_absolute_paths_elsewhere_are_outside() -> None:
    assert is_outside("/etc/postgresql/pg_hba.conf", "/data")
    assert is_outside("/data2/pg_hba.conf", "/data")
    assert not is_outside("/data/pg_hba.conf", "/data")
    assert not is_outside("/data/pg_hba.conf", "/data/")
    assert not is_outside("pg_hba.conf", "/data")
