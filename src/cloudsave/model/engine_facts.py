"""What engines say: frozen answers that cross the seam of `engines/api.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cloudsave.model.identity import SourceIdentity
from cloudsave.model.item import CorruptPage, Item, LateFile
from cloudsave.model.position import Position


@dataclass(frozen=True, slots=True)
class LogAtHand:
    """
    A source whose own log files can be read. `read(begin, end)` gives the log of a branch from a position up
    to an offset, less where files are missing; only log that the source has made durable may be asked for.
    Raises: SourceUnreadable.
    """

    identity: SourceIdentity
    read: Callable[[Position, int], bytes]


@dataclass(frozen=True, slots=True)
class BackupStart:
    """A base backup has begun."""

    position: Position
    method: str
    bytes_expected: int
    tablespaces: Mapping[str, str]
    settings: Mapping[str, str]
    clock_us: int
    """The source's clock after it had begun: no commit before `position` has a later instant."""
    notes: tuple[str, ...] = ()
    block_position: Callable[[bytes], int] | None = None
    """
    Where the last logged change ends that a block has, by the block itself. None: blocks that are not wanted
    cannot be left unread.
    """
    log_at_hand: LogAtHand | None = None
    changes_told: Callable[[Position, int], Iterable[npt.NDArray[np.void]]] | None = None
    """
    Asks the source itself which blocks changed from an earlier position up to this one, on one branch that
    began at an offset: parts of sorted changes (`model.changes`). Raises: EngineError. None: it cannot tell.
    """


@dataclass(frozen=True, slots=True)
class BackupStop:
    """A base backup is complete but for the log up to `position`."""

    position: Position
    directories: tuple[Item, ...]
    """Directories and links, parents before children."""
    late_files: tuple[LateFile, ...]
    corrupt_pages: tuple[CorruptPage, ...]
    notes: tuple[str, ...] = ()
    settings: Mapping[str, str] = field(default_factory=dict)
    """What is known only now of what a restore needs."""


@dataclass(frozen=True, slots=True)
class LogChunk:
    """
    Log bytes [offset, offset + len(data)) of `branch`; empty data is a sign of life (keep-alive, time-out
    of the wait).
    """

    branch: str
    offset: int
    data: bytes
    server_end: int
    """The end of the log on the server when it was sent; 0 where the server said nothing."""
    complete_until_us: int = 0
    """An instant such that every commit acknowledged before it ends in or before this chunk; 0: unknown."""


@dataclass(frozen=True, slots=True)
class BranchEnd:
    """`branch` ends at `end_offset`; the source goes on with `next_branch`."""

    branch: str
    end_offset: int
    next_branch: str


class SlotState(StrEnum):
    """What a source has kept for capture of its log."""

    ABSENT = "absent"
    """Nothing is kept: capture has never run, or its slot was dropped."""
    IDLE = "idle"
    """Log is kept, and nobody fetches it."""
    ACTIVE = "active"
    """A capture runs."""


@dataclass(frozen=True, slots=True)
class LogHead:
    """The state of a source's log when connected."""

    identity: SourceIdentity
    current: Position
    slot_offset: int | None
    """The oldest log that the slot holds; None where it holds none."""
    slot_created: bool


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
    recovery_end: int
    """Recovery stops at the first record that begins here or later."""
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
    opened_before: bool = False
    """
    It was opened by an earlier run: where its replay ended stands in the history that it wrote; which
    transaction was the last one, it does not know any more.
    """


@dataclass(frozen=True, slots=True)
class PresentLog:
    """A file of log, or a history file, that lies in a data directory."""

    path: Path
    branch: str
    begin: int
    end: int
    """Equal to `begin`: a history file, which holds no log."""


@dataclass(frozen=True, slots=True)
class DirectoryFacts:
    """A data directory, looked at without its server."""

    lineage: str
    """Whose it is; "" where its control file is missing or damaged."""
    in_use: str
    """Why a server may be running in it or in one of its tablespaces; "": none does."""
    tablespaces: Mapping[str, Path]
    """Tablespace oid to where its link leads."""
    log_directory: Path
    """Where its log is, any link followed."""
    log_files: tuple[PresentLog, ...]
    """Log that was written there; files that wait to be written again are left out."""
