"""Restoring files: vacancy, paths, modes, and kills at every write."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

import pytest

from cloudsave.errors import IntegrityError, LockError, NotEnoughSpace, TargetDirectoryInUse, UsageError
from cloudsave.model.item import ItemKind
from cloudsave.model.manifest import BackupStatistics, FileEntry, Manifest
from cloudsave.model.position import Position
from cloudsave.recovery import journal as journal_module
from cloudsave.recovery.journal import JOURNAL_NAME, PACKS_NAME, Journal
from cloudsave.recovery.layout import plan_layout
from cloudsave.recovery.restore import RestoreRequest, finish_restore, restore_files
from cloudsave.repository.comparison import PresentFiles, StaleBlocks

BLOCK = 8192


class Killed(BaseException):
    """The process is gone."""


def manifest_of(files: tuple[FileEntry, ...], *, tablespaces: dict[str, str] | None = None) -> Manifest:
    """A manifest with these files."""
    return Manifest(
        backup_id="20261124T000000Z-0000",
        lineage="postgresql-1",
        source="db",
        engine="postgresql",
        server_version="15.18",
        kind="full",
        parent="",
        method="local",
        tool_version="0",
        started_us=1,
        finished_us=2,
        start=Position("00000001", 0),
        stop=Position("00000001", 1),
        log_file_bytes=1 << 20,
        page_bytes=BLOCK,
        page_checksums=True,
        tablespaces=tablespaces or {},
        settings={},
        packs=("p0", "p1", "p2"),
        maps=(),
        files=files,
        corrupt_pages=(),
        statistics=BackupStatistics(),
    )


class FakeFiles:
    """A backup in memory: each block of 8 KiB belongs to one of three packs."""

    def __init__(self, contents: dict[str, bytes], *, tablespaces: dict[str, str] | None = None) -> None:
        self.contents = contents
        outside = {path for path in contents if path.startswith("/")}
        entries = [
            FileEntry(path, ItemKind.FILE, 0o600, len(data), outside=path in outside)
            for path, data in contents.items()
        ]
        entries.append(FileEntry("pg_wal", ItemKind.DIRECTORY, 0o700))
        self.manifest = manifest_of(tuple(entries), tablespaces=tablespaces)
        self.writes_left: int | None = None
        self.fetched: list[str] = []
        self._lock = threading.Lock()

    def read_all(
        self,
        write: Callable[[int, int, memoryview], None],
        *,
        workers: int,
        skip_packs: Collection[str],
        stale: StaleBlocks | None,
        pack_done: Callable[[str], None],
        advance: Callable[[int], None],
    ) -> None:
        for number, pack in enumerate(self.manifest.packs):
            if pack in skip_packs:
                continue
            self.fetched.append(pack)
            for index, entry in enumerate(self.manifest.files):
                data = self.contents.get(entry.path, b"")
                for offset in range(0, len(data), BLOCK):
                    part = data[offset : offset + BLOCK]
                    if (index + offset // BLOCK) % 3 == number and part.strip(b"\0"):
                        self._tick()
                        write(index, offset, memoryview(part))
                        advance(len(part))
            self._tick()
            pack_done(pack)

    def compare(self, present: PresentFiles, *, workers: int, advance: Callable[[int], None]) -> StaleBlocks:
        raise AssertionError("nothing is there to be compared")

    def _tick(self) -> None:
        if self.writes_left is not None:
            if self.writes_left == 0:
                raise Killed
            self.writes_left -= 1

    def read_file(self, file_index: int) -> bytes:
        return self.contents[self.manifest.files[file_index].path]


def some_files() -> dict[str, bytes]:
    """A small data directory with holes of zeros and configuration outside."""
    return {
        "base/1/1259": os.urandom(BLOCK) + bytes(BLOCK) + os.urandom(3 * BLOCK),
        "base/1/empty": b"",
        "base/1/zeros": bytes(2 * BLOCK),
        "global/pg_control": os.urandom(BLOCK),
        "PG_VERSION": b"15\n",
        "backup_label": b"START WAL LOCATION\n",
        "tablespace_map": b"16385 /old\n",
        "/etc/postgresql/15/main/postgresql.conf": b"port = 5432\n",
    }


def assert_restored(directory: Path, contents: dict[str, bytes]) -> None:
    """Every file is there with its content, and nothing else but the journal."""
    for path, data in contents.items():
        if path == "tablespace_map":
            assert not (directory / path).exists()
        elif path.startswith("/"):
            assert (directory.with_name(directory.name + ".config") / path[1:]).read_bytes() == data
        else:
            assert (directory / path).read_bytes() == data
    there = {str(one.relative_to(directory)) for one in directory.rglob("*") if one.is_file()}
    assert there - {JOURNAL_NAME, PACKS_NAME} == {
        one for one in contents if not one.startswith("/") and one != "tablespace_map"
    }


def request_for(directory: Path, **more: object) -> RestoreRequest:
    """A request of the user who runs the tests."""
    owner = "root" if os.geteuid() == 0 else None
    return RestoreRequest(directory, owner=owner, workers=1, **more)  # type: ignore[arg-type]


def test_a_restore_brings_every_file_with_its_mode(tmp_path: Path) -> None:
    files = FakeFiles(some_files())
    done = restore_files(files, request_for(tmp_path / "new"))
    assert_restored(tmp_path / "new", files.contents)
    assert done.config_directory == tmp_path / "new.config"
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "new/base/1/1259").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "new/pg_wal").stat().st_mode & 0o777 == 0o700
    finish_restore(tmp_path / "new")
    assert not (tmp_path / "new" / JOURNAL_NAME).exists()
    with pytest.raises(TargetDirectoryInUse):
        restore_files(files, request_for(tmp_path / "new"))


def test_zero_blocks_are_left_sparse(tmp_path: Path) -> None:
    restore_files(FakeFiles({"zeros": bytes(1 << 20)}), request_for(tmp_path / "new"))
    found = (tmp_path / "new/zeros").stat()
    assert found.st_size == 1 << 20
    assert found.st_blocks * 512 < 1 << 16


@pytest.mark.parametrize("kill_at", range(14))
def test_a_killed_restore_goes_on(tmp_path: Path, kill_at: int) -> None:
    files = FakeFiles(some_files())
    files.writes_left = kill_at
    try:
        restore_files(files, request_for(tmp_path / "new"))
    except Killed:
        assert not (tmp_path / "new/global/pg_control").exists(), "a server could start on a part"
    files.writes_left = None
    files.fetched.clear()
    done = restore_files(files, request_for(tmp_path / "new"))
    assert done.resumed
    assert_restored(tmp_path / "new", files.contents)
    assert len(files.fetched) < 3 or kill_at < 6


@pytest.mark.parametrize("name", ["base", "base/1", "pg_wal", "."])
def test_a_directory_that_a_kill_left_half_made_is_put_right(tmp_path: Path, name: str) -> None:
    """Made, and neither private nor the owner's yet."""
    files = FakeFiles(some_files())
    files.writes_left = 0
    with pytest.raises(Killed):
        restore_files(files, request_for(tmp_path / "new"))
    (tmp_path / "new" / name).chmod(0o755)
    files.writes_left = None
    restore_files(files, request_for(tmp_path / "new"))
    assert (tmp_path / "new" / name).stat().st_mode & 0o777 == 0o700


def test_kills_did_happen_and_packs_were_skipped(tmp_path: Path) -> None:
    files = FakeFiles(some_files())
    files.writes_left = 6
    with pytest.raises(Killed):
        restore_files(files, request_for(tmp_path / "new"))
    files.writes_left = None
    files.fetched.clear()
    restore_files(files, request_for(tmp_path / "new"))
    assert files.fetched in (["p1", "p2"], ["p2"])


def test_after_a_reboot_every_pack_is_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = FakeFiles(some_files())
    files.writes_left = 6
    with pytest.raises(Killed):
        restore_files(files, request_for(tmp_path / "new"))
    files.writes_left = None
    files.fetched.clear()
    (tmp_path / "boot_id").write_text("another run of the machine\n")
    monkeypatch.setattr(journal_module, "_BOOT_ID", tmp_path / "boot_id")
    restore_files(files, request_for(tmp_path / "new"))
    assert files.fetched == ["p0", "p1", "p2"]
    assert_restored(tmp_path / "new", files.contents)


def test_a_torn_line_of_the_pack_journal_is_not_believed(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        journal.begin("digest")
        journal.pack_done("p0")
    with (tmp_path / PACKS_NAME).open("a") as file:
        file.write("p1")
    with Journal(tmp_path) as journal:
        assert journal.begin("digest") == {"p0"}


def test_another_backup_may_not_go_on_in_the_directory(tmp_path: Path) -> None:
    files = FakeFiles(some_files())
    files.writes_left = 3
    with pytest.raises(Killed):
        restore_files(files, request_for(tmp_path / "new"))
    other = FakeFiles(some_files())
    other.manifest = replace(other.manifest, backup_id="20261125T000000Z-0000")
    with pytest.raises(TargetDirectoryInUse, match="another unfinished restore"):
        restore_files(other, request_for(tmp_path / "new"))


def test_complete_files_are_not_written_again_and_serve_only_their_target(tmp_path: Path) -> None:
    files = FakeFiles(some_files())
    restore_files(files, request_for(tmp_path / "new", recovery_digest="target one"))
    (tmp_path / "new/base/1/1259").write_bytes(b"changed by the server")
    restore_files(files, request_for(tmp_path / "new", recovery_digest="target one"))
    assert (tmp_path / "new/base/1/1259").read_bytes() == b"changed by the server"
    with pytest.raises(TargetDirectoryInUse, match="another target"):
        restore_files(files, request_for(tmp_path / "new", recovery_digest="target two"))


@pytest.mark.parametrize("name", ["file", ".hidden", "lost+found"])
def test_a_foreign_directory_is_never_touched(tmp_path: Path, name: str) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / name).write_text("precious")
    with pytest.raises(TargetDirectoryInUse):
        restore_files(FakeFiles(some_files()), request_for(tmp_path / "new"))
    assert [one.name for one in (tmp_path / "new").iterdir()] == [name]


def test_two_restores_do_not_share_a_directory(tmp_path: Path) -> None:
    with Journal(tmp_path), pytest.raises(LockError):
        Journal(tmp_path)


@pytest.mark.parametrize(
    "path", ["../evil", "a/../../evil", "/etc/passwd", "a//b", "./a", "", "a/./b", "a\0b"]
)
def test_paths_that_lead_outside_are_refused_before_anything_is_written(tmp_path: Path, path: str) -> None:
    files = FakeFiles(some_files())
    bad = FileEntry(path, ItemKind.FILE, 0o600, 10)
    files.manifest = replace(files.manifest, files=(*files.manifest.files, bad))
    with pytest.raises(IntegrityError):
        restore_files(files, request_for(tmp_path / "new"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", ["/etc/../../evil", "//etc/x", "/"])
def test_outside_files_stay_below_the_configuration_directory(tmp_path: Path, path: str) -> None:
    files = FakeFiles(some_files())
    bad = FileEntry(path, ItemKind.FILE, 0o600, 10, outside=True)
    files.manifest = replace(files.manifest, files=(bad,))
    with pytest.raises(IntegrityError):
        restore_files(files, request_for(tmp_path / "new"))


def test_links_other_than_to_tablespaces_are_refused(tmp_path: Path) -> None:
    files = FakeFiles({})
    link = FileEntry("base/1", ItemKind.LINK, 0o777, link_target="/etc")
    files.manifest = replace(files.manifest, files=(link,))
    with pytest.raises(IntegrityError, match="link"):
        restore_files(files, request_for(tmp_path / "new"))


def test_tablespaces_go_where_they_are_mapped(tmp_path: Path) -> None:
    old = tmp_path / "old_space"
    old.mkdir()
    (old / "production").write_text("precious")
    contents = {"pg_tblspc/16385/PG_15/5/100": os.urandom(BLOCK), "PG_VERSION": b"15\n"}
    files = FakeFiles(contents, tablespaces={"16385": str(old)})
    with pytest.raises(TargetDirectoryInUse, match="tablespace 16385") as caught:
        restore_files(files, request_for(tmp_path / "new"))
    assert any("--tablespace 16385=" in hint for hint in caught.value.hints)
    assert not (tmp_path / "new").exists()
    for key in ("16385", str(old)):
        directory = tmp_path / f"new-{len(key)}"
        space = tmp_path / f"space-{len(key)}"
        restore_files(files, request_for(directory, tablespaces={key: str(space)}))
        assert (directory / "pg_tblspc/16385").readlink() == space
        assert (space / "PG_15/5/100").read_bytes() == contents["pg_tblspc/16385/PG_15/5/100"]
    assert (old / "production").read_text() == "precious"


def test_an_unknown_or_overlapping_tablespace_is_a_usage_error(tmp_path: Path) -> None:
    files = FakeFiles({}, tablespaces={"16385": "/old"})
    with pytest.raises(UsageError, match="no tablespace '7'"):
        plan_layout(files.manifest, tmp_path / "new", {"7": "/x"})
    with pytest.raises(UsageError, match="overlap"):
        plan_layout(files.manifest, tmp_path / "new", {"16385": str(tmp_path / "new/inside")})


def test_too_little_space_is_told_before_anything_is_written(tmp_path: Path) -> None:
    files = FakeFiles({})
    huge = FileEntry("base/1/1", ItemKind.FILE, 0o600, 1 << 60)
    files.manifest = replace(files.manifest, files=(huge,))
    with pytest.raises(NotEnoughSpace):
        restore_files(files, request_for(tmp_path / "new"))
    assert list(tmp_path.iterdir()) == []
