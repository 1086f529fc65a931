"""
Long byte strings that must be equal.

A bare `assert` would do, but under CI=true pytest explains every difference in full: for a log file of 16 MiB
it works on that for a minute. In a negative control, which fails on purpose, nobody would even read it.
"""

from __future__ import annotations

import numpy as np

SHOWN_BYTES = 16


def assert_same_bytes(found: bytes, expected: bytes, what: str) -> None:
    """Raises: AssertionError with the place of the first difference and the bytes there."""
    if found == expected:
        return
    common = min(len(found), len(expected))
    ours, theirs = (np.frombuffer(one, np.uint8, common) for one in (found, expected))
    unequal = np.flatnonzero(ours != theirs)
    place = int(unequal[0]) if len(unequal) else common
    shown = [one[place : place + SHOWN_BYTES].hex(" ") or "its end" for one in (found, expected)]
    raise AssertionError(
        f"{what}: {len(found)} bytes, expected are {len(expected)}; {len(unequal)} of the common ones differ;"
        f" from offset {place} on: {shown[0]}, expected {shown[1]}"
    )
