"""
Block maps: which frame holds which block of a file.

A block is 8192 bytes of a file (the last one padded with zeros). A map object holds the segment maps of one
or several files; a manifest names a file's map by object and ordinal. All integers are little-endian.

    map object
    0    4   magic "MAP2"
    4    4   u32 number of packs
    8    4   u32 number of segment maps
    12   ..  pack names: u16 length, ASCII; then padding with zeros to a multiple of 8
    ..       segment maps, one after the other

    segment map
    0    8   u64 file bytes
    8    4   u32 frames
    12   4   u32 runs
    16   ..  frames, 24 bytes each: u32 pack (index into the object's packs), u32 frame number,
             u64 offset in the pack, u32 sealed bytes, u32 plain bytes
    ..   ..  runs, one behind the other, together all blocks, in three columns of u32: blocks; frame (index,
             0xFFFFFFFF: the blocks are all zero bytes and stored nowhere); first block within the frame
    ..   ..  zeros to a multiple of 8

A column of n numbers is n lowest bytes, then n second ones, n third and n highest: scattered changes make
runs of single blocks by the hundred thousand, and so they compress to a third.

"MAP1" is the older form of the same: the segment map has u64 blocks at 16, frames at 24, then runs of 16
bytes each (u32 first block, blocks, frame, offset in the frame), then a fingerprint of u64 for each block.
Now they are in the trailers of packs only: to repeat those of all blocks in each increment took more room
than its pages.

Validity: counts fit the size; runs are all blocks of the file; frame and pack indexes exist.
Source: docs/repository_format.md.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cloudsave.errors import IntegrityError

BLOCK_BYTES = 8192
ZERO_FRAME = 0xFFFFFFFF
BLOCKS_MAX = (1 << 32) - 2
"""Limit: blocks of a file."""
FRAME_BLOCKS_MAX = (64 << 20) // BLOCK_BYTES
"""Limit: blocks in a frame."""
MAGIC, MAGIC_1 = b"MAP2", b"MAP1"
FRAME_TYPE = np.dtype(
    [("pack", "<u4"), ("number", "<u4"), ("offset", "<u8"), ("sealed", "<u4"), ("plain", "<u4")]
)
RUN_TYPE = np.dtype([("block", "<u4"), ("count", "<u4"), ("frame", "<u4"), ("offset", "<u4")])
_HEAD = struct.Struct("<4sII")
_SEGMENT_HEAD = struct.Struct("<QII")
_SEGMENT_HEAD_1 = struct.Struct("<QIIQ")
Fingerprints = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class SegmentMap:
    """The map of one file. `frames["pack"]` counts in the pack list of the object that holds it."""

    file_bytes: int
    frames: npt.NDArray[np.void]
    runs: npt.NDArray[np.void]
    fingerprints: Fingerprints | None = None
    """Of an old map, one for each block; else they are in the trailers of packs."""

    def encode(self) -> bytes:
        """Its bytes; a multiple of 8."""
        head = _SEGMENT_HEAD.pack(self.file_bytes, len(self.frames), len(self.runs))
        columns = (self.runs["count"], self.runs["frame"], self.runs["offset"] // BLOCK_BYTES)
        body = head + self.frames.tobytes() + b"".join(_planes(column) for column in columns)
        return body + bytes(-len(body) % 8)

    def check(self, packs: int, what: str) -> None:
        """Raises: IntegrityError where the map contradicts itself."""
        blocks = block_count(self.file_bytes)
        first, count = self.runs["block"].astype(np.int64), self.runs["count"].astype(np.int64)
        ends = first + count
        if (
            (self.fingerprints is not None and len(self.fingerprints) != blocks)
            or (int(ends[-1]) if len(ends) else 0) != blocks
            or (len(first) and (int(first[0]) != 0 or bool((first[1:] != ends[:-1]).any())))
        ):
            raise IntegrityError(f"{what} does not cover its file")
        held = self.runs[self.runs["frame"] != ZERO_FRAME]
        if bool((held["frame"] >= len(self.frames)).any()) or bool((self.frames["pack"] >= packs).any()):
            raise IntegrityError(f"{what} names a frame or pack that it does not list")
        room = self.frames["plain"][held["frame"]].astype(np.int64)
        if bool((held["offset"] + held["count"].astype(np.int64) * BLOCK_BYTES > room).any()):
            raise IntegrityError(f"{what} reaches beyond a frame")


def _planes(column: npt.NDArray[np.uint32]) -> bytes:
    """A column, byte by byte of its numbers, the lowest first."""
    return np.ascontiguousarray(column, "<u4").view(np.uint8).reshape(-1, 4).T.tobytes()


def _from_planes(content: bytes, count: int, offset: int) -> npt.NDArray[np.uint32]:
    """A column of `count` numbers."""
    planes = np.frombuffer(content, np.uint8, 4 * count, offset).reshape(4, count)
    column: npt.NDArray[np.uint32] = np.ascontiguousarray(planes.T).view("<u4").reshape(count)
    return column


def block_count(file_bytes: int) -> int:
    """Blocks of a file of that size."""
    return -(-file_bytes // BLOCK_BYTES)


def encode_map_object(packs: Sequence[str], segments: Sequence[bytes]) -> bytes:
    """A map object from pack names and encoded segment maps."""
    names = b"".join(struct.pack("<H", len(name)) + name.encode("ascii") for name in packs)
    head = _HEAD.pack(MAGIC, len(packs), len(segments)) + names
    return head + bytes(-len(head) % 8) + b"".join(segments)


@dataclass(frozen=True, slots=True)
class MapObject:
    """A decoded map object."""

    packs: tuple[str, ...]
    segments: tuple[SegmentMap, ...]


def decode_map_object(content: bytes, what: str) -> MapObject:
    """Parse and check a map object. Raises: IntegrityError."""
    try:
        return _decode(content, what)
    except (struct.error, ValueError, OverflowError) as error:
        raise IntegrityError(
            f"{what} cannot be read", detail=f"It is truncated or malformed: {error}."
        ) from error


def _decode(content: bytes, what: str) -> MapObject:
    magic, pack_count, segment_count = _HEAD.unpack_from(content)
    if magic not in (MAGIC, MAGIC_1):
        raise IntegrityError(f"{what} is not a map")
    parse = _segment if magic == MAGIC else _segment_1
    offset = _HEAD.size
    packs = []
    for _ in range(pack_count):
        (length,) = struct.unpack_from("<H", content, offset)
        packs.append(content[offset + 2 : offset + 2 + length].decode("ascii"))
        offset += 2 + length
    offset += -offset % 8
    segments = []
    for _ in range(segment_count):
        segment, offset = parse(content, offset)
        segment.check(pack_count, what)
        segments.append(segment)
    if offset != len(content):
        raise IntegrityError(f"{what} has {len(content) - offset} bytes too many")
    return MapObject(tuple(packs), tuple(segments))


def _segment(content: bytes, offset: int) -> tuple[SegmentMap, int]:
    """A segment map, and where it ends. Raises: struct.error, ValueError."""
    begin = offset
    file_bytes, frame_count, run_count = _SEGMENT_HEAD.unpack_from(content, offset)
    offset += _SEGMENT_HEAD.size
    frames = np.frombuffer(content, FRAME_TYPE, frame_count, offset)
    offset += frames.nbytes
    count, frame, place = (_from_planes(content, run_count, offset + 4 * run_count * n) for n in range(3))
    offset += 12 * run_count
    ends = np.cumsum(count, dtype=np.uint64)
    if run_count and (int(ends[-1]) > BLOCKS_MAX or bool((place > FRAME_BLOCKS_MAX).any())):
        raise ValueError("a run is beyond the end of any file or frame")
    runs = np.empty(run_count, RUN_TYPE)
    runs["block"], runs["count"], runs["frame"] = ends - count, count, frame
    runs["offset"] = place * BLOCK_BYTES
    return SegmentMap(file_bytes, frames, runs), offset + (begin - offset) % 8


def _segment_1(content: bytes, offset: int) -> tuple[SegmentMap, int]:
    """The same of an old map."""
    file_bytes, frame_count, run_count, blocks = _SEGMENT_HEAD_1.unpack_from(content, offset)
    offset += _SEGMENT_HEAD_1.size
    frames = np.frombuffer(content, FRAME_TYPE, frame_count, offset)
    offset += frames.nbytes
    runs = np.frombuffer(content, RUN_TYPE, run_count, offset)
    offset += runs.nbytes
    fingerprints = np.frombuffer(content, np.dtype("<u8"), blocks, offset)
    return SegmentMap(file_bytes, frames, runs, fingerprints), offset + fingerprints.nbytes
