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
PACKS_CACHED_MAX = 128
"""Limit: packs of which this is kept at once, 16 bytes for each of their blocks (about 50 MB in all)."""


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


class StoredPrints:
    """Looks blocks up by their places. Used by one thread."""

    def __init__(self, lineage: Lineage, sizes: Mapping[str, int]) -> None:
        """`sizes`: of the packs that are there."""
        self._lineage = lineage
        self.sizes = sizes
        self._packs: OrderedDict[str, _Pack] = OrderedDict()

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
        missing = [name for name in names if name not in self._packs][:PACKS_CACHED_MAX]
        for name, pack in zip(missing, map_ahead(self._read, missing, in_flight=READS_AT_ONCE), strict=True):
            self._packs[name] = pack
        while len(self._packs) > PACKS_CACHED_MAX:
            self._packs.popitem(last=False)

    def _pack(self, name: str) -> _Pack:
        if name not in self._packs:
            self._packs[name] = self._read(name)
            if len(self._packs) > PACKS_CACHED_MAX:
                self._packs.popitem(last=False)
        self._packs.move_to_end(name)
        return self._packs[name]

    def _read(self, name: str) -> _Pack:
        pack = _Pack({}, {})
        try:
            trailer = read_trailer(self._lineage.keys, self._lineage.store, name, self.sizes.get(name, 0))
        except (IntegrityError, ObjectMissing):
            return pack
        numbers = trailer.frames["number"].tolist()
        for number, size in zip(numbers, trailer.frames["plain"].tolist(), strict=True):
            blocks = size // BLOCK_BYTES
            nothing = np.full(blocks, -1, np.int32)
            pack.frames[number] = _Frame(np.zeros(blocks, np.uint64), nothing, np.zeros(blocks, np.uint32))
        for index, stretch in trailer.stretches:
            frame, begin = pack.frames[numbers[index]], stretch.frame_offset // BLOCK_BYTES
            span = slice(begin, begin + stretch.count)
            frame.prints[span] = stretch.fingerprints
            frame.path[span] = pack.paths.setdefault(stretch.path, len(pack.paths))
            frame.block[span] = np.arange(stretch.block, stretch.block + stretch.count)
        return pack
