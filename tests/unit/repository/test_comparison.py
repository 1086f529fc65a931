"""Which blocks of files that are there are those of a backup: exactly, and cheaply where nothing is right."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloudsave.model.manifest import Manifest
from cloudsave.repository import comparison
from cloudsave.repository.container import FOOTER_BYTES
from cloudsave.repository.lineage import Lineage
from cloudsave.repository.reader import BackupReader
from cloudsave.store.api import StoreCapabilities
from cloudsave.store.memory import MemoryStore
from tests.unit.repository.samples import BLOCK, lineage_on, noise, write_backup


class FilesInMemory:
    """Present files that count what is read of them."""

    def __init__(self, manifest: Manifest, there: dict[str, bytes]) -> None:
        self.present = [min(len(there.get(one.path, b"")), one.size_bytes) for one in manifest.files]
        self.contents = [
            bytearray(there.get(one.path, b"")[: one.size_bytes].ljust(one.size_bytes, b"\0"))
            for one in manifest.files
        ]
        self.bytes_read = 0

    def present_bytes(self, file_index: int) -> int:
        return self.present[file_index]

    def read_into(self, file_index: int, offset: int, target: memoryview) -> int:
        part = self.contents[file_index][offset : offset + len(target)]
        target[: len(part)] = part
        self.bytes_read += len(part)
        return len(part)

    def clear(self, file_index: int, offset: int, length: int) -> None:
        self.contents[file_index][offset : offset + length] = bytes(length)

    def write(self, file_index: int, offset: int, data: memoryview) -> None:
        self.contents[file_index][offset : offset + len(data)] = data


def made_right(
    lineage: Lineage, manifest: Manifest, there: dict[str, bytes]
) -> tuple[FilesInMemory, list[tuple[int, int]]]:
    """Files after a comparison and the writes that it asked for; and where these writes went."""
    reader, files = BackupReader(lineage, manifest), FilesInMemory(manifest, there)
    stale = reader.compare(files, workers=lambda: 2)
    written: list[tuple[int, int]] = []

    def write(file_index: int, offset: int, data: memoryview) -> None:
        written.append((file_index, offset))
        files.write(file_index, offset, data)

    reader.read_all(write, workers=lambda: 2, stale=stale)
    return files, written


def assert_right(files: FilesInMemory, manifest: Manifest, wanted: dict[str, bytes]) -> None:
    for content, entry in zip(files.contents, manifest.files, strict=True):
        assert bytes(content) == wanted.get(entry.path, b""), entry.path


class DistantStore(MemoryStore):
    """A store that says that it is far away."""

    @property
    def capabilities(self) -> StoreCapabilities:
        return replace(super().capabilities, distant=True)


WANTED = {
    "base/5/1001": noise(1, 30 * BLOCK) + bytes(7 * BLOCK) + noise(2, 5 * BLOCK + 100),
    "base/5/1002": bytes(20 * BLOCK),
    "base/5/1003": b"",
    "PG_VERSION": b"18\n",
}


@pytest.fixture(scope="module")
def stored() -> tuple[Lineage, Manifest]:
    """A backup of WANTED."""
    lineage = lineage_on(MemoryStore())
    return lineage, write_backup(lineage, "20260101T000000Z-0001", WANTED)


def damaged(content: bytes, chance: random.Random) -> bytes:
    """Some blocks changed by one bit, some cleared, and the end cut off or more added."""
    result = bytearray(content)
    for block in range(0, len(result), BLOCK):
        match chance.randrange(4):
            case 0:
                result[min(block + chance.randrange(BLOCK), len(result) - 1)] ^= 1
            case 1:
                end = min(block + BLOCK, len(result))
                result[block:end] = bytes(end - block)
    match chance.randrange(3):
        case 0:
            del result[chance.randrange(len(result) + 1) :]
        case 1:
            result += noise(3, chance.randrange(2 * BLOCK))
    return bytes(result)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1 << 32))
def test_whatever_is_there_the_result_is_right(stored: tuple[Lineage, Manifest], seed: int) -> None:
    lineage, manifest = stored
    chance = random.Random(seed)
    there = {path: damaged(content, chance) for path, content in WANTED.items() if chance.random() < 0.8}
    files, _ = made_right(lineage, manifest, there)
    assert_right(files, manifest, WANTED)


def test_what_is_right_is_neither_fetched_nor_written(stored: tuple[Lineage, Manifest]) -> None:
    lineage, manifest = stored
    _, written = made_right(lineage, manifest, WANTED)
    assert written == []
    changed = bytearray(WANTED["base/5/1001"])
    changed[3 * BLOCK + 5] ^= 1
    files, written = made_right(lineage, manifest, {**WANTED, "base/5/1001": bytes(changed)})
    (index,) = [n for n, entry in enumerate(manifest.files) if entry.path == "base/5/1001"]
    assert written == [(index, 3 * BLOCK)]
    assert_right(files, manifest, WANTED)


def test_a_comparison_that_believes_everything_would_be_noticed(
    stored: tuple[Lineage, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control of the tests above."""
    lineage, manifest = stored
    monkeypatch.setattr(
        comparison.Comparison,
        "_differ",
        lambda self, region, first, last: region.wanted.zero[first:last] & False,
    )
    changed = bytearray(WANTED["base/5/1001"])
    changed[3 * BLOCK + 5] ^= 1
    files, _ = made_right(lineage, manifest, {**WANTED, "base/5/1001": bytes(changed)})
    with pytest.raises(AssertionError, match="1001"):
        assert_right(files, manifest, WANTED)


def test_what_cannot_be_compared_is_written() -> None:
    """The fingerprints are in the trailers of packs; the frames can be read without them."""
    store = MemoryStore()
    lineage = lineage_on(store)
    manifest = write_backup(lineage, "20260101T000000Z-0001", WANTED)
    for name, (content, at) in list(store.objects.items()):
        if "/packs/" in name:
            damaged_pack = bytearray(content)
            damaged_pack[-FOOTER_BYTES - 20] ^= 1
            store.objects[name] = (bytes(damaged_pack), at)
    files, written = made_right(lineage, manifest, WANTED)
    assert_right(files, manifest, WANTED)
    assert len(written) >= 2


def test_where_all_is_wrong_little_is_read() -> None:
    lineage = lineage_on(MemoryStore())
    size = 4096 * BLOCK
    wanted = {"base/5/1": noise(1, size // 2) + bytes(size // 4) + noise(2, size // 4)}
    manifest = write_backup(lineage, "20260101T000000Z-0001", wanted)
    files, _ = made_right(lineage, manifest, {"base/5/1": noise(3, size)})
    assert_right(files, manifest, wanted)
    assert files.bytes_read <= size / 16


@pytest.mark.parametrize("distant", [False, True])
def test_a_few_wrong_blocks_are_worth_a_comparison_where_bytes_are_dear(distant: bool) -> None:
    lineage = lineage_on(DistantStore() if distant else MemoryStore())
    size = 2048 * BLOCK
    wanted = {"base/5/1": noise(1, size)}
    manifest = write_backup(lineage, "20260101T000000Z-0001", wanted)
    there = bytearray(wanted["base/5/1"])
    for block in range(0, 2048, 20):
        there[block * BLOCK] ^= 1
    files, written = made_right(lineage, manifest, {"base/5/1": bytes(there)})
    assert_right(files, manifest, wanted)
    if distant:
        assert files.bytes_read >= size
        assert len(written) == 103
    else:
        assert files.bytes_read <= size / 8
    files, written = made_right(lineage, manifest, wanted)
    assert not written
