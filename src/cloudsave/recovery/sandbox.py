"""
A directory for a restored server that serves one purpose and then is gone, also where cloudsave was killed: a
process waits at a pipe for our end, and what a dead machine left behind is removed by the next one.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cloudsave.recovery.reaper import DONE, reap

PREFIX = "cloudsave-sandbox-"
NEW_PREFIX = "cloudsave-new-"
REAPER_SECONDS_MAX = 10.0
ROOT_MODE = 0o711
"""Of a directory that is made for sandboxes: the server's user passes through to its own."""


@contextmanager
def sandbox(root: Path, engine: str) -> Iterator[Path]:
    """
    A new private directory below `root`; the data directory goes to `reaper.DATA_NAME` in it. Removed at the
    end with the server that may still run in it.
    """
    root.mkdir(mode=ROOT_MODE, parents=True, exist_ok=True)
    _sweep(root, engine)
    directory, held = _make(root.absolute())
    reaper = subprocess.Popen(
        [sys.executable, "-m", "cloudsave.recovery.reaper", engine, str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        start_new_session=True,
    )
    try:
        yield directory
    finally:
        reap(engine, directory)
        with suppress(BrokenPipeError, subprocess.TimeoutExpired):
            reaper.communicate(DONE, timeout=REAPER_SECONDS_MAX)
        if held is not None:
            os.close(held)


def _make(root: Path) -> tuple[Path, int | None]:
    """A sandbox that is locked before another process can take it for one that was left behind."""
    new = Path(tempfile.mkdtemp(prefix=NEW_PREFIX, dir=root))
    held = _lock(new)
    directory = new.with_name(PREFIX + new.name.removeprefix(NEW_PREFIX))
    new.rename(directory)
    return directory, held


def _sweep(root: Path, engine: str) -> None:
    """Remove sandboxes that nobody holds."""
    for left in root.glob(f"{PREFIX}*"):
        with suppress(OSError):
            held = _lock(left) if left.stat().st_uid == os.geteuid() or os.geteuid() == 0 else None
            if held is not None:
                reap(engine, left)
                os.close(held)


def _lock(directory: Path) -> int | None:
    """The descriptor of a directory that is locked with it; None where another process holds it."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
