"""The seam of data directories that are there already: looked at, never written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from cloudsave.model.engine_facts import DirectoryFacts


class DirectoryInspector(Protocol):
    """Says what a directory is, and which server uses it."""

    def inspect(self, directory: Path) -> DirectoryFacts | None:
        """
        What is known of a data directory; None where `directory` is none.

        Raises: TargetDirectoryInUse where it cannot be looked into.
        """

    def users_of(self, places: Sequence[Path]) -> str:
        """
        Which running server has its data, log or a tablespace in, above or below one of `places`; "" where
        none has that can be seen from this process.
        """

    def end_server(self, directory: Path) -> None:
        """
        End the server that runs on a directory of ours, one that was left behind, and wait for it. Harmless
        where there is none. Raises: ServerDidNotStart where it does not end.
        """
