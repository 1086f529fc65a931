"""The seam of extraction: single databases and tables out of a restored server that is read-only."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from cloudsave.model.extract import DumpFormat, FoundObjects, Selection


class Extractor(Protocol):
    """
    Takes objects out of one server and puts them into another. Order: check_destination where there is one,
    then (with the server running) find, dump, and last load.
    """

    forms: tuple[DumpFormat, ...]
    """The forms that it can write."""

    def check_destination(self, url: str, selection: Selection, *, replace: bool) -> None:
        """
        See, before any work, whether the server at `url` can take the objects.

        Raises: EngineUnavailable, UnusableUrl, DestinationUnfit.
        """

    def find(self, url: str, selection: Selection) -> FoundObjects:
        """
        The objects of a selection in the restored server, and what they need.

        Raises: ObjectsNotFound, with near names.
        """

    def dump(
        self, url: str, found: FoundObjects, file: Path, *, form: DumpFormat, replace: bool, into: str = ""
    ) -> None:
        """
        Write a new file with the objects: as SQL with all that they need (but for what the server `into` has
        already), or as an archive. With `replace` existing ones are dropped on loading.

        Raises: ExtractionFailed.
        """

    def load(self, url: str, file: Path, *, form: DumpFormat, replace: bool) -> None:
        """
        Load a file, in one transaction where the engine can.

        Raises: ExtractionFailed; the server is as it was then.
        """
