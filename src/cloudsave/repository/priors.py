"""
Pages that are already stored: what a new backup may reuse instead of storing again.

Two origins: the parent backup's maps, and packs of backups that were killed before they could commit.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from cloudsave.errors import CloudsaveError, IntegrityError, ObjectMissing
from cloudsave.model.manifest import FileEntry, Manifest
from cloudsave.repository.container import FOOTER_BYTES, FRAME_HEADER, FrameRef, Kind
from cloudsave.repository.frames import read_frame
from cloudsave.repository.lineage import Lineage
from cloudsave.repository.maps import (
    BLOCK_BYTES,
    ZERO_FRAME,
    Fingerprints,
    MapObject,
    SegmentMap,
    decode_map_object,
)
from cloudsave.repository.packs import Stretch, read_trailer
from cloudsave.repository.prints import StoredPrints

MAPS_CACHED_MAX = 8
"""Limit: decoded map objects kept at once."""
ADOPTED_BLOCKS_MAX = 8 << 20
"""Limit: blocks of unfinished backups that are looked at (64 MiB of fingerprints, 64 GiB of data)."""
FRAMES_PER_SEGMENT_MAX = 4096
"""
Limit: a file scattered over more frames than this is stored whole again, so that reading stays quick for
ever.
"""


@dataclass(frozen=True, slots=True)
class PriorFile:
    """
    Stored blocks of one file. Arrays have one element per block; `frame` indexes `places`, ZERO_FRAME means
    a block of zeros; blocks that are not stored have `known` false, and those whose fingerprint was not
    looked up have `printed` false.
    """

    fingerprints: Fingerprints
    printed: npt.NDArray[np.bool_]
    known: npt.NDArray[np.bool_]
    frame: npt.NDArray[np.uint32]
    offset: npt.NDArray[np.uint32]
    places: tuple[tuple[str, FrameRef], ...]
    """(pack, frame)."""

    @property
    def blocks(self) -> int:
        """How many blocks it speaks of."""
        return len(self.fingerprints)


def expand_segment(segment: SegmentMap, packs: tuple[str, ...], usable: Mapping[str, int]) -> PriorFile:
    """
    A parent's segment map, block by block; blocks in packs that are not `usable` (sizes by name), or that end
    behind the end of their pack, are not known.
    """
    runs, frames = segment.runs, segment.frames
    count = runs["count"].astype(np.int64)
    frame = np.repeat(runs["frame"], count)
    within = np.arange(len(frame), dtype=np.int64) - np.repeat(runs["block"].astype(np.int64), count)
    offset = np.repeat(runs["offset"].astype(np.int64), count) + within * BLOCK_BYTES
    offset[frame == ZERO_FRAME] = 0
    pack_ends = np.array([usable.get(name, 0) - FOOTER_BYTES for name in packs], dtype=np.int64)
    frame_ends = frames["offset"].astype(np.int64) + FRAME_HEADER.size + frames["sealed"]
    frame_usable = frame_ends <= pack_ends[frames["pack"]] if len(frames) else np.zeros(0, bool)
    known = np.ones(len(frame), dtype=bool)
    held = frame != ZERO_FRAME
    known[held] = frame_usable[frame[held]]
    places = tuple(
        (packs[pack], FrameRef(number, frame_offset, sealed, plain))
        for pack, number, frame_offset, sealed, plain in frames.tolist()
    )
    if segment.fingerprints is None:
        prints, printed = np.zeros(len(frame), np.uint64), np.zeros(len(frame), bool)
    else:
        prints, printed = segment.fingerprints.copy(), np.ones(len(frame), bool)
    return PriorFile(prints, printed, known, frame, offset.astype(np.uint32), places)


@dataclass(slots=True)
class _Adopted:
    stretches: list[tuple[str, FrameRef, Stretch]] = field(default_factory=list)

    def expand(self) -> PriorFile:
        blocks = max(stretch.block + stretch.count for _, _, stretch in self.stretches)
        fingerprints = np.zeros(blocks, np.uint64)
        known = np.zeros(blocks, bool)
        frame, offset = np.zeros(blocks, np.uint32), np.zeros(blocks, np.uint32)
        places: dict[tuple[str, FrameRef], int] = {}
        for pack, reference, stretch in self.stretches:
            span = slice(stretch.block, stretch.block + stretch.count)
            fingerprints[span] = stretch.fingerprints
            known[span] = True
            frame[span] = places.setdefault((pack, reference), len(places))
            offset[span] = stretch.frame_offset + np.arange(stretch.count, dtype=np.uint32) * BLOCK_BYTES
        return PriorFile(fingerprints, known, known, frame, offset, tuple(places))


@dataclass(frozen=True, slots=True)
class ParentMap:
    """The parent's map of one file, which may be named again when the file has not changed."""

    map_id: str
    ordinal: int
    packs: tuple[str, ...]
    """All packs that the map object refers to."""
    file_bytes: int


@dataclass(frozen=True, slots=True)
class Found:
    """What is stored of one file."""

    files: list[PriorFile]
    named: ParentMap | None
    """The parent's map, where it may be named again."""
    parent_bytes: int
    """The file's size in the parent, whose blocks are the first of `files`; 0: the parent has none."""


def read_block(lineage: Lineage, prior: PriorFile, block: int) -> bytes:
    """A block as it is stored. Raises: ObjectMissing, IntegrityError."""
    number = int(prior.frame[block])
    if number == ZERO_FRAME:
        return bytes(BLOCK_BYTES)
    pack, frame = prior.places[number]
    offset = int(prior.offset[block])
    return read_frame(lineage, pack, frame)[offset : offset + BLOCK_BYTES]


class Priors:
    """Finds stored blocks by path. Used by one thread."""

    def __init__(
        self,
        lineage: Lineage,
        parent: Manifest | None,
        usable_packs: Mapping[str, int],
        condemned: Collection[str] = (),
        *,
        zero_print: int = 0,
    ) -> None:
        """`zero_print`: the fingerprint of a block of zeros."""
        self._lineage = lineage
        self._prints = StoredPrints(lineage, usable_packs)
        self._zero_print = zero_print
        self._parent = parent
        self._usable = usable_packs
        self._condemned = condemned
        self._entries = {entry.path: entry for entry in parent.files} if parent else {}
        self._maps: OrderedDict[int, MapObject] = OrderedDict()
        self._adopted: dict[str, _Adopted] = {}

    def read_ahead(self) -> None:
        """Read the maps that are asked for first. One that cannot be read shows itself when it is needed."""
        for index in range(min(len(self._parent.maps) if self._parent else 0, MAPS_CACHED_MAX)):
            with suppress(IntegrityError, ObjectMissing):
                self._map(index)

    def find(self, path: str) -> Found:
        """
        What is stored of the file at `path`: of the parent, then of unfinished backups.

        The parent's map is returned only where its whole object may be named again: neither it nor any
        pack that it refers to, be it for another file, is missing or about to be deleted.
        """
        found, named, parent_bytes = [], None, 0
        entry = self._entries.get(path)
        if entry is not None and entry.map_index >= 0:
            parent_map = self._map(entry.map_index)
            segment = parent_map.segments[entry.map_ordinal]
            if len(segment.frames) <= FRAMES_PER_SEGMENT_MAX:
                found.append(expand_segment(segment, parent_map.packs, self._usable))
                parent_bytes = segment.file_bytes
            named = self._may_name(entry, parent_map) if found else None
        if path in self._adopted:
            found.append(self._adopted[path].expand())
        return Found(found, named, parent_bytes)

    def named(self, path: str) -> ParentMap | None:
        """As `find` returns it, without looking at the blocks: thousands of small files never change."""
        entry = self._entries.get(path)
        if entry is None or entry.map_index < 0:
            return None
        parent_map = self._map(entry.map_index)
        scattered = len(parent_map.segments[entry.map_ordinal].frames) > FRAMES_PER_SEGMENT_MAX
        return None if scattered else self._may_name(entry, parent_map)

    def look_up(self, path: str, prior: PriorFile, wanted: npt.NDArray[np.bool_]) -> None:
        """Find the fingerprints of the `wanted` blocks (one flag for each block) that are not known yet."""
        blocks = np.flatnonzero(wanted & ~prior.printed & prior.known)
        zero = prior.frame[blocks] == ZERO_FRAME
        prior.fingerprints[blocks[zero]], prior.printed[blocks[zero]] = self._zero_print, True
        held = blocks[~zero]
        found = self._prints.find(path, prior.places, prior.frame[held], prior.offset[held])
        prior.fingerprints[held] = found.prints
        prior.printed[held] = found.known & found.of_file & (found.block == held)

    def _may_name(self, entry: FileEntry, parent_map: MapObject) -> ParentMap | None:
        assert self._parent is not None
        map_id = self._parent.maps[entry.map_index]
        if f"maps/{map_id}" in self._condemned or any(pack not in self._usable for pack in parent_map.packs):
            return None
        return ParentMap(map_id, entry.map_ordinal, parent_map.packs, entry.size_bytes)

    def _map(self, index: int) -> MapObject:
        if index not in self._maps:
            assert self._parent is not None
            map_id = self._parent.maps[index]
            self._maps[index] = self._read_map(map_id)
            if len(self._maps) > MAPS_CACHED_MAX:
                self._maps.popitem(last=False)
        self._maps.move_to_end(index)
        return self._maps[index]

    def _read_map(self, map_id: str) -> MapObject:
        try:
            content = self._lineage.get_blob(f"maps/{map_id}", Kind.MAP)
            return decode_map_object(content, f"map {map_id!r}")
        except IntegrityError as error:
            raise IntegrityError(
                f"map {map_id!r}, which this backup would build on, is damaged",
                detail=error.detail,
                hints=["`cloudsave backup NAME --full` builds on no other backup", *error.hints],
            ) from error

    def adopt(self, packs: list[tuple[str, int]]) -> int:
        """
        Look into packs (name, size) of unfinished backups; how many were usable.

        A pack whose trailer cannot be read is left alone: it is waste that garbage collection removes.
        """
        adopted = blocks = 0
        for name, size_bytes in packs:
            try:
                trailer = read_trailer(self._lineage.keys, self._lineage.store, name, size_bytes)
            except CloudsaveError as error:
                if error.retryable:
                    raise
                continue
            references = [FrameRef(*row[1:]) for row in trailer.frames.tolist()]
            for frame, stretch in trailer.stretches():
                self._adopted.setdefault(stretch.path, _Adopted()).stretches.append(
                    (name, references[frame], stretch)
                )
                blocks += stretch.count
            adopted += 1
            if blocks > ADOPTED_BLOCKS_MAX:
                break
        return adopted
