"""The directory store: kills, full disks, missing rights, names that try to leave, lack of links."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloudsave.clock import SYSTEM_CLOCK
from cloudsave.errors import (
    IntegrityError,
    ObjectExists,
    ObjectMissing,
    StoreError,
    StoreFull,
    StorePermission,
    StoreUnfit,
)
from cloudsave.store.api import OBJECT_BYTES_MAX
from cloudsave.store.memory import MemoryStore
from cloudsave.store.posix import TEMP_AGE_MAX, TEMP_DIRECTORY, PosixStore
from cloudsave.store.posix_calls import place_by_link, place_by_rename, write_all
from tests.fake_clock import FakeClock
from tests.unit.store.put_until_killed import KILLED_AT_PUT, content_of

NOBODY = 65_534
WAIT_SECONDS_MAX = 60.0


def _start(root: Path, seed: str, mode: str) -> subprocess.Popen[str]:
    repository = Path(__file__).parents[3]
    return subprocess.Popen(
        [sys.executable, "-m", "tests.unit.store.put_until_killed", str(root), seed, mode],
        stdout=subprocess.PIPE,
        text=True,
        cwd=repository,
        env={**os.environ, "PYTHONPATH": f"{repository / 'src'}{os.pathsep}{repository}"},
    )


def _kill_after(process: subprocess.Popen[str], lines: int) -> list[str]:
    """Kill the process when it has said so many lines; all names that it acknowledged until it died."""
    assert process.stdout is not None
    said = [process.stdout.readline() for _ in range(lines)]
    process.kill()
    said.extend(process.stdout.read().splitlines(keepends=True))
    process.stdout.close()
    assert process.wait(WAIT_SECONDS_MAX) == -signal.SIGKILL
    return [line.strip() for line in said if line.endswith("\n") and "/" in line]


def _damaged(store: PosixStore) -> list[str]:
    return [info.name for info in store.list("") if store.get(info.name) != content_of(info.name)]


def _temp_files(root: Path) -> list[str]:
    return os.listdir(root / TEMP_DIRECTORY)


# ---- kills -----------------------------------------------------------------------------------------------


def test_killed_at_any_moment_every_visible_object_is_whole_and_none_acknowledged_is_missing(
    tmp_path: Path,
) -> None:
    acknowledged: list[str] = []
    for round_number in range(10):
        process = _start(tmp_path, f"seed{round_number}", "store")
        acknowledged += _kill_after(process, lines=1 + 3 * round_number)

    store = PosixStore(tmp_path)

    assert len(acknowledged) > 30
    assert _damaged(store) == []
    assert set(acknowledged) <= {info.name for info in store.list("")}


def test_the_kill_test_finds_a_store_that_writes_in_place(tmp_path: Path) -> None:
    _kill_after(_start(tmp_path, "seed", "in place"), lines=4)

    assert _damaged(PosixStore(tmp_path)) != []


@pytest.mark.parametrize(
    ("mode", "visible"), [("before link", KILLED_AT_PUT - 1), ("after link", KILLED_AT_PUT)]
)
def test_killed_around_the_link_the_object_is_absent_or_whole(
    tmp_path: Path, mode: str, visible: int
) -> None:
    process = _start(tmp_path, "seed", mode)
    assert process.stdout is not None
    process.stdout.read()
    process.stdout.close()
    assert process.wait(WAIT_SECONDS_MAX) == -signal.SIGKILL

    store = PosixStore(tmp_path)

    assert len(list(store.list(""))) == visible
    assert _damaged(store) == []
    assert len(_temp_files(tmp_path)) == 1


def test_a_temporary_file_that_was_linked_is_swept_at_once_and_its_object_stays(tmp_path: Path) -> None:
    process = _start(tmp_path, "seed", "after link")
    assert process.stdout is not None
    process.stdout.read()
    process.stdout.close()
    process.wait(WAIT_SECONDS_MAX)

    store = PosixStore(tmp_path)
    store.put("later", [content_of("later")])

    assert _temp_files(tmp_path) == []
    assert len(list(store.list(""))) == KILLED_AT_PUT + 1
    assert _damaged(store) == []


def test_stale_temporary_files_are_swept_only_when_old(tmp_path: Path) -> None:
    clock = FakeClock(start_utc=SYSTEM_CLOCK.now())
    PosixStore(tmp_path, clock=clock).put("a", [b"x"])
    left = tmp_path / TEMP_DIRECTORY / "put-left-by-a-kill"
    left.write_bytes(b"half")

    PosixStore(tmp_path, clock=clock).put("b", [b"x"])
    assert left.exists()
    clock.advance(TEMP_AGE_MAX.total_seconds() + 60)
    PosixStore(tmp_path, clock=clock).put("c", [b"x"])

    assert not left.exists()
    assert [info.name for info in PosixStore(tmp_path).list("")] == ["a", "b", "c"]


def test_an_object_whose_name_could_not_be_synced_is_an_error_and_made_durable_by_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = PosixStore(tmp_path)
    store.put("a", [content_of("a")])
    real_fsync = os.fsync

    def broken_fsync(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", broken_fsync)
    with pytest.raises(StoreError) as caught:
        store.put("b", [content_of("b")])
    assert not caught.value.retryable
    assert len(_temp_files(tmp_path)) == 1
    monkeypatch.setattr(os, "fsync", real_fsync)

    PosixStore(tmp_path).put("c", [content_of("c")])

    assert _temp_files(tmp_path) == []
    assert _damaged(store) == []


# ---- full, refused ---------------------------------------------------------------------------------------


@pytest.fixture
def small_file_system(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    mount_point = tmp_path / "small"
    mount_point.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount_point)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        pytest.fail(f"a small file system needs the right to mount; run as root: {mounted.stderr.strip()}")
    try:
        yield mount_point
    finally:
        subprocess.run(["umount", "--lazy", str(mount_point)], check=True)


def test_full_disk_is_said_and_leaves_nothing_half_stored(small_file_system: Path) -> None:
    store = PosixStore(small_file_system)
    store.put("packs/1", [b"x" * 400_000])

    with pytest.raises(StoreFull) as caught:
        store.put("packs/2", [b"x" * 400_000, b"y" * 400_000])

    assert "ENOSPC" in caught.value.detail
    assert [info.name for info in store.list("")] == ["packs/1"]
    assert _temp_files(small_file_system) == []
    store.put("packs/3", [b"z" * 400_000])
    assert store.get("packs/1") == b"x" * 400_000


def test_file_size_limit_is_a_full_store_and_leaves_nothing_half_stored(tmp_path: Path) -> None:
    store = PosixStore(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(StoreFull):
            store.put("a", [b"x" * 60_000, b"y" * 60_000])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)

    assert list(store.list("")) == []
    assert _temp_files(tmp_path) == []
    store.put("a", [b"x" * 120_000])


@contextlib.contextmanager
def _unprivileged() -> Iterator[None]:
    """Root may write anywhere; act as nobody for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def test_missing_rights_are_said() -> None:
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory) / "root"
        PosixStore(root).put("a/b", [b"x"])
        os.chmod(directory, 0o755)
        os.chmod(root, 0o555)
        os.chmod(root / "a", 0o000)
        try:
            with _unprivileged():
                store = PosixStore(root)
                with pytest.raises(StorePermission) as caught:
                    store.put("new", [b"x"])
                with pytest.raises(StorePermission):
                    store.get("a/b")
                with pytest.raises(StorePermission):
                    list(store.list(""))
        finally:
            os.chmod(root / "a", 0o700)
            os.chmod(root, 0o700)
    assert caught.value.hints
    assert not caught.value.retryable


def test_objects_and_directories_are_private(tmp_path: Path) -> None:
    root = tmp_path / "new" / "root"
    PosixStore(root).put("a/b/c", [b"x"])

    for directory in (tmp_path / "new", root, root / "a", root / "a" / "b", root / TEMP_DIRECTORY):
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert stat.S_IMODE((root / "a/b/c").stat().st_mode) == 0o400
    assert (root / "a/b/c").stat().st_nlink == 1


def test_reading_creates_nothing(tmp_path: Path) -> None:
    store = PosixStore(tmp_path / "absent")

    assert list(store.list("")) == []
    with pytest.raises(ObjectMissing):
        store.get("a")
    store.delete("a")
    assert not (tmp_path / "absent").exists()


def test_a_root_that_is_replaced_does_not_receive_half_of_a_repository(tmp_path: Path) -> None:
    root = tmp_path / "mount"
    store = PosixStore(root)
    store.put("a", [b"x"])
    root.rename(tmp_path / "elsewhere")
    root.mkdir()

    store.put("b", [b"x"])

    assert list(root.iterdir()) == []
    assert (tmp_path / "elsewhere" / "b").exists()


# ---- placing ---------------------------------------------------------------------------------------------


def _failing(number: int) -> object:
    def place(source_dir: int, source: str, target_dir: int, target: str) -> None:
        raise OSError(number, os.strerror(number))

    return place


@pytest.mark.parametrize("place", [place_by_link, place_by_rename])
def test_placements_refuse_an_existing_name(tmp_path: Path, place) -> None:
    (tmp_path / "old").write_bytes(b"old")
    (tmp_path / "new").write_bytes(b"new")
    directory = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(FileExistsError):
            place(directory, "new", directory, "old")
        place(directory, "new", directory, "free")
    finally:
        os.close(directory)
    assert (tmp_path / "old").read_bytes() == b"old"
    assert (tmp_path / "free").read_bytes() == b"new"


@pytest.mark.parametrize(
    ("first", "second", "error"),
    [
        (errno.EPERM, errno.EINVAL, StoreUnfit),
        (errno.ENOTSUP, errno.ENOSYS, StoreUnfit),
        (errno.EPERM, errno.EPERM, StorePermission),
        (errno.EXDEV, errno.EINVAL, StoreUnfit),
        (errno.EDQUOT, errno.EINVAL, StoreFull),
        (errno.EIO, errno.EINVAL, StoreError),
    ],
)
def test_a_file_system_that_cannot_place_atomically_is_refused(
    tmp_path: Path, first: int, second: int, error: type[StoreError]
) -> None:
    store = PosixStore(tmp_path, placements=[_failing(first), _failing(second)])

    with pytest.raises(error) as caught:
        store.put("a", [b"x"])

    assert type(caught.value) is error
    assert list(store.list("")) == []
    assert _temp_files(tmp_path) == []


def test_an_object_cannot_take_the_name_of_a_directory_nor_lie_in_an_object(tmp_path: Path) -> None:
    store = PosixStore(tmp_path)
    store.put("a/b", [b"x"])

    for name in ("a", "a/b/c"):
        with pytest.raises(StoreError) as caught:
            store.put(name, [b"y"])
        assert not isinstance(caught.value, ObjectExists)
    assert [info.name for info in store.list("")] == ["a/b"]


# ---- names and ranges ------------------------------------------------------------------------------------

_COMPONENTS = st.text("ab.-_=0A", min_size=1, max_size=3).filter(lambda text: not text.startswith("."))
_NAMES = st.lists(_COMPONENTS, min_size=1, max_size=4).map("/".join)


@settings(max_examples=200, deadline=None)
@given(
    name=st.one_of(
        st.text(max_size=30), st.lists(st.sampled_from(["..", ".", "", "a", "/", "\0", "~"])).map("/".join)
    )
)
def test_no_name_leaves_the_root(name: str) -> None:
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory) / "above" / "root"
        store = PosixStore(root)
        with contextlib.suppress(StoreError):
            store.put(name, [b"x"])
        outside = [
            path for path in Path(directory).rglob("*") if path.is_file() and not path.is_relative_to(root)
        ]
        inside = [info.name for info in store.list("")]

    assert outside == []
    assert inside in ([], [name])


def test_a_link_in_the_store_is_not_followed_out_by_a_name_with_dots(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    store = PosixStore(tmp_path / "root")
    store.put("a/b", [b"x"])

    for name in ("../secret", "a/../../secret", str(tmp_path / "secret")):
        with pytest.raises(StoreError, match="cannot use object name"):
            store.get(name)
        with pytest.raises(StoreError, match="cannot use object name"):
            store.delete(name)
    assert (tmp_path / "secret").exists()


@settings(max_examples=60, deadline=None)
@given(names=st.lists(_NAMES, max_size=12, unique=True))
def test_listing_is_in_the_order_of_whole_names(names: list[str]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        store, model = PosixStore(Path(directory)), MemoryStore()
        for name in names:
            with contextlib.suppress(StoreError):
                store.put(name, [name.encode()])
                model.put(name, [name.encode()])
        prefixes = {"", *(name[: name.index("/") + 1] for name in names if "/" in name)}
        for prefix in prefixes:
            seen = [(info.name, info.size_bytes) for info in store.list(prefix)]
            assert seen == [(info.name, info.size_bytes) for info in model.list(prefix)]


def test_files_that_no_put_could_have_made_are_passed_over(tmp_path: Path) -> None:
    store = PosixStore(tmp_path)
    store.put("a", [b"x"])
    (tmp_path / "lost+found").mkdir()
    (tmp_path / ".nfs0001").write_bytes(b"x")
    os.mkfifo(tmp_path / "pipe")

    assert [info.name for info in store.list("")] == ["a"]
    with pytest.raises(ObjectMissing):
        store.get("pipe")


@settings(max_examples=100, deadline=None)
@given(
    parts=st.lists(st.binary(max_size=50), max_size=6),
    offset=st.integers(0, 200),
    length=st.integers(0, 200),
)
def test_a_range_is_exact_or_an_error(parts: list[bytes], offset: int, length: int) -> None:
    content = b"".join(parts)
    with tempfile.TemporaryDirectory() as directory:
        for store in (PosixStore(Path(directory)), MemoryStore()):
            store.put("a", parts)
            assert store.get("a") == content
            if offset + length <= len(content):
                assert (
                    bytes(store.get_range("a", offset=offset, length=length))
                    == content[offset : offset + length]
                )
            else:
                with pytest.raises(IntegrityError):
                    store.get_range("a", offset=offset, length=length)


def test_write_all_survives_short_writes() -> None:
    reader, writer = os.pipe()
    parts = [bytes([number % 256]) * (number % 700) for number in range(3_000)]
    received = bytearray()

    def drain() -> None:
        while chunk := os.read(reader, 1_000):
            received.extend(chunk)

    thread = threading.Thread(target=drain)
    thread.start()
    os.set_blocking(writer, True)
    write_all(writer, parts)
    os.close(writer)
    thread.join(WAIT_SECONDS_MAX)
    os.close(reader)

    assert bytes(received) == b"".join(parts)


def test_an_object_that_is_too_large_to_be_ours_is_not_read_into_memory(tmp_path: Path) -> None:
    store = PosixStore(tmp_path)
    store.put("a", [b"x"])
    (tmp_path / "a").chmod(0o600)
    os.truncate(tmp_path / "a", OBJECT_BYTES_MAX + 1)
    with pytest.raises(IntegrityError, match="too large"):
        store.get("a")
    assert bytes(store.get_range("a", offset=0, length=1)) == b"x"
