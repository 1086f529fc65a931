"""The memory of this process holds keys: it must not end up in a core file."""

from __future__ import annotations

import ctypes
from contextlib import suppress

_PR_SET_DUMPABLE = 4


def forbid_core_dumps() -> None:
    """
    No core file of this process, whatever limits and handlers say, and no debugger of the same user. Programs
    that it starts are not concerned. Source: prctl(2).
    """
    # Where the C library has no prctl, limits are the administrator's.
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
