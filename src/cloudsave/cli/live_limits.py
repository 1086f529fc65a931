"""Limits that follow the configuration files while a command runs (decision 0014)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cloudsave.assembly import Limits
from cloudsave.config.model import Config
from cloudsave.errors import CloudsaveError

LOOK_SECONDS = 2.0
"""How often the files are looked at."""


@contextmanager
def followed(
    limits: Limits, files: Sequence[Path], load: Callable[[], Config], say: Callable[[str], None]
) -> Iterator[None]:
    """
    Within the context `limits` are those of `files`, whenever these change.

    `load` gives the whole configuration anew, `say` tells people; both are called from a thread of its own.
    """
    done = threading.Event()
    seen = _state(files)

    def follow() -> None:
        nonlocal seen
        while not done.wait(LOOK_SECONDS):
            now = _state(files)
            if now != seen:
                seen = now
                take_anew(limits, load, say)

    thread = threading.Thread(target=follow, name="limits", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def take_anew(limits: Limits, load: Callable[[], Config], say: Callable[[str], None]) -> None:
    """Load the configuration and apply its limits; one that cannot be used changes nothing."""
    try:
        changes = limits.apply(load())
    except (CloudsaveError, OSError) as error:
        reason = error.message if isinstance(error, CloudsaveError) else error.strerror
        say(f"the changed configuration cannot be used, limits stay as they are: {reason}")
        return
    for sentence in changes:
        say(sentence)


def _state(files: Sequence[Path]) -> tuple[tuple[int, int, int], ...]:
    """What tells a file from the one that was there before; zeros where there is none."""
    found = []
    for path in files:
        try:
            facts = path.stat()
        except OSError:
            found.append((0, 0, 0))
        else:
            found.append((facts.st_ino, facts.st_mtime_ns, facts.st_size))
    return tuple(found)
