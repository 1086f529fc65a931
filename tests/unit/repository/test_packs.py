"""Trailers of packs say what the pack holds, and stay small enough to be read."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloudsave.errors import IntegrityError
from cloudsave.repository.container import Arena
from cloudsave.repository.crypto import FRAME_PLAIN_BYTES_MAX
from cloudsave.repository.packs import TRAILER_BYTES_TARGET, PackBuilder, Stretch, read_trailer
from cloudsave.store.memory import MemoryStore
from tests.unit.repository.samples import BLOCK, SeededClock, lineage_on

paths = st.text(st.characters(exclude_characters="\0"), min_size=1, max_size=30).filter(
    lambda text: not any(0xD800 <= ord(c) <= 0xDFFF for c in text)
)
stretches = st.lists(st.tuples(paths, st.integers(0, 1 << 20), st.integers(1, 9)), min_size=1, max_size=5)


def builder(store: MemoryStore) -> PackBuilder:
    """A new pack of the sample lineage."""
    keys = lineage_on(store).keys
    return PackBuilder.open(
        keys, "00000001-00000000", clock=SeededClock(1), level=1, bytes_target=32 << 20, arena=Arena()
    )


@settings(max_examples=50, deadline=None)
@given(frames=st.lists(stretches, min_size=1, max_size=4))
def test_a_trailer_tells_all_that_was_added(frames: list[list[tuple[str, int, int]]]) -> None:
    store = MemoryStore()
    pack = builder(store)
    expected = []
    for number, descriptions in enumerate(frames):
        used, added = 0, []
        for path, block, count in descriptions:
            prints = np.arange(block, block + count, dtype=np.uint64)
            added.append(Stretch(path, block, count, used * BLOCK, prints))
            expected.append((number, path, block, count, used * BLOCK, prints.tolist()))
            used += count
        pack.add(bytes(used * BLOCK), added, proof=True)
    bound = pack.trailer_bytes_max
    trailer_bytes = len(pack._trailer())
    size = pack.put(store)
    found = read_trailer(lineage_on(store).keys, store, "00000001-00000000", size)
    assert [
        (n, s.path, s.block, s.count, s.frame_offset, s.fingerprints.tolist()) for n, s in found.stretches()
    ] == expected
    assert found.frames["plain"].tolist() == [
        BLOCK * sum(d[2] for d in descriptions) for descriptions in frames
    ]
    assert trailer_bytes <= bound + 64


def test_a_path_that_is_not_utf8_is_kept() -> None:
    store = MemoryStore()
    pack = builder(store)
    pack.add(bytes(BLOCK), [Stretch("a\udcff", 0, 1, 0, np.ones(1, np.uint64))], proof=True)
    size = pack.put(store)
    found = read_trailer(lineage_on(store).keys, store, "00000001-00000000", size)
    assert found.paths == ("a\udcff",)


def test_pages_that_compress_to_nothing_still_fill_a_pack() -> None:
    """Else the trailer of one pack could outgrow what a reader accepts."""
    pack = builder(MemoryStore())
    count = TRAILER_BYTES_TARGET // 8
    assert not pack.is_full
    pack.add(b"\x01", [Stretch("base/1", 0, count, 0, np.zeros(count, np.uint64))], proof=False)
    assert pack.container.size_bytes < 1000
    assert pack.is_full
    assert 2 * TRAILER_BYTES_TARGET < FRAME_PLAIN_BYTES_MAX


def test_each_flipped_bit_of_a_trailer_is_found() -> None:
    store = MemoryStore()
    pack = builder(store)
    pack.add(bytes(BLOCK), [Stretch("base/1", 0, 1, 0, np.ones(1, np.uint64))], proof=True)
    size = pack.put(store)
    name = pack.container.name
    content, instant = store.objects[name]
    keys = lineage_on(store).keys
    begin = size - 120 - (size - 120 - int.from_bytes(content[-120:-112], "little"))
    for place in range(begin, size - 120):
        for bit in range(8):
            damaged = bytearray(content)
            damaged[place] ^= 1 << bit
            store.objects[name] = (bytes(damaged), instant)
            with pytest.raises(IntegrityError):
                read_trailer(keys, store, "00000001-00000000", size)


def test_a_footer_that_points_to_another_frame_is_refused() -> None:
    """The footer is not authenticated; the frame that it names as trailer must be the last one."""
    store = MemoryStore()
    pack = builder(store)
    pack.add(bytes(BLOCK), [Stretch("base/1", 0, 1, 0, np.ones(1, np.uint64))], proof=True)
    size = pack.put(store)
    content, instant = store.objects[pack.container.name]
    forged = bytearray(content)
    forged[-120:-112] = (32).to_bytes(8, "little")
    forged[-112:-108] = (1).to_bytes(4, "little")
    store.objects[pack.container.name] = (bytes(forged), instant)
    with pytest.raises(IntegrityError):
        read_trailer(lineage_on(store).keys, store, "00000001-00000000", size)
