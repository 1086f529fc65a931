"""A writer that is told which blocks are unchanged leaves them unread, and sees where that was wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import numpy as np
import numpy.typing as npt
from hypothesis import given, settings
from hypothesis import strategies as st

from cloudsave.model.item import Item
from cloudsave.model.manifest import Manifest
from cloudsave.repository.file_maps import SKIP_BLOCKS_MIN
from cloudsave.repository.lineage import Lineage
from cloudsave.store.memory import MemoryStore
from tests.unit.repository.samples import (
    BLOCK,
    BytesPiece,
    draft_manifest,
    file_item,
    lineage_on,
    noise,
    open_writer,
    pieces_of,
    read_backup,
    write_backup,
)

Flags = npt.NDArray[np.bool_]


class FakeTrust:
    """Says that all blocks but those of `changed` are unchanged; proves those of `proving`."""

    def __init__(self, changed: set[int], *, proving: bool = False) -> None:
        self.changed = changed
        self.proving = proving
        self.differing: list[tuple[str, int, bytes, bytes]] = []

    def unchanged(self, item: Item, blocks: int) -> Flags | None:
        """See `Trust.unchanged`."""
        return (
            None if item.path == "untold" else np.array([n not in self.changed for n in range(blocks)], bool)
        )

    def proved(self, item: Item, blocks: int) -> Flags:
        """See `Trust.proved`."""
        return np.full(blocks, self.proving)

    def differs(self, item: Item, block: int, found: bytes, stored: Callable[[], bytes]) -> None:
        """See `Trust.differs`."""
        self.differing.append((item.path, block, found, stored()))


class WatchedPiece(BytesPiece):
    """Notes which blocks are read."""

    seen: ClassVar[set[tuple[str, int]]] = set()

    def read_into(self, target: memoryview, *, offset: int) -> int:
        """See `Piece.read_into`."""
        got = super().read_into(target, offset=offset)
        first = (self.offset + offset) // BLOCK
        self.seen |= {(self.item.path, block) for block in range(first, first + -(-got // BLOCK))}
        return got


def increment(
    lineage: Lineage, backup_id: str, files: Mapping[str, bytes], parent: Manifest, trust: FakeTrust
) -> tuple[Manifest, set[tuple[str, int]]]:
    """A backup by `trust`, and the blocks that were read for it."""
    WatchedPiece.seen = seen = set()
    writer = open_writer(lineage, backup_id, parent)
    try:
        writer.open()
        writer.trust(trust)
        for path, content in files.items():
            for piece in pieces_of(path, content):
                writer.store(WatchedPiece(file_item(path, len(content)), piece.offset, piece.content))
        writer.settle()
        writer.drain()
        return writer.commit(draft_manifest(backup_id, parent)), seen
    finally:
        writer.abort()


def changed_file(content: bytes, blocks: set[int], seed: int) -> bytes:
    fresh = bytearray(content)
    for block in blocks:
        fresh[block * BLOCK : (block + 1) * BLOCK] = noise(seed + block, BLOCK)[
            : len(content) - block * BLOCK
        ]
    return bytes(fresh)


def test_unchanged_blocks_are_not_read() -> None:
    lineage = lineage_on(MemoryStore())
    files = {"base/1": noise(1, 300 * BLOCK), "base/2": noise(2, 40 * BLOCK), "untold": noise(3, 30 * BLOCK)}
    first = write_backup(lineage, "20260101T000000Z-0001", files)
    files = {path: changed_file(content, {20}, 9) for path, content in files.items()}
    files["base/1"] += noise(7, 3 * BLOCK + 5)
    second, seen = increment(lineage, "20260102T000000Z-0002", files, first, FakeTrust({20}))
    assert seen == {
        *(("base/1", block) for block in (20, 300, 301, 302, 303)),
        ("base/2", 20),
        *(("untold", block) for block in range(30)),
    }
    assert second.statistics.blocks_stored == 7
    assert second.statistics.blocks_total == 304 + 40 + 30
    assert read_backup(lineage, second) == files


def test_a_file_without_changes_is_named_by_its_map_again() -> None:
    lineage = lineage_on(MemoryStore())
    files = {"base/1": noise(1, 300 * BLOCK), "base/2": bytes(20 * BLOCK) + noise(1, BLOCK)}
    first = write_backup(lineage, "20260101T000000Z-0001", files)
    second, seen = increment(lineage, "20260102T000000Z-0002", files, first, FakeTrust(set()))
    assert seen == set()
    assert (second.maps, second.statistics.bytes_stored) == (first.maps, 0)
    assert read_backup(lineage, second) == files


def test_an_unchanged_file_is_read_where_it_is_to_be_proved_or_has_grown() -> None:
    lineage = lineage_on(MemoryStore())
    files = {"base/1": noise(1, 30 * BLOCK)}
    first = write_backup(lineage, "20260101T000000Z-0001", files)
    _, seen = increment(lineage, "20260102T000000Z-0002", files, first, FakeTrust(set(), proving=True))
    assert len(seen) == 30
    files = {"base/1": files["base/1"] + noise(2, BLOCK)}
    second, seen = increment(lineage, "20260103T000000Z-0003", files, first, FakeTrust(set()))
    assert seen == {("base/1", 30)}
    assert read_backup(lineage, second) == files


def test_few_blocks_between_changed_ones_are_read_along() -> None:
    lineage = lineage_on(MemoryStore())
    files = {"base/1": noise(1, 100 * BLOCK)}
    first = write_backup(lineage, "20260101T000000Z-0001", files)
    near, far = 10 + SKIP_BLOCKS_MIN, 40
    trust = FakeTrust({10, near, far})
    _, seen = increment(lineage, "20260102T000000Z-0002", files, first, trust)
    assert {block for _, block in seen} == {*range(10, near + 1), far}
    assert trust.differing == []


def test_a_change_that_was_not_told_is_seen_where_it_is_read() -> None:
    lineage = lineage_on(MemoryStore())
    before = {"base/1": bytes(3 * BLOCK) + noise(1, 60 * BLOCK)}
    first = write_backup(lineage, "20260101T000000Z-0001", before)
    files = {"base/1": changed_file(before["base/1"], {0, 33, 50}, 9)}
    unaware, _ = increment(lineage, "20260102T000000Z-0002", files, first, FakeTrust({33}))
    assert read_backup(lineage, unaware)["base/1"] == changed_file(before["base/1"], {33}, 9)
    trust = FakeTrust({33}, proving=True)
    proved, _ = increment(lineage, "20260103T000000Z-0003", files, first, trust)
    assert read_backup(lineage, proved) == files
    for path, block, found, stored in trust.differing:
        assert files[path][block * BLOCK : (block + 1) * BLOCK] == found
        assert before[path][block * BLOCK : (block + 1) * BLOCK] == stored
    assert sorted(block for _, block, _, _ in trust.differing) == [0, 50]


def test_blocks_whose_fingerprints_are_lost_are_stored_again() -> None:
    """A pack without a readable trailer can still be restored from, but not be compared with."""
    store = MemoryStore()
    lineage = lineage_on(store)
    files = {"base/1": noise(1, 60 * BLOCK)}
    first = write_backup(lineage, "20260101T000000Z-0001", files)
    (pack,) = [name for name in store.objects if "/packs/" in name]
    content, instant = store.objects[pack]
    damaged = bytearray(content)
    damaged[-140] ^= 1
    store.objects[pack] = (bytes(damaged), instant)
    trust = FakeTrust(set(), proving=True)
    second, _ = increment(lineage, "20260102T000000Z-0002", files, first, trust)
    assert (second.statistics.blocks_stored, trust.differing) == (60, [])


blocks = st.sets(st.integers(0, 129), max_size=40)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(blocks, blocks, st.integers(0, 3), st.booleans()), min_size=1, max_size=5))
def test_many_increments_read_back_as_they_were(steps: list[tuple[set[int], set[int], int, bool]]) -> None:
    lineage = lineage_on(MemoryStore())
    content = noise(1, 100 * BLOCK) + bytes(30 * BLOCK)
    made = [(write_backup(lineage, "20260101T000000Z-0000", {"base/1": content}), content)]
    for number, (changed, zeroed, grown, proving) in enumerate(steps, 1):
        content = changed_file(content, changed, 1000 * number)
        for block in zeroed:
            content = content[: block * BLOCK] + bytes(BLOCK) + content[(block + 1) * BLOCK :]
        content += noise(number, grown * BLOCK)
        trust = FakeTrust(changed | zeroed, proving=proving)
        manifest, _ = increment(
            lineage, f"20260101T000000Z-{number:04d}", {"base/1": content}, made[-1][0], trust
        )
        made.append((manifest, content))
        assert trust.differing == []
    for manifest, wanted in made:
        assert read_backup(lineage, manifest) == {"base/1": wanted}
