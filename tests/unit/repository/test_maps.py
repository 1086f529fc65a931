"""Block maps: round trips, and maps that contradict themselves."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from cloudsave.errors import IntegrityError
from cloudsave.repository.maps import (
    BLOCK_BYTES,
    FRAME_TYPE,
    RUN_TYPE,
    ZERO_FRAME,
    SegmentMap,
    block_count,
    decode_map_object,
    encode_map_object,
)

frame_rows = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 99), st.integers(32, 1 << 40), st.integers(16, 1 << 20)),
    min_size=1,
    max_size=5,
)
run_counts = st.lists(st.tuples(st.integers(1, 30), st.one_of(st.none(), st.integers(0, 99))), max_size=8)


def segment_map(
    rows: list[tuple[int, int, int, int]], counts: list[tuple[int, int | None]], short_by: int = 0
) -> SegmentMap:
    """A map that is right: `counts` are runs of (blocks, frame or None for zeros)."""
    frames = np.array([(*row, 64 * BLOCK_BYTES) for row in rows], FRAME_TYPE)
    runs, block = [], 0
    for count, frame in counts:
        runs.append((block, count, ZERO_FRAME if frame is None else frame % len(rows), 0))
        block += count
    size = max(0, block * BLOCK_BYTES - short_by) if block else 0
    return SegmentMap(size, frames, np.array(runs, RUN_TYPE))


def encode_old(packs: list[str], segments: list[SegmentMap]) -> bytes:
    """A map object as the first releases wrote it, with made-up fingerprints."""
    content = encode_map_object(packs, []).replace(b"MAP2", b"MAP1")
    content = content[:8] + struct.pack("<I", len(segments)) + content[12:]
    for one in segments:
        blocks = int(one.runs["count"].sum())
        content += struct.pack("<QIIQ", one.file_bytes, len(one.frames), len(one.runs), blocks)
        content += one.frames.tobytes() + one.runs.tobytes() + np.arange(blocks, dtype="<u8").tobytes()
    return content


ENCODERS = {
    "present": lambda packs, segments: encode_map_object(packs, [one.encode() for one in segments]),
    "old": encode_old,
}


def same(one: SegmentMap, other: SegmentMap) -> bool:
    """Whether two maps are equal but for fingerprints."""
    return one.file_bytes == other.file_bytes and all(
        bool((getattr(one, name) == getattr(other, name)).all()) for name in ("frames", "runs")
    )


@pytest.mark.parametrize("form", ENCODERS)
@settings(max_examples=80, deadline=None)
@given(
    packs=st.lists(st.from_regex(r"[0-9a-f]{8}-[0-9a-f]{8}", fullmatch=True), min_size=3, max_size=4),
    parts=st.lists(st.tuples(frame_rows, run_counts, st.integers(0, BLOCK_BYTES - 1)), max_size=4),
)
def test_map_objects_are_read_back(
    form: str,
    packs: list[str],
    parts: list[tuple[list[tuple[int, int, int, int]], list[tuple[int, int | None]], int]],
) -> None:
    segments = [segment_map(*part) for part in parts]
    content = ENCODERS[form](packs, segments)
    assert len(content) % 8 == 0
    found = decode_map_object(content, "a map")
    assert found.packs == tuple(packs)
    assert len(found.segments) == len(segments)
    assert all(same(one, other) for one, other in zip(found.segments, segments, strict=True))


GOOD = segment_map([(0, 0, 32, 100), (1, 3, 500, 100)], [(3, 0), (2, None), (4, 1)], short_by=5)


def changed(what: str, row: int, column: str, value: int) -> Callable[[SegmentMap], SegmentMap]:
    """Puts one number of a map wrong."""

    def change(segment: SegmentMap) -> SegmentMap:
        array = getattr(segment, what).copy()
        array[column][row] = value
        return replace(segment, **{what: array})

    return change


@pytest.mark.parametrize(
    "change",
    [
        changed("runs", 0, "count", 2),
        changed("runs", 0, "count", 4),
        changed("runs", 2, "count", 5),
        changed("runs", 2, "frame", 2),
        changed("runs", 2, "offset", 61 * BLOCK_BYTES),
        changed("runs", 2, "offset", 0xFFFFE000),
        changed("frames", 0, "pack", 2),
        changed("frames", 1, "plain", 4 * BLOCK_BYTES - 1),
        lambda segment: replace(segment, file_bytes=segment.file_bytes + 6),
        lambda segment: replace(segment, file_bytes=segment.file_bytes - BLOCK_BYTES),
        lambda segment: replace(segment, runs=segment.runs[:-1]),
        lambda segment: replace(segment, runs=segment.runs[1:]),
        lambda segment: replace(segment, runs=segment.runs[:0]),
    ],
)
def test_a_map_that_contradicts_itself_is_refused(change: Callable[[SegmentMap], SegmentMap]) -> None:
    decode_map_object(encode_map_object(["a", "b"], [GOOD.encode()]), "a map")
    with pytest.raises(IntegrityError):
        decode_map_object(encode_map_object(["a", "b"], [change(GOOD).encode()]), "a map")


@pytest.mark.parametrize(
    "change",
    [
        changed("runs", 0, "block", 1),
        changed("runs", 2, "block", 6),
        changed("runs", 2, "count", 5),
        changed("runs", 2, "offset", 0xFFFFFFF0),
    ],
)
def test_an_old_map_that_contradicts_itself_is_refused(change: Callable[[SegmentMap], SegmentMap]) -> None:
    decode_map_object(encode_old(["a", "b"], [GOOD]), "a map")
    with pytest.raises(IntegrityError):
        decode_map_object(encode_old(["a", "b"], [change(GOOD)]), "a map")


def test_runs_of_single_blocks_all_over_take_little_room() -> None:
    random = np.random.default_rng(1)
    runs = np.empty(100_000, RUN_TYPE)
    runs["block"], runs["count"] = np.arange(100_000), 1
    runs["frame"], runs["offset"] = (
        random.integers(0, 256, 100_000),
        random.integers(0, 128, 100_000) * BLOCK_BYTES,
    )
    frames = np.array([(0, n, 32 + 1000 * n, 900, 1 << 20) for n in range(256)], FRAME_TYPE)
    content = encode_map_object(["a"], [SegmentMap(100_000 * BLOCK_BYTES, frames, runs).encode()])
    assert len(zstandard.ZstdCompressor(level=1).compress(content)) < 2.2 * len(runs)


@pytest.mark.parametrize("form", ENCODERS)
def test_each_truncation_of_a_map_is_refused(form: str) -> None:
    content = ENCODERS[form](["a", "b"], [GOOD, GOOD])
    for length in range(len(content)):
        with pytest.raises(IntegrityError):
            decode_map_object(content[:length], "a map")
    with pytest.raises(IntegrityError):
        decode_map_object(content + bytes(8), "a map")


@pytest.mark.parametrize("form", ENCODERS)
@settings(max_examples=300, deadline=None)
@given(place=st.integers(0, 400), value=st.binary(min_size=1, max_size=8))
def test_a_malformed_map_never_fails_otherwise(form: str, place: int, value: bytes) -> None:
    content = bytearray(ENCODERS[form](["a", "b"], [GOOD]))
    content[place : place + len(value)] = value
    try:
        decode_map_object(bytes(content), "a map")
    except IntegrityError:
        return


def test_blocks_of_a_file() -> None:
    sizes = [0, 1, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1]
    assert [block_count(size) for size in sizes] == [0, 1, 1, 1, 2]
