"""
Retention of one lineage: what goes, and taking it away.

Order: backups, then log. Which log goes is decided anew when the backups are gone, from what is stored then.
Invariant: log goes only while no backup is being made: a tomb names the stretches, then pins are listed
once more. Consequence: a backup that begins later sees the tomb, and fails rather than commit without its
log.
Invariant: a record tells of removed log before it is removed. Consequence: capture never takes it for a
hole that it has to fill.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from cloudsave.errors import UnknownBackup, UsageError
from cloudsave.model.ledger import Ledger
from cloudsave.model.log import LogSegment
from cloudsave.model.retention import RetentionRules, StoredBackup, Verdict
from cloudsave.policy.retention import decide, decide_log
from cloudsave.repository.collect import delete_objects, refuse_unfit
from cloudsave.repository.expire import remove_backups, sweep_tombs
from cloudsave.repository.lineage import Lineage, hole_name
from cloudsave.repository.log_objects import log_object_name
from cloudsave.repository.tombs import LogSpan, put_tombs
from cloudsave.retention.gaps import gaps_after, outdated
from cloudsave.retention.history import HistoryReader, Stored


@dataclass(frozen=True, slots=True)
class ExpiryPlan:
    """What would go, and why each backup stays or goes."""

    rules: RetentionRules
    verdicts: tuple[Verdict, ...]
    """The oldest backup first."""
    log: tuple[LogSegment, ...]
    """Stretches that nothing needs once the backups are gone."""
    unreadable: tuple[str, ...]
    """Backups that stay since nothing is known of them."""
    unfinished: tuple[str, ...]
    """Backups being made: no log goes meanwhile."""

    @property
    def remove(self) -> tuple[str, ...]:
        """Backups that go, the oldest first."""
        return tuple(one.backup_id for one in self.verdicts if not one.keep)


@dataclass(frozen=True, slots=True)
class Expired:
    """What has gone."""

    backups: tuple[str, ...]
    spared: tuple[str, ...]
    """Backups that were to go, and that somebody began to hold or to build on meanwhile."""
    log: tuple[LogSegment, ...]
    log_waits: bool
    """Whether log has to stay until a backup is finished or given up."""


def plan_expiry(reader: HistoryReader, rules: RetentionRules, *, remove: Sequence[str] = ()) -> ExpiryPlan:
    """
    What `rules` say now. Backups of `remove` go whatever the rules say; the others are judged without them.

    Raises: UnknownBackup; UsageError for one of `remove` that is held, built on, or the last of its kind.
    """
    stored = reader.read()
    given_up = [_given_up(stored, backup_id) for backup_id in dict.fromkeys(remove)]
    left = tuple(one for one in stored.history.backups if one.backup_id not in remove)
    if any(not one.trouble for one in stored.history.backups) and not any(not one.trouble for one in left):
        raise UsageError(
            "cannot remove the last backup that can be restored",
            hints=["take a new one first: `cloudsave backup NAME --full`"],
        )
    history = replace(stored.history, backups=left)
    decision = decide(rules, history)
    log = decide_log(history, decision, first_branch=reader.first_branch) if rules.any else ()
    verdicts = sorted([*decision.verdicts, *given_up], key=lambda one: one.backup_id)
    unreadable = tuple(name for name in stored.unreadable if name not in remove)
    return ExpiryPlan(rules, tuple(verdicts), log, unreadable, stored.unfinished)


def run_expiry(
    lineage: Lineage,
    reader: HistoryReader,
    plan: ExpiryPlan,
    advance: Callable[[int], None] = lambda _: None,
) -> Expired:
    """
    Carry a plan out. Killed at any time, a new plan goes on where it was.

    Raises: StoreUnfit, StorePermission, StoreError, IntegrityError.
    """
    refuse_unfit(lineage.store)
    removed = remove_backups(lineage, plan.remove, advance)
    log, waits = _LogRemoval(lineage, reader, plan.rules).run(advance) if plan.rules.any else ((), False)
    sweep_tombs(lineage)
    spared = tuple(name for name in plan.remove if name not in removed)
    return Expired(tuple(removed), spared, log, waits)


def _given_up(stored: Stored, backup_id: str) -> Verdict:
    known = {one.backup_id: one for one in stored.history.backups}
    if backup_id not in known and backup_id not in stored.unreadable:
        raise UnknownBackup(
            f"backup {backup_id!r} is not in the repository", hints=["`cloudsave list` shows the backups"]
        )
    if backup_id in known:
        _refuse_needed(known[backup_id])
    return Verdict(backup_id, keep=False, with_log=False, reasons=("its removal was asked for",))


def _refuse_needed(backup: StoredBackup) -> None:
    if backup.holds:
        raise UsageError(
            f"cannot remove backup {backup.backup_id!r}: it is held",
            detail=f"The reason is: {'; '.join(backup.holds)}.",
            hints=[f"`cloudsave hold release {backup.backup_id}` ends that"],
        )
    if backup.children:
        raise UsageError(
            f"cannot remove backup {backup.backup_id!r}: an unfinished one builds on it",
            detail=f"It is {', '.join(backup.children)}.",
            hints=["wait until it is finished; `cloudsave gc` gives up one that has died"],
        )


class _LogRemoval:
    """Takes log away that nothing needs."""

    def __init__(self, lineage: Lineage, reader: HistoryReader, rules: RetentionRules) -> None:
        self._lineage = lineage
        self._reader = reader
        self._rules = rules

    def run(self, advance: Callable[[int], None]) -> tuple[tuple[LogSegment, ...], bool]:
        """The stretches that went, and whether any stayed because of an unfinished backup."""
        lineage, store = self._lineage, self._lineage.store
        first, waits = self._unneeded()
        if not first:
            self._forget_gaps()
            return (), waits
        tombs = put_tombs(lineage, (), _spans(first))
        again, waits = self._unneeded()
        still = set(again)
        removed = tuple(one for one in first if one in still)
        if removed:
            self._record_gaps(removed)
            delete_objects(store, (log_object_name(lineage.id, one) for one in removed), advance)
        self._forget_gaps()
        delete_objects(store, tombs)
        return removed, waits

    def _unneeded(self) -> tuple[tuple[LogSegment, ...], bool]:
        """
        By what is stored now, where every backup that is still there keeps its own log; none while a backup
        is being made, or where nothing is known of one.
        """
        stored = self._reader.read()
        decision = decide(self._rules, stored.history)
        staying = replace(decision, verdicts=tuple(replace(one, keep=True) for one in decision.verdicts))
        unneeded = decide_log(stored.history, staying, first_branch=self._reader.first_branch)
        waits = bool(unneeded) and bool(stored.unfinished or stored.unreadable)
        return ((), True) if waits else (unneeded, False)

    def _record_gaps(self, removed: Sequence[LogSegment]) -> None:
        lineage, going = self._lineage, set(removed)
        left = [one for one in lineage.logs() if one not in going]
        for hole in gaps_after(removed, left, self._reader.ancestry(), lineage.holes()):
            lineage.put_hole(hole)

    def _forget_gaps(self) -> None:
        lineage = self._lineage
        old = outdated(lineage.holes(), lineage.logs(), self._reader.ancestry())
        delete_objects(lineage.store, [lineage.root + hole_name(hole) for hole in old])


def _spans(segments: Sequence[LogSegment]) -> list[LogSpan]:
    """The stretches, joined where they touch or overlap."""
    ledger = Ledger(segments)
    return [(branch, *span) for branch in ledger.branches() for span in ledger.ranges(branch)]
