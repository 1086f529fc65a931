"""
Events of binlogs in bulk: out of packets, and their check and index. C without a twin of its own: what these
functions leave, and all of it where there are no kernels, is taken event by event by their callers.
"""

from __future__ import annotations

import ctypes

import numpy as np
import numpy.typing as npt

from cloudsave.kernels.native import BinlogState, NativeKernels, native

NOWHERE = (1 << 64) - 1
"""For an offset in a state: none."""
COMMITS_MAX = 4096
"""Limit: commits of one call."""


def take_packets(
    received: bytearray | memoryview, *, lead: int, kernels: NativeKernels | None = native
) -> tuple[memoryview, int]:
    """
    The events of the plain packets with which `received` begins, one behind the other, and how many bytes
    those packets have. `lead`: bytes of a packet before its event.
    """
    if kernels is None or not len(received):
        return memoryview(b""), 0
    data = np.frombuffer(received, np.uint8)
    events = np.empty(len(data), np.uint8)
    taken = ctypes.c_size_t()
    written = kernels.binlog_packets(
        data.ctypes.data, len(data), lead, events.ctypes.data, ctypes.byref(taken)
    )
    return events[:written].data, taken.value


def walk(
    state: BinlogState, log: memoryview, *, kernels: NativeKernels | None = native
) -> tuple[npt.NDArray[np.int64], int]:
    """
    Check and note the plain events with which `log` begins: of each transaction that ends among them (offset,
    end offset, instant, number), and how many bytes the events have.
    """
    if kernels is None or not len(log):
        return np.empty((0, 4), np.int64), 0
    data = np.frombuffer(log, np.uint8)
    commits = np.empty((COMMITS_MAX, 4), np.int64)
    count = ctypes.c_size_t()
    taken = kernels.binlog_walk(
        ctypes.byref(state),
        data.ctypes.data,
        len(data),
        commits.ctypes.data,
        COMMITS_MAX,
        ctypes.byref(count),
    )
    return commits[: count.value], taken
