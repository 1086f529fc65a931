"""
A process that puts objects until it is killed, and says on stdout what was acknowledged.

Usage: put_until_killed ROOT SEED MODE. MODE is "store", "in place" (writes straight into the final file, the
negative control), or "before link" or "after link" (kills itself there, at the third put).
"""

from __future__ import annotations

import os
import random
import signal
import sys
from pathlib import Path

from cloudsave.store.posix import PosixStore
from cloudsave.store.posix_calls import place_by_link

PIECE_BYTES = 64 * 1024
PIECES = 24
KILLED_AT_PUT = 3


def content_of(name: str) -> bytes:
    """The one content that an object of this name may have."""
    return random.Random(name).randbytes(PIECE_BYTES) * PIECES


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _put_in_place(root: Path, name: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb", buffering=0) as file:
        content = content_of(name)
        for begin in range(0, len(content), PIECE_BYTES):
            file.write(content[begin : begin + PIECE_BYTES])
            _say("writing")


def main(root: Path, seed: str, mode: str) -> None:
    """Put for ever."""
    links = 0

    def place(source_dir: int, source: str, target_dir: int, target: str) -> None:
        nonlocal links
        links += 1
        if links == KILLED_AT_PUT and mode == "before link":
            os.kill(os.getpid(), signal.SIGKILL)
        place_by_link(source_dir, source, target_dir, target)
        if links == KILLED_AT_PUT and mode == "after link":
            os.kill(os.getpid(), signal.SIGKILL)

    store = PosixStore(root, placements=[place])
    for number in range(1_000_000):
        name = f"{seed}/{number % 3}/{number:06}"
        if mode == "in place":
            _put_in_place(root, name)
        else:
            content = memoryview(content_of(name))
            _say("writing")
            store.put(name, [content[n : n + PIECE_BYTES] for n in range(0, len(content), PIECE_BYTES)])
        _say(name)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
