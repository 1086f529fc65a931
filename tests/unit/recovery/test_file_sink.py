"""Stretches of many files, in any order, from several threads, are where they belong; no file stays open."""

from __future__ import annotations

import itertools
import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cloudsave.recovery.file_sink import DIRECT_BYTES_MIN, OPEN_FILES_MAX, FileSink

FILE_BYTES = 2 * DIRECT_BYTES_MIN + 100


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def files_of_zeros(directory: Path, count: int) -> list[str]:
    paths = [str(directory / str(number)) for number in range(count)]
    for path in paths:
        Path(path).write_bytes(bytes(FILE_BYTES))
    return paths


def test_stretches_of_more_files_than_stay_open_are_all_written(tmp_path: Path) -> None:
    paths = files_of_zeros(tmp_path, 2 * OPEN_FILES_MAX)
    contents = [random.Random(number).randbytes(FILE_BYTES) for number in range(len(paths))]
    cuts = [0, 100, 8192, 8192 + DIRECT_BYTES_MIN, FILE_BYTES - 8, FILE_BYTES]
    pieces = [(n, a, b) for n in range(len(paths)) for a, b in itertools.pairwise(cuts)]
    random.Random(1).shuffle(pieces)
    sink, before = FileSink(paths), open_files()
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda p: sink.write(p[0], p[1], memoryview(contents[p[0]])[p[1] : p[2]]), pieces))
    assert OPEN_FILES_MAX <= open_files() - before <= 3 * OPEN_FILES_MAX
    sink.close()
    assert open_files() == before
    assert sink.bytes_written == FILE_BYTES * len(paths)
    assert [Path(path).read_bytes() for path in paths] == contents


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (path,) = files_of_zeros(tmp_path, 1)
    link = tmp_path / "link"
    link.symlink_to(path)
    with pytest.raises(OSError, match="symbolic links"):
        FileSink([str(link)]).write(0, 0, memoryview(b"x"))
    assert Path(path).read_bytes() == bytes(FILE_BYTES)
