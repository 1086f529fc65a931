"""Records of verifications: the newest counts, and the newest that was sound; damaged ones do not."""

from __future__ import annotations

from cloudsave.repository.verifications import last_verifications, put_verification
from cloudsave.store.memory import MemoryStore
from tests.unit.repository.samples import lineage_on


def test_the_newest_and_the_newest_sound_one_are_told() -> None:
    lineage = lineage_on(MemoryStore())
    assert last_verifications(lineage).newest is None
    put_verification(lineage, sound=True, read_all=True)
    first = last_verifications(lineage)
    assert first.newest is not None
    assert first.newest == first.newest_sound
    assert (first.newest.sound, first.newest.read_all) == (True, True)
    put_verification(lineage, sound=False, read_all=False)
    last = last_verifications(lineage)
    assert last.newest is not None
    assert last.newest_sound == first.newest
    assert (last.newest.sound, last.newest.read_all) == (False, False)
    assert last.newest.at > first.newest.at


def test_damaged_and_foreign_records_count_for_nothing() -> None:
    store = MemoryStore()
    lineage = lineage_on(store)
    put_verification(lineage, sound=False, read_all=True)
    put_verification(lineage, sound=True, read_all=True)
    (_, name) = sorted(name for name in store.objects if "/verifications/" in name)
    content, instant = store.objects[name]
    copied = name[: -len("20260101T000000Z-00000000")] + "20991231T235959Z-00000000"
    store.put(copied, [content])
    store.put(lineage.root + "verifications/zzz", [content])
    last = last_verifications(lineage)
    assert last.newest == last.newest_sound
    assert last.newest is not None
    assert last.newest.at.year == 2026, "a copy under another name opens no more"
    store.objects[name] = (content[:50] + b"?" + content[51:], instant)
    last = last_verifications(lineage)
    assert last.newest is not None
    assert not last.newest.sound
    assert last.newest_sound is None
    lineage.put_record_json("verifications/20991231T235959Z-0000000a", {"sound": True})
    assert last_verifications(lineage) == last, "it lacks its instant"
