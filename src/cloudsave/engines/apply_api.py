"""
The seam of engines whose servers do not fetch their log by themselves: the log is laid out as files, and the
restored server's own replication applies it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True, slots=True)
class ApplyRequest:
    """A directory with the files of a base backup, and how to run a server on it."""

    data_directory: Path
    bin_directory: Path | None
    """Where the server's programs are; None: search."""
    server_version: str
    base: Mapping[str, str]
    """The settings that the backup has recorded."""
    settings: Mapping[str, str]
    """Settings that the user gave, by name."""


@dataclass(frozen=True, slots=True)
class ApplyLog:
    """Log files in a directory of this restore's own, which the applier may change, and where to stop."""

    directory: Path
    files: tuple[tuple[str, int], ...]
    """Name and offset of the begin of each, in order."""
    stop: int
    """Stop before the first record that begins here or later..."""
    inclusive: bool
    """...or after the one that begins at `stop`."""


@dataclass(frozen=True, slots=True)
class AppliedState:
    """Where a server is, as it said when asked, and where it was to be; in the engine's words."""

    reached: str
    wanted: str


class LogApplier(Protocol):
    """
    A restored directory on its way to a state. Order: prepare, start, apply, then hand_over or look; stop
    at any time. After `prepare` has begun the files are the backup's no more.
    """

    def prepare(self, request: ApplyRequest) -> None:
        """Make the copied files consistent. Raises: ServerToolsMissing, ServerDidNotStart."""

    def start(self, log: ApplyLog) -> None:
        """
        Make the log ready and start the server, private. Raises: ServerToolsMissing, ServerDidNotStart,
        IntegrityError.
        """

    def apply(self, passed: Callable[[int], None]) -> AppliedState:
        """
        Apply the log; `passed` is told the offset reached now and then. Raises: RecoveryError,
        IntegrityError.
        """

    def look(self) -> str:
        """Let nobody write; the URL by which the server can be looked at."""

    def hand_over(self) -> None:
        """Take back what was needed for the restore, and shut the server down in order."""

    def stop(self) -> None:
        """Stop all that runs. Never raises."""
