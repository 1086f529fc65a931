"""Garbage collection, expiry of manifests, holds: in memory, in a directory, on a real S3 protocol server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from cloudsave.errors import (
    BackupCondemned,
    GenerationFenced,
    IntegrityError,
    ObjectExists,
    ReferencesUnknown,
    StorePermission,
    StoreUnfit,
    UnknownBackup,
)
from cloudsave.repository.claim import claim
from cloudsave.repository.collect import CollectRequest, collect
from cloudsave.repository.expire import remove_backups, sweep_tombs
from cloudsave.repository.holds import holds_of, proved_backups, put_hold, release_holds
from cloudsave.repository.lineage import Lineage
from cloudsave.repository.tombs import condemned_in, put_tombs
from cloudsave.repository.writer import WriterOptions
from cloudsave.store.api import ObjectStore, StoreCapabilities
from cloudsave.store.faulty import FaultPlan, Faulty
from cloudsave.store.memory import MemoryStore
from cloudsave.store.open import open_store
from cloudsave.store.posix import PosixStore
from tests.fake_clock import FakeClock
from tests.s3_server import S3_ENVIRONMENT, S3Server, running_s3_server
from tests.unit.repository.samples import (
    BLOCK,
    draft_manifest,
    lineage_on,
    noise,
    open_writer,
    read_backup,
    store_files,
    write_backup,
)

ONE, TWO, THREE = (f"2026010{day}T000000Z-000{day}" for day in (1, 2, 3))
NOW = CollectRequest(timedelta(0))
ONE_PACK = WriterOptions(workers=1)
LATER = datetime(2099, 1, 1, tzinfo=UTC)


def files(*seeds: int) -> dict[str, bytes]:
    """One file for each seed, which decides its content."""
    return {f"base/{number}": noise(seed, 3 * BLOCK) for number, seed in enumerate(seeds)}


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with running_s3_server() as server:
        server.create_bucket("collected")
        yield server


@pytest.fixture(params=["memory", "directory", "s3"])
def store(
    request: pytest.FixtureRequest, tmp_path: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> ObjectStore:
    if request.param == "memory":
        return MemoryStore()
    if request.param == "directory":
        return PosixStore(tmp_path / "repository")
    for name, value in S3_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    return open_store(s3.url("collected", tmp_path.name), clock=FakeClock())


def names(store: ObjectStore, kind: str) -> list[str]:
    """The objects of a kind."""
    return [info.name.rpartition("/")[2] for info in store.list("") if f"/{kind}/" in info.name]


def test_what_expired_backups_needed_alone_goes_and_the_rest_reads_back(store: ObjectStore) -> None:
    lineage = lineage_on(store)
    first = write_backup(lineage, ONE, files(1, 2))
    second = write_backup(lineage, TWO, files(3, 4), first)
    third = write_backup(lineage, THREE, files(3, 5), second)
    assert collect(lineage, NOW).packs == 0
    assert remove_backups(lineage, [ONE, TWO]) == [ONE, TWO]
    assert lineage.backup_ids() == [THREE]
    with pytest.raises(UnknownBackup):
        lineage.manifest(ONE)
    dry = collect(lineage, CollectRequest(timedelta(0), dry_run=True))
    assert set(names(store, "packs")) > set(third.packs)
    done = collect(lineage, NOW)
    assert (done.packs, done.maps, done.bytes_freed) == (dry.packs, dry.maps, dry.bytes_freed)
    assert sorted(names(store, "packs")) == sorted(third.packs)
    assert sorted(names(store, "maps")) == sorted(third.maps)
    assert [info.name for info in store.list("tombs/")] == []
    assert read_backup(lineage, third) == files(3, 5)


def test_reading_an_expired_backup_fails_with_a_typed_error() -> None:
    lineage = lineage_on(MemoryStore())
    first = write_backup(lineage, ONE, files(1))
    write_backup(lineage, TWO, files(2))
    remove_backups(lineage, [ONE])
    collect(lineage, NOW)
    with pytest.raises(Exception, match="is missing") as caught:
        read_backup(lineage, first)
    assert caught.value.code == "CS-4003"  # type: ignore[attr-defined]


def test_a_running_backup_keeps_its_pages_and_those_of_its_parent(store: ObjectStore) -> None:
    lineage = lineage_on(store)
    first = write_backup(lineage, ONE, files(1, 2))
    writer = open_writer(lineage, TWO, first)
    try:
        writer.open()
        assert remove_backups(lineage, [ONE]) == []
        result = collect(lineage, CollectRequest(timedelta(days=1)))
        assert result.waiting == [TWO]
        assert (result.packs, result.maps) == (0, 0)
    finally:
        writer.abort()


def test_a_silent_backup_is_given_up_and_cannot_be_committed(store: ObjectStore) -> None:
    lineage = lineage_on(store)
    first = write_backup(lineage, ONE, files(1, 2))
    claim(lineage, TWO, parent=ONE)
    lineage.clock = FakeClock(start_utc=LATER)
    assert collect(lineage, CollectRequest()).given_up == [TWO]
    assert names(store, "pins") == [ONE]
    with pytest.raises(ObjectExists):
        lineage.revoke(TWO)
    assert lineage.backup_ids() == [ONE]
    assert read_backup(lineage, first) == files(1, 2)


def test_a_backup_that_is_given_up_while_it_runs_fails_loudly() -> None:
    lineage = lineage_on(MemoryStore())
    with pytest.raises(GenerationFenced):
        commit_after(lineage, lambda: collect(lineage, CollectRequest(timedelta(0))))
    assert lineage.backup_ids() == []
    collect(lineage, NOW)
    assert names(lineage.store, "packs") == []


def commit_after(lineage: Lineage, meanwhile: Callable[[], object]) -> None:
    """A backup during which something happens."""
    writer = open_writer(lineage, ONE)
    try:
        writer.open()
        store_files(writer, files(1))
        writer.settle()
        lineage.clock = FakeClock(start_utc=LATER)
        meanwhile()
        writer.drain()
        writer.commit(draft_manifest(ONE))
    finally:
        writer.abort()


def test_a_damaged_manifest_stops_collection_and_nothing_goes() -> None:
    store = MemoryStore()
    lineage = lineage_on(store)
    write_backup(lineage, ONE, files(1))
    write_backup(lineage, TWO, files(2))
    remove_backups(lineage, [ONE])
    name = lineage.manifest_name(TWO)
    content, instant = store.objects[name]
    store.objects[name] = (content[:-200] + bytes([content[-200] ^ 1]) + content[-199:], instant)
    before = dict(store.objects)
    with pytest.raises(ReferencesUnknown, match="cannot tell"):
        collect(lineage, NOW)
    assert store.objects == before


@pytest.mark.parametrize("damaged", ["pins", "tombs"])
def test_a_damaged_pin_or_tomb_stops_collection(damaged: str) -> None:
    store = MemoryStore()
    lineage = lineage_on(store)
    write_backup(lineage, ONE, files(1))
    write_backup(lineage, TWO, files(2))
    claim(lineage, THREE, parent=TWO)
    remove_backups(lineage, [ONE])
    put_tombs(lineage, ["packs/000000ff-00000000"])
    for name in [
        name for name in store.objects if f"{damaged}/" in name and ONE not in name and TWO not in name
    ]:
        content, instant = store.objects[name]
        store.objects[name] = (content[:60] + bytes([content[60] ^ 1]) + content[61:], instant)
    packs = names(store, "packs")
    if damaged == "tombs":
        with pytest.raises(IntegrityError):
            collect(lineage, CollectRequest())
    else:
        assert THREE in collect(lineage, CollectRequest()).blocked
    assert names(store, "packs") == packs


class WithoutDelete(Faulty):
    """A store whose credentials do not let one delete."""

    def __init__(self, store: ObjectStore) -> None:
        super().__init__(store, FaultPlan(fail_at=0))

    def delete(self, name: str) -> None:
        """Refused."""
        raise StorePermission("cannot delete object: the service refuses it", detail="403.")


class Unconditional(Faulty):
    """A store that overwrites."""

    @property
    def capabilities(self) -> StoreCapabilities:
        """Not fit."""
        return StoreCapabilities(conditional_put=False, durable_put=True)


def test_without_the_right_to_delete_the_error_says_so_and_nothing_goes() -> None:
    store = MemoryStore()
    lineage = lineage_on(store)
    write_backup(lineage, ONE, files(1))
    remove_backups(lineage, [ONE])
    write_backup(lineage, TWO, files(2))
    poor = lineage_on(WithoutDelete(store))
    for work in (lambda: collect(poor, NOW), lambda: remove_backups(poor, [TWO])):
        with pytest.raises(StorePermission) as caught:
            work()
        assert "right to delete" in caught.value.hints[0]
    assert lineage.backup_ids() == [TWO]
    assert collect(lineage, NOW).packs == 1


def test_without_put_if_absent_nothing_is_deleted() -> None:
    store = MemoryStore()
    lineage = lineage_on(store)
    write_backup(lineage, ONE, files(1))
    unfit = lineage_on(Unconditional(store, FaultPlan(fail_at=0)))
    for work in (lambda: collect(unfit, NOW), lambda: remove_backups(unfit, [ONE])):
        with pytest.raises(StoreUnfit):
            work()
    assert lineage.backup_ids() == [ONE]


# ---- killed anywhere


@pytest.mark.parametrize("after_effect", [False, True])
def test_expiry_and_collection_killed_at_any_operation_end_when_they_are_run_again(
    after_effect: bool,
) -> None:
    class Killed(BaseException):
        pass

    fail_at = 0
    while True:
        fail_at += 1
        store = MemoryStore()
        lineage = lineage_on(store)
        first = write_backup(lineage, ONE, files(1, 2))
        second = write_backup(lineage, TWO, files(3, 4), first)
        plan = FaultPlan(fail_at=fail_at, after_effect=after_effect, error=Killed)
        mortal = lineage_on(Faulty(store, plan), seed=fail_at)
        try:
            remove_backups(mortal, [ONE])
            collect(mortal, NOW)
        except Killed:
            pass
        assert read_backup(lineage, second) == files(3, 4)
        remove_backups(lineage, [one for one in lineage.backup_ids() if one == ONE])
        sweep_tombs(lineage)
        lineage.clock = FakeClock(start_utc=LATER)
        for _ in range(2):
            collect(lineage, CollectRequest())
        assert read_backup(lineage, second) == files(3, 4)
        assert sorted(names(store, "packs")) == sorted(second.packs)
        assert list(store.list("tombs/")) == []
        with pytest.raises(UnknownBackup):
            lineage.manifest(ONE)
        assert ONE in lineage.decided_backup_ids()
        if not plan.fired:
            break
    assert fail_at > 25


# ---- holds and proofs


def test_a_held_backup_is_not_removed_until_it_is_released(store: ObjectStore) -> None:
    lineage = lineage_on(store)
    write_backup(lineage, ONE, files(1))
    hold = put_hold(lineage, ONE, "audit 2026")
    assert holds_of(lineage) == [hold]
    assert remove_backups(lineage, [ONE]) == []
    assert [one.reason for one in release_holds(lineage, ONE)] == ["audit 2026"]
    assert remove_backups(lineage, [ONE]) == [ONE]


def test_a_damaged_hold_holds_all_the_same() -> None:
    store = MemoryStore()
    lineage = lineage_on(store)
    write_backup(lineage, ONE, files(1))
    name = lineage.root + put_hold(lineage, ONE, "audit").name
    content, instant = store.objects[name]
    store.objects[name] = (content[:50] + b"?" + content[51:], instant)
    assert [one.reason for one in holds_of(lineage)] == ["its record is damaged"]
    assert remove_backups(lineage, [ONE]) == []


def test_a_backup_that_is_being_removed_cannot_be_held() -> None:
    lineage = lineage_on(MemoryStore())
    write_backup(lineage, ONE, files(1))
    put_tombs(lineage, [f"backups/{ONE}"])
    with pytest.raises(BackupCondemned):
        put_hold(lineage, ONE, "too late")
    with pytest.raises(UnknownBackup):
        put_hold(lineage, TWO, "there is none")


def test_only_intact_proofs_that_passed_count() -> None:
    store = MemoryStore()
    lineage = lineage_on(store)
    for backup_id, passed in ((ONE, True), (TWO, False), (THREE, True)):
        lineage.put_record_json(f"proofs/{backup_id}/20260105T000000Z", {"passed": passed})
    name = f"{lineage.root}proofs/{THREE}/20260105T000000Z"
    content, instant = store.objects[name]
    store.objects[name] = (content[:50] + b"?" + content[51:], instant)
    assert proved_backups(lineage) == {ONE}


# ---- tombs


def test_many_objects_take_several_tombs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cloudsave.repository.tombs.TOMB_OBJECTS_MAX", 10)
    lineage = lineage_on(MemoryStore())
    objects = [f"packs/00000001-{number:08x}" for number in range(25)]
    assert len(put_tombs(lineage, objects, [("00000001", 5, 9)])) == 3
    condemned = condemned_in(lineage)
    assert condemned.objects == set(objects)
    assert condemned.touches_log("00000001", 8, 20)
    assert not condemned.touches_log("00000001", 9, 20)
    assert not condemned.touches_log("00000002", 0, 20)


# ---- packs that are mostly dead


def test_a_pack_that_is_mostly_dead_is_left_and_goes_with_the_backups_of_before(store: ObjectStore) -> None:
    lineage = lineage_on(store)
    compacting = CollectRequest(timedelta(0), sparse_share=0.25)
    small, large = {"base/9": noise(9, BLOCK)}, noise(1, 60 * BLOCK)
    first = write_backup(lineage, ONE, {"base/1": large, **small}, options=ONE_PACK)
    other = {"base/1": noise(2, 60 * BLOCK), **small}
    second = write_backup(lineage, TWO, other, first, ONE_PACK)
    assert set(first.packs) < set(second.packs)
    assert collect(lineage, compacting).sparse == 0  # all of it is needed
    remove_backups(lineage, [ONE])
    assert collect(lineage, CollectRequest(timedelta(0), sparse_share=0.25, dry_run=True)).sparse == 1
    assert collect(lineage, compacting).sparse == 1
    assert collect(lineage, compacting).sparse == 0  # it is condemned already
    assert condemned_in(lineage).objects == {f"packs/{first.packs[0]}"}
    third = write_backup(lineage, THREE, other, second)
    assert third.statistics.blocks_stored == 1
    assert not set(first.packs) & set(third.packs)
    assert read_backup(lineage, second) == other
    remove_backups(lineage, [TWO])
    assert collect(lineage, NOW).packs == 1
    assert sorted(names(store, "packs")) == sorted(third.packs)
    assert list(store.list("tombs/")) == []
    assert read_backup(lineage, third) == other


def test_no_run_has_much_stored_again() -> None:
    lineage = lineage_on(MemoryStore())
    files_of = lambda seed: {"base/1": noise(seed, 20 * BLOCK), "base/2": noise(2, 4 * BLOCK)}  # noqa: E731
    first = write_backup(lineage, ONE, files_of(1), options=ONE_PACK)
    write_backup(lineage, TWO, files_of(3), first, ONE_PACK)
    remove_backups(lineage, [ONE])
    # A tenth of all would be stored again, more than a twentieth.
    assert collect(lineage, CollectRequest(timedelta(0), sparse_share=0.25)).sparse == 0
