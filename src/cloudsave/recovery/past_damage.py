"""
Planning in spite of log objects that cannot be read.

The name of a log object tells which log it holds, and anybody who may add to the store can choose a name. So
an object that does not open is left out where that cannot change what is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from cloudsave.errors import IntegrityError, TargetUnreachable
from cloudsave.model.ledger import Ledger
from cloudsave.model.log import LogSegment
from cloudsave.model.target import Target, TargetKind
from cloudsave.recovery.history import History, IndexReader
from cloudsave.recovery.plan import RecoveryPlan, plan_recovery

LEFT_OUT_MAX = 1000
"""Limit: objects that are left out; each makes the plan begin anew."""
T = TypeVar("T")


def plan_past_damage(target: Target, history: History, indexes: IndexReader) -> RecoveryPlan:
    """
    As `plan_recovery`, without log objects that cannot be opened; they are named in the notes.

    The latest state is never planned without one that may hold later log than all others: that would lose
    it without a word.
    Raises: as `plan_recovery`; IntegrityError where the target cannot be reached without what is damaged.
    """
    latest = target.kind is TargetKind.LATEST
    plan, left_out = past_damage(
        lambda seen: plan_recovery(target, seen, indexes), history, indexes, may_end_earlier=not latest
    )
    return replace(plan, notes=(*plan.notes, *notes_of(left_out)))


def past_damage(
    work: Callable[[History], T], history: History, indexes: IndexReader, *, may_end_earlier: bool
) -> tuple[T, list[LogSegment]]:
    """
    The result of `work` on as much of `history` as can be opened, and what was left out.

    `may_end_earlier`: whether log may be missing then that nothing else holds.
    """
    left_out: list[LogSegment] = []
    first: IntegrityError | None = None
    while len(left_out) <= LEFT_OUT_MAX:
        try:
            return work(history), left_out
        except TargetUnreachable as error:
            if first is not None:
                raise first from error
            raise
        except IntegrityError as error:
            bad = indexes.unreadable.intersection(history.segments)
            if not bad:
                raise
            first = first or error
            rest = [one for one in history.segments if one not in bad]
            if not may_end_earlier and not all(_is_held_by(rest, one) for one in bad):
                raise IntegrityError(
                    error.message,
                    detail=f"{error.detail} It may hold later log than all other objects.".strip(),
                    hints=[
                        "what lies before it can be restored: give --time or --position",
                        "`cloudsave ranges NAME` shows what that is, `cloudsave verify` what else is damaged",
                    ],
                ) from error
            history = replace(history, segments=tuple(rest))
            left_out += sorted(bad, key=lambda one: (one.branch, one.first, one.last))
    raise first or AssertionError("nothing was left out")


def notes_of(left_out: list[LogSegment]) -> tuple[str, ...]:
    """What a person should be told of it."""
    if not left_out:
        return ()
    one = left_out[0]
    text = f"{len(left_out)} log objects cannot be opened and were left out, the first of branch {one.branch}"
    return (f"{text} from {one.first:#x} to {one.last:#x}: `cloudsave verify` names them",)


def _is_held_by(segments: list[LogSegment], lost: LogSegment) -> bool:
    """Whether other objects of the branch hold all that `lost` says it holds."""
    cover = Ledger(segments).cover([(lost.branch, 0, None)], lost.first, lost.last)
    return cover.complete
