"""
The seam of engines: they answer questions and yield bytes; the flow owns the life cycle.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from typing import Protocol

from cloudsave.engines.dialect_api import Dialect
from cloudsave.model.engine_facts import (
    BackupStart,
    BackupStop,
    BranchEnd,
    LogChunk,
    LogHead,
    ServerRequest,
    ServerState,
    SlotState,
)
from cloudsave.model.finding import Finding
from cloudsave.model.identity import SourceIdentity
from cloudsave.model.item import Piece
from cloudsave.model.position import Position


class BackupSource(Protocol):
    """One base backup: begin, pieces (all), finish; or abort at any time. One thread, one held session."""

    def begin(self) -> BackupStart:
        """Put the server into backup mode (or start the stream)."""

    def pieces(self) -> Iterator[Piece]:
        """All pieces, those of a file in order; other threads may read them while more are fetched."""

    def finish(self) -> BackupStop:
        """End the backup. Called when every piece has been read."""

    def abort(self) -> None:
        """Undo `begin`; never raises; harmless after `finish`."""


class LogSource(Protocol):
    """A source's log as a stream. Not thread-safe but for `acknowledge`."""

    def connect(self) -> LogHead:
        """Connect, see to the slot. Raises: CaptureRunning, SlotLost, EngineUnavailable."""

    def stream(self, start: Position) -> Generator[LogChunk | BranchEnd, None, None]:
        """Log from `start` on, until closed or the branch ends. Raises: LogRemoved, EngineUnavailable."""

    def history(self, branch: str) -> bytes:
        """The raw history file of a branch (to be asked for when not streaming)."""

    def acknowledge(self, position: Position) -> None:
        """All log before `position` is durable; the server may recycle it."""

    def replace_slot(self) -> None:
        """Drop a slot that is lost; the next `connect` makes a new one."""

    def close(self) -> None:
        """Leave the connection; the slot stays. Never raises."""


class RestoreTarget(Protocol):
    """
    A restored data directory that becomes a server. Order: configure, start, await_target, then promote or
    stop.
    """

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

    def connection_url(self) -> str:
        """The URL by which the server, once started, can be connected to."""


class Engine(Protocol):
    """One source, connected to on demand."""

    @property
    def dialect(self) -> Dialect: ...

    def identify(self) -> SourceIdentity:
        """Ask the server who it is. Raises: EngineUnavailable, PermissionMissing, UnsupportedVersion."""

    def findings(self) -> Sequence[Finding]:
        """Is it protectable: settings, rights, log, space."""

    def backup_source(self, *, mode: str, fast: bool, label: str) -> BackupSource:
        """A base backup by `mode` "auto", "local" or "remote"; `fast` asks for an immediate checkpoint."""

    def log_source(self, *, slot: str, temporary: bool, synchronous: bool = False) -> LogSource:
        """The log of the source through a replication slot; `synchronous`: commits wait for `acknowledge`."""

    def slot_state(self, slot: str) -> SlotState:
        """Whether the source keeps log in `slot`, and whether somebody fetches it."""
