"""
A store in a directory: local disk, NFS or any mounted file system.

Order of one put, and what each step is for:
  1. write `.tmp/<random>`, fdatasync      the bytes are durable before they have a name
  2. link it to its name (or rename)       atomic, refuses an existing name: a reader sees nothing or all
  3. fsync of the name's directory         the name is durable before put returns
  4. unlink the temporary name             skipped by a kill; the next start sweeps
Invariant: a directory is used only after its own entry was synced by this process, up to the root.
Invariant: the root stays open, so a file system that is unmounted and whose mount point is written to by
accident never receives half of a repository.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
import weakref
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cloudsave.clock import SYSTEM_CLOCK, Clock
from cloudsave.errors import (
    IntegrityError,
    ObjectExists,
    ObjectMissing,
    StoreError,
    StoreFull,
    StorePermission,
    StoreUnavailable,
    StoreUnfit,
)
from cloudsave.store.api import Buffer, ObjectInfo, StoreCapabilities
from cloudsave.store.names import is_component, readable_size, validate_name, validate_prefix, validate_range
from cloudsave.store.posix_calls import (
    PLACEMENTS,
    UNSUPPORTED,
    Placement,
    sync_file_system,
    write_all,
    write_around_cache,
)

TEMP_DIRECTORY = ".tmp"
TEMP_AGE_MAX = timedelta(hours=24)
"""Limit: no put takes this long; an older temporary file was left by a process that was killed."""

_DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_CREATE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_DIRECTORY_MODE = 0o700
_FILE_MODE = 0o400
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_REFUSED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
_UNFIT = frozenset({errno.EXDEV, errno.EINVAL, errno.ENOTSUP, errno.ENOSYS})
_PASSING = frozenset(
    {
        errno.EAGAIN,
        errno.EBUSY,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.EMFILE,
        errno.ENFILE,
        errno.ENOENT,
        errno.ENOLCK,
        errno.ENOMEM,
        errno.ENOTCONN,
        errno.ESTALE,
        errno.ETIMEDOUT,
    }
)
DIRECT_BYTES_MIN = 1 << 20
"""Objects of at least this size are written around the page cache."""


class PosixStore:
    """A store in one directory, which the first put creates. Objects are files of mode 0400."""

    def __init__(
        self, root: Path, *, clock: Clock = SYSTEM_CLOCK, placements: Sequence[Placement] = PLACEMENTS
    ) -> None:
        self._root = root.absolute()
        self._clock = clock
        self._placements = tuple(placements)
        self._lock = threading.Lock()
        self._root_fd: int | None = None
        self._temp_fd: int | None = None
        self._synced: set[str] = set()

    def __repr__(self) -> str:
        return f"PosixStore({str(self._root)!r})"

    @property
    def url(self) -> str:
        """The directory as a URL."""
        return self._root.as_uri()

    @property
    def capabilities(self) -> StoreCapabilities:
        """Both promises are kept on every file system that a put succeeds on."""
        return StoreCapabilities(conditional_put=True, durable_put=True)

    def put(self, name: str, parts: Sequence[Buffer]) -> None:
        """Write, sync, name, sync the name; see the head of the module."""
        validate_name(name)
        with self._errors("store", name):
            temp_dir = self._open_for_writing()
            temp = self._write_temp(temp_dir, parts)
            name_in_doubt = False
            try:
                with self._directory(name.rpartition("/")[0]) as directory:
                    self._place(temp_dir, temp, directory, name)
                    name_in_doubt = True
                    os.fsync(directory)
                    name_in_doubt = False
            finally:
                # A second name that stays makes the next start sync all before it builds on the object.
                if not name_in_doubt:
                    with contextlib.suppress(OSError):
                        os.unlink(temp, dir_fd=temp_dir)

    def get(self, name: str) -> bytes:
        """Read the file to the length that it had when it was opened."""
        validate_name(name)
        with self._errors("read", name), self._opened(name) as file:
            return _read_exactly(file, name, offset=0, length=readable_size(name, os.fstat(file).st_size))

    def get_range(self, name: str, *, offset: int, length: int) -> Buffer:
        """Read by pread until all is there."""
        validate_name(name)
        validate_range(offset=offset, length=length)
        with self._errors("read", name), self._opened(name) as file:
            size_bytes = os.fstat(file).st_size
            if offset + length > size_bytes:
                raise _short(name, wanted=offset + length, size_bytes=size_bytes)
            return _read_exactly(file, name, offset=offset, length=length)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Walk the directories; files and directories that no put could have made are passed over."""
        validate_prefix(prefix)
        return self._walk(prefix)

    def delete(self, name: str) -> None:
        """Unlink and make it durable: an expired manifest must not come back without its packs."""
        validate_name(name)
        parent, _, leaf = name.rpartition("/")
        with self._errors("delete", name):
            try:
                directory = os.open(parent or ".", _DIRECTORY_FLAGS, dir_fd=self._open_root())
            except (FileNotFoundError, NotADirectoryError):
                return
            try:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(leaf, dir_fd=directory)
                os.fsync(directory)
            finally:
                os.close(directory)

    # ---- writing -----------------------------------------------------------------------------------------

    def _write_temp(self, temp_dir: int, parts: Sequence[Buffer]) -> str:
        """A new temporary file with the durable bytes of `parts`; nothing stays behind on failure."""
        temp = f"put-{self._clock.random_bytes(16).hex()}"
        file = os.open(temp, _CREATE_FLAGS, _FILE_MODE, dir_fd=temp_dir)
        try:
            large = sum(len(part) for part in parts) >= DIRECT_BYTES_MIN
            (write_around_cache if large else write_all)(file, parts)
            os.fdatasync(file)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temp, dir_fd=temp_dir)
            raise
        finally:
            os.close(file)
        return temp

    def _place(self, temp_dir: int, temp: str, directory: int, name: str) -> None:
        """Name the object, or say why it cannot be."""
        leaf = name.rpartition("/")[2]
        try:
            self._name_if_absent(temp_dir, temp, directory, leaf)
        except FileExistsError:
            # Whoever learns that the object exists builds on it: its name must be durable too.
            os.fsync(directory)
            if stat.S_ISDIR(os.stat(leaf, dir_fd=directory).st_mode):
                raise StoreError(f'cannot store object "{name}": a directory has its name') from None
            raise ObjectExists(f'object "{name}" exists', detail=f"Store: {self.url}.") from None

    def _name_if_absent(self, temp_dir: int, temp: str, directory: int, leaf: str) -> None:
        """Try each placement until the file system knows one. Raises FileExistsError."""
        refusals: list[OSError] = []
        for place in self._placements:
            try:
                return place(temp_dir, temp, directory, leaf)
            except OSError as error:
                if error.errno not in UNSUPPORTED:
                    raise
                refusals.append(error)
        if all(refusal.errno == errno.EPERM for refusal in refusals):
            raise refusals[0]
        raise StoreUnfit(
            f"cannot store objects safely in {self.url}",
            detail="Its file system can neither link a file nor rename one without replacing another.",
            hints=["use a local file system, NFS, or an object store (s3://, gs://, az://)"],
        )

    # ---- directories -------------------------------------------------------------------------------------

    def _open_root(self) -> int:
        """The descriptor of the root, which is opened once. Raises FileNotFoundError."""
        with self._lock:
            if self._root_fd is None:
                self._root_fd = os.open(self._root, _DIRECTORY_FLAGS)
                weakref.finalize(self, os.close, self._root_fd)
            return self._root_fd

    def _open_for_writing(self) -> int:
        """The descriptor of the directory of temporary files; the first call creates and sweeps it."""
        try:
            root = self._open_root()
        except FileNotFoundError:
            _make_directories(self._root)
            root = self._open_root()
        with self._lock:
            if self._temp_fd is None:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(TEMP_DIRECTORY, _DIRECTORY_MODE, dir_fd=root)
                temp_dir = os.open(TEMP_DIRECTORY, _DIRECTORY_FLAGS, dir_fd=root)
                try:
                    self._sweep(temp_dir)
                except BaseException:
                    os.close(temp_dir)
                    raise
                weakref.finalize(self, os.close, temp_dir)
                self._temp_fd = temp_dir
            return self._temp_fd

    def _sweep(self, temp_dir: int) -> None:
        """
        Remove what killed puts left behind.

        A temporary file with two names was killed between naming the object and syncing that name: the object
        is visible but may not survive a power cut, so all is synced before anyone builds on it.
        """
        oldest = (self._clock.now() - TEMP_AGE_MAX).timestamp()
        with os.scandir(temp_dir) as entries:
            left = [(entry.name, info) for entry in entries if (info := _stat_if_there(entry)) is not None]
        if any(info.st_nlink > 1 for _, info in left):
            sync_file_system(temp_dir)
        for name, info in left:
            if info.st_nlink > 1 or info.st_mtime < oldest:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=temp_dir)

    @contextlib.contextmanager
    def _directory(self, path: str) -> Iterator[int]:
        """A descriptor of the directory, whose entry is durable; created where missing."""
        root = self._open_root()
        if path not in self._synced:
            self._create_directory(root, path)
        try:
            directory = os.open(path or ".", _DIRECTORY_FLAGS, dir_fd=root)
        except FileNotFoundError:
            self._create_directory(root, path)
            directory = os.open(path or ".", _DIRECTORY_FLAGS, dir_fd=root)
        try:
            yield directory
        finally:
            os.close(directory)

    def _create_directory(self, root: int, path: str) -> None:
        components = path.split("/") if path else []
        for depth, component in enumerate(components):
            parent = os.open("/".join(components[:depth]) or ".", _DIRECTORY_FLAGS, dir_fd=root)
            try:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(component, _DIRECTORY_MODE, dir_fd=parent)
                os.fsync(parent)
            finally:
                os.close(parent)
        self._synced.add(path)

    # ---- reading -----------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _opened(self, name: str) -> Iterator[int]:
        """The object's file, open for reading."""
        try:
            file = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=self._open_root())
        except (FileNotFoundError, NotADirectoryError):
            raise self._missing(name) from None
        try:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise self._missing(name)
            yield file
        finally:
            os.close(file)

    def _missing(self, name: str) -> ObjectMissing:
        return ObjectMissing(f'object "{name}" is missing', detail=f"Store: {self.url}.")

    def _walk(self, prefix: str) -> Iterator[ObjectInfo]:
        with self._errors("list", prefix):
            entries = self._scan(prefix)
        for leaf, info in entries:
            if leaf.endswith("/"):
                yield from self._walk(prefix + leaf)
            else:
                yield ObjectInfo(prefix + leaf, info.st_size, datetime.fromtimestamp(info.st_mtime, UTC))

    def _scan(self, prefix: str) -> Sequence[tuple[str, os.stat_result]]:
        """
        Entries of one directory in the order of full names: a directory sorts with the slash that follows it.
        """
        try:
            directory = os.open(prefix or ".", _DIRECTORY_FLAGS, dir_fd=self._open_root())
        except (FileNotFoundError, NotADirectoryError):
            return ()
        found: list[tuple[str, os.stat_result]] = []
        try:
            with os.scandir(directory) as entries:
                for entry in entries:
                    info = _stat_if_there(entry) if is_component(entry.name) else None
                    if info is not None and stat.S_ISDIR(info.st_mode):
                        found.append((entry.name + "/", info))
                    elif info is not None and stat.S_ISREG(info.st_mode):
                        found.append((entry.name, info))
        finally:
            os.close(directory)
        return sorted(found, key=lambda item: item[0])

    # ---- errors ------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _errors(self, verb: str, name: str) -> Iterator[None]:
        """Translate OSError to the branch StoreError."""
        try:
            yield
        except OSError as error:
            raise _store_error(error, verb=verb, name=name, url=self.url) from error


def _store_error(error: OSError, *, verb: str, name: str, url: str) -> StoreError:
    what = f'object "{name}"' if name else "objects"
    code = errno.errorcode.get(error.errno or 0, "unknown")
    detail = f"{error.strerror or error} ({code}) in {url}."
    if error.errno in _FULL:
        return StoreFull(
            f"could not {verb} {what}: the store is full",
            detail=detail,
            hints=["free space or raise the quota; what was stored before is intact"],
        )
    if error.errno in _REFUSED:
        return StorePermission(
            f"cannot {verb} {what}: the file system refuses it",
            detail=detail,
            hints=["does the user that runs cloudsave own the directory, and is it mounted read-write?"],
        )
    if error.errno in _UNFIT:
        return StoreUnfit(
            f"cannot {verb} {what}: the file system lacks what a repository needs",
            detail=detail,
            hints=["is a subdirectory of the repository a mount point or a link to another file system?"],
        )
    if error.errno in _PASSING:
        return StoreUnavailable(f"could not {verb} {what}", detail=detail)
    return StoreError(
        f"could not {verb} {what}", detail=detail, hints=["does the kernel log tell of a failing disk?"]
    )


def _read_exactly(file: int, name: str, *, offset: int, length: int) -> bytes:
    """`length` bytes from `offset`. Raises IntegrityError when the file ends before."""
    first = os.pread(file, length, offset)
    if len(first) == length:
        return first
    parts = [first]
    done = len(first)
    while done < length:
        part = os.pread(file, length - done, offset + done)
        if not part:
            raise _short(name, wanted=offset + length, size_bytes=offset + done)
        parts.append(part)
        done += len(part)
    return b"".join(parts)


def _short(name: str, *, wanted: int, size_bytes: int) -> IntegrityError:
    return IntegrityError(
        f'object "{name}" is too short',
        detail=f"It has {size_bytes} bytes; {wanted} were expected.",
    )


def _stat_if_there(entry: os.DirEntry[str]) -> os.stat_result | None:
    """The state of an entry, or None when it vanished while the directory was read."""
    try:
        return entry.stat()
    except FileNotFoundError:
        return None


def _make_directories(path: Path) -> None:
    """Create `path` and what is missing above it, and make all their entries durable."""
    missing = [path, *(parent for parent in path.parents if not parent.exists())]
    for directory in reversed(missing):
        with contextlib.suppress(FileExistsError):
            os.mkdir(directory, _DIRECTORY_MODE)
        parent = os.open(directory.parent, _DIRECTORY_FLAGS)
        try:
            os.fsync(parent)
        finally:
            os.close(parent)
