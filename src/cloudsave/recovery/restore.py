"""
Write the files of a backup into a directory: parallel, resumable, control file last. The directory is empty,
or one whose files may be re-used (`delta.py`).

Order, and what follows from it: (1) look whether the places are vacant and large enough; nothing is touched
before that. (2) journal, so that every later byte in the directory is known to be ours. (3) directories,
links and files at full length, sparse. (4) all packs. (5) everything to stable storage. (6) the control
file: until it is there no server starts. (7) the journal says "complete": from then on files are never
written again.
"""

from __future__ import annotations

import errno
import hashlib
import os
import pwd
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from cloudsave.errors import NotEnoughSpace, RecoveryError, TargetDirectoryInUse, UsageError
from cloudsave.model.item import ItemKind
from cloudsave.model.manifest import FileEntry, Manifest
from cloudsave.recovery.delta import (
    DeltaOptions,
    DeltaPlan,
    FilesOnDisk,
    check_places,
    check_reusable,
    clear_the_way,
    disable_control_files,
    plan_delta,
    tablespaces_as_they_are,
)
from cloudsave.recovery.durable import sync_directory, sync_file_systems
from cloudsave.recovery.file_sink import FileSink
from cloudsave.recovery.journal import (
    JOURNAL_NAME,
    LEFT_BEFORE_BEGIN,
    Journal,
    JournalHead,
    ReplayStop,
    read_head,
)
from cloudsave.recovery.layout import (
    CONTROL_FILES,
    REPLACED_FILES,
    Layout,
    check_vacant,
    is_occupied,
    plan_layout,
)
from cloudsave.repository.comparison import PresentFiles, StaleBlocks
from cloudsave.telemetry import NoProgress, Progress

WORKERS_MAX = 16
WAITING_WORKERS = 1
"""Threads beyond those that compute, since each waits for the disk now and then."""
SPACE_RESERVE_BYTES = 64 << 20
"""Left free on each file system beyond the files themselves."""
SERVER_ACCOUNT = "postgres"
"""Who owns restored files where nobody says otherwise."""
NO_RECOVERY = "none"


class StoredFiles(Protocol):
    """What is asked of `repository.reader.BackupReader`."""

    manifest: Manifest

    def read_all(
        self,
        write: Callable[[int, int, memoryview], None],
        *,
        workers: Callable[[], int],
        skip_packs: Collection[str],
        stale: StaleBlocks | None,
        pack_done: Callable[[str], None],
        advance: Callable[[int], None],
    ) -> None:
        """Hand out all stored stretches but those of `skip_packs`, from several threads; see BackupReader."""

    def compare(
        self, present: PresentFiles, *, workers: Callable[[], int], advance: Callable[[int], None]
    ) -> StaleBlocks:
        """Find what of the files that are there must be written."""

    def read_file(self, file_index: int) -> bytes:
        """One small file."""


@dataclass(frozen=True, slots=True)
class RestoreRequest:
    """Where and how to restore files."""

    directory: Path
    tablespaces: Mapping[str, str] = field(default_factory=dict)
    owner: str | None = None
    """User who is to own the files; None: the owner of the directory (or of the nearest one above it),
    or `server_account` where that is root."""
    server_account: str = SERVER_ACCOUNT
    """The user that usually runs such servers."""
    workers: int = 0
    """Threads that compute; 0: as many as processors."""
    workers_now: Callable[[], int] | None = None
    """How many may compute at the moment, asked again and again; None: `workers`."""
    recovery_digest: str = ""
    """Of the recovery that will follow; a directory whose files are complete is used for no other."""
    replay: ReplayStop | None = None
    """What that recovery is, so that it can be planned again."""
    delta: DeltaOptions | None = None
    """Re-use what is right in a data directory that is there; None: the directory must be vacant."""

    def threads(self) -> int:
        """How many may be at work now, with those that wait."""
        computing = self.workers_now() if self.workers_now else self.workers
        return min(WORKERS_MAX, (computing or os.cpu_count() or 1) + WAITING_WORKERS)


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
    bytes_kept: int = 0
    """Bytes that were right already."""
    removed: int = 0
    """Files and directories that were removed."""
    set_aside: Path | None = None
    """The directory with log that is stored nowhere; None: there was none."""


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
    layout = layout_of(manifest, request)
    owner = choose_owner(request.owner, layout.directory, request.server_account)
    digest = files_digest(manifest, layout)
    start = _prepare(layout, manifest, digest, request)
    run = _FileRestore(reader, layout, owner, progress or NoProgress())
    cleared: DeltaPlan | None = None
    with Journal(layout.directory) as journal:
        head = journal.head()
        if start.delta is not None or head is None or not head.recovery_digest:
            with _full_disk_explained(layout):
                if start.delta is None:
                    done = journal.begin(digest, manifest.backup_id, manifest.lineage)
                    run.execute(request.threads, done, journal.pack_done)
                else:
                    cleared = _begin_delta(journal, digest, manifest, layout, start.delta)
                    run.execute_over(request.threads)
            replay = request.replay or ReplayStop(manifest.backup_id)
            journal.files_complete(digest, request.recovery_digest or NO_RECOVERY, replay)
    has_config = any(entry.outside for entry in manifest.files)
    return RestoredFiles(
        directory=layout.directory,
        config_directory=layout.config_directory if has_config else None,
        tablespaces={oid: str(place) for oid, place in layout.tablespaces.items()},
        owner=owner.name if owner else None,
        bytes_written=run.bytes_written,
        resumed=start.resumed,
        notes=(*_notes(owner), *_notes_of_log(cleared)),
        bytes_kept=run.bytes_kept,
        removed=len(cleared.removed) if cleared else 0,
        set_aside=cleared.aside if cleared and cleared.set_aside else None,
    )


def layout_of(manifest: Manifest, request: RestoreRequest) -> Layout:
    """The places of a restore. Raises: UsageError, IntegrityError, TargetDirectoryInUse."""
    remap = request.tablespaces
    facts = request.delta.inspector.inspect(request.directory) if request.delta else None
    if facts is not None:
        remap = tablespaces_as_they_are(facts, manifest, remap)
    return plan_layout(manifest, request.directory, remap)


def look_ahead(manifest: Manifest, request: RestoreRequest) -> DeltaPlan | None:
    """
    What a delta restore will remove and set aside; None where it begins in an empty place. Touches nothing.

    Raises: TargetDirectoryInUse, UsageError, IntegrityError.
    """
    layout = layout_of(manifest, request)
    if request.delta is None or not is_occupied(layout.directory, LEFT_BEFORE_BEGIN):
        return None
    return _check_delta(layout, manifest, request.delta, read_head(layout.directory))


def finish_restore(directory: Path) -> None:
    """The restored directory is in use: forget the journal."""
    with Journal(directory) as journal:
        journal.finish()


def files_digest(manifest: Manifest, layout: Layout) -> str:
    """What decides the content of the restored files."""
    places = sorted(f"{oid}={place}" for oid, place in layout.tablespaces.items())
    return hashlib.sha256("\0".join([manifest.lineage, manifest.backup_id, *places]).encode()).hexdigest()


def choose_owner(wanted: str | None, directory: Path, server_account: str) -> Owner | None:
    """Whom to give the files to; None: they stay with the user of this process. Raises: UsageError."""
    if os.geteuid() != 0:
        if wanted is not None and wanted != pwd.getpwuid(os.geteuid()).pw_name:
            raise UsageError(f"only root can give files to user {wanted!r}")
        return None
    if wanted is None:
        uid = _existing_parent(directory).stat().st_uid
        try:
            entry = pwd.getpwuid(uid) if uid else pwd.getpwnam(server_account)
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


def _notes_of_log(cleared: DeltaPlan | None) -> tuple[str, ...]:
    if cleared is None or not cleared.set_aside:
        return ()
    text = f"{len(cleared.set_aside)} files of log that is not stored were set aside in {cleared.aside};"
    return (f"{text} the transactions in them are not in what was restored",)


# ---- before anything is written ----


@dataclass(frozen=True, slots=True)
class _Start:
    """How a restore begins."""

    resumed: bool
    delta: DeltaOptions | None = None
    """Files that are there are to be compared; None: they are none, or ours."""


def _prepare(layout: Layout, manifest: Manifest, digest: str, request: RestoreRequest) -> _Start:
    """See that the places are ours to use, and make the directory; whether an earlier restore goes on."""
    directory = layout.directory
    head = None
    if (directory / JOURNAL_NAME).exists():
        with Journal(directory) as journal:
            head = journal.head()
    recovery_digest = request.recovery_digest or NO_RECOVERY
    complete = head is not None and (head.files_digest, head.recovery_digest) == (digest, recovery_digest)
    if request.delta is not None and not complete and is_occupied(directory, LEFT_BEFORE_BEGIN):
        plan = _check_delta(layout, manifest, request.delta, head)
        _check_space(layout, manifest, plan.there_bytes)
        return _Start(head is not None, request.delta)
    if head is not None:
        _check_same_restore(head, digest, recovery_digest, directory)
        return _Start(resumed=True)
    check_vacant(layout, ignored=LEFT_BEFORE_BEGIN)
    _check_space(layout, manifest, {})
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    return _Start(resumed=False)


def _check_same_restore(head: JournalHead, digest: str, recovery_digest: str, directory: Path) -> None:
    if head.files_digest != digest:
        raise TargetDirectoryInUse(
            f"directory holds another unfinished restore: {directory}",
            hints=["run that one again to finish it, or remove the directory"],
        )
    if head.recovery_digest and head.recovery_digest != recovery_digest:
        raise TargetDirectoryInUse(
            f"directory is already on the way to another target: {directory}",
            detail="Its files are complete and a server may have replayed log in it.",
            hints=["remove the directory, or choose another one", "--delta takes what is right in it"],
        )
    if head.delta and not head.recovery_digest:
        raise TargetDirectoryInUse(
            f"directory holds an unfinished delta restore: {directory}",
            detail="Nothing says which of its files are right; they must be compared again.",
            hints=["give --delta again"],
        )


def _check_delta(
    layout: Layout, manifest: Manifest, delta: DeltaOptions, head: JournalHead | None
) -> DeltaPlan:
    """See that a delta restore may work in the places, and what it will do. Raises: TargetDirectoryInUse."""
    facts = delta.inspector.inspect(layout.directory)
    check_reusable(facts, head, manifest, layout.directory)
    for place in check_places(layout, facts, delta):
        if is_occupied(place):
            raise TargetDirectoryInUse(
                f"directory of a tablespace is not empty: {place}",
                detail=f"{layout.directory} does not link to it, so it is not the one that may be changed.",
                hints=["give it another one: --tablespace OID=/new/directory"],
            )
    return plan_delta(layout, manifest, facts, delta)


def _begin_delta(
    journal: Journal, digest: str, manifest: Manifest, layout: Layout, delta: DeltaOptions
) -> DeltaPlan:
    """From here on the directory is ours: no server starts in it, and what is too much goes."""
    had_journal = journal.head() is not None
    journal.begin_delta(digest, manifest.backup_id, manifest.lineage)
    try:
        disable_control_files(layout, delta)
    except TargetDirectoryInUse:
        if not had_journal:
            journal.finish()
        raise
    plan = plan_delta(layout, manifest, delta.inspector.inspect(layout.directory), delta)
    clear_the_way(layout, plan)
    return plan


def _check_space(layout: Layout, manifest: Manifest, there_bytes: Mapping[int, int]) -> None:
    """`there_bytes`: by device, what the files in the places take already."""
    needed: dict[int, tuple[Path, int]] = {}
    for entry in manifest.files:
        if entry.kind is ItemKind.FILE and entry.size_bytes:
            existing = _existing_parent(layout.place(entry).parent)
            device = existing.stat().st_dev
            _, so_far = needed.get(device, (existing, 0))
            needed[device] = (existing, so_far + entry.size_bytes)
    for device, (place, size_bytes) in needed.items():
        missing = size_bytes - there_bytes.get(device, 0)
        free = shutil.disk_usage(place).free
        if free < missing + SPACE_RESERVE_BYTES:
            raise NotEnoughSpace(
                f"not enough space at {place}",
                detail=f"The files need {missing} bytes more; {free} are free.",
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

    def __init__(self, reader: StoredFiles, layout: Layout, owner: Owner | None, progress: Progress) -> None:
        self._reader = reader
        self._progress = progress
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
        self._sink = FileSink(self._paths)
        self._bytes_put = 0
        self.bytes_kept = 0

    def execute(
        self, workers: Callable[[], int], done: frozenset[str], pack_done: Callable[[str], None]
    ) -> None:
        """Make everything, fill it, and put the control files last."""
        self._make_directories()
        for index, entry in self._plain_files():
            self._make_file(self._paths[index], entry)
        self._fill(workers, skip_packs=done, pack_done=pack_done)

    def execute_over(self, workers: Callable[[], int]) -> None:
        """The same where files are there already: what is right in them stays."""
        self._make_directories()
        present: dict[int, int] = {}
        for index, entry in self._plain_files():
            present[index] = min(entry.size_bytes, _size_of(self._paths[index]))
            self._make_file(self._paths[index], entry)
        self._progress.begin("compare files", bytes_total=sum(entry.size_bytes for entry in self._files))
        there = FilesOnDisk(self._paths, present)
        stale = self._reader.compare(there, workers=workers, advance=self._progress.advance)
        self._progress.finish()
        self.bytes_kept = stale.bytes_kept
        self._fill(workers, stale=stale)

    def _fill(
        self,
        workers: Callable[[], int],
        *,
        skip_packs: Collection[str] = (),
        stale: StaleBlocks | None = None,
        pack_done: Callable[[str], None] | None = None,
    ) -> None:
        total = sum(entry.size_bytes for entry in self._files) if stale is None else stale.bytes_stale
        self._progress.begin("restore files", bytes_total=total)
        try:
            self._reader.read_all(
                self._write,
                workers=workers,
                skip_packs=skip_packs,
                stale=stale,
                pack_done=pack_done or _note_nothing,
                advance=self._progress.advance,
            )
        finally:
            self._sink.close()
        sync_file_systems([*self._layout.roots(), self._layout.config_directory])
        for index in sorted(self._held_back):
            if self._files[index].path in CONTROL_FILES:
                self._put_control_file(index)
        self._progress.finish()

    def _plain_files(self) -> Iterator[tuple[int, FileEntry]]:
        for index, entry in enumerate(self._files):
            if entry.kind is ItemKind.FILE and index not in self._held_back:
                yield index, entry

    @property
    def bytes_written(self) -> int:
        """So far, with the control files."""
        return self._sink.bytes_written + self._bytes_put

    def _write(self, file_index: int, offset: int, data: memoryview) -> None:
        if file_index not in self._held_back:
            self._sink.write(file_index, offset, data)

    def _make_directories(self) -> None:
        for root in self._layout.roots():
            self._make_directory(root)
        # Links before contents: a place that nothing links to holds nothing of ours.
        links = self._layout.directory / "pg_tblspc"
        for oid, place in self._layout.tablespaces.items():
            self._make_directory(links)
            link = links / oid
            if not (link.is_symlink() and link.readlink() == place):
                link.symlink_to(place)
            if self._owner:
                os.chown(link, self._owner.uid, self._owner.gid, follow_symlinks=False)
        for entry in self._files:
            place = self._layout.place(entry)
            if entry.kind is ItemKind.DIRECTORY and not entry.outside:
                self._make_directory(place)
            elif entry.kind is ItemKind.FILE:
                self._make_directory(place.parent)

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
        self._bytes_put += len(content)


def _note_nothing(pack: str) -> None:
    """Nobody keeps a note that `pack` is done."""


def _size_of(path: str) -> int:
    """Bytes of a file; 0 where there is none."""
    try:
        return os.stat(path, follow_symlinks=False).st_size
    except FileNotFoundError:
        return 0
