"""What this machine could do at best: the bounds that results are read against, measured beside them."""

from __future__ import annotations

import mmap
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import zstandard

FRAME_BYTES = 1 << 20
SAMPLE_EVERY_FRAMES = 6
WRITTEN_BYTES = 1 << 30


def relation_files(data: Path) -> list[Path]:
    """The files that hold nearly all bytes of a cluster."""
    return sorted(
        path for path in (data / "base").rglob("*") if path.is_file() and path.stat().st_size >= FRAME_BYTES
    )


def compress_mb_per_second(data: Path, *, threads: int) -> float:
    """zstd level 1, and nothing else, of every sixth megabyte of a cluster: MB of input per second."""
    frames = [
        (path, offset)
        for path in relation_files(data)
        for offset in range(0, path.stat().st_size - FRAME_BYTES + 1, FRAME_BYTES * SAMPLE_EVERY_FRAMES)
    ]
    contents = [_read(path, offset) for path, offset in frames]

    def compress(part: list[bytes]) -> None:
        compressor = zstandard.ZstdCompressor(level=1)
        for content in part:
            compressor.compress(content)

    begin = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(compress, [contents[number::threads] for number in range(threads)]))
    return sum(map(len, contents)) / 1e6 / (time.perf_counter() - begin)


def _read(path: Path, offset: int) -> bytes:
    with path.open("rb") as file:
        return os.pread(file.fileno(), FRAME_BYTES, offset)


def write_mb_per_second(directory: Path) -> float:
    """One gigabyte written around the page cache, 4 MiB at a time, and synced, in MB per second."""
    path = directory / "write-bound"
    block = mmap.mmap(-1, 4 * FRAME_BYTES)
    block.write(os.urandom(len(block)))
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
    try:
        begin = time.perf_counter()
        for offset in range(0, WRITTEN_BYTES, len(block)):
            os.pwrite(descriptor, block, offset)
        os.fsync(descriptor)
        return WRITTEN_BYTES / 1e6 / (time.perf_counter() - begin)
    finally:
        os.close(descriptor)
        path.unlink()
