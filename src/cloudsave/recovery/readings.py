"""
Where an instant exists more than once in the log, because the source's clock was set back (by hand, by NTP,
by a failover to a host whose clock was behind): which of its readings does a target time mean? Pure.

A plan stops before the first commit behind its backup that is later than the target. Commits before the
backup that are later too show that the clock has been at the target there already; commits behind the stop
that are not later, and log behind them that is, show that it came to the target again. The names of log
objects bound the instants in them, so that only objects are read that hold such a commit.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cloudsave.errors import TargetUnreachable
from cloudsave.model.log import Commit, Commits, LogSegment
from cloudsave.recovery.history import BackupSummary
from cloudsave.recovery.reach import Reach, instant_text

SLACK_US = 2_000_000
"""Commits at the same time are stamped, and then written, in another order; by no more than this."""


def check_readings(reach: Reach, backup: BackupSummary, stop: int, wanted_us: int) -> tuple[str, ...]:
    """
    See that the target time means the stop at the offset `stop` and nothing else; notes for the plan.

    Raises: TargetUnreachable, with the position of each reading. Where the plan's backup was chosen by name,
    it is the reading behind that backup that is meant.
    """
    if reach.target.backup_id is None:
        later = _first(_later_before(reach, backup.start.offset, wanted_us + SLACK_US))
        if later is not None:
            ways = [f"--backup {backup.backup_id}: when the clock came to that time again"]
            if any(one.stop.offset <= later.offset for one in reach.backups):
                ways.insert(0, f"--position {reach.text(later.offset)} --exclusive: before that commit")
            raise _ambiguous(
                wanted_us,
                f"A commit of {instant_text(later.instant_us)} lies before backup {backup.backup_id}.",
                *ways,
            )
    earlier = _last(_earlier_behind(reach, stop, wanted_us - SLACK_US))
    if earlier is None:
        return ()
    where = f"A commit of {instant_text(earlier.instant_us)} lies behind {reach.text(stop)}"
    if not reach.history.instants_at_commit:
        # A statement that ran for long looks the same, and no clock was set back for it.
        return (f"{where}: its statement began before the target and ended after it",)
    if not _comes_again(reach, earlier.offset, wanted_us):
        return (f"{where}: the clock was set back, and has not come to the target again",)
    raise _ambiguous(
        wanted_us,
        f"{where}.",
        f"--position {reach.text(stop)} --exclusive: before the first commit that is later",
        f"--position {reach.text(earlier.offset)}: after the last commit that is not",
    )


def steps_back(reach: Reach) -> Iterator[tuple[int, int, int]]:
    """
    Where the log shows that the clock was set back: offset, and the first and the last instant that exist
    twice. By the names of log objects, one after the other; what went back and forth within one is not seen.
    """
    if not reach.history.instants_at_commit:
        return
    latest_us, covered = 0, 0
    open_step: tuple[int, int] | None = None
    """Offset, and the first instant that exists twice, until the clock has caught up."""
    again_us = 0
    """How far it has come again."""
    for segment in sorted(_on_path(reach), key=lambda one: (one.first, one.last)):
        if segment.commit_last_us == 0:
            continue
        if open_step is None and segment.commit_first_us + SLACK_US < latest_us:
            commits = _of_path(reach, segment)
            # Stored log may overlap: what was covered already is not log that follows.
            back = (commits.rows[1] > covered) & (commits.rows[2] + SLACK_US < latest_us)
            if back.any():
                first = commits[int(back.argmax())]
                open_step, again_us = (first.offset, first.instant_us), 0
        if open_step is not None:
            again_us = max(again_us, segment.commit_last_us)
            if again_us >= latest_us:
                yield (*open_step, latest_us)
                open_step = None
        latest_us, covered = max(latest_us, segment.commit_last_us), max(covered, segment.last)
    if open_step is not None:
        yield (*open_step, again_us)


def _on_path(reach: Reach) -> Iterator[LogSegment]:
    for branch, begin, end in reach.path:
        for segment in reach.history.segments:
            if segment.branch == branch and segment.last > begin and (end is None or segment.first < end):
                yield segment


def _later_before(reach: Reach, offset: int, instant_us: int) -> Iterator[Commits]:
    """Commits of the path before `offset` that are later than an instant."""
    for segment in _on_path(reach):
        if segment.first < offset and segment.commit_last_us > instant_us:
            commits = _of_path(reach, segment)
            yield Commits(commits.rows[:, (commits.rows[0] < offset) & (commits.rows[2] > instant_us)])


def _earlier_behind(reach: Reach, offset: int, instant_us: int) -> Iterator[Commits]:
    """Commits of the path from `offset` on that are not later than an instant."""
    for segment in _on_path(reach):
        if segment.last > offset and 0 < segment.commit_first_us <= instant_us:
            commits = _of_path(reach, segment)
            yield Commits(commits.rows[:, (commits.rows[0] >= offset) & (commits.rows[2] <= instant_us)])


def _comes_again(reach: Reach, offset: int, instant_us: int) -> bool:
    """Whether log of the path behind `offset` is later than an instant."""
    for segment in reversed(list(_on_path(reach))):
        if segment.last <= offset:
            continue
        if reach.indexes(segment).complete_until_us > instant_us:
            return True
        if segment.commit_last_us > instant_us:
            commits = _of_path(reach, segment)
            if ((commits.rows[0] > offset) & (commits.rows[2] > instant_us)).any():
                return True
    return False


def _of_path(reach: Reach, segment: LogSegment) -> Commits:
    """The commits of a segment as far as it is on the path."""
    commits = reach.indexes(segment).commits
    inside = np.zeros(len(commits), bool)
    for branch, begin, end in reach.path:
        if branch == segment.branch:
            limit = (1 << 63) - 1 if end is None else end
            inside |= (commits.rows[0] >= begin) & (commits.rows[0] < limit)
    return Commits(commits.rows[:, inside])


def _first(found: Iterator[Commits]) -> Commit | None:
    return min((one[0] for one in found if len(one)), key=lambda one: one.offset, default=None)


def _last(found: Iterator[Commits]) -> Commit | None:
    return max((one[len(one) - 1] for one in found if len(one)), key=lambda one: one.offset, default=None)


def _ambiguous(wanted_us: int, why: str, *ways: str) -> TargetUnreachable:
    return TargetUnreachable(
        f"target time {instant_text(wanted_us)} exists more than once: the source's clock was set back",
        detail=why,
        hints=list(ways),
    )
