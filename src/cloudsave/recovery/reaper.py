"""
Removes a sandbox whose owner died: waits at a pipe that closes with its owner, however that ends.

Run as `python -m cloudsave.recovery.reaper ENGINE DIRECTORY`, by `sandbox.py`. It is told "done" where the
owner has cleaned up itself.
"""

from __future__ import annotations

import shutil
import sys
from contextlib import suppress
from pathlib import Path

from cloudsave.engines.registry import directory_inspector
from cloudsave.errors import CloudsaveError

DATA_NAME = "data"
"""The data directory in a sandbox."""
DONE = b"done\n"


def reap(engine: str, directory: Path) -> None:
    """End the server of a sandbox and remove all of it. Never raises for what is gone already."""
    with suppress(CloudsaveError):
        directory_inspector(engine).end_server(directory / DATA_NAME)
    shutil.rmtree(directory, ignore_errors=True)


def main() -> None:
    """Wait for the owner's end."""
    engine, directory = sys.argv[1:]
    if sys.stdin.buffer.read() != DONE:
        reap(engine, Path(directory))


if __name__ == "__main__":
    main()
