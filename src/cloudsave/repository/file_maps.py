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
SKIP_BLOCKS_MIN = 8
"""Unchanged blocks between changed ones are read along when they are fewer."""
Blocks = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]
_NOWHERE, _ZERO = -2, -1


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a run of blocks is newly stored."""

    block: int
    count: int
    pack: str
    frame: FrameRef
    frame_offset: int


@dataclass(frozen=True, slots=True)
class Placement:
    """What is to become of some blocks that were read."""

    keep: Flags
    """Of each block, whether it is to be stored."""
    zero: Blocks
    reused: tuple[tuple[int, Blocks], ...]
    """(number of the prior file, blocks that it holds)."""
    missed: Flags
    """Of each block, whether it differs from the parent's although it is known to be unchanged."""
    same_as_parent: bool


@dataclass(slots=True)
class FileState:
    """A file on its way into the repository. Fields from `pending` on are guarded by the writer's lock."""

    item: Item
    priors: list[PriorFile]
    parent_map: ParentMap | None
    unchanged: Flags | None = None
    """Of the file's first blocks, which are known to be as the first prior file has them."""
    skipped: Flags | None = None
    """Of the file's first blocks, which are taken from the first prior file without being read."""
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
    zero: list[Blocks] = field(default_factory=list)
    reused: list[tuple[int, Blocks]] = field(default_factory=list)
    same_as_parent: bool = True

    @classmethod
    def of_unchanged(cls, item: Item, named: ParentMap) -> FileState:
        """A file that is as the parent has it, of which nothing is read."""
        whole = np.ones(block_count(item.size_bytes), bool)
        return cls(item, [], named, whole, whole, size_bytes=item.size_bytes)

    def skip(self, unchanged: Flags, proved: Flags) -> None:
        """Before the first piece: take `unchanged` blocks unread, but for those that are to be proved."""
        self.unchanged, self.skipped = unchanged, skippable(unchanged & ~proved)
        blocks = np.flatnonzero(self.skipped)
        if len(blocks):
            self.size_bytes = (int(blocks[-1]) + 1) * BLOCK_BYTES
            self.reused.append((0, blocks))

    def wanted(self, offset: int, length: int) -> list[tuple[int, int]]:
        """The parts [begin, end) of a piece that are to be read, in bytes of the piece."""
        if self.skipped is None:
            return [(0, length)] if length else []
        first, count = offset // BLOCK_BYTES, block_count(length)
        skipped = np.zeros(count, bool)
        known = self.skipped[first : first + count]
        skipped[: len(known)] = known
        runs = runs_of(np.flatnonzero(~skipped))
        return [(begin * BLOCK_BYTES, min(end * BLOCK_BYTES, length)) for begin, end in runs]

    def match(self, blocks: Blocks, prints: Fingerprints, zero: Flags) -> Placement:
        """Which of some blocks, ascending, are new. Reads no guarded field."""
        keep, reused, same = ~zero, [], False
        missed = np.zeros(len(blocks), bool)
        for number, prior in enumerate(self.priors):
            inside = int(np.searchsorted(blocks, prior.blocks))
            within = blocks[:inside]
            equal = np.zeros(len(blocks), bool)
            compared = prior.known[within] & prior.printed[within]
            equal[:inside] = compared & (prior.fingerprints[within] == prints[:inside])
            if number == 0:
                same = bool(equal.all())
                missed[:inside] = compared
                missed &= self._known_unchanged(blocks) & ~equal
            found = equal & keep
            keep = keep & ~found
            if found.any():
                reused.append((number, blocks[found]))
        return Placement(keep, blocks[zero], tuple(reused), missed, same)

    def _known_unchanged(self, blocks: Blocks) -> Flags:
        known = np.zeros(len(blocks), bool)
        if self.unchanged is not None:
            inside = int(np.searchsorted(blocks, len(self.unchanged)))
            known[:inside] = self.unchanged[blocks[:inside]]
        return known

    def note(self, end_bytes: int, placement: Placement) -> None:
        """With the lock held: take in what `match` found."""
        self.size_bytes = max(self.size_bytes, end_bytes)
        self.zero.append(placement.zero)
        self.reused += placement.reused
        self.same_as_parent = self.same_as_parent and placement.same_as_parent


def skippable(wanted: Flags) -> Flags:
    """`wanted` without runs so short that reading them along is cheaper than a further read."""
    kept = wanted.copy()
    for begin, end in runs_of(np.flatnonzero(wanted)):
        if end - begin < SKIP_BLOCKS_MIN:
            kept[begin:end] = False
    return kept


def runs_of(places: Blocks) -> list[tuple[int, int]]:
    """Runs [begin, end) of consecutive ascending numbers."""
    if not len(places):
        return []
    breaks = np.flatnonzero(np.diff(places) != 1)
    begins = places[np.concatenate(([0], breaks + 1))]
    ends = places[np.concatenate((breaks, [len(places) - 1]))] + 1
    return list(zip(begins.tolist(), ends.tolist(), strict=True))


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
        self._segments_bytes = 0
        self._waiting: list[FileEntry] = []
        """Entries of the segments that are not put yet."""

    def add_entry(self, entry: FileEntry) -> None:
        """Something without content."""
        self._entries.append(entry)

    def add_file(self, state: FileState, entry: FileEntry) -> None:
        """A file whose blocks all have their place."""
        size_bytes, parent = state.size_bytes, state.parent_map
        if size_bytes == 0:
            self._entries.append(replace(entry, size_bytes=0))
        elif parent is not None and state.same_as_parent and parent.file_bytes == size_bytes:
            self._packs_of_map[parent.map_id] = parent.packs
            index = self._maps.setdefault(parent.map_id, len(self._maps))
            self._entries.append(
                replace(entry, size_bytes=size_bytes, map_index=index, map_ordinal=parent.ordinal)
            )
        else:
            segment = self._segment(state).encode()
            self._segments.append(segment)
            self._segments_bytes += len(segment)
            self._waiting.append(replace(entry, size_bytes=size_bytes))
            if self._segments_bytes >= MAP_OBJECT_BYTES:
                self.flush()

    def _segment(self, state: FileState) -> SegmentMap:
        blocks = block_count(state.size_bytes)
        layout = _Layout(state, blocks)
        used, runs = layout.runs()
        frame_rows = []
        for pack_name, reference in (layout.places[number] for number in used.tolist()):
            pack = self._packs.setdefault(pack_name, len(self._packs))
            frame_rows.append(
                (pack, reference.number, reference.offset, reference.sealed_bytes, reference.plain_bytes)
            )
        return SegmentMap(state.size_bytes, np.array(frame_rows, FRAME_TYPE), runs)

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
        self._segments_bytes = 0

    def complete(self, draft: Manifest) -> Manifest:
        """`draft` with the file table, the maps and the packs."""
        packs = sorted({pack for names in self._packs_of_map.values() for pack in names})
        files = sorted(self._entries, key=lambda entry: (entry.outside, entry.path))
        return replace(draft, files=tuple(files), maps=tuple(self._maps), packs=tuple(packs))


class _Layout:
    """Where each block of a finished file is: its frame, as an index into `places`, and its offset there."""

    def __init__(self, state: FileState, blocks: int) -> None:
        self.places: list[tuple[str, FrameRef]] = []
        self._frame = np.full(blocks, _NOWHERE, np.int64)
        self._offset = np.zeros(blocks, np.int64)
        self._placed = 0
        firsts = []
        for prior in state.priors:
            firsts.append(len(self.places))
            self.places += prior.places
        for number, reused in state.reused:
            prior = state.priors[number]
            frame = prior.frame[reused].astype(np.int64)
            zero = frame == ZERO_FRAME
            self._place(reused, np.where(zero, _ZERO, frame + firsts[number]), prior.offset[reused])
        for zeros in state.zero:
            self._place(zeros, _ZERO, 0)
        self._place_slots(state.slots)
        self._see_that_all_are_placed(state)

    def _place(
        self, blocks: Blocks, frame: Blocks | int, offset: Blocks | npt.NDArray[np.uint32] | int
    ) -> None:
        self._frame[blocks] = frame
        self._offset[blocks] = offset
        self._placed += len(blocks)

    def _place_slots(self, slots: list[Slot]) -> None:
        numbers: dict[tuple[str, int], int] = {}
        for slot in slots:
            key = (slot.pack, slot.frame.number)
            if key not in numbers:
                numbers[key] = len(self.places)
                self.places.append((slot.pack, slot.frame))
            within = np.arange(slot.count) * BLOCK_BYTES
            self._place(slot.block + np.arange(slot.count), numbers[key], slot.frame_offset + within)

    def _see_that_all_are_placed(self, state: FileState) -> None:
        nowhere = self._frame == _NOWHERE
        if state.shrank:
            self._frame[nowhere] = _ZERO
            self._placed += int(nowhere.sum())
        elif nowhere.any():
            raise IntegrityError(
                f"blocks of {state.item.path!r} were lost on the way",
                detail=f"Block {int(np.flatnonzero(nowhere)[0])} has no place.",
            )
        if self._placed != len(self._frame):
            raise IntegrityError(
                f"blocks of {state.item.path!r} were doubled on the way",
                detail=f"There are {self._placed} places for {len(self._frame)} blocks.",
            )

    def runs(self) -> tuple[Blocks, npt.NDArray[np.void]]:
        """The frames in use (indexes into `places`), and the runs of the segment map, which count in them."""
        frame, offset = self._frame, self._offset
        held = frame != _ZERO
        used, index = np.unique(frame[held], return_inverse=True)
        numbered = np.full(len(frame), ZERO_FRAME, np.int64)
        numbered[held] = index
        breaks = np.ones(len(frame), bool)
        breaks[1:] = (np.diff(frame) != 0) | (held[1:] & (np.diff(offset) != BLOCK_BYTES))
        firsts = np.flatnonzero(breaks)
        runs = np.empty(len(firsts), RUN_TYPE)
        runs["block"], runs["frame"], runs["offset"] = firsts, numbered[firsts], offset[firsts]
        runs["count"] = np.diff(np.append(firsts, len(frame)))
        return used, runs
