"""
Every error that cloudsave raises. Libraries raise, only `cli/main.py` prints and exits.

A message is one line, lower case, without a full stop, and names the kind of object: "could not" may work
later, "cannot" never will. Detail is a sentence with facts; a hint is a question or a command. Codes are
never reused and each has a section in docs/messages.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import IntEnum


class ExitCode(IntEnum):
    """Process exit codes, the same for every command (docs/design: command line)."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    FINDINGS = 3
    UNREACHABLE = 4
    INTEGRITY = 5
    BUSY = 6
    CANCELLED = 130


class CloudsaveError(Exception):
    """Root of all errors: a fact, a detail and hints, with a stable code."""

    code = "CS-0001"
    exit_code = ExitCode.FAILED
    retryable = False

    def __init__(self, message: str, *, detail: str = "", hints: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.detail = detail
        self.hints = tuple(hints)

    def __str__(self) -> str:
        lines = [f"error[{self.code}]: {self.message}"]
        if self.detail:
            lines.append(f"detail: {self.detail}")
        lines.extend(f"hint: {hint}" for hint in self.hints)
        return "\n".join(lines)


class LocalDiskFull(CloudsaveError):
    """This machine has no space left, not the store."""

    code = "CS-0002"


class OutOfMemory(CloudsaveError):
    """The process could not get memory."""

    code = "CS-0003"


# ---- usage: what was asked for cannot be understood or is not allowed
# ------------------------------------------------
class UsageError(CloudsaveError):
    """The command line or the configuration is wrong."""

    code = "CS-1001"
    exit_code = ExitCode.USAGE


class ConfigurationError(UsageError):
    """A configuration file or environment variable cannot be used."""

    code = "CS-1002"


class TimeWithoutZone(UsageError):
    """A time was given without a zone, which would restore to the wrong moment in silence."""

    code = "CS-1003"


class UnknownSource(UsageError):
    """A source name is not in the configuration."""

    code = "CS-1004"


class UnknownBackup(UsageError):
    """A backup id is not in the repository."""

    code = "CS-1005"


class SecretInline(UsageError):
    """A secret was given where it would be stored or shown in the clear."""

    code = "CS-1006"


class UnusableUrl(UsageError):
    """A URL of a store or source cannot be understood."""

    code = "CS-1007"


class UnknownRelation(UsageError):
    """A relation is in nothing that was searched."""

    code = "CS-1008"


# ---- engine: the database server
# --------------------------------------------------------------------------------------
class EngineError(CloudsaveError):
    """The database server refused or failed."""

    code = "CS-2001"


class EngineUnavailable(EngineError):
    """The server cannot be connected to now."""

    code = "CS-2002"
    retryable = True


class PermissionMissing(EngineError):
    """The role lacks a right."""

    code = "CS-2003"


class UnsuitableSettings(EngineError):
    """The server is set up in a way that makes what was asked for impossible."""

    code = "CS-2004"


class UnsupportedVersion(EngineError):
    """A server version that this release does not support."""

    code = "CS-2005"


class SlotLost(EngineError):
    """The replication slot is gone or invalidated, or its log has been removed."""

    code = "CS-2006"


class ForeignSystem(EngineError):
    """The server is not the one that this source's history belongs to."""

    code = "CS-2007"
    exit_code = ExitCode.INTEGRITY


class LogRemoved(EngineError):
    """The server no longer has the log that is needed to continue without a hole."""

    code = "CS-2008"


class ServerDidNotStart(EngineError):
    """A restored server did not reach the wanted state."""

    code = "CS-2009"


class ServerToolsMissing(EngineError):
    """The programs of the database server are not installed in a fitting version."""

    code = "CS-2010"


class BackupNotCovered(EngineError):
    """The log that makes a base backup consistent did not become durable in time."""

    code = "CS-2011"
    retryable = True


class SourceUnreadable(EngineError):
    """A file of the data directory cannot be read."""

    code = "CS-2012"


class BackupLogLost(EngineError):
    """Log that makes a base backup consistent is lost for good, so that this backup will never be usable."""

    code = "CS-2013"


class ExtractionFailed(EngineError):
    """Objects could not be taken out of a restored server, or not be put into another."""

    code = "CS-2020"


class BackupInvalidated(EngineError):
    """The server changed during a base backup so that what was read is worthless; a new one may succeed."""

    code = "CS-2015"
    retryable = True


# ---- store -----------------------------------------------------------------------------------------------
# ---------------
class StoreError(CloudsaveError):
    """The object store or directory failed."""

    code = "CS-4001"


class StoreUnavailable(StoreError):
    """A store operation failed in a way that may pass: time-out, 5xx, connection lost."""

    code = "CS-4002"
    retryable = True


class ObjectMissing(StoreError):
    """An object is not in the store."""

    code = "CS-4003"


class ObjectExists(StoreError):
    """A put-if-absent found an object of that name."""

    code = "CS-4004"


class StoreFull(StoreError):
    """No space or quota is left."""

    code = "CS-4005"


class StorePermission(StoreError):
    """The store's credentials do not allow the operation."""

    code = "CS-4006"


class StoreUnfit(StoreError):
    """The store does not keep a promise that the repository needs."""

    code = "CS-4007"


class NoRepository(StoreError):
    """There is no cloudsave repository at this place."""

    code = "CS-4008"
    exit_code = ExitCode.USAGE


class RepositoryExists(StoreError):
    """A repository, or something else, is already at this place."""

    code = "CS-4009"
    exit_code = ExitCode.USAGE


# ---- recovery --------------------------------------------------------------------------------------------
# ---------------
class RecoveryError(CloudsaveError):
    """A restore failed."""

    code = "CS-5002"


@dataclass(frozen=True, slots=True)
class ReachablePoint:
    """A state that can be reached: its position in the engine's text form and its instant where known."""

    position: str
    instant: datetime | None


class TargetUnreachable(RecoveryError):
    """
    The wanted state cannot be reached from what is stored; nothing was touched.

    `before` and `after` are the nearest reachable states on both sides; None: there is none on that side.
    """

    code = "CS-5001"
    exit_code = ExitCode.UNREACHABLE

    def __init__(
        self,
        message: str,
        *,
        detail: str = "",
        hints: Sequence[str] = (),
        before: ReachablePoint | None = None,
        after: ReachablePoint | None = None,
    ) -> None:
        super().__init__(message, detail=detail, hints=hints)
        self.before = before
        self.after = after


class TargetDirectoryInUse(RecoveryError):
    """The directory to restore into is not empty, or belongs to another restore."""

    code = "CS-5003"
    exit_code = ExitCode.USAGE


class NotEnoughSpace(RecoveryError):
    """The target file system is too small."""

    code = "CS-5004"


class RecoveryMismatch(RecoveryError):
    """The started server is not in the state that the plan promised."""

    code = "CS-5005"
    exit_code = ExitCode.INTEGRITY


class LogNotInArchive(RecoveryError):
    """A log segment is proved to be beyond the end of the archive; `logs fetch` exits with 1."""

    code = "CS-5006"


class ObjectsNotFound(RecoveryError):
    """A database or table to be extracted is not in the restored server."""

    code = "CS-5010"
    exit_code = ExitCode.USAGE


class DestinationUnfit(RecoveryError):
    """The place that extracted objects are to go to cannot take them; nothing was restored."""

    code = "CS-5011"
    exit_code = ExitCode.USAGE


class LogNotStored(RecoveryError):
    """No log of the wanted time is stored, so that nothing can be said about it."""

    code = "CS-5007"
    exit_code = ExitCode.UNREACHABLE


# ---- integrity: never retried, always alarmed
# ---------------------------------------------------------------------------
class IntegrityError(CloudsaveError):
    """Stored or received bytes are not what they must be."""

    code = "CS-6001"
    exit_code = ExitCode.INTEGRITY


class WrongKey(IntegrityError):
    """No key that was given opens this repository."""

    code = "CS-6002"


class FormatUnsupported(IntegrityError):
    """An object has a format version or feature that this release cannot read."""

    code = "CS-6003"


class LogHole(IntegrityError):
    """The log has a hole."""

    code = "CS-6004"


class LogConflict(IntegrityError):
    """Log with the same place and other content is already stored."""

    code = "CS-6005"


class PageCorrupt(IntegrityError):
    """A page of the source fails its checksum for good."""

    code = "CS-6006"


class LogDamaged(IntegrityError):
    """Bytes are not what a server writes as log, at `offset` of the log (None: unknown)."""

    code = "CS-6007"

    def __init__(
        self, message: str, *, detail: str = "", hints: Sequence[str] = (), offset: int | None = None
    ) -> None:
        super().__init__(message, detail=detail, hints=hints)
        self.offset = offset


class ReferencesUnknown(IntegrityError):
    """What is still needed cannot be told, so that nothing may be deleted."""

    code = "CS-6008"


# ---- locks -----------------------------------------------------------------------------------------------
# ---------------
class LockError(CloudsaveError):
    """Another process holds what is needed."""

    code = "CS-7001"
    exit_code = ExitCode.BUSY


class CaptureRunning(LockError):
    """The replication slot is in use by another capture."""

    code = "CS-7002"


class GenerationFenced(LockError):
    """A newer writer has taken over; this one must stop."""

    code = "CS-7003"


class BackupCondemned(LockError):
    """A backup is being expired by another process."""

    code = "CS-7004"


class Cancelled(CloudsaveError):
    """The user stopped the command."""

    code = "CS-9001"
    exit_code = ExitCode.CANCELLED
