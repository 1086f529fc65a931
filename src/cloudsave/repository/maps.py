"""
Block maps: which frame holds which block of a file.

A block is 8192 bytes of a file (the last one padded with zeros). A map object holds the segment maps of one
or several files; a manifest names a file's map by object and ordinal. All integers are little-endian.

    map object
    0    4   magic "MAP1"
    4    4   u32 number of packs
    8    4   u32 number of segment maps
    12   ..  pack names: u16 length, ASCII; then padding with zeros to a multiple of 8
    ..       segment maps, one after the other

    segment map
    0    8   u64 file bytes
    8    4   u32 frames
    12   4   u32 runs
    16   8   u64 blocks = ceil(file bytes / 8192)
    24   ..  frames, 24 bytes each: u32 pack (index into the object's packs), u32 frame number,
             u64 offset in the pack, u32 sealed bytes, u32 plain bytes
    ..   ..  runs, 16 bytes each, ascending, together all blocks: u32 first block, u32 blocks,
             u32 frame (index, 0xFFFFFFFF: the blocks are all zero bytes and stored nowhere), u32 offset in
             the frame
    ..   ..  fingerprints, u64 each, one per block

Validity: counts fit the size; runs ascend without gap from 0 to `blocks`; frame and pack indexes exist.
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
MAGIC = b"MAP1"
FRAME_TYPE = np.dtype(
    [("pack", "<u4"), ("number", "<u4"), ("offset", "<u8"), ("sealed", "<u4"), ("plain", "<u4")]
)
RUN_TYPE = np.dtype([("block", "<u4"), ("count", "<u4"), ("frame", "<u4"), ("offset", "<u4")])
_HEAD = struct.Struct("<4sII")
_SEGMENT_HEAD = struct.Struct("<QIIQ")
Fingerprints = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class SegmentMap:
    """The map of one file. `frames["pack"]` counts in the pack list of the object that holds it."""

    file_bytes: int
    frames: npt.NDArray[np.void]
    runs: npt.NDArray[np.void]
    fingerprints: Fingerprints

    def encode(self) -> bytes:
        """Its bytes; a multiple of 8."""
        head = _SEGMENT_HEAD.pack(self.file_bytes, len(self.frames), len(self.runs), len(self.fingerprints))
        return head + self.frames.tobytes() + self.runs.tobytes() + self.fingerprints.tobytes()

    def check(self, packs: int, what: str) -> None:
        """Raises: IntegrityError where the map contradicts itself."""
        blocks = block_count(self.file_bytes)
        first, count = self.runs["block"].astype(np.int64), self.runs["count"].astype(np.int64)
        ends = first + count
        if (
            len(self.fingerprints) != blocks
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
    if magic != MAGIC:
        raise IntegrityError(f"{what} is not a map")
    offset = _HEAD.size
    packs = []
    for _ in range(pack_count):
        (length,) = struct.unpack_from("<H", content, offset)
        packs.append(content[offset + 2 : offset + 2 + length].decode("ascii"))
        offset += 2 + length
    offset += -offset % 8
    segments = []
    for _ in range(segment_count):
        file_bytes, frames, runs, blocks = _SEGMENT_HEAD.unpack_from(content, offset)
        offset += _SEGMENT_HEAD.size
        frame_array = np.frombuffer(content, FRAME_TYPE, frames, offset)
        offset += frame_array.nbytes
        run_array = np.frombuffer(content, RUN_TYPE, runs, offset)
        offset += run_array.nbytes
        fingerprints = np.frombuffer(content, np.dtype("<u8"), blocks, offset)
        offset += fingerprints.nbytes
        segment = SegmentMap(file_bytes, frame_array, run_array, fingerprints)
        segment.check(pack_count, what)
        segments.append(segment)
    if offset != len(content):
        raise IntegrityError(f"{what} has {len(content) - offset} bytes too many")
    return MapObject(tuple(packs), tuple(segments))
