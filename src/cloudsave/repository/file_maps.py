"""From placed blocks to segment maps, map objects and the manifest's file table."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from cloudsave.errors import IntegrityError
from cloudsave.model.item import Item
from cloudsave.model.manifest import FileEntry, Manifest
from cloudsave.repository.container import FrameRef, Kind
from cloudsave.repository.lineage import Lineage
from cloudsave.repository.maps import (
    BLOCK_BYTES,
    FRAME_TYPE,
    RUN_TYPE,
    ZERO_FRAME,
    Fingerprints,
    SegmentMap,
    block_count,
    encode_map_object,
)
from cloudsave.repository.priors import ParentMap, PriorFile

MAP_OBJECT_BYTES = 1 << 20
"""Segment maps are collected until they have this size."""


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a run of blocks is stored; `frame` None: zeros, stored nowhere."""

    block: int
    count: int
    pack: str
    frame: FrameRef | None
    frame_offset: int


@dataclass(frozen=True, slots=True)
class Placement:
    """What is to become of a few consecutive blocks."""

    keep: npt.NDArray[np.bool_]
    slots: tuple[Slot, ...]
    """Of blocks that need not be stored."""
    zero_blocks: int
    reused_blocks: int
    same_as_parent: bool


@dataclass(slots=True)
class FileState:
    """A file on its way into the repository. Fields from `pending` on are guarded by the writer's lock."""

    item: Item
    priors: list[PriorFile]
    parent_map: ParentMap | None
    pending: int = 0
    """Pieces not read plus runs of blocks not sealed yet."""
    closed: bool = False
    finished: bool = False
    shrank: bool = False
    """
    A piece ended early: the server truncated the file while it was read, and log replay will make it right.
    """
    size_bytes: int = 0
    slots: list[Slot] = field(default_factory=list)
    prints: list[tuple[int, Fingerprints]] = field(default_factory=list)
    same_as_parent: bool = True

    def match(self, block: int, prints: Fingerprints, zero: npt.NDArray[np.bool_]) -> Placement:
        """Which of the blocks from `block` on are new. Reads no guarded field."""
        keep, slots, reused, same = ~zero, [], 0, False
        for number, prior in enumerate(self.priors):
            count = max(0, min(len(prints), prior.blocks - block))
            span = slice(block, block + count)
            equal = np.zeros(len(prints), bool)
            equal[:count] = prior.known[span] & (prior.fingerprints[span] == prints[:count])
            if number == 0 and self.parent_map is not None:
                same = bool(equal.all())
            found = equal & keep & ~zero
            keep = keep & ~found
            reused += int(found.sum())
            slots += _prior_slots(prior, block, np.flatnonzero(found))
        empty = np.flatnonzero(zero)
        for run in _runs(empty):
            slots.append(Slot(block + int(run[0]), len(run), "", None, 0))
        return Placement(keep, tuple(slots), len(empty), reused, same)

    def note(self, block: int, end_bytes: int, prints: Fingerprints, placement: Placement) -> None:
        """With the lock held: take in what `match` found."""
        self.size_bytes = max(self.size_bytes, end_bytes)
        self.prints.append((block, prints))
        self.slots += placement.slots
        self.same_as_parent = self.same_as_parent and placement.same_as_parent


def _runs(places: npt.NDArray[np.intp]) -> list[npt.NDArray[np.intp]]:
    """Runs of consecutive numbers."""
    if not len(places):
        return []
    return np.split(places, np.flatnonzero(np.diff(places) != 1) + 1)


def _prior_slots(prior: PriorFile, block: int, found: npt.NDArray[np.intp]) -> list[Slot]:
    """Places of the blocks `block + found` as runs that are consecutive in file and frame."""
    slots: list[Slot] = []
    for run in _runs(found):
        blocks = block + run
        frame, offset = prior.frame[blocks], prior.offset[blocks].astype(np.int64)
        breaks = np.flatnonzero((np.diff(frame) != 0) | (np.diff(offset) != BLOCK_BYTES)) + 1
        for part in np.split(np.arange(len(run)), breaks):
            first = int(part[0])
            pack, reference = prior.places[int(frame[first])]
            slots.append(Slot(int(blocks[first]), len(part), pack, reference, int(offset[first])))
    return slots


class MapWriter:
    """Collects finished files. Not thread-safe: the writer's lock is held by the caller."""

    def __init__(self, lineage: Lineage, *, generation: int) -> None:
        self._lineage = lineage
        self._generation = generation
        self._sequence = itertools.count()
        self.bytes_stored = 0
        self._entries: list[FileEntry] = []
        self._maps: dict[str, int] = {}
        self._packs_of_map: dict[str, tuple[str, ...]] = {}
        self._packs: dict[str, int] = {}
        self._segments: list[bytes] = []
        self._waiting: list[FileEntry] = []
        """Entries of the segments that are not put yet."""

    def add_entry(self, entry: FileEntry) -> None:
        """Something without content."""
        self._entries.append(entry)

    def add_file(self, state: FileState, entry: FileEntry) -> None:
        """A file whose blocks all have their place."""
        entry = replace(entry, size_bytes=state.size_bytes)
        parent = state.parent_map
        if state.size_bytes == 0:
            self._entries.append(entry)
        elif parent is not None and state.same_as_parent and parent.file_bytes == state.size_bytes:
            self._packs_of_map[parent.map_id] = parent.packs
            index = self._maps.setdefault(parent.map_id, len(self._maps))
            self._entries.append(replace(entry, map_index=index, map_ordinal=parent.ordinal))
        else:
            self._segments.append(self._segment(state).encode())
            self._waiting.append(entry)
            if sum(map(len, self._segments)) >= MAP_OBJECT_BYTES:
                self.flush()

    def _segment(self, state: FileState) -> SegmentMap:
        blocks = block_count(state.size_bytes)
        prints = np.zeros(blocks, np.uint64)
        for block, part in state.prints:
            prints[block : block + len(part)] = part[: blocks - block]
        frames: dict[tuple[str, int], int] = {}
        frame_rows: list[tuple[int, int, int, int, int]] = []
        runs: list[tuple[int, int, int, int]] = []
        expected = 0
        for slot in sorted(state.slots, key=lambda slot: slot.block):
            if slot.block > expected and state.shrank:
                runs.append((expected, slot.block - expected, ZERO_FRAME, 0))
                expected = slot.block
            if slot.block != expected:
                raise IntegrityError(
                    f"blocks of {state.item.path!r} were lost or doubled on the way",
                    detail=f"Block {expected} has no place, or block {slot.block} has two.",
                )
            expected += slot.count
            if slot.frame is None:
                runs.append((slot.block, slot.count, ZERO_FRAME, 0))
                continue
            key = (slot.pack, slot.frame.number)
            if key not in frames:
                frames[key] = len(frames)
                pack = self._packs.setdefault(slot.pack, len(self._packs))
                reference = slot.frame
                frame_rows.append(
                    (pack, reference.number, reference.offset, reference.sealed_bytes, reference.plain_bytes)
                )
            runs.append((slot.block, slot.count, frames[key], slot.frame_offset))
        if expected != blocks:
            raise IntegrityError(f"blocks of {state.item.path!r} were lost on the way")
        return SegmentMap(
            state.size_bytes, np.array(frame_rows, FRAME_TYPE), np.array(runs, RUN_TYPE), prints
        )

    def flush(self) -> None:
        """Put the collected segment maps as one map object."""
        if not self._segments:
            return
        packs = tuple(self._packs)
        content = encode_map_object(packs, self._segments)
        map_id = f"{self._generation:08x}-{next(self._sequence):08x}"
        self.bytes_stored += self._lineage.put_blob(f"maps/{map_id}", Kind.MAP, content)
        index = self._maps.setdefault(map_id, len(self._maps))
        self._packs_of_map[map_id] = packs
        self._entries += [
            replace(entry, map_index=index, map_ordinal=ordinal)
            for ordinal, entry in enumerate(self._waiting)
        ]
        self._packs, self._segments, self._waiting = {}, [], []

    def complete(self, draft: Manifest) -> Manifest:
        """`draft` with the file table, the maps and the packs."""
        packs = sorted({pack for names in self._packs_of_map.values() for pack in names})
        files = sorted(self._entries, key=lambda entry: (entry.outside, entry.path))
        return replace(draft, files=tuple(files), maps=tuple(self._maps), packs=tuple(packs))
