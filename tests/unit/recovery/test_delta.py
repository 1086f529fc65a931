"""Restores over a data directory that is there: what stays, goes and is refused; kills at every step."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from tests.unit.repository.samples import (
    BLOCK,
    LINEAGE,
    draft_manifest,
    lineage_on,
    noise,
    open_writer,
    store_files,
)

from cloudsave.errors import TargetDirectoryInUse
from cloudsave.model.engine_facts import DirectoryFacts, PresentLog
from cloudsave.model.item import Item, ItemKind
from cloudsave.model.manifest import Manifest
from cloudsave.recovery import delta as delta_module
from cloudsave.recovery import restore as restore_module
from cloudsave.recovery.delta import DeltaOptions
from cloudsave.recovery.journal import JOURNAL_FILES, Journal
from cloudsave.recovery.restore import RestoreRequest, finish_restore, look_ahead, restore_files
from cloudsave.repository.lineage import Lineage
from cloudsave.repository.reader import BackupReader
from cloudsave.store.memory import MemoryStore

FILES = {
    "PG_VERSION": b"18\n",
    "backup_label": b"START WAL LOCATION\n",
    "base/5/1": noise(1, 9 * BLOCK) + bytes(4 * BLOCK) + noise(2, BLOCK + 5),
    "base/5/2": noise(3, BLOCK),
    "base/5/empty": b"",
    "global/pg_control": noise(4, BLOCK),
    "global/1262": noise(5, BLOCK),
    "tablespace_map": b"16385 /old\n",
}
DIRECTORIES = ("base", "base/5", "global", "pg_wal", "pg_wal/archive_status")
SPACE_FILE = "pg_tblspc/16385/PG_18_1/5/7"


class Killed(BaseException):
    """The process is gone."""


@dataclass
class FakeInspector:
    """Believes what it is told of the lineage and of servers."""

    lineage: str = LINEAGE
    in_use: str = ""
    users: str = ""
    inspected: int = 0
    used_from: int = 1 << 30
    """A server has started by then."""

    def inspect(self, directory: Path) -> DirectoryFacts | None:
        if not (directory / "PG_VERSION").exists():
            return None
        self.inspected += 1
        links = directory / "pg_tblspc"
        log = directory / "pg_wal"
        return DirectoryFacts(
            self.lineage if (directory / "global/pg_control").exists() else "",
            "a server has started" if self.inspected >= self.used_from else self.in_use,
            {one.name: one.readlink() for one in links.iterdir()} if links.exists() else {},
            log.resolve(),
            tuple(
                PresentLog(one, "00000001", 0, 1)
                for one in sorted(log.resolve().iterdir())
                if one.name.startswith("0000")
            )
            if log.exists()
            else (),
        )

    def users_of(self, places: Sequence[Path]) -> str:
        return self.users

    def end_server(self, directory: Path) -> None:
        raise AssertionError("a server was ended")


@dataclass
class Site:
    """A backup in memory and places on disk."""

    lineage: Lineage
    manifest: Manifest
    root: Path

    def request(
        self, directory: Path, inspector: FakeInspector | None = None, **more: object
    ) -> RestoreRequest:
        """A delta restore by the user who runs the tests; log of an even number is stored."""
        options = DeltaOptions(inspector or FakeInspector(), lambda one: int(one.path.name, 16) % 2 == 0)
        owner = "root" if os.geteuid() == 0 else None
        space = {"16385": str(directory.with_name(directory.name + "-space"))}
        given = {"delta": options, "owner": owner, "workers": 1, "tablespaces": space, **more}
        return RestoreRequest(directory, **given)  # type: ignore[arg-type]

    def reader(self) -> BackupReader:
        return BackupReader(self.lineage, self.manifest)

    def fresh(self, name: str) -> Path:
        """A finished restore."""
        directory = self.root / name
        restore_files(self.reader(), self.request(directory, delta=None))
        finish_restore(directory)
        return directory

    def over(self, directory: Path, inspector: FakeInspector | None = None, **more: object) -> object:
        """A delta restore, finished."""
        done = restore_files(self.reader(), self.request(directory, inspector, **more))
        finish_restore(directory)
        return done


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """A backup with a tablespace."""
    lineage = lineage_on(MemoryStore())
    writer = open_writer(lineage, "20260101T000000Z-0001")
    try:
        writer.open()
        items = [Item(path, ItemKind.DIRECTORY, 0o700) for path in (*DIRECTORIES, "pg_tblspc/16385/PG_18_1")]
        link = Item("pg_tblspc/16385", ItemKind.LINK, 0o777, link_target="/old")
        store_files(writer, {**FILES, SPACE_FILE: noise(6, 3 * BLOCK)}, [*items, link])
        writer.settle()
        writer.drain()
        draft = replace(draft_manifest("20260101T000000Z-0001"), tablespaces={"16385": "/old"})
        manifest = writer.commit(draft)
    finally:
        writer.abort()
    return Site(lineage, manifest, tmp_path)


def tree(directory: Path) -> dict[str, object]:
    """Everything below a directory and its tablespace but the journal: kind, mode and content."""
    found: dict[str, object] = {}
    for root in (directory, directory.with_name(directory.name + "-space")):
        for path in sorted(root.rglob("*")):
            name = f"{root.name[len(directory.name) :]}/{path.relative_to(root)}"
            if path.name in {*JOURNAL_FILES, "lost+found"}:
                continue
            if path.is_symlink():
                found[name] = "link"
            elif path.is_dir():
                found[name] = ("directory", path.stat().st_mode)
            else:
                found[name] = (path.stat().st_mode, path.read_bytes())
    return found


def spoil(directory: Path, seed: int = 1) -> None:
    """All that can have happened to a directory."""
    chance = random.Random(seed)
    one = bytearray((directory / "base/5/1").read_bytes())
    one[2 * BLOCK + 9] ^= 1
    one[10 * BLOCK : 11 * BLOCK] = chance.randbytes(BLOCK)
    (directory / "base/5/1").write_bytes(one + chance.randbytes(100))
    (directory / "base/5/2").write_bytes(b"")
    (directory / "base/5/empty").write_bytes(b"not any more")
    (directory / "base/5/2").chmod(0o644)
    (directory / "global/1262").unlink()
    (directory / "global/1262").mkdir()
    (directory / "global/1262/file").write_bytes(b"x")
    (directory / "base/6").mkdir()
    (directory / "base/6/1").write_bytes(b"a database that was made later")
    (directory / "base/5/link").symlink_to("/etc/passwd")
    (directory / "recovery.signal").touch()
    (directory / "lost+found").mkdir(exist_ok=True)
    (directory / "tablespace_map").write_bytes(b"16385 /old\n")
    (directory.with_name(directory.name + "-space") / "PG_18_1/5/7").write_bytes(b"wrong")
    (directory.with_name(directory.name + "-space") / "PG_18_1/5/8").write_bytes(b"extra")


def test_a_spoilt_directory_becomes_what_a_fresh_restore_makes(site: Site) -> None:
    wanted = tree(site.fresh("fresh"))
    spoilt = site.fresh("spoilt")
    spoil(spoilt)
    assert tree(spoilt) != wanted
    plan = look_ahead(site.manifest, site.request(spoilt))
    assert plan is not None
    assert {str(one.relative_to(site.root)) for one in plan.removed} == {
        "spoilt/base/6",
        "spoilt/base/5/link",
        "spoilt/global/1262",
        "spoilt/recovery.signal",
        "spoilt/tablespace_map",
        "spoilt-space/PG_18_1/5/8",
    }
    site.over(spoilt)
    assert tree(spoilt) == wanted
    assert (spoilt / "lost+found").is_dir()
    assert Path("/etc/passwd").exists()


def test_what_is_right_is_kept(site: Site) -> None:
    place = site.fresh("place")
    done = restore_files(site.reader(), site.request(place))
    assert done.bytes_written == BLOCK, "but for the control file something was written"
    assert done.bytes_kept >= 14 * BLOCK
    finish_restore(place)
    spoil(place)
    done = restore_files(site.reader(), site.request(place))
    assert 0 < done.bytes_written < 10 * BLOCK
    assert done.removed == 6


def test_into_an_empty_place_it_is_a_fresh_restore(site: Site) -> None:
    wanted = tree(site.fresh("fresh"))
    assert look_ahead(site.manifest, site.request(site.root / "absent")) is None
    site.over(site.root / "absent")
    (site.root / "empty").mkdir(mode=0o700)
    site.over(site.root / "empty")
    assert tree(site.root / "absent") == tree(site.root / "empty") == wanted


def count_calls(monkeypatch: pytest.MonkeyPatch, kill_at: int) -> list[str]:
    """Let each step that changes the disk be counted, and the one numbered `kill_at` not happen."""
    steps: list[str] = []

    def counted(name: str, real: Callable[..., object]) -> Callable[..., object]:
        def step(*given: object, **more: object) -> object:
            if str(given[0]).startswith("/proc"):
                return real(*given, **more)
            steps.append(name)
            if len(steps) > kill_at:
                raise Killed
            return real(*given, **more)

        return step

    monkeypatch.setattr(Journal, "_write", counted("journal", Journal._write))
    monkeypatch.setattr(Path, "replace", counted("replace", Path.replace))
    monkeypatch.setattr(Path, "unlink", counted("unlink", Path.unlink))
    monkeypatch.setattr(Path, "rename", counted("rename", Path.rename))
    monkeypatch.setattr(Path, "mkdir", counted("mkdir", Path.mkdir))
    monkeypatch.setattr(shutil, "rmtree", counted("rmtree", shutil.rmtree))
    monkeypatch.setattr(os, "ftruncate", counted("ftruncate", os.ftruncate))
    monkeypatch.setattr(os, "pwrite", counted("pwrite", os.pwrite))
    monkeypatch.setattr(os, "replace", counted("replace", os.replace))
    monkeypatch.setattr(delta_module, "sync_directory", counted("sync", delta_module.sync_directory))
    monkeypatch.setattr(
        restore_module, "sync_file_systems", counted("sync", restore_module.sync_file_systems)
    )
    return steps


def test_killed_at_any_step_and_run_again_it_is_right(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = tree(site.fresh("fresh"))
    kill_at, seen = 0, set()
    while True:
        place = site.fresh(f"place-{kill_at}")
        spoil(place)
        (place / "pg_wal/000000010000000000000001").write_bytes(b"log that is stored nowhere")
        before = tree(place)
        with monkeypatch.context() as patched:
            steps = count_calls(patched, kill_at)
            try:
                restore_files(site.reader(), site.request(place))
            except Killed:
                pass
            else:
                break
        seen.add(steps[-1])
        if (place / "global/pg_control").exists():
            assert tree(place) in (before, wanted), "a server could start on a mixture"
        restore_files(site.reader(), site.request(place))
        finish_restore(place)
        assert tree(place) == wanted, (kill_at, steps[-3:])
        (kept,) = (site.root / f"place-{kill_at}.log-set-aside").iterdir()
        assert kept.read_bytes() == b"log that is stored nowhere"
        kill_at += 1
    assert kill_at > 20
    assert {"journal", "replace", "unlink", "rename", "rmtree", "ftruncate", "pwrite", "sync"} <= seen


def test_while_it_is_under_way_no_server_could_start(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    place = site.fresh("place")
    spoil(place)

    def killed(*given: object, **more: object) -> None:
        assert not (place / "global/pg_control").exists()
        raise Killed

    monkeypatch.setattr(restore_module, "clear_the_way", killed)
    with pytest.raises(Killed):
        restore_files(site.reader(), site.request(place))
    with pytest.raises(TargetDirectoryInUse, match="unfinished delta"):
        restore_files(site.reader(), site.request(place, delta=None))


def test_log_that_is_stored_nowhere_is_set_aside(site: Site) -> None:
    place = site.fresh("place")
    for round_number in (1, 2):
        (place / "pg_wal/000000010000000000000001").write_bytes(b"precious")
        (place / "pg_wal/000000010000000000000002").write_bytes(b"stored")
        (place / "pg_wal/000000010000000000000003").write_bytes(b"precious %d" % round_number)
        done = restore_files(site.reader(), site.request(place))
        finish_restore(place)
        assert done.set_aside == site.root / "place.log-set-aside"
        assert not list((place / "pg_wal").glob("0*"))
    aside = {one.name: one.read_bytes() for one in (site.root / "place.log-set-aside").iterdir()}
    assert aside == {
        "000000010000000000000001": b"precious",
        "000000010000000000000003": b"precious 1",
        "000000010000000000000003.1": b"precious 2",
    }


def test_a_log_directory_elsewhere_stays_there(site: Site) -> None:
    wanted = tree(site.fresh("fresh"))
    place = site.fresh("place")
    (place / "pg_wal").rename(site.root / "log")
    (place / "pg_wal").symlink_to(site.root / "log")
    (site.root / "log/000000010000000000000001").write_bytes(b"precious")
    (site.root / "log/000000010000000000000002").write_bytes(b"stored")
    site.over(place)
    assert (place / "pg_wal").is_symlink()
    assert [one.name for one in (site.root / "log").iterdir()] == ["archive_status"]
    assert (site.root / "place.log-set-aside/000000010000000000000001").read_bytes() == b"precious"
    (place / "pg_wal").unlink()
    (site.root / "log").rename(place / "pg_wal")
    assert tree(place) == wanted


def test_a_file_that_another_copy_shares_is_not_changed_there(site: Site) -> None:
    wanted = tree(site.fresh("fresh"))
    place = site.fresh("place")
    spoil(place)
    before = (place / "base/5/1").read_bytes()
    os.link(place / "base/5/1", site.root / "other-copy")
    site.over(place)
    assert tree(place) == wanted
    assert (site.root / "other-copy").read_bytes() == before


def test_names_of_other_versions_in_a_tablespace_stay(site: Site) -> None:
    place = site.fresh("place")
    other = site.root / "place-space/PG_17_1/5/7"
    other.parent.mkdir(parents=True)
    other.write_bytes(b"of the server before the upgrade")
    site.over(place)
    assert other.read_bytes() == b"of the server before the upgrade"


def test_a_tablespace_stays_where_the_directory_has_it(site: Site) -> None:
    place = site.fresh("place")
    done = restore_files(site.reader(), site.request(place, tablespaces={}))
    assert done.tablespaces == {"16385": str(site.root / "place-space")}
    finish_restore(place)
    (site.root / "precious").mkdir()
    (site.root / "precious/file").write_bytes(b"x")
    moved = {"16385": str(site.root / "precious")}
    with pytest.raises(TargetDirectoryInUse, match="tablespace"):
        restore_files(site.reader(), site.request(place, tablespaces=moved))
    moved = {"16385": str(site.root / "vacant")}
    restore_files(site.reader(), site.request(place, tablespaces=moved))
    assert (site.root / "vacant/PG_18_1/5/7").read_bytes() == noise(6, 3 * BLOCK)
    assert (place / "pg_tblspc/16385").readlink() == site.root / "vacant"


REFUSED: list[tuple[FakeInspector, str]] = [
    (FakeInspector(lineage="postgresql-2"), "another database system"),
    (FakeInspector(lineage=""), "whose data directory"),
    (FakeInspector(in_use="There is a postmaster.pid in it."), "server may be running"),
    (FakeInspector(users="Process 7 uses it."), "server may be running"),
]


@pytest.mark.parametrize(("inspector", "text"), REFUSED, ids=[text for _, text in REFUSED[:3]] + ["users"])
def test_what_is_refused_is_not_touched(site: Site, inspector: FakeInspector, text: str) -> None:
    place = site.fresh("place")
    spoil(place)
    before = tree(place)
    for attempt in (restore_files, lambda reader, request: look_ahead(reader.manifest, request)):
        with pytest.raises(TargetDirectoryInUse, match=text):
            attempt(site.reader(), site.request(place, inspector))
    assert tree(place) == before
    assert not JOURNAL_FILES & set(os.listdir(place))


def test_a_directory_that_is_no_data_directory_is_refused(site: Site) -> None:
    place = site.root / "home"
    place.mkdir()
    (place / "letter").write_text("precious")
    with pytest.raises(TargetDirectoryInUse, match="not a data directory"):
        restore_files(site.reader(), site.request(place))
    assert os.listdir(place) == ["letter"]


def test_a_server_that_starts_in_the_last_moment_keeps_its_files(site: Site) -> None:
    place = site.fresh("place")
    spoil(place)
    before = tree(place)
    with pytest.raises(TargetDirectoryInUse, match="server may be running"):
        restore_files(site.reader(), site.request(place, FakeInspector(used_from=3)))
    assert tree(place) == before
    assert not JOURNAL_FILES & set(os.listdir(place))


def test_an_unfinished_restore_of_the_same_system_serves(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = tree(site.fresh("fresh"))
    place = site.root / "place"

    def killed(*given: object) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(restore_module, "sync_file_systems", killed)
        with pytest.raises(Killed):
            restore_files(site.reader(), site.request(place, delta=None))
    assert not (place / "global/pg_control").exists()
    other = Site(site.lineage, replace(site.manifest, backup_id="20260102T000000Z-0001"), site.root)
    with pytest.raises(TargetDirectoryInUse, match="another unfinished"):
        restore_files(other.reader(), other.request(place, delta=None))
    foreign = replace(site.manifest, lineage="postgresql-2")
    with pytest.raises(TargetDirectoryInUse, match="another database system"):
        restore_files(BackupReader(site.lineage, foreign), site.request(place))
    done = restore_files(other.reader(), other.request(place))
    assert done.resumed
    assert done.bytes_written == BLOCK
    assert tree(place) == wanted


def test_complete_files_are_left_to_their_server_or_begun_anew(site: Site) -> None:
    place = site.root / "place"
    restore_files(site.reader(), site.request(place, recovery_digest="target one"))
    (place / "base/5/2").write_bytes(b"changed by the server")
    restore_files(site.reader(), site.request(place, recovery_digest="target one"))
    assert (place / "base/5/2").read_bytes() == b"changed by the server"
    restore_files(site.reader(), site.request(place, recovery_digest="target two"))
    assert (place / "base/5/2").read_bytes() == FILES["base/5/2"]
