"""What the trailers of packs say of the blocks in them: their fingerprints, and which file they are of."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cloudsave.errors import IntegrityError, ObjectMissing
from cloudsave.repository.container import FrameRef
from cloudsave.repository.lineage import Lineage
from cloudsave.repository.maps import BLOCK_BYTES, Fingerprints
from cloudsave.repository.packs import read_trailer
from cloudsave.repository.parallel import map_ahead

READS_AT_ONCE = 16
"""Limit: trailers that are read at the same time."""
PACKS_AHEAD_MAX = 128
"""Limit: trailers that are read ahead of their use."""
BLOCKS_CACHED_MAX = 3 << 20
"""Limit: blocks of which this is kept at once, 16 bytes for each (48 MiB)."""


@dataclass(frozen=True, slots=True)
class StoredBlocks:
    """One row for each block asked for; without `known` the others have no meaning."""

    known: npt.NDArray[np.bool_]
    prints: Fingerprints
    of_file: npt.NDArray[np.bool_]
    """Whether it was stored for the file asked for."""
    block: npt.NDArray[np.int64]
    """Which block of its file it was stored as."""


@dataclass(slots=True)
class _Frame:
    prints: Fingerprints
    path: npt.NDArray[np.int32]
    """An index of the pack's paths; -1: nothing is said."""
    block: npt.NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class _Pack:
    paths: dict[str, int]
    frames: dict[int, _Frame]
    blocks: int


class StoredPrints:
    """Looks blocks up by their places. Used by one thread."""

    def __init__(self, lineage: Lineage, sizes: Mapping[str, int]) -> None:
        """`sizes`: of the packs that are there."""
        self._lineage = lineage
        self.sizes = sizes
        self._packs: OrderedDict[str, _Pack] = OrderedDict()
        self._blocks = 0

    def find(
        self,
        path: str,
        places: Sequence[tuple[str, FrameRef]],
        frame: npt.NDArray[np.uint32],
        offset: npt.NDArray[np.uint32],
    ) -> StoredBlocks:
        """
        Of blocks of the file at `path`, which are at `offset` in frame `places[frame]`. Blocks in packs whose
        trailers cannot be read are not known.
        """
        count = len(frame)
        flags, other = np.zeros(count, bool), np.zeros(count, bool)
        found = StoredBlocks(flags, np.zeros(count, np.uint64), other, np.zeros(count, np.int64))
        order = np.argsort(frame, kind="stable")
        for part in np.split(order, np.flatnonzero(np.diff(frame[order])) + 1) if count else ():
            name, reference = places[int(frame[part[0]])]
            pack = self._pack(name)
            stored = pack.frames.get(reference.number)
            slots = offset[part] // BLOCK_BYTES
            if stored is None or int(slots.max()) >= len(stored.prints):
                continue
            found.known[part] = stored.path[slots] >= 0
            found.prints[part], found.block[part] = stored.prints[slots], stored.block[slots]
            found.of_file[part] = stored.path[slots] == pack.paths.get(path, -2)
        return found

    def read_ahead(self, names: Iterable[str]) -> None:
        """Read the trailers of packs at once that will be asked for next."""
        missing = [name for name in names if name not in self._packs][:PACKS_AHEAD_MAX]
        for name, pack in zip(missing, map_ahead(self._read, missing, in_flight=READS_AT_ONCE), strict=True):
            self._keep(name, pack)

    def _pack(self, name: str) -> _Pack:
        if name not in self._packs:
            self._keep(name, self._read(name))
        self._packs.move_to_end(name)
        return self._packs[name]

    def _keep(self, name: str, pack: _Pack) -> None:
        self._packs[name] = pack
        self._blocks += pack.blocks
        while self._blocks > BLOCKS_CACHED_MAX and len(self._packs) > 1:
            self._blocks -= self._packs.popitem(last=False)[1].blocks

    def _read(self, name: str) -> _Pack:
        try:
            trailer = read_trailer(self._lineage.keys, self._lineage.store, name, self.sizes.get(name, 0))
        except (IntegrityError, ObjectMissing):
            return _Pack({}, {}, 0)
        ends = np.cumsum(trailer.frames["plain"].astype(np.int64) // BLOCK_BYTES)
        begins = np.concatenate(([0], ends))
        blocks, entries = int(begins[-1]), trailer.entries
        counts = entries["count"].astype(np.int64)
        within = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
        at = np.repeat(begins[entries["frame"]] + entries["offset"] // BLOCK_BYTES, counts) + within
        prints = np.zeros(blocks, np.uint64)
        path = np.full(blocks, -1, np.int32)
        block = np.zeros(blocks, np.uint32)
        prints[at] = trailer.fingerprints
        path[at] = np.repeat(entries["path"], counts)
        block[at] = np.repeat(entries["block"], counts) + within
        frames = {
            number: _Frame(prints[begin:end], path[begin:end], block[begin:end])
            for number, begin, end in zip(
                trailer.frames["number"].tolist(), begins[:-1].tolist(), ends.tolist(), strict=True
            )
        }
        return _Pack({one: index for index, one in enumerate(trailer.paths)}, frames, blocks)
