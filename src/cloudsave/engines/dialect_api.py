"""The seam of formats: what an engine knows of its log without a server."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from cloudsave.model.history import BranchPoint
from cloudsave.model.log import LogIndex
from cloudsave.model.position import Position


class LogIndexer(Protocol):
    """Reads consecutive log bytes and says what is in them."""

    def feed(self, data: bytes | memoryview) -> None:
        """The next bytes. Raises: IntegrityError where they are not valid log."""

    def take(self) -> LogIndex:
        """What the bytes since the last `take` contained; offsets absolute. `complete_until_us` is left 0."""


class Dialect(Protocol):
    """What an engine knows without a server: its formats."""

    name: str
    instants_at_commit: bool
    """
    Whether a commit's instant is that of the commit, so that a later commit has an earlier one only where the
    clock was set back. Else it is that of the statement, which may have run for long.
    """

    def parse_position(self, text: str, *, branch: str) -> int:
        """An offset from its text form. Raises: UsageError."""

    def format_position(self, position: Position) -> str:
        """The text form that the engine's own tools print."""

    def parse_history(self, content: bytes) -> tuple[BranchPoint, ...]:
        """A raw history file. Raises: IntegrityError."""

    def first_branch(self, system_identifier: str) -> str:
        """The branch of a system that has no history."""

    def transaction_text(self, log: memoryview) -> str:
        """The full name of the transaction that begins with `log`; "" where its number is all it has."""

    def parse_transaction(self, text: str) -> int:
        """The number by which the index knows a transaction. Raises: UsageError."""

    def indexer(self, start: Position, *, log_file_bytes: int, system_identifier: str) -> LogIndexer:
        """An indexer for the log from `start` (a record boundary or the start of a log file)."""

    def log_file_name(self, branch: str, offset: int, *, log_file_bytes: int) -> str:
        """The name of the log file that holds `offset`."""

    def parse_log_file_name(self, name: str, *, log_file_bytes: int) -> Position | None:
        """The begin of the log file called `name`; None where it is none's name."""

    def check_replay(
        self, log: bytes | bytearray, *, until: int, log_file_bytes: int, directory: Path
    ) -> None:
        """Raises: TargetDirectoryInUse where replay up to `until` would write where something else does."""
