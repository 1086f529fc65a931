"""
Write the files of a backup into an empty directory: parallel, resumable, control file last.

Order, and what follows from it: (1) look whether the places are vacant and large enough; nothing is touched
before that. (2) journal, so that every later byte in the directory is known to be ours. (3) directories,
links and files at full length, sparse. (4) all packs. (5) everything to stable storage. (6) the control
file: until it is there no server starts. (7) the journal says "complete": from then on files are never
written again.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import pwd
import shutil
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from cloudsave.errors import NotEnoughSpace, RecoveryError, TargetDirectoryInUse, UsageError
from cloudsave.model.item import ItemKind
from cloudsave.model.manifest import FileEntry, Manifest
from cloudsave.recovery.journal import JOURNAL_NAME, LEFT_BEFORE_BEGIN, Journal, ReplayStop
from cloudsave.recovery.layout import CONTROL_FILES, REPLACED_FILES, Layout, check_vacant, plan_layout
from cloudsave.telemetry import NoProgress, Progress

WORKERS_MAX = 16
SPACE_RESERVE_BYTES = 64 << 20
"""Left free on each file system beyond the files themselves."""
DIRECT_BYTES_MIN = 64 << 10
"""Writes of at least this size go around the page cache: a third of the CPU, and production's cache stays."""
DIRECT_UNIT_BYTES = 4096
"""What such a write must be a multiple of, in memory, in the file and in length."""
DEFAULT_OWNER = "postgres"
NO_RECOVERY = "none"
_libc = ctypes.CDLL(None, use_errno=True)


class StoredFiles(Protocol):
    """What is asked of `repository.reader.BackupReader`."""

    manifest: Manifest

    def read_all(
        self,
        write: Callable[[int, int, memoryview], None],
        *,
        workers: int,
        skip_packs: Collection[str],
        pack_done: Callable[[str], None],
        advance: Callable[[int], None],
    ) -> None:
        """Hand out all stored stretches but those of `skip_packs`, from several threads."""

    def read_file(self, file_index: int) -> bytes:
        """One small file."""


@dataclass(frozen=True, slots=True)
class RestoreRequest:
    """Where and how to restore files."""

    directory: Path
    tablespaces: Mapping[str, str] = field(default_factory=dict)
    owner: str | None = None
    """User who is to own the files; None: the owner of the directory (or of the nearest one above it),
    or `postgres` where that is root."""
    workers: int = 0
    """Threads; 0: one more than processors."""
    recovery_digest: str = ""
    """Of the recovery that will follow; a directory whose files are complete is used for no other."""
    replay: ReplayStop | None = None
    """What that recovery is, so that it can be planned again."""


@dataclass(frozen=True, slots=True)
class RestoredFiles:
    """What was restored."""

    directory: Path
    config_directory: Path | None
    """Where configuration from outside the data directory was put; None: there was none."""
    tablespaces: Mapping[str, str]
    owner: str | None
    bytes_written: int
    """Bytes written by this run; fewer than the files have when it took up an earlier one."""
    resumed: bool
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Owner:
    """Whom files are given to."""

    name: str
    uid: int
    gid: int


def restore_files(
    reader: StoredFiles, request: RestoreRequest, *, progress: Progress | None = None
) -> RestoredFiles:
    """
    Restore all files. Run again after a kill, it goes on where it was.

    Raises: TargetDirectoryInUse, NotEnoughSpace, UsageError, IntegrityError, StoreError, LockError. The
    journal stays until `finish_restore`.
    """
    manifest = reader.manifest
    layout = plan_layout(manifest, request.directory, request.tablespaces)
    owner = choose_owner(request.owner, layout.directory)
    digest = files_digest(manifest, layout)
    resumed = _prepare(layout, manifest, digest, request.recovery_digest)
    with Journal(layout.directory) as journal:
        head = journal.head()
        run = _FileRestore(reader, layout, owner)
        if head is None or not head.recovery_digest:
            done = journal.begin(digest, manifest.backup_id)
            workers = request.workers or min(WORKERS_MAX, (os.cpu_count() or 1) + 1)
            with _full_disk_explained(layout):
                run.execute(journal, done, workers, progress or NoProgress())
            replay = request.replay or ReplayStop(manifest.backup_id)
            journal.files_complete(digest, request.recovery_digest or NO_RECOVERY, replay)
    has_config = any(entry.outside for entry in manifest.files)
    return RestoredFiles(
        directory=layout.directory,
        config_directory=layout.config_directory if has_config else None,
        tablespaces={oid: str(place) for oid, place in layout.tablespaces.items()},
        owner=owner.name if owner else None,
        bytes_written=run.bytes_written,
        resumed=resumed,
        notes=_notes(owner),
    )


def finish_restore(directory: Path) -> None:
    """The restored directory is in use: forget the journal."""
    with Journal(directory) as journal:
        journal.finish()


def files_digest(manifest: Manifest, layout: Layout) -> str:
    """What decides the content of the restored files."""
    places = sorted(f"{oid}={place}" for oid, place in layout.tablespaces.items())
    return hashlib.sha256("\0".join([manifest.lineage, manifest.backup_id, *places]).encode()).hexdigest()


def choose_owner(wanted: str | None, directory: Path) -> Owner | None:
    """Whom to give the files to; None: they stay with the user of this process. Raises: UsageError."""
    if os.geteuid() != 0:
        if wanted is not None and wanted != pwd.getpwuid(os.geteuid()).pw_name:
            raise UsageError(f"only root can give files to user {wanted!r}")
        return None
    if wanted is None:
        uid = _existing_parent(directory).stat().st_uid
        try:
            entry = pwd.getpwuid(uid) if uid else pwd.getpwnam(DEFAULT_OWNER)
        except KeyError:
            return None
    else:
        try:
            entry = pwd.getpwnam(wanted)
        except KeyError as error:
            raise UsageError(f"user {wanted!r} does not exist on this machine") from error
    return Owner(entry.pw_name, entry.pw_uid, entry.pw_gid)


def _notes(owner: Owner | None) -> tuple[str, ...]:
    if owner is None and os.geteuid() == 0:
        return ("the files belong to root, and database servers refuse to run as root: give --owner USER",)
    return ()


# ---- before anything is written ----


def _prepare(layout: Layout, manifest: Manifest, digest: str, recovery_digest: str) -> bool:
    """See that the places are ours to use, and make the directory; whether an earlier restore goes on."""
    directory = layout.directory
    if (directory / JOURNAL_NAME).exists():
        with Journal(directory) as journal:
            head = journal.head()
        if head is None or head.files_digest != digest:
            raise TargetDirectoryInUse(
                f"directory holds another unfinished restore: {directory}",
                hints=["run that one again to finish it, or remove the directory"],
            )
        if head.recovery_digest and head.recovery_digest != (recovery_digest or NO_RECOVERY):
            raise TargetDirectoryInUse(
                f"directory is already on the way to another target: {directory}",
                detail="Its files are complete and a server may have replayed log in it.",
                hints=["remove the directory, or choose another one"],
            )
        return True
    check_vacant(layout, ignored=LEFT_BEFORE_BEGIN)
    _check_space(layout, manifest)
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    return False


def _check_space(layout: Layout, manifest: Manifest) -> None:
    needed: dict[int, tuple[Path, int]] = {}
    for entry in manifest.files:
        if entry.kind is ItemKind.FILE and entry.size_bytes:
            existing = _existing_parent(layout.place(entry).parent)
            device = existing.stat().st_dev
            _, so_far = needed.get(device, (existing, 0))
            needed[device] = (existing, so_far + entry.size_bytes)
    for place, size_bytes in needed.values():
        free = shutil.disk_usage(place).free
        if free < size_bytes + SPACE_RESERVE_BYTES:
            raise NotEnoughSpace(
                f"not enough space at {place}",
                detail=f"The files need {size_bytes} bytes; {free} are free.",
                hints=["choose a larger file system, or map tablespaces to others with --tablespace"],
            )


def _existing_parent(place: Path) -> Path:
    while not place.exists():
        place = place.parent
    return place


@contextmanager
def _full_disk_explained(layout: Layout) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NotEnoughSpace(
                f"no space left while restoring into {layout.directory}",
                hints=["free some space and run the same command again: it goes on where it was"],
            ) from error
        raise RecoveryError(
            f"could not write into {layout.directory}",
            detail=f"{error.strerror}: {error.filename or 'a file'}.",
            hints=["run the same command again when this is cured: it goes on where it was"],
        ) from error


# ---- writing ----


class _FileRestore:
    """One run over all files."""

    def __init__(self, reader: StoredFiles, layout: Layout, owner: Owner | None) -> None:
        self._reader = reader
        self._layout = layout
        self._owner = owner
        self._files = reader.manifest.files
        self._paths: list[str] = [str(layout.place(entry)) for entry in self._files]
        self._held_back = {
            index
            for index, entry in enumerate(self._files)
            if not entry.outside and entry.path in CONTROL_FILES | REPLACED_FILES
        }
        self._roots = {*layout.roots(), layout.config_directory}
        self._made: set[Path] = set()
        self._lock = threading.Lock()
        self._direct = True
        """Whether the file system takes writes around the page cache; found by trying."""
        self.bytes_written = 0

    def execute(self, journal: Journal, done: frozenset[str], workers: int, progress: Progress) -> None:
        """Make everything, fill it, and put the control files last."""
        total = sum(entry.size_bytes for entry in self._files)
        progress.begin("restore files", bytes_total=total)
        self._make_directories()
        for index, entry in enumerate(self._files):
            if entry.kind is ItemKind.FILE and index not in self._held_back:
                self._make_file(self._paths[index], entry)

        def advance(count: int) -> None:
            with self._lock:
                self.bytes_written += count
            progress.advance(count)

        self._reader.read_all(
            self._write, workers=workers, skip_packs=done, pack_done=journal.pack_done, advance=advance
        )
        sync_file_systems([*self._layout.roots(), self._layout.config_directory])
        for index in sorted(self._held_back):
            if self._files[index].path in CONTROL_FILES:
                self._put_control_file(index)
        progress.finish()

    def _write(self, file_index: int, offset: int, data: memoryview) -> None:
        if file_index in self._held_back:
            return
        if self._direct and len(data) >= DIRECT_BYTES_MIN and len(data) % DIRECT_UNIT_BYTES == 0:
            try:
                self._write_with(os.O_DIRECT, file_index, offset, data)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._direct = False
            else:
                return
        self._write_with(0, file_index, offset, data)

    def _write_with(self, flags: int, file_index: int, offset: int, data: memoryview) -> None:
        flags |= os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(self._paths[file_index], flags)
        try:
            written = 0
            while written < len(data):
                written += os.pwrite(descriptor, data[written:], offset + written)
        finally:
            os.close(descriptor)

    def _make_directories(self) -> None:
        for root in self._layout.roots():
            self._make_directory(root)
        for entry in self._files:
            place = self._layout.place(entry)
            if entry.kind is ItemKind.DIRECTORY and not entry.outside:
                self._make_directory(place)
            elif entry.kind is ItemKind.FILE:
                self._make_directory(place.parent)
        links = self._layout.directory / "pg_tblspc"
        for oid, place in self._layout.tablespaces.items():
            self._make_directory(links)
            link = links / oid
            if not (link.is_symlink() and link.readlink() == place):
                link.symlink_to(place)
            if self._owner:
                os.chown(link, self._owner.uid, self._owner.gid, follow_symlinks=False)

    def _make_directory(self, place: Path) -> None:
        """
        Make it, with parents; it is private and the owner's. Below our roots also where it is there already:
        a kill between making it and giving it away leaves it to root, and the server could not read it.
        """
        if place in self._made:
            return
        if place not in self._roots:
            self._make_directory(place.parent)
        missing = []
        above = place
        while not above.is_dir():
            missing.append(above)
            above = above.parent
        for one in reversed(missing):
            one.mkdir(mode=0o700)
        for one in missing or [place]:
            one.chmod(0o700)
            if self._owner:
                os.chown(one, self._owner.uid, self._owner.gid)
        self._made.add(place)

    def _make_file(self, path: str, entry: FileEntry) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(path, flags, 0o600)
        try:
            os.ftruncate(descriptor, entry.size_bytes)
            os.fchmod(descriptor, (entry.mode & 0o740) | 0o600)
            if self._owner:
                os.fchown(descriptor, self._owner.uid, self._owner.gid)
        finally:
            os.close(descriptor)

    def _put_control_file(self, index: int) -> None:
        """A control file appears as a whole, on stable storage, or not at all."""
        path = self._paths[index]
        content = self._reader.read_file(index)
        new = f"{path}.cloudsave-new"
        self._make_file(new, self._files[index])
        descriptor = os.open(new, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.pwrite(descriptor, content, 0)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(new, path)
        sync_directory(os.path.dirname(path))
        self.bytes_written += len(content)


def sync_file_systems(places: list[Path]) -> None:
    """Everything written to the file systems of `places` is on stable storage. Raises: OSError."""
    for place in places:
        if not place.exists():
            continue
        descriptor = os.open(place, os.O_RDONLY)
        try:
            if _libc.syncfs(descriptor) != 0:
                number = ctypes.get_errno()
                raise OSError(number, os.strerror(number), str(place))
        finally:
            os.close(descriptor)


def sync_directory(path: str) -> None:
    """The entries of a directory are on stable storage."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
