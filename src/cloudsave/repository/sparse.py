"""
Packs of which little is needed any more: to be left by the next backups, so that they can go.

A pack goes only as a whole, and nothing that is stored is written anew. So a pack that is mostly dead is
named in a tomb while it is still needed: a tomb keeps what it names from being reused. The next backup
stores the few pages again, and the pack goes with the last backup that was there before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress

from cloudsave.errors import ObjectMissing, UnknownBackup
from cloudsave.model.manifest import Manifest
from cloudsave.repository.container import FRAME_HEADER, Kind
from cloudsave.repository.lineage import Lineage
from cloudsave.repository.maps import BLOCK_BYTES, ZERO_FRAME, SegmentMap, decode_map_object
from cloudsave.repository.parallel import map_ahead, reads_in_flight

SPARSE_SHARE = 0.25
"""A pack is left when less than this share of its bytes is needed."""
STORED_AGAIN_SHARE_MAX = 20
"""Limit: of so many bytes that stay, one at most has to be stored again because of one run."""
_Frames = dict[tuple[str, int], tuple[int, int, int]]
"""(pack, frame number) -> (needed blocks as bits, blocks, bytes with the header)."""


def sparse_packs(
    lineage: Lineage, backup_ids: Sequence[str], sizes: Mapping[str, int], share_max: float
) -> dict[str, int]:
    """
    Packs of `sizes` of which the backups use less than a share; with the bytes in use.

    Reads every manifest and every map once; what goes meanwhile is not needed. Raises: IntegrityError,
    StoreError.
    """
    needed = _needed_segments(lineage, backup_ids)
    frames: _Frames = {}

    def read(map_id: str) -> bytes | None:
        with suppress(ObjectMissing):
            return lineage.get_blob(f"maps/{map_id}", Kind.MAP)
        return None

    names = sorted(needed)
    for name, content in zip(
        names, map_ahead(read, names, in_flight=reads_in_flight(lineage.store)), strict=True
    ):
        if content is None:
            continue
        found = decode_map_object(content, f"map {name!r}")
        for ordinal in needed[name]:
            _take_in(frames, found.segments[ordinal], found.packs)
    used: dict[str, int] = {}
    for (pack, _), (flags, blocks, size) in frames.items():
        used[pack] = used.get(pack, 0) + size * flags.bit_count() // blocks
    sparse = {name: used.get(name, 0) for name, size in sizes.items() if used.get(name, 0) < share_max * size}
    budget = sum(sizes.values()) // STORED_AGAIN_SHARE_MAX
    chosen: dict[str, int] = {}
    for name in sorted(sparse, key=lambda one: (sparse[one] / sizes[one], one)):
        budget -= sparse[name]
        if budget < 0:
            break
        chosen[name] = sparse[name]
    return chosen


def _needed_segments(lineage: Lineage, backup_ids: Sequence[str]) -> dict[str, set[int]]:
    """
    By map object, the segment maps in it that any file of a backup has: the others are of files that changed.
    """

    def read(backup_id: str) -> Manifest | None:
        with suppress(UnknownBackup):
            return lineage.manifest(backup_id)
        return None

    needed: dict[str, set[int]] = {}
    for manifest in map_ahead(read, backup_ids, in_flight=reads_in_flight(lineage.store)):
        if manifest is None:
            continue
        for entry in manifest.files:
            if entry.map_index >= 0:
                needed.setdefault(manifest.maps[entry.map_index], set()).add(entry.map_ordinal)
    return needed


def _take_in(frames: _Frames, segment: SegmentMap, packs: tuple[str, ...]) -> None:
    keys = [(packs[pack], number) for pack, number, _, _, _ in segment.frames.tolist()]
    for key, (_, _, _, sealed, plain) in zip(keys, segment.frames.tolist(), strict=True):
        frames.setdefault(key, (0, max(1, plain // BLOCK_BYTES), sealed + FRAME_HEADER.size))
    for _, count, frame, offset in segment.runs.tolist():
        if frame != ZERO_FRAME:
            flags, blocks, size = frames[keys[frame]]
            frames[keys[frame]] = (flags | ((1 << count) - 1) << (offset // BLOCK_BYTES), blocks, size)
