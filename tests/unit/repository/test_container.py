"""The container: round trips, and everything that was changed is noticed."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from cloudsave.errors import FormatUnsupported, IntegrityError
from cloudsave.model.log import LogIndex, LogSegment
from cloudsave.repository.container import (
    BLOB_FRAME_BYTES,
    FOOTER_BYTES,
    FRAME_HEADER,
    HEADER_BYTES,
    REVOCATION_BYTES,
    Arena,
    ContainerReader,
    ContainerWriter,
    Kind,
    check_digest,
    read_frames,
)
from cloudsave.repository.crypto import FRAME_PLAIN_BYTES_MAX, LineageKeys
from cloudsave.repository.lineage import Lineage
from cloudsave.repository.reader import BackupReader
from cloudsave.store.memory import MemoryStore
from tests.unit.repository.samples import (
    LINEAGE,
    REPOSITORY_KEY,
    SeededClock,
    lineage_on,
    noise,
    sample_log,
    write_backup,
)

KEYS = LineageKeys.derive(REPOSITORY_KEY, LINEAGE)
NAME = f"lineages/{LINEAGE}/maps/00000001-00000000"


def sealed(
    *frames: bytes, name: str = NAME, kind: Kind = Kind.MAP, sign: bool = False, seed: int = 1
) -> bytes:
    """A whole object."""
    writer = ContainerWriter(KEYS, name, kind, clock=SeededClock(seed))
    for number, frame in enumerate(frames):
        writer.add(frame, proof=True, last=number == len(frames) - 1)
    return b"".join(writer.finish(sign=sign))


def forged(content: bytes, *, frame_count: int) -> bytes:
    """What one without keys can do: bytes with a footer that is right again."""
    begin = content + struct.pack("<QI4x", 0, frame_count)
    return begin + blake3(begin).digest() + bytes(64) + b"CSV1END\n"


@settings(max_examples=60, deadline=None)
@given(frames=st.lists(st.binary(max_size=4000), min_size=1, max_size=6), sign=st.booleans())
def test_frames_are_read_back(frames: list[bytes], sign: bool) -> None:
    content = sealed(*frames, sign=sign)
    assert read_frames(KEYS, NAME, Kind.MAP, content) == frames
    footer = check_digest(NAME, content, public_key=KEYS.public_key() if sign else None)
    assert footer.frame_count == len(frames)


@pytest.mark.parametrize(
    "size", [0, 1, BLOB_FRAME_BYTES - 1, BLOB_FRAME_BYTES, BLOB_FRAME_BYTES + 1, 3 << 20]
)
def test_a_blob_of_any_size_has_a_last_frame(size: int) -> None:
    plain = noise(1, size)
    writer = ContainerWriter(KEYS, NAME, Kind.MAP, clock=SeededClock(1))
    writer.add_blob(plain)
    frames = read_frames(KEYS, NAME, Kind.MAP, b"".join(writer.finish()))
    assert b"".join(frames) == plain
    assert len(frames) == max(1, -(-size // BLOB_FRAME_BYTES))


def _samples() -> dict[str, tuple[Kind, Callable[[MemoryStore], None], Callable[[Lineage], object]]]:
    """For each kind: how to store a small object, and how it is read."""
    segment, log, index = sample_log(0x1000000, 500)

    def put_log(store: MemoryStore) -> None:
        lineage_on(store).put_log(segment, [log], index)

    return {
        "manifest": (
            Kind.MANIFEST,
            lambda store: write_backup(lineage_on(store), "20260101T000000Z-0001", {}) and None,
            lambda lineage: lineage.manifest("20260101T000000Z-0001"),
        ),
        "map": (
            Kind.MAP,
            lambda store: write_backup(lineage_on(store), "20260101T000000Z-0001", {"a": bytes(9)}) and None,
            lambda lineage: BackupReader(lineage, lineage.manifest("20260101T000000Z-0001")).segment(0),
        ),
        "log": (Kind.LOG, put_log, lambda lineage: lineage.read_log(segment)),
        "record": (
            Kind.RECORD,
            lambda store: lineage_on(store).put_history("00000002", b"1\t0/3000000\tno recovery target\n"),
            lambda lineage: lineage.histories(),
        ),
    }


def _stored(kind: str) -> tuple[MemoryStore, str, Callable[[Lineage], object]]:
    wanted, put, read = _samples()[kind]
    store = MemoryStore()
    put(store)
    name = next(
        n for n, (content, _) in store.objects.items() if content[4] == wanted and content[:4] == b"CSV1"
    )
    return store, name, read


@pytest.mark.parametrize("kind", ["manifest", "map", "log", "record"])
def test_each_flipped_bit_is_found(kind: str) -> None:
    store, name, read = _stored(kind)
    lineage = lineage_on(store)
    content, instant = store.objects[name]
    assert read(lineage)
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << (place % 8)
        store.objects[name] = (bytes(damaged), instant)
        with pytest.raises(IntegrityError):
            read(lineage)


@pytest.mark.parametrize("kind", ["manifest", "map", "log", "record"])
def test_each_truncation_is_found(kind: str) -> None:
    store, name, read = _stored(kind)
    lineage = lineage_on(store)
    content, instant = store.objects[name]
    for length in range(len(content)):
        store.objects[name] = (content[:length], instant)
        with pytest.raises(IntegrityError):
            read(lineage)
    store.objects[name] = (content + b"\0", instant)
    with pytest.raises(IntegrityError):
        read(lineage)


@pytest.mark.parametrize("bit", range(8))
def test_each_bit_of_a_small_record_matters(bit: int) -> None:
    content = sealed(b"x", kind=Kind.RECORD)
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << bit
        with pytest.raises(IntegrityError):
            read_frames(KEYS, NAME, Kind.RECORD, bytes(damaged))


def test_an_object_under_another_name_does_not_open() -> None:
    content = sealed(b"one", b"two")
    with pytest.raises(IntegrityError, match="damaged"):
        read_frames(KEYS, NAME[:-1] + "1", Kind.MAP, content)


def test_an_object_of_another_lineage_does_not_open() -> None:
    other = LineageKeys.derive(REPOSITORY_KEY, "postgresql-2")
    with pytest.raises(IntegrityError):
        read_frames(other, NAME, Kind.MAP, sealed(b"one"))


def test_an_object_of_another_kind_does_not_open() -> None:
    with pytest.raises(IntegrityError, match="damaged"):
        read_frames(KEYS, NAME, Kind.LOG, sealed(b"one"))


def test_a_signature_of_another_name_is_refused() -> None:
    content = sealed(b"one", sign=True)
    with pytest.raises(IntegrityError):
        check_digest(NAME + "x", content, public_key=KEYS.public_key())


def test_an_object_without_signature_is_refused_where_one_is_needed() -> None:
    with pytest.raises(IntegrityError):
        read_frames(KEYS, NAME, Kind.MAP, sealed(b"one"), public_key=KEYS.public_key())


def test_frames_that_were_cut_off_are_missed_although_the_checksum_is_right() -> None:
    content = sealed(b"one", b"two")
    whole = content[:-FOOTER_BYTES]
    first_end = HEADER_BYTES + FRAME_HEADER.size + FRAME_HEADER.unpack_from(content, HEADER_BYTES)[2]
    assert read_frames(KEYS, NAME, Kind.MAP, forged(whole, frame_count=2)) == [b"one", b"two"]
    for cut, count in ((whole[:first_end], 1), (whole[:HEADER_BYTES], 0), (whole, 1), (whole, 3)):
        with pytest.raises(IntegrityError):
            read_frames(KEYS, NAME, Kind.MAP, forged(cut, frame_count=count))


def test_frames_cannot_be_swapped_or_taken_from_another_object() -> None:
    content, other = sealed(b"one", b"two"), sealed(b"one", b"two", seed=2)
    size = FRAME_HEADER.size + FRAME_HEADER.unpack_from(content, HEADER_BYTES)[2]
    head, first, second = (
        content[:HEADER_BYTES],
        content[HEADER_BYTES:][:size],
        content[HEADER_BYTES + size :][:size],
    )
    foreign = other[HEADER_BYTES:][:size]
    for body in (second + first, foreign + second, first + first):
        with pytest.raises(IntegrityError):
            read_frames(KEYS, NAME, Kind.MAP, forged(head + body, frame_count=2))


def test_the_same_content_twice_looks_different() -> None:
    assert sealed(b"one", seed=1)[HEADER_BYTES:] != sealed(b"one", seed=2)[HEADER_BYTES:]


def test_a_newer_container_is_named_as_such() -> None:
    header = bytearray(sealed(b"one")[:HEADER_BYTES])
    header[3:4] = b"2"
    with pytest.raises(FormatUnsupported):
        ContainerReader(KEYS, NAME, Kind.MAP, bytes(header))


def test_the_writer_refuses_what_no_reader_would_accept() -> None:
    writer = ContainerWriter(KEYS, NAME, Kind.MAP, clock=SeededClock(1))
    with pytest.raises(ValueError, match="no room"):
        writer.add(bytes(FRAME_PLAIN_BYTES_MAX + 1), proof=False)
    writer.add(b"", proof=True, last=True)
    with pytest.raises(ValueError, match="no room"):
        writer.add(b"", proof=True)
    unfinished = ContainerWriter(KEYS, NAME, Kind.MAP, clock=SeededClock(1))
    unfinished.add(b"", proof=True)
    with pytest.raises(ValueError, match="last"):
        unfinished.finish()


def test_no_manifest_is_as_small_as_a_revocation() -> None:
    store = MemoryStore()
    lineage = lineage_on(store)
    write_backup(lineage, "20260101T000000Z-0001", {})
    lineage.revoke("20260101T000000Z-0002")
    sizes = [len(store.objects[lineage.manifest_name(f"20260101T000000Z-000{n}")][0]) for n in (1, 2)]
    assert sizes[0] > REVOCATION_BYTES
    assert sizes[1] == REVOCATION_BYTES


def test_a_manifest_cut_to_the_size_of_a_revocation_is_not_taken_for_one() -> None:
    store = MemoryStore()
    lineage = lineage_on(store)
    write_backup(lineage, "20260101T000000Z-0001", {})
    name = lineage.manifest_name("20260101T000000Z-0001")
    content, instant = store.objects[name]
    store.objects[name] = (content[:REVOCATION_BYTES], instant)
    assert lineage.backup_ids() == ["20260101T000000Z-0001"]
    with pytest.raises(IntegrityError):
        lineage.manifest("20260101T000000Z-0001")


def test_an_empty_stretch_of_log_has_no_name() -> None:
    """A log object always has bytes; its last frame is one of log."""
    lineage = lineage_on(MemoryStore())
    lineage.put_log(LogSegment("00000001", 0, 1), [b"x"], LogIndex())
    assert lineage.read_log(lineage.logs()[0]) == b"x"


def test_a_small_object_that_unfolds_to_very_much_is_refused() -> None:
    """Whoever holds the key could fill the memory of a reader with a few kilobytes."""
    lineage = lineage_on(MemoryStore())
    name = f"{lineage.root}logs/00000002/history"
    writer = ContainerWriter(lineage.keys, name, Kind.RECORD, clock=SeededClock(1), arena=Arena())
    for number in range(5):
        writer.add(bytes(4 << 20), proof=False, last=number == 4)
    lineage.store.put(name, writer.finish())
    assert next(iter(lineage.store.list("lineages/"))).size_bytes < 16 << 10
    with pytest.raises(IntegrityError, match="damaged") as caught:
        lineage.history("00000002")
    assert "unfolds" in caught.value.detail
