"""Backups are read back as they were written, and store only what is new."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloudsave.errors import GenerationFenced, IntegrityError, ObjectExists, UnknownBackup
from cloudsave.model.manifest import Manifest
from cloudsave.repository import file_maps
from cloudsave.repository.lineage import Lineage
from cloudsave.repository.maps import BLOCK_BYTES
from cloudsave.repository.reader import BackupReader
from cloudsave.repository.writer import BackupWriter, WriterOptions
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
    store_files,
    write_backup,
)

SMALL_PACKS = WriterOptions(workers=2, pack_bytes=1 << 20)


def database(seed: int = 1) -> dict[str, bytes]:
    """Files of all sorts: several packs, zero pages within and at the end, short last blocks, empty."""
    return {
        "base/5/1001": noise(seed, 5 * (1 << 20) + 3 * BLOCK),
        "base/5/1002": noise(seed + 1, 3 * BLOCK) + bytes(5 * BLOCK) + noise(seed + 2, BLOCK) + bytes(BLOCK),
        "base/5/1003": bytes(40 * BLOCK),
        "base/5/1004": b"",
        "PG_VERSION": b"18\n",
        "global/pg_filenode.map": noise(seed + 3, BLOCK + 17),
        "pg_xact/0000": bytes(BLOCK - 1) + b"\x01",
    }


def packs_in(store: MemoryStore) -> list[str]:
    """Names of all stored packs."""
    return sorted(name for name in store.objects if "/packs/" in name)


def stored_bytes(store: MemoryStore) -> int:
    """All bytes of all packs."""
    return sum(len(store.objects[name][0]) for name in packs_in(store))


def test_a_backup_reads_back_identical() -> None:
    store = MemoryStore()
    lineage = lineage_on(store)
    manifest = write_backup(lineage, "20260101T000000Z-0001", database(), options=SMALL_PACKS)
    assert len(packs_in(store)) > 3
    again = lineage_on(store, seed=2).manifest("20260101T000000Z-0001")
    assert again == manifest
    assert read_backup(lineage, again) == database()
    assert manifest.statistics.blocks_zero == 5 + 1 + 40
    assert manifest.statistics.bytes_read == sum(map(len, database().values()))


def test_reading_back_can_fail() -> None:
    """Negative control: the comparison above notices one other byte."""
    lineage = lineage_on(MemoryStore())
    files = database()
    manifest = write_backup(lineage, "20260101T000000Z-0001", files)
    other = {**files, "PG_VERSION": b"17\n"}
    assert read_backup(lineage, manifest) != other


def writer_of(store: MemoryStore) -> BackupWriter:
    """A writer that is open."""
    writer = open_writer(lineage_on(store), "20260101T000000Z-0001", None, SMALL_PACKS)
    writer.open()
    return writer


def test_pieces_of_other_files_may_stand_between_those_of_one() -> None:
    store = MemoryStore()
    files = database()
    large = max(files, key=lambda path: len(files[path]))
    first, *others = pieces_of(large, files[large])
    assert others, "the sample needs a file of several pieces"
    small = [piece for path in files if path != large for piece in pieces_of(path, files[path])]
    writer = writer_of(store)
    for piece in (first, *small, *others):
        writer.store(piece)
    writer.drain()
    manifest = writer.commit(draft_manifest("20260101T000000Z-0001"))
    assert read_backup(lineage_on(store), manifest) == files


def test_a_file_whose_last_piece_never_comes_ends_the_backup() -> None:
    """It would be missing in the manifest, and nobody would know."""
    files = database()
    large = max(files, key=lambda path: len(files[path]))
    writer = writer_of(MemoryStore())
    for piece in pieces_of(large, files[large])[:-1]:
        writer.store(piece)
    with pytest.raises(IntegrityError, match="was not given as a whole"):
        writer.settle()
    with pytest.raises(IntegrityError, match="was not given as a whole"):
        writer.drain()
    writer.abort()


def test_a_file_cannot_begin_in_its_midst_or_be_given_twice() -> None:
    files = database()
    large = max(files, key=lambda path: len(files[path]))
    writer = writer_of(MemoryStore())
    with pytest.raises(IntegrityError, match="was not given as a whole"):
        writer.store(pieces_of(large, files[large])[1])
    writer.abort()


def test_zero_blocks_are_stored_nowhere() -> None:
    store = MemoryStore()
    manifest = write_backup(lineage_on(store), "20260101T000000Z-0001", {"base/1": bytes(1000 * BLOCK)})
    assert packs_in(store) == []
    assert manifest.packs == ()
    assert read_backup(lineage_on(store), manifest) == {"base/1": bytes(1000 * BLOCK)}


def test_an_increment_stores_only_changed_blocks() -> None:
    store = MemoryStore()
    lineage = lineage_on(store)
    files = database()
    first = write_backup(lineage, "20260101T000000Z-0001", files, options=SMALL_PACKS)
    before = stored_bytes(store)
    changed = bytearray(files["base/5/1001"])
    for block in (0, 77, 300, 640):
        changed[block * BLOCK + 5] ^= 1
    files["base/5/1001"] = bytes(changed)
    second = write_backup(lineage, "20260102T000000Z-0002", files, first)
    assert second.statistics.blocks_stored == 4
    assert stored_bytes(store) - before < 5 * BLOCK
    assert read_backup(lineage, second) == files
    assert read_backup(lineage, first) == database()


def test_a_map_of_unchanged_files_is_named_again() -> None:
    store = MemoryStore()
    lineage = lineage_on(store)
    first = write_backup(lineage, "20260101T000000Z-0001", database())
    second = write_backup(lineage, "20260102T000000Z-0002", database(), first)
    assert second.maps == first.maps
    assert second.packs == first.packs
    assert second.statistics.bytes_stored == 0
    assert len(packs_in(store)) == len(first.packs)
    assert read_backup(lineage, second) == database()


def test_maps_of_many_small_files_are_cut_by_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """A one-block file has a map of 56 bytes: objects of 18 of them, and the rest."""
    monkeypatch.setattr(file_maps, "MAP_OBJECT_BYTES", 1000)
    store = MemoryStore()
    lineage = lineage_on(store)
    files = {f"base/5/{10_000 + number}": noise(number, BLOCK) for number in range(100)}
    manifest = write_backup(lineage, "20260101T000000Z-0001", files)
    assert len(manifest.maps) == 6
    assert read_backup(lineage, manifest) == files


class Meeting(BytesPiece):
    """A piece whose reading says by whom it is read, and may wait until somebody else reads as well."""

    readers: ClassVar[set[str]] = set()
    barrier: ClassVar[threading.Barrier | None] = None

    def read_into(self, target: memoryview, *, offset: int) -> int:
        self.readers.add(threading.current_thread().name)
        if self.barrier is not None:
            self.barrier.wait(timeout=20)
        return super().read_into(target, offset=offset)


def test_workers_beyond_those_wanted_rest_and_more_are_started(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = 1
    monkeypatch.setattr(Meeting, "readers", set())
    lineage = lineage_on(MemoryStore())
    writer = open_writer(
        lineage, "20260101T000000Z-0001", options=WriterOptions(workers=2, workers_now=lambda: wanted)
    )
    files = {f"base/5/{number}": noise(number, BLOCK) for number in range(40)}
    names = list(files)
    try:
        writer.open()
        for name in names[:36]:
            writer.store(Meeting(file_item(name, BLOCK), 0, files[name]))
        writer.settle()
        assert Meeting.readers == {"backup-worker-0"}
        # Four read at once, or the barrier breaks and with it the backup: the control of what is above.
        wanted = 4
        monkeypatch.setattr(Meeting, "barrier", threading.Barrier(4))
        for name in names[36:]:
            writer.store(Meeting(file_item(name, BLOCK), 0, files[name]))
        writer.settle()
        assert len(Meeting.readers) == 4
        wanted = 1  # Those who rest hold what they have gathered, until the end.
        writer.drain()
        manifest = writer.commit(draft_manifest("20260101T000000Z-0001"))
    finally:
        writer.abort()
    assert read_backup(lineage, manifest) == files


def test_an_increment_stands_without_its_parents_manifest() -> None:
    store = MemoryStore()
    lineage = lineage_on(store)
    first = write_backup(lineage, "20260101T000000Z-0001", database())
    files = {**database(), "base/5/1002": noise(9, 4 * BLOCK)}
    write_backup(lineage, "20260102T000000Z-0002", files, first)
    store.delete(lineage.manifest_name("20260101T000000Z-0001"))
    assert read_backup(lineage, lineage.manifest("20260102T000000Z-0002")) == files


@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 17 * BLOCK + 100])
def test_files_grow_and_shrink_between_backups(size: int) -> None:
    lineage = lineage_on(MemoryStore())
    content = noise(3, 20 * BLOCK + 11)
    first = write_backup(lineage, "20260101T000000Z-0001", {"base/1": content})
    second = write_backup(lineage, "20260102T000000Z-0002", {"base/1": content[:size]}, first)
    third = write_backup(lineage, "20260103T000000Z-0003", {"base/1": content + content}, second)
    assert read_backup(lineage, second) == {"base/1": content[:size]}
    assert read_backup(lineage, third) == {"base/1": content + content}


def _killed_backup(lineage: Lineage, backup_id: str, files: dict[str, bytes]) -> None:
    """All packs are stored, then the process dies before the manifest."""
    writer = open_writer(lineage, backup_id, options=SMALL_PACKS)
    writer.open()
    store_files(writer, files)
    writer.settle()
    writer.drain()


def test_packs_of_a_killed_backup_are_adopted() -> None:
    store = MemoryStore()
    lineage = lineage_on(store)
    _killed_backup(lineage, "20260101T000000Z-0001", database())
    assert lineage.backup_ids() == []
    before = packs_in(store)
    writer = open_writer(lineage_on(store, seed=2), "20260101T000100Z-0002")
    try:
        assert writer.open() == len(before)
        store_files(writer, database())
        writer.settle()
        writer.drain()
        manifest = writer.commit(draft_manifest("20260101T000100Z-0002"))
    finally:
        writer.abort()
    assert packs_in(store) == before
    assert manifest.statistics.blocks_stored == 0
    assert read_backup(lineage, manifest) == database()


def test_a_damaged_pack_of_a_killed_backup_is_not_adopted() -> None:
    store = MemoryStore()
    lineage = lineage_on(store)
    _killed_backup(lineage, "20260101T000000Z-0001", database())
    for name in packs_in(store):
        content, instant = store.objects[name]
        store.objects[name] = (content[:-500], instant)
    manifest = write_backup(lineage_on(store, seed=2), "20260101T000100Z-0002", database())
    assert read_backup(lineage, manifest) == database()


def test_a_pack_that_lost_its_end_is_not_reused() -> None:
    store = MemoryStore()
    lineage = lineage_on(store)
    first = write_backup(lineage, "20260101T000000Z-0001", database(), options=SMALL_PACKS)
    victim = f"{lineage.root}packs/{first.packs[0]}"
    content, instant = store.objects[victim]
    store.objects[victim] = (content[: len(content) // 3], instant)
    second = write_backup(lineage, "20260102T000000Z-0002", database(), first)
    assert read_backup(lineage, second) == database()


@pytest.mark.parametrize("kind", ["packs", "maps"])
def test_what_is_about_to_be_deleted_is_not_reused(kind: str) -> None:
    store = MemoryStore()
    lineage = lineage_on(store)
    first = write_backup(lineage, "20260101T000000Z-0001", database(), options=SMALL_PACKS)
    condemned = [f"{lineage.root}{kind}/{name}" for name in (first.packs if kind == "packs" else first.maps)]
    store.put("tombs/1", [b'{"objects": ["' + '", "'.join(condemned).encode() + b'"]}'])
    second = write_backup(lineage, "20260102T000000Z-0002", database(), first)
    assert not set(condemned) & {f"{lineage.root}packs/{name}" for name in second.packs}
    assert not set(condemned) & {f"{lineage.root}maps/{name}" for name in second.maps}
    assert (second.statistics.blocks_reused == 0) == (kind == "packs")
    for name in condemned:
        store.delete(name)
    assert read_backup(lineage, second) == database()


def test_a_parents_map_is_not_named_when_any_of_its_packs_is_gone() -> None:
    """The map of an untouched file may share its object with one whose pack was condemned."""
    store = MemoryStore()
    lineage = lineage_on(store)
    files = {"base/1": noise(1, 3 << 20), "base/2": noise(2, 3 << 20)}
    first = write_backup(lineage, "20260101T000000Z-0001", files, options=SMALL_PACKS)
    victim = f"{lineage.root}packs/{first.packs[0]}"
    store.put("tombs/1", [b'{"objects": ["' + victim.encode() + b'"]}'])
    second = write_backup(lineage, "20260102T000000Z-0002", files, first)
    assert first.packs[0] not in second.packs
    store.delete(victim)
    assert read_backup(lineage, second) == files


def test_a_damaged_tomb_stops_the_backup() -> None:
    store = MemoryStore()
    store.put("tombs/1", [b'["objects"]'])
    with pytest.raises(IntegrityError, match="tomb"):
        write_backup(lineage_on(store), "20260101T000000Z-0001", database())


def test_a_revoked_backup_cannot_be_committed() -> None:
    store = MemoryStore()
    lineage = lineage_on(store)
    writer = open_writer(lineage, "20260101T000000Z-0001")
    try:
        writer.open()
        store_files(writer, database())
        writer.settle()
        writer.drain()
        lineage.revoke("20260101T000000Z-0001")
        with pytest.raises(GenerationFenced):
            writer.commit(draft_manifest("20260101T000000Z-0001"))
    finally:
        writer.abort()
    assert lineage.backup_ids() == []
    with pytest.raises(UnknownBackup):
        lineage.manifest("20260101T000000Z-0001")


def test_a_committed_backup_cannot_be_revoked() -> None:
    lineage = lineage_on(MemoryStore())
    write_backup(lineage, "20260101T000000Z-0001", database())
    with pytest.raises(ObjectExists):
        lineage.revoke("20260101T000000Z-0001")
    assert lineage.backup_ids() == ["20260101T000000Z-0001"]


def test_packs_of_a_revoked_backup_are_not_adopted() -> None:
    store = MemoryStore()
    lineage = lineage_on(store)
    _killed_backup(lineage, "20260101T000000Z-0001", database())
    lineage.revoke("20260101T000000Z-0001")
    writer = open_writer(lineage_on(store, seed=2), "20260101T000100Z-0002")
    try:
        assert writer.open() == 0
    finally:
        writer.abort()


def test_a_file_that_shrinks_while_it_is_read_keeps_what_was_read() -> None:
    lineage = lineage_on(MemoryStore())
    content = noise(4, 3 << 20)
    writer = open_writer(lineage, "20260101T000000Z-0001")
    try:
        writer.open()
        item = file_item("base/1", len(content))
        lost = (1 << 20) - 3 * BLOCK - 100
        writer.store(BytesPiece(item, 0, content[: 1 << 20]))
        writer.store(BytesPiece(item, 1 << 20, content[1 << 20 : 2 << 20], missing=lost))
        writer.store(BytesPiece(item, 2 << 20, content[2 << 20 :], missing=1 << 20))
        writer.settle()
        writer.drain()
        manifest = writer.commit(draft_manifest("20260101T000000Z-0001"))
    finally:
        writer.abort()
    assert read_backup(lineage, manifest) == {"base/1": content[: (1 << 20) + 3 * BLOCK + 100]}


def test_a_file_that_shrinks_and_grows_again_has_zeros_between() -> None:
    """Log replay makes such a file right; the backup must neither fail nor mix up blocks."""
    lineage = lineage_on(MemoryStore())
    content = noise(5, 2 << 20)
    writer = open_writer(lineage, "20260101T000000Z-0001")
    try:
        writer.open()
        item = file_item("base/1", len(content))
        writer.store(BytesPiece(item, 0, content[: 1 << 20], missing=1 << 19))
        writer.store(BytesPiece(item, 1 << 20, content[1 << 20 :]))
        writer.settle()
        writer.drain()
        manifest = writer.commit(draft_manifest("20260101T000000Z-0001"))
    finally:
        writer.abort()
    expected = content[: 1 << 19] + bytes(1 << 19) + content[1 << 20 :]
    assert read_backup(lineage, manifest) == {"base/1": expected}


def _every_byte_matters(lineage: Lineage, manifest: Manifest, store: MemoryStore) -> None:
    name = f"{lineage.root}packs/{manifest.packs[0]}"
    content, instant = store.objects[name]
    for place in range(40, len(content) - 1000, 997):
        damaged = bytearray(content)
        damaged[place] ^= 4
        store.objects[name] = (bytes(damaged), instant)
        with pytest.raises(IntegrityError):
            read_backup(lineage, manifest)


def test_a_flipped_bit_in_a_pack_is_found_by_reading() -> None:
    store = MemoryStore()
    lineage = lineage_on(store)
    manifest = write_backup(lineage, "20260101T000000Z-0001", {"base/1": noise(6, 6 * BLOCK)})
    _every_byte_matters(lineage, manifest, store)


def test_a_manifest_that_lists_too_few_packs_is_refused() -> None:
    lineage = lineage_on(MemoryStore())
    manifest = write_backup(lineage, "20260101T000000Z-0001", database())
    with pytest.raises(IntegrityError, match="does not list pack"):
        read_backup(lineage, replace(manifest, packs=()))


def test_packs_already_restored_are_skipped() -> None:
    store = MemoryStore()
    lineage = lineage_on(store)
    manifest = write_backup(lineage, "20260101T000000Z-0001", database(), options=SMALL_PACKS)
    done: list[str] = []
    reader = BackupReader(lineage, manifest)
    reader.read_all(lambda file, offset, data: None, workers=lambda: 2, pack_done=done.append)
    assert sorted(done) == list(manifest.packs)
    counted: list[int] = []
    reader.read_all(
        lambda file, offset, data: None, workers=lambda: 2, skip_packs=done[1:], advance=counted.append
    )
    assert 0 < sum(counted) < sum(map(len, database().values()))


def test_an_error_while_writing_ends_the_reading() -> None:
    lineage = lineage_on(MemoryStore())
    manifest = write_backup(lineage, "20260101T000000Z-0001", database())

    def full(file_index: int, offset: int, data: memoryview) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        BackupReader(lineage, manifest).read_all(full, workers=lambda: 2)


file_contents = st.lists(
    st.tuples(st.sampled_from(["zero", "noise", "text"]), st.integers(1, 40), st.integers(0, 3)), max_size=4
).flatmap(lambda parts: st.tuples(st.just(parts), st.integers(0, BLOCK_BYTES - 1)))


def _content(description: tuple[list[tuple[str, int, int]], int]) -> bytes:
    parts, cut = description
    made = {
        "zero": lambda count, seed: bytes(count * BLOCK),
        "noise": lambda count, seed: noise(seed, count * BLOCK),
        "text": lambda count, seed: (b"%d of a text. " % seed * 700)[:BLOCK] * count,
    }
    joined = b"".join(made[kind](count, seed) for kind, count, seed in parts)
    return joined[: len(joined) - cut] if joined else b""


@settings(max_examples=40, deadline=None)
@given(
    first=st.dictionaries(st.sampled_from("abcd"), file_contents, max_size=4),
    second=st.dictionaries(st.sampled_from("abcd"), file_contents, max_size=4),
)
def test_any_two_states_are_read_back(
    first: dict[str, tuple[list[tuple[str, int, int]], int]],
    second: dict[str, tuple[list[tuple[str, int, int]], int]],
) -> None:
    lineage = lineage_on(MemoryStore())
    before = {name: _content(one) for name, one in first.items()}
    after = {name: _content(one) for name, one in second.items()}
    parent = write_backup(lineage, "20260101T000000Z-0001", before)
    child = write_backup(lineage, "20260102T000000Z-0002", after, parent)
    assert read_backup(lineage, child) == after
    assert read_backup(lineage, parent) == before
