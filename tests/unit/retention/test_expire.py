"""Expiry of backups and log of one lineage in memory: what goes, killed anywhere, beside backups."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from datetime import UTC

import pytest

from cloudsave.engines.postgresql.dialect import PostgresDialect
from cloudsave.errors import UnknownBackup, UsageError
from cloudsave.logs.ledger import first_missing
from cloudsave.model.history import Ancestry
from cloudsave.model.item import CorruptPage
from cloudsave.model.ledger import Ledger
from cloudsave.model.log import Commit, LogHole, LogIndex, LogSegment
from cloudsave.model.position import Position
from cloudsave.model.retention import RetentionRules
from cloudsave.repository.claim import claim
from cloudsave.repository.collect import CollectRequest, collect
from cloudsave.repository.expire import remove_backups
from cloudsave.repository.holds import put_hold
from cloudsave.repository.lineage import Lineage
from cloudsave.repository.tombs import put_tombs
from cloudsave.retention.expire import Expired, ExpiryPlan, plan_expiry, run_expiry
from cloudsave.retention.gaps import gaps_after, outdated
from cloudsave.retention.history import HistoryReader
from cloudsave.store.faulty import FaultPlan, Faulty
from cloudsave.store.memory import MemoryStore
from tests.unit.repository.samples import BLOCK, draft_manifest, lineage_on, noise, open_writer, store_files

BRANCH, SECOND = "00000001", "00000002"
STEP = 1 << 10
"""Bytes of a stretch of log; a log file has four."""
DAY_US = 86400 * 1_000_000
BEGIN_US = 1_760_000_000_000_000
LOG_DAYS = 40
"""One stretch of log a day."""
END = LOG_DAYS * STEP


def put_log(lineage: Lineage, number: int, branch: str = BRANCH) -> None:
    """The stretch of one day, with a commit at its end."""
    instant_us = BEGIN_US + (number + 1) * DAY_US
    first = number * STEP
    segment = LogSegment(branch, first, first + STEP, instant_us, instant_us)
    index = LogIndex(commits=(Commit(first + 8, first + 48, instant_us, 700 + number),))
    lineage.put_log(segment, [noise(number, STEP)], index)


def put_backup(lineage: Lineage, day: int, *, corrupt: tuple[CorruptPage, ...] = ()) -> str:
    """A backup that begins and ends on a day; its id."""
    backup_id = f"20260101T0000{day:02d}Z-0000"
    draft = replace(
        draft_manifest(backup_id),
        start=Position(BRANCH, day * STEP + 100),
        stop=Position(BRANCH, day * STEP + 300),
        started_us=BEGIN_US + day * DAY_US,
        finished_us=BEGIN_US + day * DAY_US + DAY_US // 4,
        log_file_bytes=4 * STEP,
        corrupt_pages=corrupt,
    )
    writer = open_writer(lineage, backup_id)
    try:
        writer.open()
        store_files(writer, {"base/1": noise(1000 + day, 3 * BLOCK)})
        writer.settle()
        writer.drain()
        writer.commit(draft)
    finally:
        writer.abort()
    return backup_id


def lineage_of_days(*days: int) -> tuple[MemoryStore, list[str]]:
    """Log of 40 days, and backups on some."""
    store = MemoryStore()
    lineage = lineage_on(store)
    for number in range(LOG_DAYS):
        put_log(lineage, number)
    return store, [put_backup(lineage, day) for day in days]


def reader_of(lineage: Lineage) -> HistoryReader:
    """Reads it as the command does."""
    return HistoryReader(lineage, PostgresDialect(), UTC)


def expire(lineage: Lineage, rules: RetentionRules, *remove: str) -> tuple[ExpiryPlan, Expired]:
    """Plan and run, as the command does."""
    reader = reader_of(lineage)
    plan = plan_expiry(reader, rules, remove=remove)
    return plan, run_expiry(lineage, reader, plan)


def stored_days(lineage: Lineage) -> list[int]:
    """Of which days log is stored."""
    return [segment.first // STEP for segment in lineage.logs()]


def next_missing(lineage: Lineage) -> int:
    """Where capture would go on."""
    path = Ancestry().lineage_of(BRANCH)
    found = first_missing(Ledger(lineage.logs()), lineage.holes(), path)
    assert found is not None
    return found.offset


KEEP_TWO = RetentionRules(last=2)


def test_backups_and_their_log_go_and_a_held_one_keeps_its_own() -> None:
    store, (a, b, c, d) = lineage_of_days(2, 10, 20, 30)
    lineage = lineage_on(store)
    put_hold(lineage, b, "audit")
    plan, done = expire(lineage, KEEP_TWO)
    assert (plan.remove, done.backups, done.spared) == ((a,), (a,), ())
    assert lineage.backup_ids() == [b, c, d]
    # The held one needs the log file of its start, days 8 to 11, up to its stop on day 10.
    assert stored_days(lineage) == [8, 9, 10, *range(20, 40)]
    assert done.log == plan.log
    assert [(hole.first, hole.last, hole.expired) for hole in lineage.holes()] == [
        (11 * STEP, 20 * STEP, True)
    ]
    assert next_missing(lineage) == END
    assert list(store.list("tombs/")) == []
    assert expire(lineage, KEEP_TWO)[1] == Expired((), (), (), log_waits=False)


def test_capture_would_ask_for_expired_log_without_the_record() -> None:
    """Negative control of the above."""
    store, (_, b, *_) = lineage_of_days(2, 10, 20, 30)
    lineage = lineage_on(store)
    put_hold(lineage, b, "audit")
    expire(lineage, KEEP_TWO)
    for name in [name for name in store.objects if "/holes/" in name]:
        del store.objects[name]
    assert next_missing(lineage) == 11 * STEP


def test_records_of_expired_log_grow_into_one_and_go_when_nothing_is_before_them() -> None:
    store, (a, *_) = lineage_of_days(2, 10, 20, 30)
    lineage = lineage_on(store)
    put_hold(lineage, a, "audit")
    expire(lineage, KEEP_TWO)
    expire(lineage, RetentionRules(last=1))
    spans = [(hole.first // STEP, hole.last // STEP) for hole in lineage.holes()]
    assert spans == [(3, 28)]
    for hold in [name for name in store.objects if "/holds/" in name]:
        store.delete(hold)
    expire(lineage, RetentionRules(last=1))
    assert lineage.holes() == []
    assert stored_days(lineage) == list(range(28, 40))


@pytest.mark.parametrize("after_effect", [False, True])
def test_killed_at_any_operation_and_run_again_it_ends_the_same(after_effect: bool) -> None:
    class Killed(BaseException):
        pass

    fail_at = 0
    ends = []
    first, (_, b, c, d) = lineage_of_days(2, 10, 20, 30)
    put_hold(lineage_on(first), b, "audit")
    while True:
        fail_at += 1
        store = MemoryStore()
        store.objects.update(first.objects)
        lineage = lineage_on(store, seed=1000 + fail_at)
        plan = FaultPlan(fail_at=fail_at, after_effect=after_effect, error=Killed)
        with suppress(Killed):
            expire(lineage_on(Faulty(store, plan), seed=fail_at), KEEP_TWO)
        sound = {one.backup_id: one.trouble for one in reader_of(lineage).read().history.backups}
        assert [sound[one] for one in (b, c, d)] == ["", "", ""]
        assert next_missing(lineage) == END
        put_log(lineage, LOG_DAYS)
        assert next_missing(lineage) == END + STEP
        unfinished = reader_of(lineage).read().unfinished
        for backup_id in unfinished:  # killed between a manifest and its revocation: gc does this in a day
            lineage.revoke(backup_id)
            store.delete(f"{lineage.root}pins/{backup_id}")
        expire(lineage, KEEP_TWO)
        kinds = ("backups/", "pins/", "logs/", "holds/")
        collect(lineage, CollectRequest())
        ends.append({n for n in store.objects if any(f"/{kind}" in n for kind in kinds)})
        assert list(store.list("tombs/")) == []
        if not plan.fired:
            break
    assert fail_at > 60
    assert all(end == ends[-1] for end in ends)


def test_no_log_goes_while_a_backup_is_being_made() -> None:
    store, (a, *_) = lineage_of_days(2, 10, 20, 30)
    lineage = lineage_on(store)
    claim(lineage, "20260102T000000Z-0000", parent="")
    plan, done = expire(lineage, KEEP_TWO)
    assert plan.log
    assert (done.log, done.log_waits) == ((), True)
    assert a in done.backups
    assert stored_days(lineage) == list(range(40))


class BackupBegins(Faulty):
    """A backup is pinned just after the tomb that names log has been put."""

    def __init__(self, store: MemoryStore, *, early: bool) -> None:
        super().__init__(store, FaultPlan(fail_at=0))
        self._early = early
        self._bare = lineage_on(store, seed=9)
        self.condemned: bool | None = None

    def list(self, prefix: str):  # type: ignore[no-untyped-def]
        """Before, or after, pins are listed under the tomb."""
        tombs = [info.name for info in self._bare.store.list("tombs/")]
        now = bool(tombs) and prefix.endswith("/pins/") and self.condemned is None
        of_log = now and any(b'"log"' in self._bare.store.get(name) for name in tombs)
        found = list(super().list(prefix)) if of_log and not self._early else None
        if of_log:
            taken = claim(self._bare, "20260102T000000Z-0000", parent="")
            self.condemned = taken.condemned.touches_log(BRANCH, 2 * STEP, 3 * STEP)
        return iter(found) if found is not None else super().list(prefix)


@pytest.mark.parametrize("early", [True, False])
def test_a_backup_that_begins_meanwhile_is_seen_or_sees_that_log_goes(early: bool) -> None:
    store, _ = lineage_of_days(2, 10, 20, 30)
    shaken = BackupBegins(store, early=early)
    _, done = expire(lineage_on(shaken), KEEP_TWO)
    assert shaken.condemned is True
    assert bool(done.log) is not early


def test_a_backup_that_is_held_after_the_plan_is_spared() -> None:
    store, (a, b, *_) = lineage_of_days(2, 10, 20, 30)
    lineage = lineage_on(store)
    reader = reader_of(lineage)
    plan = plan_expiry(reader, KEEP_TWO)
    put_hold(lineage, a, "just now")
    done = run_expiry(lineage, reader, plan)
    assert (done.backups, done.spared) == ((b,), (a,))
    assert {0, 1, 2} <= set(stored_days(lineage))


def test_a_backup_without_its_pages_or_log_does_not_count() -> None:
    store, (a, b, c, d) = lineage_of_days(2, 10, 20, 30)
    lineage = lineage_on(store)
    packs = lineage.manifest(d).packs
    del store.objects[f"{lineage.root}packs/{packs[0]}"]
    for name in [name for name in store.objects if f"/{20 * STEP:016x}-" in name]:
        del store.objects[name]
    plan = plan_expiry(reader_of(lineage), RetentionRules(last=1))
    kept = {one.backup_id: one.keep for one in plan.verdicts}
    assert kept == {a: False, b: True, c: False, d: False}
    assert "packs/" in next(one.reasons[0] for one in plan.verdicts if one.backup_id == d)


def test_the_last_good_copy_of_a_page_stays() -> None:
    store, (a, b) = lineage_of_days(2, 10)
    lineage = lineage_on(store)
    c = put_backup(lineage, 20, corrupt=(CorruptPage("base/1", 1, "checksum"),))
    plan, _ = expire(lineage, RetentionRules(last=1))
    assert {one.backup_id: one.keep for one in plan.verdicts} == {a: False, b: True, c: True}
    assert set(range(10, 40)) <= set(stored_days(lineage))
    remove_backups(lineage, [c])
    d = put_backup(lineage, 30)
    assert expire(lineage, RetentionRules(last=1))[1].backups == (b,)
    assert lineage.backup_ids() == [d]


def damage_manifest(store: MemoryStore, lineage: Lineage, backup_id: str) -> None:
    """One byte of it."""
    name = lineage.manifest_name(backup_id)
    content, instant = store.objects[name]
    store.objects[name] = (content[:60] + bytes([content[60] ^ 1]) + content[61:], instant)


def test_a_backup_that_cannot_be_read_stays_with_all_log_until_it_is_given_up() -> None:
    store, (a, b, c, d) = lineage_of_days(2, 10, 20, 30)
    lineage = lineage_on(store)
    damage_manifest(store, lineage, b)
    plan, done = expire(lineage, KEEP_TWO)
    assert (plan.unreadable, done.backups, done.log_waits) == ((b,), (a,), True)
    assert stored_days(lineage) == list(range(40))
    assert expire(lineage, KEEP_TWO, b)[1].backups == (b,)
    assert lineage.backup_ids() == [c, d]
    assert stored_days(lineage) == list(range(20, 40))


def test_backups_that_must_not_go_are_refused() -> None:
    store, (a, b) = lineage_of_days(2, 10)
    lineage = lineage_on(store)
    put_hold(lineage, a, "audit")
    with pytest.raises(UsageError, match="it is held"):
        plan_expiry(reader_of(lineage), RetentionRules(), remove=[a])
    with pytest.raises(UnknownBackup):
        plan_expiry(reader_of(lineage), RetentionRules(), remove=["20260101T000059Z-0000"])
    claim(lineage, "20260102T000000Z-0000", parent=b)
    with pytest.raises(UsageError, match="unfinished one builds on it"):
        plan_expiry(reader_of(lineage), RetentionRules(), remove=[b])


def test_the_last_backup_that_can_be_restored_is_not_removed() -> None:
    store, (a, b) = lineage_of_days(2, 10)
    lineage = lineage_on(store)
    del store.objects[f"{lineage.root}packs/{lineage.manifest(a).packs[0]}"]
    with pytest.raises(UsageError, match="last backup that can be restored"):
        plan_expiry(reader_of(lineage), RetentionRules(), remove=[b])
    assert expire(lineage, RetentionRules(), a)[1].backups == (a,)


def test_without_rules_nothing_goes() -> None:
    store, ids = lineage_of_days(2, 10)
    before = dict(store.objects)
    plan, done = expire(lineage_on(store), RetentionRules())
    assert (plan.remove, done.backups, done.log) == ((), (), ())
    assert store.objects == before
    assert len(ids) == 2


def test_a_tomb_that_a_killed_run_left_is_cleared_by_the_next() -> None:
    store, (a, *_) = lineage_of_days(2, 10, 20, 30)
    lineage = lineage_on(store)
    put_tombs(lineage, [f"backups/{a}"])
    expire(lineage, RetentionRules())
    assert len(list(store.list("tombs/"))) == 1
    expire(lineage, KEEP_TWO)
    assert list(store.list("tombs/")) == []


# ---- branches


def test_expired_log_of_an_ancestor_is_recorded_up_to_the_fork() -> None:
    """The end of the older branch was never stored; the newer one's first log file holds it."""
    history = PostgresDialect().parse_history(b"1\t0/6400\tpromoted\n")
    ancestry = Ancestry({SECOND: history})
    fork = history[0].end_offset
    removed = [LogSegment(BRANCH, 2048, fork - 512), LogSegment(SECOND, fork - 1024, fork + 2048)]
    left = [LogSegment(BRANCH, 0, 1024), LogSegment(SECOND, fork + 2048, fork + 9000)]
    known = [LogHole(BRANCH, 1024, 2048, "removed", expired=True)]
    holes = gaps_after(removed, left, ancestry, known)
    assert [(one.branch, one.first, one.last) for one in holes] == [
        (BRANCH, 1024, fork),
        (SECOND, fork - 1024, fork + 2048),
    ]
    path = ancestry.lineage_of(SECOND)
    found = first_missing(Ledger(left), [*holes, *known], path)
    assert found == Position(SECOND, fork + 9000)
    assert outdated([*holes, *known], left, ancestry) == known
    assert set(outdated(holes, left[1:], ancestry)) == set(holes)
