"""Archive files in and out, against a lineage in a memory store."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloudsave.clock import SYSTEM_CLOCK
from cloudsave.errors import (
    ExitCode,
    IntegrityError,
    LogConflict,
    LogHole,
    LogNotInArchive,
    RecoveryError,
    SourceUnreadable,
    UsageError,
)
from cloudsave.logs.archive import fetch, push
from cloudsave.model.log import LogHole as HoleRecord
from cloudsave.model.log import LogIndex, LogSegment
from cloudsave.repository.lineage import Lineage
from cloudsave.repository.repository import Repository
from cloudsave.store.memory import MemoryStore
from tests.unit.logs.fakes import FakeDialect, log_bytes

FILE = 1 << 20
DIALECT = FakeDialect()


@pytest.fixture
def lineage() -> Lineage:
    store = MemoryStore()
    return Repository.create(store, passphrase=None, clock=SYSTEM_CLOCK).repository.lineage("fake-77")


def put(lineage: Lineage, branch: str, first: int, last: int, *, seed: str = "x") -> None:
    lineage.put_log(LogSegment(branch, first, last), [log_bytes(seed, first, last)], LogIndex())


def pushed(lineage: Lineage, path: Path, name: str, content: bytes) -> str:
    file = path / name
    file.write_bytes(content)
    return push(lineage, DIALECT, file)


def fetched(lineage: Lineage, path: Path, name: str, *, needed_until: int | None = None) -> bytes:
    target = path / "RECOVERYXLOG"
    fetch(lineage, DIALECT, name, target, log_file_bytes=FILE, needed_until=needed_until)
    return target.read_bytes()


def test_what_is_pushed_is_fetched(lineage: Lineage, tmp_path: Path) -> None:
    content = log_bytes("x", 3 * FILE, 4 * FILE)
    assert pushed(lineage, tmp_path, "1-3", content) == "1-3 stored"
    assert pushed(lineage, tmp_path, "1-3", content) == "1-3 is stored already"
    assert fetched(lineage, tmp_path, "1-3") == content
    assert sorted(tmp_path.iterdir()) == [tmp_path / "1-3", tmp_path / "RECOVERYXLOG"]


def test_the_same_name_with_other_content_is_refused(lineage: Lineage, tmp_path: Path) -> None:
    content = bytearray(log_bytes("x", 3 * FILE, 4 * FILE))
    pushed(lineage, tmp_path, "1-3", bytes(content))
    content[77] ^= 1
    with pytest.raises(LogConflict):
        pushed(lineage, tmp_path, "1-3", bytes(content))


def test_a_push_that_differs_from_captured_pieces_is_refused(lineage: Lineage, tmp_path: Path) -> None:
    put(lineage, "1", 3 * FILE + 100, 3 * FILE + 900)
    content = bytearray(log_bytes("x", 3 * FILE, 4 * FILE))
    content[899] ^= 1
    with pytest.raises(LogConflict):
        pushed(lineage, tmp_path, "1-3", bytes(content))
    content[899] ^= 1
    content[900] ^= 1
    assert pushed(lineage, tmp_path, "1-3", bytes(content)) == "1-3 stored"


@pytest.mark.parametrize("size", [0, 1000, FILE - 1, FILE + 8192])
def test_a_cut_off_file_is_refused(lineage: Lineage, tmp_path: Path, size: int) -> None:
    with pytest.raises(IntegrityError):
        pushed(lineage, tmp_path, "1-3", bytes(size))
    assert lineage.logs() == []


def test_names_that_are_no_log_are_refused_and_labels_accepted(lineage: Lineage, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        pushed(lineage, tmp_path, "notes.txt", bytes(FILE))
    assert "accepted" in pushed(lineage, tmp_path, "1-3.00000028.backup", b"label")
    with pytest.raises(SourceUnreadable):
        push(lineage, DIALECT, tmp_path / "1-9")


def test_histories_are_stored_once_and_refused_when_they_differ(lineage: Lineage, tmp_path: Path) -> None:
    pushed(lineage, tmp_path, "2.history", b"1 100\n")
    pushed(lineage, tmp_path, "2.history", b"1 100\n")
    assert fetched(lineage, tmp_path, "2.history") == b"1 100\n"
    with pytest.raises(LogConflict):
        pushed(lineage, tmp_path, "2.history", b"1 101\n")


def test_an_absent_history_is_proved_absent_only_without_log_of_the_branch(
    lineage: Lineage, tmp_path: Path
) -> None:
    with pytest.raises(LogNotInArchive) as absent:
        fetched(lineage, tmp_path, "2.history")
    assert absent.value.exit_code == ExitCode.FAILED
    put(lineage, "2", 0, FILE)
    with pytest.raises(IntegrityError):
        fetched(lineage, tmp_path, "2.history")


def test_a_file_of_many_pieces_is_put_together(lineage: Lineage, tmp_path: Path) -> None:
    for first in range(0, FILE, 1 << 18):
        put(lineage, "1", first, min(first + (1 << 18) + 500, FILE))
    assert fetched(lineage, tmp_path, "1-0") == log_bytes("x", 0, FILE)


def test_only_past_the_end_of_the_branch_there_are_zeros(lineage: Lineage, tmp_path: Path) -> None:
    put(lineage, "1", 0, FILE + 1000)
    assert fetched(lineage, tmp_path, "1-1") == log_bytes("x", FILE, FILE + 1000) + bytes(FILE - 1000)
    with pytest.raises(LogNotInArchive):
        fetched(lineage, tmp_path, "1-2")
    put(lineage, "1", 3 * FILE, 3 * FILE + 10)
    with pytest.raises(LogHole):
        fetched(lineage, tmp_path, "1-1")
    with pytest.raises(LogHole):
        fetched(lineage, tmp_path, "1-2")


def test_a_recorded_hole_is_never_taken_for_the_end(lineage: Lineage, tmp_path: Path) -> None:
    put(lineage, "1", 0, FILE)
    lineage.put_hole(HoleRecord("1", FILE, 3 * FILE, "removed by the server"))
    with pytest.raises(LogHole):
        fetched(lineage, tmp_path, "1-1")
    with pytest.raises(LogNotInArchive):
        fetched(lineage, tmp_path, "1-3")


def test_a_parent_that_is_not_complete_to_its_switch_is_a_hole(lineage: Lineage, tmp_path: Path) -> None:
    put(lineage, "1", 0, FILE + 1000)
    lineage.put_history("2", f"1 {3 * FILE + 5}\n".encode())
    for name in ("1-1", "1-2"):
        with pytest.raises(LogHole):
            fetched(lineage, tmp_path, name)
    with pytest.raises(LogNotInArchive):
        fetched(lineage, tmp_path, "1-4")


def test_a_hole_behind_where_recovery_stops_does_no_harm(lineage: Lineage, tmp_path: Path) -> None:
    test_a_parent_that_is_not_complete_to_its_switch_is_a_hole(lineage, tmp_path)
    content = fetched(lineage, tmp_path, "1-1", needed_until=FILE + 1000)
    assert content == log_bytes("x", FILE, FILE + 1000) + bytes(FILE - 1000)
    with pytest.raises(LogHole):
        fetched(lineage, tmp_path, "1-1", needed_until=FILE + 1001)


def test_a_branchs_first_file_is_its_own_or_composed_from_the_parent(
    lineage: Lineage, tmp_path: Path
) -> None:
    lineage.put_history("2", f"1 {FILE + 600}\n".encode())
    put(lineage, "1", 0, FILE + 700)
    put(lineage, "2", FILE + 600, 2 * FILE, seed="y")
    composed = log_bytes("x", FILE, FILE + 600) + log_bytes("y", FILE + 600, 2 * FILE)
    assert fetched(lineage, tmp_path, "2-1") == composed
    put(lineage, "2", FILE, FILE + 600, seed="own")
    own = log_bytes("own", FILE, FILE + 600) + log_bytes("y", FILE + 600, 2 * FILE)
    assert fetched(lineage, tmp_path, "2-1") == own
    with pytest.raises(LogNotInArchive):
        fetched(lineage, tmp_path, "2-0")


def test_a_damaged_object_is_an_integrity_error_and_leaves_no_file(tmp_path: Path) -> None:
    store = MemoryStore()
    lineage = Repository.create(store, passphrase=None, clock=SYSTEM_CLOCK).repository.lineage("fake-77")
    put(lineage, "1", 0, FILE)
    (name,) = [info.name for info in store.list("lineages/")]
    damaged = bytearray(store.get(name))
    damaged[len(damaged) // 2] ^= 1
    store.delete(name)
    store.put(name, [bytes(damaged)])
    with pytest.raises(IntegrityError):
        fetched(lineage, tmp_path, "1-0")
    assert list(tmp_path.iterdir()) == []


def test_a_destination_that_cannot_be_written_is_not_the_end_of_the_log(
    lineage: Lineage, tmp_path: Path
) -> None:
    put(lineage, "1", 0, FILE)
    with pytest.raises(RecoveryError) as failed:
        fetch(lineage, DIALECT, "1-0", tmp_path / "absent" / "x", log_file_bytes=FILE)
    assert not isinstance(failed.value, LogNotInArchive)
