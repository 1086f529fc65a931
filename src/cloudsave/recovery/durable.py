"""What has been written is on stable storage."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from cloudsave.store.posix_calls import sync_file_system


def sync_file_systems(places: Sequence[Path]) -> None:
    """Everything written to the file systems of `places` is on stable storage. Raises: OSError."""
    for place in places:
        if not place.exists():
            continue
        descriptor = os.open(place, os.O_RDONLY)
        try:
            sync_file_system(descriptor)
        except OSError as error:
            error.filename = str(place)
            raise
        finally:
            os.close(descriptor)


def sync_directory(path: str | Path) -> None:
    """The entries of a directory are on stable storage."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
