"""The seam of sort orders: what a restored server's host sorts otherwise than the source's did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from cloudsave.model.collation import CollationChange


class CollationInspector(Protocol):
    """Asks a running server, by its URL."""

    def changes(self, url: str, recorded: Mapping[str, str]) -> Sequence[CollationChange]:
        """
        Where indexes may be out of order on this host. `recorded`: the settings that the backup recorded.

        Raises: EngineError.
        """
