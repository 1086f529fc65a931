"""
Every store operation of a backup fails in turn, before and after its effect, for a moment or for good.

After each fault: every committed backup reads back whole, a run that failed has committed nothing (but where
just the answer to its commit was lost), no thread is left behind, and the next run succeeds.
"""

from __future__ import annotations

import threading

import pytest

from cloudsave.errors import CloudsaveError, ObjectExists, StoreUnavailable
from cloudsave.model.manifest import Manifest
from cloudsave.repository.lineage import Lineage
from cloudsave.repository.writer import WriterOptions
from cloudsave.store.api import ObjectStore
from cloudsave.store.faulty import FaultPlan, Faulty
from cloudsave.store.memory import MemoryStore
from tests.unit.repository.samples import (
    BLOCK,
    draft_manifest,
    lineage_on,
    noise,
    open_writer,
    read_backup,
    sample_log,
    store_files,
    write_backup,
)

OPTIONS = WriterOptions(workers=2, pack_bytes=1 << 19)
FIRST, SECOND, THIRD = "20260101T000000Z-0001", "20260102T000000Z-0002", "20260103T000000Z-0003"
OPERATIONS_MAX = 300
"""Limit: a run of this size has fewer; more means that the loop does not end."""


class DeathError(BaseException):
    """The process died at this operation."""


def died(operation: str) -> BaseException:
    """What a planned death raises."""
    return DeathError(operation)


def before() -> dict[str, bytes]:
    """Files of the parent backup."""
    return {
        "base/1": noise(1, 90 * BLOCK),
        "base/2": noise(2, 7 * BLOCK + 5) + bytes(3 * BLOCK),
        "base/3": b"",
    }


def after() -> dict[str, bytes]:
    """Some pages changed, a file new, one the same."""
    files = before()
    changed = bytearray(files["base/1"])
    for block in (0, 13, 89):
        changed[block * BLOCK] ^= 1
    return {**files, "base/1": bytes(changed) + noise(3, 60 * BLOCK), "base/4": noise(4, 9 * BLOCK)}


def prepared() -> MemoryStore:
    """A store with a parent backup and the packs of one that was killed."""
    store = MemoryStore()
    lineage = lineage_on(store)
    write_backup(lineage, FIRST, before(), options=OPTIONS)
    writer = open_writer(lineage, "20260101T120000Z-dead", options=OPTIONS)
    writer.open()
    store_files(writer, {"base/4": noise(4, 9 * BLOCK)})
    writer.settle()
    writer.drain()
    return store


def incremental(store: ObjectStore, backup_id: str, *, seed: int) -> Manifest:
    """One run as the flow does it: the newest backup is the parent."""
    lineage = lineage_on(store, seed=seed)
    parent = lineage.manifest(lineage.backup_ids()[-1])
    return write_backup(lineage, backup_id, after(), parent, OPTIONS)


def manifest_name(backup_id: str) -> str:
    """Object name of the manifest of a backup."""
    return lineage_on(MemoryStore()).manifest_name(backup_id)


def check_all(store: MemoryStore) -> list[str]:
    """Every committed backup is whole; its ids."""
    lineage = lineage_on(store)
    for backup_id in lineage.backup_ids():
        manifest = lineage.manifest(backup_id)
        names = [f"packs/{name}" for name in manifest.packs] + [f"maps/{name}" for name in manifest.maps]
        assert all(lineage.root + name in store.objects for name in names)
        assert read_backup(lineage, manifest) == (before() if backup_id == FIRST else after())
    return lineage.backup_ids()


def faulted_run(plan: FaultPlan, *, after_effect: bool) -> None:
    """A run under a plan of faults; afterwards all is checked and the next run succeeds."""
    store = prepared()
    threads = set(threading.enumerate())
    failure = ""
    try:
        incremental(Faulty(store, plan), SECOND, seed=5)
    except (StoreUnavailable, DeathError) as error:
        failure = str(error)
    assert bool(failure) == plan.fired
    committed = SECOND in check_all(store)
    # A run that failed has committed only where the answer to the commit itself was lost.
    assert committed == (not failure or (after_effect and f"put {manifest_name(SECOND)}" in failure))
    assert set(threading.enumerate()) <= threads, "a thread is left behind"
    incremental(store, THIRD, seed=6)
    assert THIRD in check_all(store)


@pytest.mark.parametrize("outage", [False, True], ids=["moment", "outage"])
@pytest.mark.parametrize("after_effect", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("error", [None, died], ids=["error", "death"])
@pytest.mark.fault("store-operation-fails-backup", control="test_the_check_notices_a_missing_pack")
def test_every_operation_of_a_backup_may_fail(
    after_effect: bool, outage: bool, error: type[BaseException] | None
) -> None:
    for fail_at in range(1, OPERATIONS_MAX):
        options = {} if error is None else {"error": error}
        plan = FaultPlan(fail_at=fail_at, after_effect=after_effect, outage=outage, **options)
        faulted_run(plan, after_effect=after_effect)
        if not plan.fired:
            break
    assert not plan.fired
    assert fail_at > 15
    operations = {operation.split()[0] for operation in plan.trace}
    assert operations == {"put", "get", "get_range", "list"}


def test_the_check_notices_a_missing_pack() -> None:
    """Negative control: were a manifest put too early, `check_all` would fail."""
    store = prepared()
    victim = lineage_on(store).root + "packs/" + lineage_on(store).manifest(FIRST).packs[0]
    store.delete(victim)
    with pytest.raises((AssertionError, CloudsaveError)):
        check_all(store)


def test_a_commit_whose_answer_was_lost_is_not_repeated_under_the_same_name() -> None:
    """The manifest is there although its writer was told otherwise: the next run goes on from it."""
    plan = FaultPlan(fail_at=0)
    incremental(Faulty(prepared(), plan), SECOND, seed=5)
    # The commit is the last operation; how many come before it differs by how the workers share the packs.
    for _ in range(OPERATIONS_MAX):
        store = prepared()
        try:
            incremental(Faulty(store, FaultPlan(fail_at=plan.operations, after_effect=True)), SECOND, seed=5)
        except StoreUnavailable as error:
            if f"put {manifest_name(SECOND)}" in str(error):
                break
    else:
        pytest.fail("the commit was never the operation that failed")
    assert check_all(store) == [FIRST, SECOND]
    assert incremental(store, THIRD, seed=6).statistics.blocks_stored == 0


def put_log(lineage: Lineage) -> None:
    """Two stretches of log, a history and a hole-free end."""
    for number in range(2):
        segment, log, index = sample_log(0x1000000 + 500 * number, 500, seed=number)
        lineage.put_log(segment, [log], index)
    lineage.put_history("00000002", b"1\t0/1000300\tno recovery target\n")


@pytest.mark.parametrize("after_effect", [False, True], ids=["before", "after"])
def test_every_operation_of_storing_log_may_fail(after_effect: bool) -> None:
    for fail_at in range(1, OPERATIONS_MAX):
        store, plan = MemoryStore(), FaultPlan(fail_at=fail_at, after_effect=after_effect)
        try:
            put_log(lineage_on(Faulty(store, plan)))
        except StoreUnavailable:
            assert plan.fired
        lineage = lineage_on(store, seed=2)
        for segment in lineage.logs():
            lineage.read_log(segment)
        put_log(lineage)
        assert [lineage.read_log(one) for one in lineage.logs()] == [
            sample_log(0, 500, seed=number)[1] for number in range(2)
        ]
        if not plan.fired:
            break
    assert not plan.fired


@pytest.mark.fault("writers-two", control="test_the_check_notices_a_missing_pack")
def test_two_writers_at_once_do_not_meet_in_a_name() -> None:
    store = prepared()
    failures: list[BaseException] = []

    def run(number: int) -> None:
        try:
            incremental(store, f"20260102T00000{number}Z-000{number}", seed=number)
        except BaseException as error:  # noqa: BLE001 - judged below
            failures.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(check_all(store)) == 5


def test_a_name_that_is_taken_is_refused() -> None:
    store = prepared()
    lineage = lineage_on(store)
    with pytest.raises(ObjectExists):
        lineage.put_manifest(draft_manifest(FIRST))
