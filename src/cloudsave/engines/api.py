"""
The seam of engines. An engine answers questions and yields bytes; the flow (backup, logs, recovery) owns the life cycle.

A `Dialect` knows an engine's formats without a server; an `Engine` is a Dialect's view of one running source.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cloudsave.model.finding import Finding
from cloudsave.model.history import BranchPoint
from cloudsave.model.identity import SourceIdentity
from cloudsave.model.item import CorruptPage, Item, LateFile, Piece
from cloudsave.model.log import LogIndex
from cloudsave.model.position import Position


@dataclass(frozen=True, slots=True)
class BackupStart:
    """A base backup has begun."""

    position: Position
    method: str
    bytes_expected: int
    tablespaces: Mapping[str, str]
    settings: Mapping[str, str]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class BackupStop:
    """A base backup is complete but for the log up to `position`."""

    position: Position
    directories: tuple[Item, ...]
    """Directories and links, parents before children."""
    late_files: tuple[LateFile, ...]
    corrupt_pages: tuple[CorruptPage, ...]
    notes: tuple[str, ...] = ()


class BackupSource(Protocol):
    """One base backup. Order: begin, pieces (to the end), finish; or abort at any time. One thread, one held session."""

    def begin(self) -> BackupStart:
        """Put the server into backup mode (or start the stream)."""

    def pieces(self) -> Iterator[Piece]:
        """All pieces of all files, large files first; they may be read by other threads while more are fetched."""

    def finish(self) -> BackupStop:
        """End the backup. Called when every piece has been read."""

    def abort(self) -> None:
        """Undo `begin`; never raises; harmless after `finish`."""


@dataclass(frozen=True, slots=True)
class LogChunk:
    """Log bytes [offset, offset + len(data)) of `branch`; empty data is a sign of life (keep-alive, time-out of the wait)."""

    branch: str
    offset: int
    data: bytes
    server_clock_us: int
    """The source's clock when it was sent; 0 where the server said nothing."""
    server_end: int
    """The end of the log on the server at that time."""


@dataclass(frozen=True, slots=True)
class BranchEnd:
    """`branch` ends at `end_offset`; the source goes on with `next_branch`."""

    branch: str
    end_offset: int
    next_branch: str


@dataclass(frozen=True, slots=True)
class LogHead:
    """The state of a source's log when connected."""

    identity: SourceIdentity
    current: Position
    slot_offset: int | None
    """The oldest log that the slot holds; None where it holds none."""
    slot_created: bool


class LogSource(Protocol):
    """A source's log as a stream. Not thread-safe but for `acknowledge`."""

    def connect(self) -> LogHead:
        """Connect, see to the slot. Raises: CaptureRunning, SlotLost, EngineUnavailable, PermissionMissing."""

    def stream(self, start: Position) -> Iterator[LogChunk | BranchEnd]:
        """Log from `start` on, for ever or to the end of the branch. Raises: LogRemoved, EngineUnavailable."""

    def history(self, branch: str) -> bytes:
        """The raw history file of a branch (to be asked for when not streaming)."""

    def acknowledge(self, position: Position) -> None:
        """All log before `position` is durable; the server may recycle it."""

    def close(self) -> None:
        """Leave the connection; the slot stays. Never raises."""


class LogIndexer(Protocol):
    """Reads consecutive log bytes and says what is in them."""

    def feed(self, data: bytes) -> None:
        """The next bytes. Raises: IntegrityError where they are not valid log."""

    def take(self) -> LogIndex:
        """What the bytes since the last `take` contained; offsets absolute. `complete_until_us` is left 0."""


@dataclass(frozen=True, slots=True)
class ServerRequest:
    """How to run a restored server."""

    data_directory: Path
    bin_directory: Path | None
    """Where the server's programs are; None: search."""
    port: int | None
    private_socket: bool
    """Listen on nothing but a private Unix socket directory."""
    fetch_command: str
    """The command that recovery runs for each log file; `%f` name, `%p` destination."""
    recovery_end: int | None
    """Offset at which recovery stops; None: as soon as the backup is consistent."""
    inclusive: bool
    """Whether a record that begins at `recovery_end` is replayed."""
    branch: str
    consistent_offset: int
    settings: Mapping[str, str]
    """More settings to set."""


@dataclass(frozen=True, slots=True)
class ServerState:
    """What a restored server said when asked."""

    in_recovery: bool
    paused_at_target: bool
    replayed_offset: int | None
    branch: str
    last_commit_us: int | None


class RestoreTarget(Protocol):
    """A restored data directory that becomes a server. Order: configure, start, await_target, then promote or stop."""

    def configure(self, request: ServerRequest) -> None:
        """Write recovery settings into the directory. Idempotent."""

    def start(self) -> None:
        """Start the server. Raises: ServerDidNotStart, ServerToolsMissing."""

    def await_target(self, *, timeout_seconds: float) -> ServerState:
        """Wait until the server has paused at its target; the state as queried. Raises: ServerDidNotStart."""

    def promote(self, *, timeout_seconds: float) -> ServerState:
        """Open the server for writing on a new branch and return the state as queried."""

    def stop(self) -> None:
        """Stop the server if it runs."""

    def connection_hint(self) -> str:
        """The command with which a person connects."""


class Dialect(Protocol):
    """What an engine knows without a server: its formats."""

    name: str

    def parse_position(self, text: str, *, branch: str) -> int:
        """An offset from its text form. Raises: UsageError."""

    def format_position(self, position: Position) -> str:
        """The text form that the engine's own tools print."""

    def parse_history(self, content: bytes) -> tuple[BranchPoint, ...]:
        """A raw history file. Raises: IntegrityError."""

    def indexer(self, start: Position, *, log_file_bytes: int, system_identifier: str) -> LogIndexer:
        """An indexer for the log from `start` (a record boundary or the start of a log file)."""

    def log_file_name(self, branch: str, offset: int, *, log_file_bytes: int) -> str:
        """The name of the log file that holds `offset`."""

    def parse_log_file_name(self, name: str, *, log_file_bytes: int) -> Position | None:
        """The begin of the log file called `name`; None where it is not a log file's name."""


class Engine(Protocol):
    """One source, connected to on demand."""

    dialect: Dialect

    def identify(self) -> SourceIdentity:
        """Ask the server who it is. Raises: EngineUnavailable, PermissionMissing, UnsupportedVersion."""

    def findings(self) -> Sequence[Finding]:
        """Is it protectable: settings, rights, log, space."""

    def backup_source(self, *, mode: str, fast: bool, label: str) -> BackupSource:
        """A base backup by `mode` "auto", "local" or "remote"; `fast` asks for an immediate checkpoint."""

    def log_source(self, *, slot: str, temporary: bool) -> LogSource:
        """The log of the source through a replication slot."""
