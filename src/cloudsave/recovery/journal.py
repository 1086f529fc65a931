"""
The journal of a restore: what makes it go on after a kill, and nothing else write into its directory.

`cloudsave.restore.json` says whose restore this is and how far it is; `cloudsave.restore.packs` has a line
for each pack whose bytes have been written. Both lie in the directory restored into and go away at the end.
Written bytes survive the death of the process but perhaps not of the machine: after a reboot, every pack is
fetched again.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from cloudsave.errors import LockError, TargetDirectoryInUse

JOURNAL_NAME = "cloudsave.restore.json"
PACKS_NAME = "cloudsave.restore.packs"
_NEW_NAME = "cloudsave.restore.json.new"
LEFT_BEFORE_BEGIN = frozenset({_NEW_NAME})
"""What a kill in the very first step leaves behind."""
JOURNAL_FILES = frozenset({JOURNAL_NAME, PACKS_NAME, _NEW_NAME})
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class JournalHead:
    """Whose restore this is."""

    files_digest: str
    """Of what the files depend on: lineage, backup, tablespace directories."""
    recovery_digest: str
    """Of what replay depends on; "" until the files are complete."""
    boot_id: str
    backup_id: str = ""
    recovery_end: int | None = None
    """Where the replay that was begun ends; None until the files are complete, or where none will follow."""
    inclusive: bool = True
    branch: str = ""
    format: int = 1
    lineage: str = ""
    """Whose data the directory holds; it has no control file that could tell."""
    delta: bool = False
    """It was begun over other files, which must be compared: nothing says which of them are written."""


@dataclass(frozen=True, slots=True)
class ReplayStop:
    """The backup that was restored, and where its replay is to end."""

    backup_id: str = ""
    recovery_end: int | None = None
    inclusive: bool = True
    branch: str = ""


def read_head(directory: Path) -> JournalHead | None:
    """The journal of an unfinished restore; None where there is none. Raises: TargetDirectoryInUse."""
    try:
        return JournalHead(**json.loads((directory / JOURNAL_NAME).read_bytes()))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, TypeError) as error:
        raise TargetDirectoryInUse(
            f"journal of an earlier restore is damaged: {directory / JOURNAL_NAME}",
            hints=["remove the directory and restore again"],
        ) from error


class Journal:
    """The journal of one directory, locked while open."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._lock = threading.Lock()
        self._descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._descriptor)
            raise LockError(
                f"another restore into {directory} is running", hints=["wait for it, or stop it"]
            ) from error

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)

    def head(self) -> JournalHead | None:
        """The journal of an unfinished restore; None where there is none. Raises: TargetDirectoryInUse."""
        return read_head(self._directory)

    def begin(self, files_digest: str, backup_id: str = "", lineage: str = "") -> frozenset[str]:
        """Start or take up a restore; the packs that need not be fetched again."""
        found = self.head()
        boot_id = current_boot_id()
        if found is not None and found.boot_id == boot_id and boot_id:
            return self._packs()
        self._unlink(PACKS_NAME)
        self._write(JournalHead(files_digest, "", boot_id, backup_id, lineage=lineage))
        return frozenset()

    def begin_delta(self, files_digest: str, backup_id: str, lineage: str) -> None:
        """Start a restore over what is there, or take one up."""
        self._unlink(PACKS_NAME)
        head = JournalHead(files_digest, "", current_boot_id(), backup_id, lineage=lineage, delta=True)
        self._write(head)

    def pack_done(self, pack: str) -> None:
        """Note that all bytes of a pack are written. From any thread."""
        with self._lock:
            descriptor = os.open(
                self._directory / PACKS_NAME, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600
            )
            try:
                os.write(descriptor, f"{pack}\n".encode())
            finally:
                os.close(descriptor)

    def files_complete(self, files_digest: str, recovery_digest: str, replay: ReplayStop) -> None:
        """All files are complete and on stable storage; from here on the directory belongs to the server."""
        self._write(JournalHead(files_digest, recovery_digest, current_boot_id(), **asdict(replay)))

    def forget_files(self, head: JournalHead) -> None:
        """None of the files counts as written any more; it is the same restore still."""
        self._unlink(PACKS_NAME)
        self._write(JournalHead(head.files_digest, "", "", head.backup_id, lineage=head.lineage))

    def finish(self) -> None:
        """The restore is over."""
        self._unlink(PACKS_NAME)
        self._unlink(JOURNAL_NAME)
        os.fsync(self._descriptor)

    def _packs(self) -> frozenset[str]:
        try:
            content = (self._directory / PACKS_NAME).read_text()
        except FileNotFoundError:
            return frozenset()
        return frozenset(content.split("\n")[:-1])

    def _write(self, head: JournalHead) -> None:
        new = self._directory / _NEW_NAME
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.write(descriptor, json.dumps(asdict(head)).encode())
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        new.replace(self._directory / JOURNAL_NAME)
        os.fsync(self._descriptor)

    def _unlink(self, name: str) -> None:
        (self._directory / name).unlink(missing_ok=True)


def current_boot_id() -> str:
    """What tells this run of the machine from any other; "" where the system does not say."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""
