"""
Packs: objects of many frames of blocks, with a trailer that says what each frame holds.

The trailer is the last frame of a pack (the container's footer names its offset). With it an unfinished
backup's packs can be adopted, and a map that was lost can be made again.

    trailer
    0    4   magic "PAK1"
    4    4   u32 number of paths
    8    4   u32 number of frames
    12   4   u32 number of entries
    16   ..  paths: u16 length, bytes (as the file system has them); then zeros to a multiple of 8
    ..   ..  frames, 24 bytes each, as in a map (`pack` is 0)
    ..   ..  entries, 20 bytes each: u32 path, u32 frame, u32 first block, u32 blocks, u32 offset in the frame
    ..   ..  zeros to a multiple of 8; fingerprints, u64 each, of all blocks in the order of the entries

Source: docs/repository_format.md.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from cloudsave.clock import Clock
from cloudsave.errors import IntegrityError
from cloudsave.repository.container import (
    FOOTER_BYTES,
    FRAME_HEADER,
    HEADER_BYTES,
    Arena,
    ContainerReader,
    ContainerWriter,
    FrameRef,
    Kind,
    parse_footer,
)
from cloudsave.repository.crypto import LineageKeys
from cloudsave.repository.maps import BLOCK_BYTES, FRAME_TYPE, Fingerprints
from cloudsave.store.api import Buffer, ObjectStore

PACK_BYTES_TARGET = 32 << 20
TRAILER_BYTES_TARGET = 16 << 20
"""Pages that compress to almost nothing fill a pack by what its trailer says of them."""
MAGIC = b"PAK1"
ENTRY_TYPE = np.dtype(
    [("path", "<u4"), ("frame", "<u4"), ("block", "<u4"), ("count", "<u4"), ("offset", "<u4")]
)
_HEAD = struct.Struct("<4sIII")


@dataclass(slots=True)
class Stretch:
    """Consecutive blocks of one file within a frame."""

    path: str
    block: int
    count: int
    frame_offset: int
    fingerprints: Fingerprints


@dataclass(slots=True)
class PackBuilder:
    """One pack in the making. Not thread-safe."""

    name: str
    """Without the lineage's prefix and "packs/": `<generation>-<sequence>`."""
    container: ContainerWriter
    bytes_target: int = PACK_BYTES_TARGET
    frames: list[FrameRef] = field(default_factory=list)
    stretches: list[tuple[int, Stretch]] = field(default_factory=list)
    trailer_bytes_max: int = 0
    """Upper bound of the size of the trailer so far."""

    @staticmethod
    def open(
        keys: LineageKeys, name: str, *, clock: Clock, level: int, bytes_target: int, arena: Arena
    ) -> PackBuilder:
        """A new pack, to be built in `arena`, which must not be used for another one before `put`."""
        full_name = f"lineages/{keys.lineage}/packs/{name}"
        container = ContainerWriter(keys, full_name, Kind.PACK, clock=clock, level=level, arena=arena)
        return PackBuilder(name, container, bytes_target)

    @property
    def is_full(self) -> bool:
        """Whether it, or its trailer, has reached its target size."""
        return (
            self.container.size_bytes >= self.bytes_target or self.trailer_bytes_max >= TRAILER_BYTES_TARGET
        )

    def add(self, plain: Buffer, stretches: list[Stretch], *, proof: bool) -> FrameRef:
        """Seal a frame that holds `stretches`."""
        frame = self.container.add(plain, proof=proof)
        self.stretches += [(len(self.frames), stretch) for stretch in stretches]
        self.frames.append(frame)
        self.trailer_bytes_max += FRAME_TYPE.itemsize + sum(
            2 + len(os.fsencode(one.path)) + ENTRY_TYPE.itemsize + one.fingerprints.nbytes
            for one in stretches
        )
        return frame

    def put(self, store: ObjectStore) -> int:
        """Close the pack with its trailer and store it; its size."""
        index = self.container.add(self._trailer(), proof=True, last=True)
        store.put(self.container.name, self.container.finish(index=index))
        return self.container.size_bytes

    def _trailer(self) -> bytes:
        paths: dict[str, int] = {}
        for _, stretch in self.stretches:
            paths.setdefault(stretch.path, len(paths))
        head = _HEAD.pack(MAGIC, len(paths), len(self.frames), len(self.stretches))
        for path in map(os.fsencode, paths):
            head += struct.pack("<H", len(path)) + path
        body = _padded(head) + frame_table(self.frames, pack=0).tobytes()
        entries = [(paths[s.path], frame, s.block, s.count, s.frame_offset) for frame, s in self.stretches]
        body += np.array(entries, dtype=ENTRY_TYPE).tobytes()
        return _padded(body) + b"".join(stretch.fingerprints.tobytes() for _, stretch in self.stretches)


def _padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % 8)


def frame_table(frames: list[FrameRef], *, pack: int) -> npt.NDArray[np.void]:
    """Frame references as a map stores them."""
    rows = [(pack, frame.number, frame.offset, frame.sealed_bytes, frame.plain_bytes) for frame in frames]
    return np.array(rows, dtype=FRAME_TYPE)


@dataclass(frozen=True, slots=True)
class PackTrailer:
    """What a stored pack says of itself. An entry's blocks lie within its frame."""

    frames: npt.NDArray[np.void]
    paths: tuple[str, ...]
    entries: npt.NDArray[np.void]
    fingerprints: Fingerprints
    """Of all blocks, in the order of the entries."""

    def stretches(self) -> Iterator[tuple[int, Stretch]]:
        """(index of the frame, blocks in it), one entry after the other."""
        begin = 0
        for path, frame, block, count, frame_offset in self.entries.tolist():
            prints = self.fingerprints[begin : begin + count]
            begin += count
            yield frame, Stretch(self.paths[path], block, count, frame_offset, prints)


def read_trailer(keys: LineageKeys, store: ObjectStore, name: str, size_bytes: int) -> PackTrailer:
    """The trailer of a stored pack: three small reads. Raises: IntegrityError, StoreError."""
    full_name = f"lineages/{keys.lineage}/packs/{name}"
    footer = parse_footer(
        full_name, store.get_range(full_name, offset=max(0, size_bytes - FOOTER_BYTES), length=FOOTER_BYTES)
    )
    length = size_bytes - FOOTER_BYTES - footer.index_offset
    if not HEADER_BYTES <= footer.index_offset < size_bytes - FOOTER_BYTES - FRAME_HEADER.size:
        raise IntegrityError(f"object {full_name!r} is damaged", detail="Its footer names no trailer.")
    reader = ContainerReader(
        keys, full_name, Kind.PACK, store.get_range(full_name, offset=0, length=HEADER_BYTES)
    )
    sealed = store.get_range(full_name, offset=footer.index_offset, length=length)
    plain, end = reader.open(sealed, number=footer.frame_count - 1, last=True)
    if end != length:
        raise IntegrityError(f"object {full_name!r} is damaged", detail="Its trailer is not its last frame.")
    try:
        return _parse_trailer(plain)
    except (struct.error, ValueError, IndexError) as error:
        raise IntegrityError(
            f"object {full_name!r} is damaged", detail="Its trailer is malformed."
        ) from error


def _parse_trailer(plain: bytes) -> PackTrailer:
    magic, path_count, frame_count, entry_count = _HEAD.unpack_from(plain)
    if magic != MAGIC:
        raise ValueError("not a trailer")
    offset = _HEAD.size
    paths = []
    for _ in range(path_count):
        (length,) = struct.unpack_from("<H", plain, offset)
        paths.append(os.fsdecode(plain[offset + 2 : offset + 2 + length]))
        offset += 2 + length
    offset += -offset % 8
    frames = np.frombuffer(plain, FRAME_TYPE, frame_count, offset)
    offset += frames.nbytes
    entries = np.frombuffer(plain, ENTRY_TYPE, entry_count, offset)
    offset += entries.nbytes
    offset += -offset % 8
    fingerprints = np.frombuffer(plain, "<u8", int(entries["count"].sum(dtype=np.uint64)), offset)
    if bool((entries["path"] >= path_count).any()):
        raise ValueError("an entry names no path")
    ends = entries["offset"] + entries["count"].astype(np.uint64) * BLOCK_BYTES
    if bool((ends > frames["plain"][entries["frame"]]).any()):
        raise ValueError("an entry reaches beyond its frame")
    return PackTrailer(frames, tuple(paths), entries, fingerprints)
