"""
Writes stretches of restored files, from several threads.

Each thread keeps its last few files open: after many increments a backup's blocks lie singly in its packs,
and to open a file anew for each of a hundred thousand blocks takes longer than to write them.
"""

from __future__ import annotations

import errno
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence

OPEN_FILES_MAX = 32
"""Limit: files that a thread keeps open."""
DIRECT_BYTES_MIN = 64 << 10
"""Writes of at least this size go around the page cache: a third of the CPU, and production's cache stays."""
DIRECT_UNIT_BYTES = 4096
"""What such a write must be a multiple of, in memory, in the file and in length."""


class FileSink:
    """The files at `paths`, which are there already. Thread-safe but for `close`, which comes last."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths = paths
        self._lock = threading.Lock()
        self._of_thread = threading.local()
        self._opened: list[OrderedDict[tuple[int, int], int]] = []
        self._direct = True
        """Whether the file system takes writes around the page cache; found by trying."""
        self.bytes_written = 0

    def write(self, file_index: int, offset: int, data: memoryview) -> None:
        """Write `data` at `offset` of a file. Raises: OSError."""
        if self._direct and len(data) >= DIRECT_BYTES_MIN and len(data) % DIRECT_UNIT_BYTES == 0:
            try:
                self._write(os.O_DIRECT, file_index, offset, data)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._direct = False
            else:
                return
        self._write(0, file_index, offset, data)

    def _write(self, flags: int, file_index: int, offset: int, data: memoryview) -> None:
        descriptor = self._open(file_index, flags)
        written = os.pwrite(descriptor, data, offset)
        while written < len(data):
            written += os.pwrite(descriptor, data[written:], offset + written)
        with self._lock:
            self.bytes_written += written

    def _open(self, file_index: int, flags: int) -> int:
        if not hasattr(self._of_thread, "files"):
            self._of_thread.files = OrderedDict()
            with self._lock:
                self._opened.append(self._of_thread.files)
        files: OrderedDict[tuple[int, int], int] = self._of_thread.files
        key = (file_index, flags)
        found = files.get(key)
        if found is not None:
            files.move_to_end(key)
            return found
        if len(files) >= OPEN_FILES_MAX:
            os.close(files.popitem(last=False)[1])
        mode = flags | os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW
        files[key] = descriptor = os.open(self._paths[file_index], mode)
        return descriptor

    def close(self) -> None:
        """Close all files; what was written is where the kernel has it, not yet on stable storage."""
        for files in self._opened:
            while files:
                os.close(files.popitem()[1])
