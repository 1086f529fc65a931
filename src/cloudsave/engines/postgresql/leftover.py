"""
A server that outlived the cloudsave that had started it: killed during replay, it left its server behind.

The run after it owns the directory, by the journal of the restore, but could start nothing there.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from cloudsave.clock import Clock
from cloudsave.errors import ServerDidNotStart

STOP_SECONDS_MAX = 60.0
"""Limit: a server ends within this when asked (SIGINT), and again when told (SIGQUIT)."""
POLL_SECONDS = 0.05
_SOCKET_DIRECTORY_LINE = 4
"""Line of postmaster.pid, from 0 (src/include/utils/pidfile.h)."""


def end_leftover_server(data: Path, *, private: Callable[[Path], bool], clock: Clock) -> None:
    """
    End the server that runs on the directory of an unfinished restore, if one does.

    `private`: whether a socket directory was made by cloudsave, and so goes away with the server.
    Raises: ServerDidNotStart where the server does not end.
    """
    try:
        lines = (data / "postmaster.pid").read_text().splitlines()
        pid = int(lines[0])
    except (OSError, ValueError, IndexError):
        return
    if not _runs_on(data, pid):
        return
    for number in (signal.SIGINT, signal.SIGQUIT):
        with suppress(ProcessLookupError):
            os.kill(pid, number)
        deadline = clock.monotonic() + STOP_SECONDS_MAX
        while _runs_on(data, pid) and clock.monotonic() < deadline:
            clock.sleep(POLL_SECONDS)
        if not _runs_on(data, pid):
            break
    else:
        raise ServerDidNotStart(
            "could not end the server that an interrupted restore left behind",
            detail=f"Process {pid} still runs on {str(data)!r}.",
            hints=[f"is it stopped by a debugger? kill -9 {pid}, then run the same command again"],
        )
    sockets = Path(lines[_SOCKET_DIRECTORY_LINE]) if len(lines) > _SOCKET_DIRECTORY_LINE else None
    if sockets is not None and private(sockets):
        shutil.rmtree(sockets, ignore_errors=True)


def _runs_on(data: Path, pid: int) -> bool:
    """Whether the process works in the directory, as a server does; a file may name a process of old."""
    try:
        return Path(f"/proc/{pid}/cwd").samefile(data)
    except OSError:
        return False
