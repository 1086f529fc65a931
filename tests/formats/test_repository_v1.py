"""A repository of format 1, made when the format was final, opens for ever."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

from cloudsave.clock import SYSTEM_CLOCK
from cloudsave.errors import IntegrityError, UnknownBackup
from cloudsave.model.item import ItemKind
from cloudsave.model.log import LogHole
from cloudsave.repository.keys import Secret
from cloudsave.repository.lineage import Lineage
from cloudsave.repository.reader import BackupReader
from cloudsave.repository.repository import Repository
from cloudsave.repository.tombs import condemned_in
from cloudsave.store.posix import PosixStore
from tests.formats.make_repository_v1 import (
    ARCHIVE,
    EXPECTED,
    FIRST,
    HISTORY,
    OUTSIDE,
    REVOKED,
    SECOND,
    UNFINISHED,
    files_of,
)
from tests.unit.repository.samples import SEGMENT, read_backup, write_backup

RESCUE = Path(__file__).parents[2] / "tools" / "rescue.py"
ARCHIVE_BYTES_MAX = 200_000


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    """What was in it when it was made."""
    return dict(json.loads(EXPECTED.read_text()))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """The repository, unpacked."""
    root = tmp_path / "repository"
    with tarfile.open(ARCHIVE) as archive:
        for member in archive:
            content = archive.extractfile(member)
            assert content is not None
            (root / member.name).parent.mkdir(parents=True, exist_ok=True)
            (root / member.name).write_bytes(content.read())
    return root


@pytest.fixture
def lineage(directory: Path, expected: dict[str, Any]) -> Lineage:
    """Its only lineage, opened by the passphrase."""
    secret = Secret(passphrase=expected["passphrase"])
    repository = Repository.open(PosixStore(directory), secret=secret, clock=SYSTEM_CLOCK)
    assert repository.lineage_ids() == [expected["lineage"]]
    return repository.lineage(expected["lineage"])


def test_it_is_small() -> None:
    assert ARCHIVE.stat().st_size + EXPECTED.stat().st_size < ARCHIVE_BYTES_MAX


def test_its_keys_are_derived_as_ever(lineage: Lineage, directory: Path, expected: dict[str, Any]) -> None:
    assert lineage.keys.lineage_key.hex() == expected["lineage_key"]
    assert lineage.keys.public_key().hex() == expected["public_key"]
    secret = Secret(recovery_key=expected["recovery_key"])
    opened = Repository.open(PosixStore(directory), secret=secret, clock=SYSTEM_CLOCK)
    assert opened.lineage(lineage.id).keys == lineage.keys
    identity = lineage.identity()
    assert identity is not None
    assert (identity.engine, identity.source) == ("postgresql", "orders")


def assert_holds(found: Any, expected: Any) -> None:
    """`found` is `expected`, apart from fields that were not known then."""
    if isinstance(expected, dict):
        for name, value in expected.items():
            assert_holds(found[name], value)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_holds(one, other)
    else:
        assert found == expected


def test_its_manifests_say_what_they_said(lineage: Lineage, expected: dict[str, Any]) -> None:
    assert lineage.backup_ids() == [FIRST, SECOND]
    for backup_id in (FIRST, SECOND):
        found = json.loads(json.dumps(asdict(lineage.manifest(backup_id))))
        assert_holds(found, expected["manifests"][backup_id])
    for backup_id in (REVOKED, UNFINISHED):
        with pytest.raises(UnknownBackup):
            lineage.manifest(backup_id)
    kinds = {entry.path: entry.kind for entry in lineage.manifest(SECOND).files}
    assert kinds["pg_tblspc/16390"] == ItemKind.LINK


def test_its_files_are_what_they_were(lineage: Lineage, expected: dict[str, Any]) -> None:
    for backup_id in (FIRST, SECOND):
        files = read_backup(lineage, lineage.manifest(backup_id))
        assert files.pop(OUTSIDE) == b"local all all peer"
        assert {path: blake3(content).hexdigest() for path, content in files.items()} == expected["files"][
            backup_id
        ]
        assert files == files_of(backup_id)


def test_its_log_is_what_it_was(lineage: Lineage, expected: dict[str, Any]) -> None:
    logs = lineage.logs()
    assert [[s.branch, s.first, s.last, s.commit_first_us, s.commit_last_us] for s in logs] == expected[
        "logs"
    ]
    assert [blake3(lineage.read_log(one)).hexdigest() for one in logs] == expected["log_digests"]
    indexes = [
        json.loads(
            json.dumps(
                asdict(lineage.log_index(one)), default=lambda commits: [asdict(commit) for commit in commits]
            )
        )
        for one in logs
    ]
    assert_holds(indexes, expected["log_indexes"])
    assert lineage.histories() == {"00000002": HISTORY}
    assert lineage.holes() == [LogHole("00000001", SEGMENT + 2000, SEGMENT + 2500, "the server removed it")]


def test_a_new_backup_goes_on_from_it(lineage: Lineage) -> None:
    """Fingerprints, pins, generations, tombs and packs of the unfinished backup are understood."""
    parent = lineage.manifest(SECOND)
    files = files_of(SECOND)
    manifest = write_backup(lineage, "20270101T000000Z-0001", files, parent)
    assert manifest.statistics.blocks_stored == 0
    assert read_backup(lineage, manifest) == files
    assert condemned_in(lineage).objects == {"packs/000000ff-00000000"}


def test_the_comparison_can_fail(directory: Path, lineage: Lineage) -> None:
    """Negative control: one bit of a pack."""
    pack = next((directory / lineage.root / "packs").iterdir())
    content = bytearray(pack.read_bytes())
    content[200] ^= 1
    pack.write_bytes(content)
    reader = BackupReader(lineage, lineage.manifest(SECOND))
    with pytest.raises(IntegrityError):
        reader.read_all(lambda file, offset, data: None, workers=lambda: 1)


def test_the_stand_alone_program_restores_it(
    directory: Path, expected: dict[str, Any], tmp_path: Path
) -> None:
    secret = tmp_path / "passphrase"
    secret.write_text(expected["passphrase"] + "\n")
    command = [
        sys.executable,
        "-I",
        str(RESCUE),
        "--repository",
        str(directory),
        "--passphrase-file",
        str(secret),
    ]
    into, wal = tmp_path / "into", tmp_path / "wal"
    arguments = ["restore", SECOND, "--into", str(into), "--wal-into", str(wal)]
    done = subprocess.run([*command, *arguments], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "there is a hole" in done.stderr
    for path, content in files_of(SECOND).items():
        assert (into / path).read_bytes() == content
    assert (tmp_path / "into.outside" / OUTSIDE[1:]).read_bytes() == b"local all all peer"
    assert (into / "pg_tblspc/16390").readlink() == tmp_path / "into.tablespaces/16390"
    assert (into / "base/5").stat().st_mode & 0o777 == 0o750
    assert (wal / "000000010000000000000001").stat().st_size == SEGMENT
    listed = subprocess.run([*command, "list"], check=True, capture_output=True, text=True).stdout
    assert [FIRST in listed, SECOND in listed, REVOKED in listed] == [True, True, False]
