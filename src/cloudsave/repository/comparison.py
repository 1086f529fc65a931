"""
Which blocks of files that are there already are those of a backup, by the fingerprints that are stored with
its blocks.

Files are looked at in regions. Of each region a sample is read first: where it is not right enough, reading
the rest would cost more than it saves, and all of it counts as wrong. So where everything has changed a
comparison costs the samples and no more.

A block counts as right when its keyed fingerprint is the stored one: decision 0013 says why this is enough.
Where the stored one cannot be read, the block is wrong. Zeros are compared as such, byte by byte.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from cloudsave.kernels.pages import FingerprintKey, fingerprints
from cloudsave.repository.maps import BLOCK_BYTES, ZERO_FRAME, Fingerprints, SegmentMap, block_count
from cloudsave.repository.prints import StoredPrints
from cloudsave.repository.priors import expand_segment

REGION_BLOCKS = 8192
"""Blocks that are sampled, and compared or given up, together (64 MiB); a multiple of 8."""
SAMPLES = 4
SAMPLE_BLOCKS = 64
SAMPLED_BLOCKS_MIN = 4 * SAMPLES * SAMPLE_BLOCKS
"""Smaller regions are read at once."""
WRONG_SHARE_NEAR = 0.0
"""
Of the sample, at most, for a region to be read where the repository is near: a frame of 128 blocks is fetched
as a whole for one that is wrong, and fetching from near and writing is about as quick as reading.
"""
WRONG_SHARE_DISTANT = 0.5
"""The same where bytes come over a network, which is slower than any disk."""
READ_BLOCKS = 128
"""Blocks per read (1 MiB)."""
Blocks = npt.NDArray[np.bool_]


class PresentFiles(Protocol):
    """The files of a backup as they are on this machine, at full length; by their number in the manifest."""

    def present_bytes(self, file_index: int) -> int:
        """How much of the file was there before; all behind it is zeros. 0: nothing is to be compared."""

    def read_into(self, file_index: int, offset: int, target: memoryview) -> int:
        """Read from stable storage; bytes read, fewer than asked for only at the end of the file."""

    def clear(self, file_index: int, offset: int, length: int) -> None:
        """Make bytes zero."""


class StaleBlocks:
    """The blocks of a backup's files that must be written; one bit for each block."""

    def __init__(self, sizes: Mapping[int, int]) -> None:
        """`sizes`: file number to bytes, of all files that have a map."""
        self._bits = {index: np.zeros(-(-block_count(size) // 8), np.uint8) for index, size in sizes.items()}

        self._lock = threading.Lock()
        self.bytes_stale = 0
        self.bytes_kept = 0
        """Bytes that were there and right, in whole blocks."""

    def put(self, file_index: int, first_block: int, stale: Blocks, *, kept: int) -> None:
        """
        Set the bits of blocks from `first_block` (a multiple of 8) on, of which `kept` were right. From any
        thread, each block once.
        """
        packed = np.packbits(stale)
        begin = first_block // 8
        self._bits[file_index][begin : begin + len(packed)] = packed
        with self._lock:
            self.bytes_stale += int(stale.sum()) * BLOCK_BYTES
            self.bytes_kept += kept * BLOCK_BYTES

    def of_file(self, file_index: int) -> Blocks:
        """One element for each block (and up to 7 more)."""
        return np.unpackbits(self._bits[file_index]).view(np.bool_)

    def touched(self, places: npt.NDArray[np.void]) -> Blocks:
        """Which of the places (with fields `file`, `block` and `count`) hold a stale block."""
        result = np.zeros(len(places), np.bool_)
        order = np.argsort(places["file"], kind="stable")
        files = places["file"][order]
        edges = np.flatnonzero(np.diff(files)) + 1
        for part in np.split(order, edges) if len(order) else []:
            stale = self.of_file(int(places["file"][part[0]]))
            before = np.concatenate([[0], np.cumsum(stale)])
            first = places["block"][part].astype(np.int64)
            result[part] = before[first + places["count"][part]] > before[first]
        return result

    def runs(self, file_index: int, block: int, count: int) -> list[tuple[int, int]]:
        """Runs [first, last) of stale blocks in [block, block + count), relative to `block`."""
        bits = self._bits[file_index][block // 8 : -(-(block + count) // 8)]
        stale = np.unpackbits(bits)[block % 8 : block % 8 + count]
        edges = np.flatnonzero(np.diff(stale, prepend=0, append=0)).tolist()
        return list(zip(edges[::2], edges[1::2], strict=True))


@dataclass(frozen=True, slots=True)
class Region:
    """Blocks [first, last) of one file."""

    file_index: int
    file_bytes: int
    wanted: WantedBlocks
    """Of the whole file."""
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class WantedBlocks:
    """What a file is to be: one element for each of its blocks."""

    zero: Blocks
    prints: Fingerprints
    printed: Blocks
    """Whether the fingerprint is known; else only writing makes the block right."""


def wanted_blocks(
    path: str, segment: SegmentMap, packs: tuple[str, ...], stored: StoredPrints, *, compare: bool
) -> WantedBlocks:
    """
    The blocks of a segment map, whose packs are `packs`. Without `compare` nothing is looked up: nothing is
    there to be compared. Raises: StoreError.
    """
    blocks = expand_segment(segment, packs, stored.sizes)
    zero = blocks.frame == ZERO_FRAME
    prints, printed = blocks.fingerprints, blocks.printed
    missing = np.flatnonzero(~zero & ~printed) if compare else np.empty(0, np.int64)
    if len(missing):
        used = np.unique(blocks.frame[missing]).tolist()
        stored.read_ahead(dict.fromkeys(blocks.places[number][0] for number in used))
        found = stored.find(path, blocks.places, blocks.frame[missing], blocks.offset[missing])
        prints[missing], printed[missing] = found.prints, found.known
    return WantedBlocks(zero, prints, printed)


def regions_of(file_index: int, file_bytes: int, wanted: WantedBlocks) -> Iterator[Region]:
    """A file in regions."""
    blocks = len(wanted.zero)
    for first in range(0, blocks, REGION_BLOCKS):
        yield Region(file_index, file_bytes, wanted, first, min(first + REGION_BLOCKS, blocks))


class Comparison:
    """Compares regions with what is there. Thread-safe."""

    def __init__(
        self,
        present: PresentFiles,
        stale: StaleBlocks,
        key: FingerprintKey,
        *,
        wrong_share_max: float,
        advance: Callable[[int], None],
    ) -> None:
        """`wrong_share_max`: of a region's sample, for the region to be read."""
        self._wrong_max = int(wrong_share_max * SAMPLES * SAMPLE_BLOCKS)
        self._present = present
        self._stale = stale
        self._key = key
        self._advance = advance
        self._of_thread = threading.local()

    def compare(self, region: Region) -> None:
        """Find the stale blocks of a region, and clear those that are to be zeros."""
        zero_wanted = region.wanted.zero[region.first : region.last]
        stale = ~zero_wanted
        kept = 0
        there = min(block_count(self._present.present_bytes(region.file_index)), region.last)
        if there > region.first:
            if self._is_worth_reading(region, there):
                for first in range(region.first, there, READ_BLOCKS):
                    last = min(first + READ_BLOCKS, there)
                    stale[first - region.first : last - region.first] = self._differ(region, first, last)
                wrong_zeros = stale & zero_wanted
                kept = there - region.first - int(stale[: there - region.first].sum())
            else:
                wrong_zeros = zero_wanted.copy()
                wrong_zeros[there - region.first :] = False
            self._clear(region, wrong_zeros)
            stale &= ~zero_wanted
        self._stale.put(region.file_index, region.first, stale, kept=kept)
        self._advance((region.last - region.first) * BLOCK_BYTES)

    def _is_worth_reading(self, region: Region, there: int) -> bool:
        if there - region.first < SAMPLED_BLOCKS_MIN:
            return True
        step = (there - region.first) // SAMPLES
        wrong = 0
        for number in range(SAMPLES):
            first = region.first + number * step
            wrong += int(self._differ(region, first, first + SAMPLE_BLOCKS).sum())
        return wrong <= self._wrong_max

    def _differ(self, region: Region, first: int, last: int) -> Blocks:
        """Which of the blocks [first, last), at most READ_BLOCKS, are not those of the backup."""
        count = last - first
        buffer = self._buffer()[: count * BLOCK_BYTES]
        got = self._present.read_into(region.file_index, first * BLOCK_BYTES, buffer)
        buffer[got:] = bytes(len(buffer) - got)
        found = np.empty(count, np.uint64)
        zero = fingerprints(buffer, page_bytes=BLOCK_BYTES, key=self._key, out=found)
        wanted, part = region.wanted, slice(first, last)
        other = ~wanted.printed[part] | (found != wanted.prints[part])
        differ: Blocks = np.where(wanted.zero[part], ~zero, other)
        return differ

    def _clear(self, region: Region, wrong: Blocks) -> None:
        edges = (np.flatnonzero(np.diff(wrong.astype(np.int8), prepend=0, append=0)) + region.first).tolist()
        for first, last in zip(edges[::2], edges[1::2], strict=True):
            end = min(last * BLOCK_BYTES, region.file_bytes)
            begin = first * BLOCK_BYTES
            self._present.clear(region.file_index, begin, end - begin)

    def _buffer(self) -> memoryview:
        """A buffer of the calling thread; it begins at a multiple of the machine's page size."""
        if not hasattr(self._of_thread, "buffer"):
            self._of_thread.buffer = memoryview(mmap.mmap(-1, READ_BLOCKS * BLOCK_BYTES))
        found: memoryview = self._of_thread.buffer
        return found
