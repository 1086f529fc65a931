"""System calls that the POSIX store needs: two ways to name a file if no other has that name, and syncfs."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import threading
from collections.abc import Callable, Iterator, Sequence

Placement = Callable[[int, str, int, str], None]
"""
(source directory, source name, target directory, target name), directories as open descriptors.

Gives the file the target name in one atomic step, or raises FileExistsError; the source name may stay.
Raises OSError with one of UNSUPPORTED where the file system cannot do it.
"""

UNSUPPORTED = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})
"""What file systems answer to a call that they lack; EPERM is link() on vfat and some FUSE file systems."""

_RENAME_NOREPLACE = 1
_IOVECS_MAX = 1024
"""Source: UIO_MAXIOV of Linux, the most buffers that one writev takes."""
_DIRECT_UNIT_BYTES = 4096
"""What a write around the page cache must be a multiple of, in memory, in the file and in length."""
_DIRECT_BLOCK_BYTES = 4 << 20
_of_thread = threading.local()
_LIBC = ctypes.CDLL(None, use_errno=True)


def place_by_link(source_dir: int, source: str, target_dir: int, target: str) -> None:
    """Placement by a hard link, which every POSIX file system that has links makes atomic, NFS too."""
    os.link(source, target, src_dir_fd=source_dir, dst_dir_fd=target_dir)


def place_by_rename(source_dir: int, source: str, target_dir: int, target: str) -> None:
    """Placement by renameat2(RENAME_NOREPLACE), for file systems without hard links."""
    if not hasattr(_LIBC, "renameat2"):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    _checked(
        _LIBC.renameat2(source_dir, os.fsencode(source), target_dir, os.fsencode(target), _RENAME_NOREPLACE)
    )


PLACEMENTS: Sequence[Placement] = (place_by_link, place_by_rename)


def sync_file_system(descriptor: int) -> None:
    """Make durable all that was written to the file system of `descriptor`, names included."""
    _checked(_LIBC.syncfs(descriptor))


def write_all(descriptor: int, parts: Sequence[bytes | bytearray | memoryview]) -> None:
    """Write the concatenation of `parts` without building it."""
    pending = [memoryview(part).cast("B") for part in parts if len(part)]
    first = 0
    while first < len(pending):
        written = os.writev(descriptor, pending[first : first + _IOVECS_MAX])
        while first < len(pending) and written >= pending[first].nbytes:
            written -= pending[first].nbytes
            first += 1
        if written:
            pending[first] = pending[first][written:]


def write_around_cache(descriptor: int, parts: Sequence[bytes | bytearray | memoryview]) -> None:
    """
    Write the concatenation of `parts` to an empty file without the page cache, which neither these bytes
    nor the database need there. It costs a third of the CPU. Where the file system does not know it, write
    as usual.
    """
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT)
    except OSError:
        write_all(descriptor, parts)
        return
    offset = 0
    for block in _blocks(parts):
        whole = len(block) - len(block) % _DIRECT_UNIT_BYTES
        done = _write_direct(descriptor, block[:whole], offset)
        if done < len(block):
            fcntl.fcntl(descriptor, fcntl.F_SETFL, flags)
            os.lseek(descriptor, offset + done, os.SEEK_SET)
            write_all(descriptor, [block[done:]])
            fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT)
        offset += len(block)


def _blocks(parts: Sequence[bytes | bytearray | memoryview]) -> Iterator[memoryview]:
    """The concatenation in blocks that begin at a page of memory; each is valid until the next."""
    if len(parts) == 1 and _begins_at_page(parts[0]):
        whole = memoryview(parts[0]).cast("B")
        yield from (
            whole[begin : begin + _DIRECT_BLOCK_BYTES] for begin in range(0, len(whole), _DIRECT_BLOCK_BYTES)
        )
        return
    if not hasattr(_of_thread, "block"):
        _of_thread.block = memoryview(mmap.mmap(-1, _DIRECT_BLOCK_BYTES))
    block: memoryview = _of_thread.block
    filled = 0
    for part in parts:
        rest = memoryview(part).cast("B")
        while len(rest):
            count = min(len(rest), len(block) - filled)
            block[filled : filled + count] = rest[:count]
            rest, filled = rest[count:], filled + count
            if filled == len(block):
                yield block
                filled = 0
    if filled:
        yield block[:filled]


def _begins_at_page(part: bytes | bytearray | memoryview) -> bool:
    """Whether it can be written around the page cache from where it is."""
    try:
        return ctypes.addressof(ctypes.c_char.from_buffer(part)) % _DIRECT_UNIT_BYTES == 0
    except TypeError:  # It is read-only, and ctypes will not tell its address.
        return False


def _write_direct(descriptor: int, block: memoryview, offset: int) -> int:
    """
    Bytes written, a multiple of the unit; fewer than all where the file system will take no more this way.
    """
    done = 0
    while done < len(block):
        try:
            written = os.pwrite(descriptor, block[done:], offset + done)
        except OSError as error:
            if error.errno == errno.EINVAL:
                return done
            raise
        done += written
        if written % _DIRECT_UNIT_BYTES:
            return done
    return done


def _checked(result: int) -> None:
    """Raise OSError when a C function answered -1."""
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
