"""
Reads a base backup: from the maps to the packs, in the order of the packs, in parallel.

Each pack is read once, in stretches of neighbouring frames; every byte is authenticated before it is handed
out. Memory = workers x (one stretch + one frame), and 36 bytes per run of blocks; from a distant store
REQUESTS_IN_FLIGHT stretches more are fetched ahead of the workers.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cloudsave.errors import IntegrityError
from cloudsave.kernels.pages import FingerprintKey
from cloudsave.model.manifest import Manifest
from cloudsave.repository.comparison import (
    WRONG_SHARE_DISTANT,
    WRONG_SHARE_NEAR,
    Comparison,
    PresentFiles,
    Region,
    StaleBlocks,
    regions_of,
    wanted_blocks,
)
from cloudsave.repository.container import (
    FRAME_HEADER,
    HEADER_BYTES,
    ContainerReader,
    FrameRef,
    Kind,
    scratch_of_thread,
)
from cloudsave.repository.frames import open_pack, read_frame
from cloudsave.repository.lineage import Lineage
from cloudsave.repository.maps import BLOCK_BYTES, ZERO_FRAME, MapObject, SegmentMap, decode_map_object
from cloudsave.repository.parallel import map_ahead, run_all
from cloudsave.repository.prints import StoredPrints
from cloudsave.store.api import Buffer

STRETCH_BYTES_MAX = 8 << 20
"""Limit: bytes fetched by one request."""
REQUESTS_IN_FLIGHT = 16
"""Limit: requests at once to a store that is distant; each holds a stretch or a map object."""
MAPS_AHEAD = 2
"""Limit: map objects read ahead from a store that is near."""
READERS_MORE = 2
"""Comparing waits for the disk more than it computes."""
GAP_BYTES_MAX = 64 << 10
"""Frames that are not wanted are read along when they are smaller than this: cheaper than another request."""
_PLACE = np.dtype(
    [
        ("pack", "<u4"),
        ("number", "<u4"),
        ("offset", "<u8"),
        ("sealed", "<u4"),
        ("file", "<u4"),
        ("block", "<u4"),
        ("count", "<u4"),
        ("within", "<u4"),
    ]
)
"""One run of blocks: the frame that holds it, and where it belongs."""
Write = Callable[[int, int, memoryview], None]


@dataclass(frozen=True, slots=True)
class _Stretch:
    """Neighbouring frames of one pack, fetched with one request."""

    pack: int
    begin: int
    end: int
    places: npt.NDArray[np.void]
    """By offset of the frame."""
    last_of_pack: int
    """How many stretches the pack has; counted down to know when it is done."""


def _ignore_pack(pack: str) -> None:
    """Nobody wants to know that `pack` is done."""


def _ignore_count(count: int) -> None:
    """Nobody watches `count` bytes pass."""


class BackupReader:
    """One backup, to be read back. Thread-safe."""

    def __init__(self, lineage: Lineage, manifest: Manifest) -> None:
        self._lineage = lineage
        self.manifest = manifest
        self._pack_numbers = {name: number for number, name in enumerate(manifest.packs)}
        self._places_cache: npt.NDArray[np.void] | None = None

    def segment(self, file_index: int) -> tuple[SegmentMap, MapObject]:
        """The map of one file."""
        entry = self.manifest.files[file_index]
        found = self._map(entry.map_index)
        return found.segments[entry.map_ordinal], found

    def bytes_to_fetch(self) -> int:
        """Bytes that `read_all` gets from packs."""
        places = self._places()
        frames = np.unique(places[["pack", "offset", "sealed"]])
        return int(frames["sealed"].sum() + len(frames) * FRAME_HEADER.size)

    def read_all(
        self,
        write: Write,
        *,
        workers: Callable[[], int],
        skip_packs: Collection[str] = (),
        stale: StaleBlocks | None = None,
        pack_done: Callable[[str], None] = _ignore_pack,
        advance: Callable[[int], None] = _ignore_count,
    ) -> None:
        """
        Hand out all stored blocks: `write(file_index, file_offset, data)`, from several threads, in no
        order. `data` is valid only during the call; it begins at a multiple of 4096 in memory.

        Blocks of zeros are not handed out: files are made at their full length, sparse. With `stale` only
        its blocks are fetched and handed out. `pack_done` is told of each pack whose blocks have all been
        written; `advance` of file bytes. The first error of a worker ends it all.
        Raises: IntegrityError, ObjectMissing, StoreError, and what `write` raises.
        """
        skipped = {self._pack_numbers[name] for name in skip_packs if name in self._pack_numbers}
        run = _Run(self, write, stale, pack_done, advance)
        wanted = (stretch for stretch in self._stretches(stale) if stretch.pack not in skipped)
        if not self._lineage.store.capabilities.distant:
            run_all(wanted, lambda stretch: run.read(stretch, run.fetch(stretch)), workers=workers)
            return
        with ThreadPoolExecutor(REQUESTS_IN_FLIGHT, thread_name_prefix="fetch") as pool:
            fetched = ((stretch, pool.submit(run.fetch, stretch)) for stretch in wanted)
            try:
                run_all(
                    fetched,
                    lambda task: run.read(task[0], task[1].result()),
                    workers=workers,
                    waiting_max=REQUESTS_IN_FLIGHT,
                )
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def compare(
        self,
        present: PresentFiles,
        *,
        workers: Callable[[], int],
        advance: Callable[[int], None] = _ignore_count,
    ) -> StaleBlocks:
        """
        Find the blocks of `present` that are not this backup's, for `read_all` to hand out; those that are to
        be zeros are cleared at once. Raises: IntegrityError, StoreError, OSError.
        """
        sizes = {i: one.size_bytes for i, one in enumerate(self.manifest.files) if one.map_index >= 0}
        stale = StaleBlocks(sizes)
        key = FingerprintKey.from_bytes(self._lineage.keys.fingerprint_seed(), page_bytes=BLOCK_BYTES)
        distant = self._lineage.store.capabilities.distant
        share = WRONG_SHARE_DISTANT if distant else WRONG_SHARE_NEAR
        comparison = Comparison(present, stale, key, wrong_share_max=share, advance=advance)
        run_all(self._regions(present), comparison.compare, workers=lambda: workers() + READERS_MORE)
        return stale

    def _regions(self, present: PresentFiles) -> Iterator[Region]:
        prefix = f"{self._lineage.root}packs/"
        sizes = {info.name[len(prefix) :]: info.size_bytes for info in self._lineage.store.list(prefix)}
        stored = StoredPrints(self._lineage, sizes)
        for index, segment, found in self._segments():
            path, is_there = self.manifest.files[index].path, present.present_bytes(index) > 0
            wanted = wanted_blocks(path, segment, found.packs, stored, compare=is_there)
            yield from regions_of(index, segment.file_bytes, wanted)

    def read_file(self, file_index: int) -> bytes:
        """One file as a whole; for small ones. Raises: IntegrityError, StoreError."""
        entry = self.manifest.files[file_index]
        content = bytearray(entry.size_bytes)
        if entry.map_index < 0:
            return bytes(content)
        segment, found = self.segment(file_index)
        for block, count, frame, within in segment.runs.tolist():
            if frame == ZERO_FRAME:
                continue
            pack, number, offset, sealed, _ = segment.frames[frame].tolist()
            plain = read_frame(self._lineage, found.packs[pack], FrameRef(number, offset, sealed, 0))
            data = plain[within : within + count * BLOCK_BYTES]
            begin = block * BLOCK_BYTES
            content[begin : min(begin + len(data), entry.size_bytes)] = data[: entry.size_bytes - begin]
        return bytes(content)

    def open_pack(self, name: str, header: Buffer | None) -> ContainerReader:
        """See the function of that name."""
        return open_pack(self._lineage, name, header)

    def pack_name(self, number: int) -> str:
        """Full object name of a pack of the manifest."""
        return f"{self._lineage.root}packs/{self.manifest.packs[number]}"

    def fetch(self, name: str, begin: int, end: int) -> memoryview:
        """Bytes [begin, end) of an object."""
        return memoryview(self._lineage.store.get_range(name, offset=begin, length=end - begin))

    def _map(self, index: int) -> MapObject:
        map_id = self.manifest.maps[index]
        content = self._lineage.get_blob(f"maps/{map_id}", Kind.MAP)
        return decode_map_object(content, f"map {map_id!r}")

    def _segments(self) -> Iterator[tuple[int, SegmentMap, MapObject]]:
        """The segment maps of all files that have one, by file number; each map object is read once."""
        by_map: dict[int, list[int]] = {}
        for index, entry in enumerate(self.manifest.files):
            if entry.map_index >= 0:
                by_map.setdefault(entry.map_index, []).append(index)
        in_flight = REQUESTS_IN_FLIGHT if self._lineage.store.capabilities.distant else MAPS_AHEAD
        maps = map_ahead(self._map, by_map, in_flight=in_flight)
        for found, files in zip(maps, by_map.values(), strict=True):
            for index in files:
                entry = self.manifest.files[index]
                if entry.map_ordinal >= len(found.segments):
                    raise IntegrityError(f"map of {entry.path!r} is missing in its map object")
                segment = found.segments[entry.map_ordinal]
                if segment.file_bytes != entry.size_bytes:
                    raise IntegrityError(f"map of {entry.path!r} is of another size than the file")
                yield index, segment, found

    def _places(self) -> npt.NDArray[np.void]:
        """All runs of all files, by pack and offset."""
        if self._places_cache is None:
            parts = [self._places_of(*found) for found in self._segments()]
            joined = np.concatenate(parts) if parts else np.empty(0, _PLACE)
            self._places_cache = joined[np.lexsort((joined["offset"], joined["pack"]))]
        return self._places_cache

    def _places_of(self, index: int, segment: SegmentMap, found: MapObject) -> npt.NDArray[np.void]:
        try:
            numbers = np.array([self._pack_numbers[name] for name in found.packs], dtype=np.uint32)
        except KeyError as error:
            raise IntegrityError(
                f"manifest of backup {self.manifest.backup_id!r} does not list pack {error}"
            ) from error
        runs = segment.runs[segment.runs["frame"] != ZERO_FRAME]
        frames = segment.frames[runs["frame"]]
        places = np.empty(len(runs), _PLACE)
        places["pack"] = numbers[frames["pack"]] if len(runs) else 0
        for name in ("number", "offset", "sealed"):
            places[name] = frames[name]
        places["file"] = index
        places["block"], places["count"], places["within"] = runs["block"], runs["count"], runs["offset"]
        return places

    def _stretches(self, stale: StaleBlocks | None = None) -> Iterator[_Stretch]:
        """Requests in pack order."""
        places = self._places()
        if stale is not None:
            places = places[stale.touched(places)]
        ends = places["offset"] + FRAME_HEADER.size + places["sealed"]
        packs, offsets = places["pack"], places["offset"]
        for first, last in _spans(packs):
            cuts = [first]
            begin = int(offsets[first])
            for at in range(first + 1, last):
                gap = int(offsets[at]) > int(ends[at - 1]) + GAP_BYTES_MAX
                if gap or int(ends[at]) - begin > STRETCH_BYTES_MAX:
                    if offsets[at] == offsets[at - 1]:
                        continue
                    cuts.append(at)
                    begin = int(offsets[at])
            cuts.append(last)
            for low, high in itertools.pairwise(cuts):
                begin, end = int(offsets[low]), int(ends[low:high].max())
                if low == first and begin <= GAP_BYTES_MAX:
                    begin = 0  # The header, which is needed to open the frames, comes along.
                yield _Stretch(int(packs[low]), begin, end, places[low:high], len(cuts) - 1)


def _spans(keys: npt.NDArray[np.uint32]) -> Iterator[tuple[int, int]]:
    """[first, last) of runs of equal keys."""
    if not len(keys):
        return
    edges = [0, *(np.flatnonzero(np.diff(keys)) + 1).tolist(), len(keys)]
    yield from itertools.pairwise(edges)


class _Run:
    """One `read_all`: opens what was fetched and hands it out."""

    def __init__(
        self,
        reader: BackupReader,
        write: Write,
        stale: StaleBlocks | None,
        pack_done: Callable[[str], None],
        advance: Callable[[int], None],
    ) -> None:
        self._reader = reader
        self._write = write
        self._stale = stale
        self._pack_done = pack_done
        self._advance = advance
        self._sizes = [entry.size_bytes for entry in reader.manifest.files]
        self._lock = threading.Lock()
        self._left: dict[int, int] = {}
        self._openers: dict[str, ContainerReader] = {}

    def fetch(self, stretch: _Stretch) -> memoryview:
        """The bytes of a stretch; its pack can be opened then."""
        name = self._reader.pack_name(stretch.pack)
        content = self._reader.fetch(name, stretch.begin, stretch.end)
        if name not in self._openers:
            header = content[:HEADER_BYTES] if stretch.begin == 0 else None
            self._openers[name] = self._reader.open_pack(name, header)
        return content

    def read(self, stretch: _Stretch, content: memoryview) -> None:
        """Hand out all that is in a stretch."""
        opener = self._openers[self._reader.pack_name(stretch.pack)]
        scratch, opened = scratch_of_thread(), -1
        plain, done = memoryview(b""), 0
        for _, number, offset, _, file, block, count, within in stretch.places.tolist():
            if offset != opened:
                plain = opener.open_into(content[offset - stretch.begin :], number=number, scratch=scratch)
                opened = offset
            for first, last in [(0, count)] if self._stale is None else self._stale.runs(file, block, count):
                begin = (block + first) * BLOCK_BYTES
                length = min((last - first) * BLOCK_BYTES, self._sizes[file] - begin)
                at = within + first * BLOCK_BYTES
                self._write(file, begin, plain[at : at + length])
                done += length
        self._advance(done)
        with self._lock:
            left = self._left.get(stretch.pack, stretch.last_of_pack) - 1
            self._left[stretch.pack] = left
        if left == 0:
            self._pack_done(self._reader.manifest.packs[stretch.pack])
