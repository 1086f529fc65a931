"""The seam of purging: log files that a server keeps for its own time, and may lose when they are stored."""

from __future__ import annotations

from typing import Protocol

from cloudsave.model.held_log import HeldFile, HeldLog


class LogPurger(Protocol):
    """A session with a server and with each replica that is named, opened when first asked. One thread."""

    def look(self) -> HeldLog:
        """What the server holds now, and who reads it. Raises: EngineError, PermissionMissing."""

    def remove_before(self, file: HeldFile) -> None:
        """Have the server remove all files that are older than `file`. Raises: EngineError."""

    def close(self) -> None:
        """Leave the sessions. Never raises."""
