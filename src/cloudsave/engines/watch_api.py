"""The seam of watching: what a running capture asks its source beside the log, on a session of its own."""

from __future__ import annotations

from typing import Protocol


class SourceWatch(Protocol):
    """A session of its own, opened when first asked. Each call may block; one thread."""

    def beat(self) -> int | None:
        """
        Commit something harmless of ours; the end of the log that holds it. None: the source is a replica,
        where nothing can be committed. Raises: EngineError.
        """

    def retained_bytes(self, slot: str) -> int | None:
        """Log that the source keeps for `slot`; None where there is no such slot. Raises: EngineError."""

    def close(self) -> None:
        """Leave the session. Never raises."""
