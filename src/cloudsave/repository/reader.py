"""
Reads a base backup: from the maps to the packs, in the order of the packs, in parallel.

Each pack is read once, in stretches of neighbouring frames; every byte is authenticated before it is handed
out. Memory = workers x (one stretch + one frame), and 36 bytes per run of blocks.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cloudsave.errors import IntegrityError
from cloudsave.model.manifest import FileEntry, Manifest
from cloudsave.repository.container import (
    FRAME_HEADER,
    HEADER_BYTES,
    ContainerReader,
    FrameRef,
    Kind,
    scratch_of_thread,
)
from cloudsave.repository.lineage import Lineage
from cloudsave.repository.maps import BLOCK_BYTES, ZERO_FRAME, MapObject, SegmentMap, decode_map_object

STRETCH_BYTES_MAX = 8 << 20
"""Limit: bytes fetched by one request."""
GAP_BYTES_MAX = 64 << 10
"""Frames that are not wanted are read along when they are smaller than this: cheaper than another request."""
POLL_SECONDS = 0.2
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


def open_pack(lineage: Lineage, name: str) -> ContainerReader:
    """A reader of a pack's frames, by its full name."""
    header = lineage.store.get_range(name, offset=0, length=HEADER_BYTES)
    return ContainerReader(lineage.keys, name, Kind.PACK, header)


def read_frame(lineage: Lineage, pack: str, frame: FrameRef) -> bytes:
    """The plain bytes of one frame. Raises: ObjectMissing, IntegrityError."""
    name = f"{lineage.root}packs/{pack}"
    length = FRAME_HEADER.size + frame.sealed_bytes
    content = lineage.store.get_range(name, offset=frame.offset, length=length)
    plain, _ = open_pack(lineage, name).open(content, number=frame.number)
    return plain


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
        workers: int,
        skip_packs: Collection[str] = (),
        pack_done: Callable[[str], None] = _ignore_pack,
        advance: Callable[[int], None] = _ignore_count,
    ) -> None:
        """
        Hand out all stored blocks: `write(file_index, file_offset, data)`, from several threads, in no
        order. `data` is valid only during the call; it begins at a multiple of 4096 in memory.

        Blocks of zeros are not handed out: files are made at their full length, sparse. `pack_done` is told
        of each pack whose blocks have all been written; `advance` of file bytes. The first error of a
        worker ends it all.
        Raises: IntegrityError, ObjectMissing, StoreError, and what `write` raises.
        """
        skipped = {self._pack_numbers[name] for name in skip_packs if name in self._pack_numbers}
        run = _Run(self, write, pack_done, advance)
        run.execute((s for s in self._stretches() if s.pack not in skipped), workers)

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

    def open_pack(self, name: str) -> ContainerReader:
        """A reader of a pack's frames, by its full name."""
        return open_pack(self._lineage, name)

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

    def _places(self) -> npt.NDArray[np.void]:
        """All runs of all files, by pack and offset."""
        if self._places_cache is None:
            by_map: dict[int, list[tuple[int, FileEntry]]] = {}
            for index, entry in enumerate(self.manifest.files):
                if entry.map_index >= 0:
                    by_map.setdefault(entry.map_index, []).append((index, entry))
            parts = [part for number, files in by_map.items() for part in self._places_of(number, files)]
            joined = np.concatenate(parts) if parts else np.empty(0, _PLACE)
            self._places_cache = joined[np.lexsort((joined["offset"], joined["pack"]))]
        return self._places_cache

    def _places_of(
        self, map_index: int, files: list[tuple[int, FileEntry]]
    ) -> Iterator[npt.NDArray[np.void]]:
        found = self._map(map_index)
        try:
            numbers = np.array([self._pack_numbers[name] for name in found.packs], dtype=np.uint32)
        except KeyError as error:
            raise IntegrityError(
                f"manifest of backup {self.manifest.backup_id!r} does not list pack {error}"
            ) from error
        for index, entry in files:
            if entry.map_ordinal >= len(found.segments):
                raise IntegrityError(f"map of {entry.path!r} is missing in its map object")
            segment = found.segments[entry.map_ordinal]
            if segment.file_bytes != entry.size_bytes:
                raise IntegrityError(f"map of {entry.path!r} is of another size than the file")
            runs = segment.runs[segment.runs["frame"] != ZERO_FRAME]
            frames = segment.frames[runs["frame"]]
            places = np.empty(len(runs), _PLACE)
            places["pack"] = numbers[frames["pack"]] if len(runs) else 0
            for name in ("number", "offset", "sealed"):
                places[name] = frames[name]
            places["file"] = index
            places["block"], places["count"], places["within"] = runs["block"], runs["count"], runs["offset"]
            yield places

    def _stretches(self) -> Iterator[_Stretch]:
        """Requests in pack order."""
        places = self._places()
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
                end = int(ends[low:high].max())
                yield _Stretch(int(packs[low]), int(offsets[low]), end, places[low:high], len(cuts) - 1)


def _spans(keys: npt.NDArray[np.uint32]) -> Iterator[tuple[int, int]]:
    """[first, last) of runs of equal keys."""
    if not len(keys):
        return
    edges = [0, *(np.flatnonzero(np.diff(keys)) + 1).tolist(), len(keys)]
    yield from itertools.pairwise(edges)


class _Run:
    """One `read_all`: a bounded queue of stretches and the threads that read them."""

    def __init__(
        self,
        reader: BackupReader,
        write: Write,
        pack_done: Callable[[str], None],
        advance: Callable[[int], None],
    ) -> None:
        self._reader = reader
        self._write = write
        self._pack_done = pack_done
        self._advance = advance
        self._sizes = [entry.size_bytes for entry in reader.manifest.files]
        self._lock = threading.Lock()
        self._left: dict[int, int] = {}
        self._error: BaseException | None = None
        self._openers: dict[str, ContainerReader] = {}

    def execute(self, stretches: Iterator[_Stretch], workers: int) -> None:
        """Read all; raises the first error."""
        tasks: queue.Queue[_Stretch | None] = queue.Queue(2 * workers)
        threads = [threading.Thread(target=self._work, args=(tasks,), daemon=True) for _ in range(workers)]
        for thread in threads:
            thread.start()
        try:
            for stretch in itertools.chain(stretches, itertools.repeat(None, workers)):
                self._submit(tasks, stretch)
        except BaseException as error:
            self._error = self._error or error
            raise
        finally:
            for thread in threads:
                thread.join()
        if self._error is not None:
            raise self._error

    def _submit(self, tasks: queue.Queue[_Stretch | None], stretch: _Stretch | None) -> None:
        while True:
            if self._error is not None:
                raise self._error
            try:
                tasks.put(stretch, timeout=POLL_SECONDS)
            except queue.Full:
                continue
            return

    def _work(self, tasks: queue.Queue[_Stretch | None]) -> None:
        try:
            while self._error is None:
                try:
                    stretch = tasks.get(timeout=POLL_SECONDS)
                except queue.Empty:
                    continue
                if stretch is None:
                    return
                self._read(stretch)
        except BaseException as error:  # noqa: BLE001 - carried to the thread that waits
            self._error = self._error or error

    def _opener(self, name: str) -> ContainerReader:
        found = self._openers.get(name)
        if found is None:
            found = self._openers[name] = self._reader.open_pack(name)
        return found

    def _read(self, stretch: _Stretch) -> None:
        name = self._reader.pack_name(stretch.pack)
        opener = self._opener(name)
        content = self._reader.fetch(name, stretch.begin, stretch.end)
        scratch, opened = scratch_of_thread(), -1
        plain = memoryview(b"")
        for _, number, offset, _, file, block, count, within in stretch.places.tolist():
            if offset != opened:
                plain = opener.open_into(content[offset - stretch.begin :], number=number, scratch=scratch)
                opened = offset
            begin = block * BLOCK_BYTES
            length = min(count * BLOCK_BYTES, self._sizes[file] - begin)
            self._write(file, begin, plain[within : within + length])
            self._advance(length)
        with self._lock:
            left = self._left.get(stretch.pack, stretch.last_of_pack) - 1
            self._left[stretch.pack] = left
        if left == 0:
            self._pack_done(self._reader.manifest.packs[stretch.pack])
