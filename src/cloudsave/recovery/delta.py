"""
Restore over a data directory that is there already: what is right stays, the rest is written, and what the
backup does not have is removed.

Order, and what follows from it: (1) the directory is proved to be of the same lineage and without a server;
nothing is touched before that. (2) The journal says "delta": from here on the directory is ours. (3) The
control file goes away, so that no server starts on a mixture; whether one has started meanwhile is asked
again. (4) Log that is stored nowhere is set aside, never removed. (5) What is too much goes. From here on it
is a restore like any other. Killed at any moment, the same command compares again: what was written is right
by then.
"""

from __future__ import annotations

import ctypes
import errno
import filecmp
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cloudsave.engines.directory_api import DirectoryInspector
from cloudsave.errors import TargetDirectoryInUse
from cloudsave.model.engine_facts import DirectoryFacts, PresentLog
from cloudsave.model.item import ItemKind
from cloudsave.model.ledger import Ledger
from cloudsave.model.manifest import Manifest
from cloudsave.recovery.durable import sync_directory
from cloudsave.recovery.history import History
from cloudsave.recovery.journal import JOURNAL_FILES, JournalHead
from cloudsave.recovery.layout import CONTROL_FILES, REPLACED_FILES, TABLESPACES, Layout

ASIDE_SUFFIX = ".log-set-aside"
LINKED_DIRECTORIES = frozenset({"pg_wal"})
"""Directories that may be links to another file system; they stay so."""
KEPT_NAMES = JOURNAL_FILES | {"lost+found"}
"""What stays at the top of a place: our own files, and the file system's."""
_OLD_SUFFIX = ".cloudsave-old"
_PUNCH_HOLE_KEEP_SIZE = 3
_ZEROS = bytes(1 << 20)
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


@dataclass(frozen=True, slots=True)
class DeltaOptions:
    """What a delta restore asks the engine and the ledger."""

    inspector: DirectoryInspector
    is_stored: Callable[[PresentLog], bool]
    """Whether the repository holds all of a file of log."""


def delta_options(inspector: DirectoryInspector, history: History) -> DeltaOptions:
    """Log counts as stored where the ledger has all of a file on its very branch."""
    ledger = Ledger(history.segments)

    def is_stored(log: PresentLog) -> bool:
        if log.begin == log.end:
            return log.branch in history.ancestry.ancestors
        return ledger.frontier(log.branch, log.begin) >= log.end

    return DeltaOptions(inspector, is_stored)


@dataclass(frozen=True, slots=True)
class DeltaPlan:
    """What will happen to the things that are in the way."""

    removed: tuple[Path, ...]
    """Files, links and directories (with all below them) that the backup does not have."""
    set_aside: tuple[PresentLog, ...]
    """Log that is stored nowhere."""
    aside: Path
    """The directory that it goes to."""
    there_bytes: Mapping[int, int]
    """Space that the files in the places take now, by device."""


def tablespaces_as_they_are(
    facts: DirectoryFacts, manifest: Manifest, remap: Mapping[str, str]
) -> dict[str, str]:
    """The places of tablespaces: as asked for, else where the directory links to."""
    chosen = dict(remap)
    for oid, place in facts.tablespaces.items():
        old = manifest.tablespaces.get(oid)
        if old is not None and oid not in chosen and old not in chosen:
            chosen[oid] = str(place)
    return chosen


def check_reusable(
    facts: DirectoryFacts | None, head: JournalHead | None, manifest: Manifest, directory: Path
) -> None:
    """
    The directory must be a data directory of the manifest's lineage, and no server's.

    Raises: TargetDirectoryInUse.
    """
    lineage = (head.lineage if head else "") or (facts.lineage if facts else "")
    if facts is None and not lineage:
        raise TargetDirectoryInUse(
            f"directory is not a data directory: {directory}",
            detail="A delta restore re-uses nothing else, and removes nothing elsewhere.",
            hints=["is the path right?", "without --delta, an empty or absent directory is filled"],
        )
    if not lineage:
        raise TargetDirectoryInUse(
            f"cannot tell whose data directory it is: {directory}",
            detail="Its control file is missing or damaged.",
            hints=["move the directory aside and restore without --delta"],
        )
    if lineage != manifest.lineage:
        raise TargetDirectoryInUse(
            f"directory belongs to another database system: {directory}",
            detail=f"It is of {lineage}; the backup is of {manifest.lineage}.",
        )
    if facts is not None and facts.in_use:
        raise _in_use(directory, facts.in_use)


def check_places(layout: Layout, facts: DirectoryFacts | None, options: DeltaOptions) -> Sequence[Path]:
    """
    No server but that of the directory may ever have used the places of tablespaces.

    Returns: the places that must be vacant, since the directory does not link to them yet.
    Raises: TargetDirectoryInUse.
    """
    users = options.inspector.users_of(layout.roots())
    if users:
        raise _in_use(layout.directory, users)
    linked = {oid: place.resolve() for oid, place in facts.tablespaces.items()} if facts else {}
    return [place for oid, place in layout.tablespaces.items() if linked.get(oid) != place.resolve()]


def plan_delta(
    layout: Layout, manifest: Manifest, facts: DirectoryFacts | None, options: DeltaOptions
) -> DeltaPlan:
    """See what is in the way. Touches nothing."""
    wanted = _wanted(layout, manifest)
    log_files = facts.log_files if facts else ()
    aside = tuple(one for one in log_files if not options.is_stored(one))
    kept = {str(one.path) for one in aside}
    removed: list[Path] = []
    there: dict[int, int] = {}
    for root in layout.roots():
        owned = None if root == layout.directory else _owned_names(layout, manifest, root)
        for entry, is_wanted in _walk(str(root), wanted, owned):
            found = entry.stat(follow_symlinks=False)
            there[found.st_dev] = there.get(found.st_dev, 0) + found.st_blocks * 512
            if not is_wanted and os.path.realpath(entry.path) not in kept:
                removed.append(Path(entry.path))
    aside_directory = layout.directory.with_name(layout.directory.name + ASIDE_SUFFIX)
    return DeltaPlan(tuple(removed), aside, aside_directory, there)


def _wanted(layout: Layout, manifest: Manifest) -> dict[str, ItemKind]:
    wanted = {str(layout.directory / TABLESPACES): ItemKind.DIRECTORY}
    for oid, place in layout.tablespaces.items():
        wanted[str(layout.directory / TABLESPACES / oid)] = ItemKind.LINK
        wanted[str(place)] = ItemKind.DIRECTORY
    roots = {str(root) for root in layout.roots()}
    for entry in manifest.files:
        if entry.outside or entry.path in REPLACED_FILES or entry.kind is ItemKind.LINK:
            continue
        place = layout.place(entry)
        wanted[str(place)] = entry.kind
        for above in place.parents:
            if str(above) in roots or str(above) in wanted:
                break
            wanted[str(above)] = ItemKind.DIRECTORY
    return wanted


def _owned_names(layout: Layout, manifest: Manifest, root: Path) -> frozenset[str]:
    """The names in a tablespace's place that are this system's; others belong to other versions."""
    oid = next(oid for oid, place in layout.tablespaces.items() if place == root)
    parts = (entry.path.split("/") for entry in manifest.files if not entry.outside)
    return frozenset(one[2] for one in parts if len(one) > 2 and one[:2] == [TABLESPACES, oid])


def _walk(
    root: str, wanted: Mapping[str, ItemKind], owned: frozenset[str] | None
) -> Iterator[tuple[os.DirEntry[str], bool]]:
    """
    Everything in the place, and whether it may stay; nothing below what may not. Links are never followed but
    the one of the log.
    """
    folders = [root]
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(folder) as listing:
                entries = list(listing)
        except FileNotFoundError:
            continue
        for entry in entries:
            if folder == root and (
                entry.name in KEPT_NAMES or (owned is not None and entry.name not in owned)
            ):
                continue
            stays = _may_stay(entry, wanted.get(entry.path), top=folder == root)
            yield entry, stays
            if stays and wanted[entry.path] is ItemKind.DIRECTORY:
                folders.append(entry.path)


def _may_stay(entry: os.DirEntry[str], wanted: ItemKind | None, *, top: bool) -> bool:
    if wanted is ItemKind.FILE:
        # A file of several names may be part of another copy, which must not change with this one.
        return entry.is_file(follow_symlinks=False) and entry.stat(follow_symlinks=False).st_nlink == 1
    if wanted is ItemKind.DIRECTORY:
        linked = top and entry.name in LINKED_DIRECTORIES
        return entry.is_dir(follow_symlinks=linked)
    return wanted is ItemKind.LINK and entry.is_symlink()


# ---- what is done before the files are written


def disable_control_files(layout: Layout, options: DeltaOptions) -> None:
    """
    Take the control files away: no server starts any more. Raises: TargetDirectoryInUse where one has started
    before that; the files are back then.
    """
    moved: list[tuple[Path, Path]] = []
    for name in sorted(CONTROL_FILES):
        place = layout.directory / name
        old = place.with_name(place.name + _OLD_SUFFIX)
        if place.exists():
            place.replace(old)
            sync_directory(place.parent)
            moved.append((old, place))
    facts = options.inspector.inspect(layout.directory)
    reason = (facts.in_use if facts else "") or options.inspector.users_of(layout.roots())
    if reason:
        for old, place in moved:
            old.replace(place)
            sync_directory(place.parent)
        raise _in_use(layout.directory, reason)
    for old, _ in moved:
        old.unlink()


def clear_the_way(layout: Layout, plan: DeltaPlan) -> None:
    """Set log aside, and remove what the backup does not have."""
    if plan.set_aside:
        plan.aside.mkdir(mode=0o700, exist_ok=True)
        shutil.copystat(layout.directory, plan.aside)
        for one in plan.set_aside:
            _set_aside(one.path, plan.aside)
        sync_directory(plan.aside)
    for path in plan.removed:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    for oid, place in layout.tablespaces.items():
        link = layout.directory / TABLESPACES / oid
        if link.is_symlink() and link.readlink() != place:
            link.unlink()


def _set_aside(path: Path, aside: Path) -> None:
    """Move a file; one of the same name and content that is there already will do."""
    number, place = 0, aside / path.name
    while place.exists():
        if filecmp.cmp(path, place, shallow=False):
            path.unlink()
            return
        number += 1
        place = aside / f"{path.name}.{number}"
    try:
        path.rename(place)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        _copy_across(path, place)


def _copy_across(path: Path, place: Path) -> None:
    new = place.with_name(place.name + ".new")
    shutil.copy2(path, new)
    with new.open("rb") as file:
        os.fsync(file.fileno())
    new.replace(place)
    sync_directory(place.parent)
    path.unlink()


# ---- what is there, to be compared


class FilesOnDisk:
    """`repository.comparison.PresentFiles` of files that have been brought to their full length."""

    def __init__(self, paths: Sequence[str], present: Mapping[int, int]) -> None:
        """`present`: bytes that were there, by file number; others are new."""
        self._paths = paths
        self._present = present
        self._direct = True
        self._of_thread = threading.local()

    def present_bytes(self, file_index: int) -> int:
        """See `PresentFiles`."""
        return self._present.get(file_index, 0)

    def read_into(self, file_index: int, offset: int, target: memoryview) -> int:
        """
        See `PresentFiles`. Around the page cache, whose pages may be right where the disk's are not; file
        systems that cannot do so have no other truth than the cache.
        """
        if self._direct:
            try:
                return self._read(os.O_DIRECT, file_index, offset, target)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._direct = False
        return self._read(0, file_index, offset, target)

    def _read(self, flags: int, file_index: int, offset: int, target: memoryview) -> int:
        descriptor = os.open(self._paths[file_index], flags | os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            done = 0
            while done < len(target):
                got = os.preadv(descriptor, [target[done:]], offset + done)
                done += got
                if got == 0 or (flags and got % 4096):
                    break
            return done
        finally:
            os.close(descriptor)

    def clear(self, file_index: int, offset: int, length: int) -> None:
        """See `PresentFiles`. A hole where the file system has holes."""
        descriptor = os.open(self._paths[file_index], os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            if _libc.fallocate(descriptor, _PUNCH_HOLE_KEEP_SIZE, offset, length) == 0:
                return
            end = offset + length
            while offset < end:
                offset += os.pwrite(descriptor, _ZEROS[: end - offset], offset)
        finally:
            os.close(descriptor)


def _in_use(directory: Path, reason: str) -> TargetDirectoryInUse:
    return TargetDirectoryInUse(
        f"a server may be running on the directory to restore into: {directory}",
        detail=reason,
        hints=["stop the server first: a restore under a running server destroys its data"],
    )
