"""
Which backup and which log bring a database to a wanted state; or why nothing does. Pure.

Rules, each of which answers a way in which servers or tools lose data in silence:
- Every target becomes an exact offset of the log, so that the server cannot stop anywhere else.
- A backup counts only where its stop lies on the path to the target and not after it: a target before the
  first backup is refused, never answered with something newer.
- All log from the backup's start to the target must be durable without a hole, and the ancestry of each
  branch on the path known: a hole or a missing history file is a refusal, never an earlier end.
- A time means: stop before the first commit, in log order, whose instant is later (or, exclusive, not
  earlier). Instants are not monotonic along the log. Where no such commit is stored, the log must be known
  to be complete up to that time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from cloudsave.errors import TargetUnreachable, UsageError
from cloudsave.model.ledger import Extent, Stretch
from cloudsave.model.log import Commit, LogSegment, RestorePoint, us_from_instant
from cloudsave.model.target import Target, TargetKind
from cloudsave.recovery.history import BackupSummary, History, Indexes
from cloudsave.recovery.log_path import LogPath, is_beyond
from cloudsave.recovery.reach import Reach, instant_text
from cloudsave.recovery.readings import check_readings

RECORD_BEGIN_SLACK_BYTES = 40
"""Between the end of a record and the begin of the next there may be a page header and padding."""
CANDIDATES_LISTED_MAX = 8
"""Limit: matches that an ambiguity names."""


@dataclass(frozen=True, slots=True)
class Stop:
    """Where replay stops: at the first record that begins at or after `recovery_end`."""

    recovery_end: int
    inclusive: bool
    log_end: int
    """All log before this must be at hand."""
    replayed_min: int
    replayed_max: int
    """The end of the last record replayed lies in [replayed_min, replayed_max]."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RecoveryPlan:
    """A proved way to the target: the same object for a dry run and for the restore itself."""

    target: Target
    backup: BackupSummary
    branch: str
    path: tuple[Stretch, ...]
    """The stretches from the backup's start on, oldest first."""
    extents: tuple[Extent, ...]
    """The log to replay, each extent beginning where the one before it ends."""
    stop: Stop
    histories: tuple[str, ...]
    """Branches whose history files replay needs."""
    last_commit: Commit | None
    """The last commit that the restored database contains of those since the backup's start."""
    first_left_out: Commit | None
    """The first commit that it does not contain, where one is stored."""
    position_text: str
    """Where replay stops, in the engine's text form."""
    notes: tuple[str, ...]

    @property
    def segments(self) -> tuple[LogSegment, ...]:
        """The stored log that is needed, in order."""
        return tuple(dict.fromkeys(extent.segment for extent in self.extents))

    @property
    def log_begin(self) -> int:
        """Where the log begins that replay needs."""
        return self.backup.log_begin

    @property
    def log_stored_bytes(self) -> int:
        """Bytes of log objects to fetch."""
        return sum(segment.size_bytes for segment in self.segments)

    def as_dict(self) -> dict[str, Any]:
        """The plan for `--json`."""
        last, left_out = self.last_commit, self.first_left_out
        return {
            "target": self.target.kind.value,
            "backup": self.backup.backup_id,
            "branch": self.branch,
            "path": [list(step) for step in self.path],
            "recovery_end": self.stop.recovery_end,
            "inclusive": self.stop.inclusive,
            "position": self.position_text,
            "last_commit": _commit_dict(last),
            "first_commit_left_out": _commit_dict(left_out),
            "data_bytes": self.backup.data_bytes,
            "log_stored_bytes": self.log_stored_bytes,
            "log_segments": [[one.branch, one.first, one.last] for one in self.segments],
            "notes": list(self.notes),
        }

    def describe(self) -> list[str]:
        """The plan for people, one fact a line."""
        last, left_out = self.last_commit, self.first_left_out
        way = "included" if self.stop.inclusive else "left out"
        lines = [
            f"backup       {self.backup.backup_id} ({self.backup.data_bytes} bytes of files)",
            f"branches     {' -> '.join(step[0] for step in self.path)}",
            f"log          {len(self.segments)} objects, {self.log_stored_bytes} bytes as they are stored",
            f"stops at     {self.position_text}, that record {way}",
            f"last commit  {_commit_text(last)}",
            f"left out     {_commit_text(left_out)}",
            "steps        restore files, replay log, pause at the target and compare, then open",
        ]
        return lines + [f"note         {note}" for note in self.notes]


def plan_recovery(target: Target, history: History, indexes: Indexes) -> RecoveryPlan:
    """
    Choose the backup and the log that bring a database to `target`. Pure over what it is given.

    Returns: a plan whose extents touch and reach the target.
    Raises: TargetUnreachable with the nearest reachable points, UnknownBackup, UsageError.
    Source: PostgreSQL recoveryStopsBefore(), src/backend/access/transam/xlogrecovery.c.
    """
    reach = Reach(target, history, indexes)
    match target.kind:
        case TargetKind.TIME:
            backup, stop = _plan_time(reach)
        case TargetKind.POSITION:
            backup, stop = _plan_position(reach, _offset_on_path(reach))
        case TargetKind.TRANSACTION | TargetKind.NAME:
            backup, stop = _plan_record(reach)
        case TargetKind.LATEST:
            backup, stop = _plan_latest(reach)
        case TargetKind.IMMEDIATE:
            backup, stop = _plan_immediate(reach)
    return _assemble(reach, backup, stop)


# ---- one function for each kind of target ----


def _plan_time(reach: Reach) -> tuple[BackupSummary, Stop]:
    target = reach.target
    if target.time is None:
        raise UsageError("a time target needs a time")
    wanted_us = us_from_instant(target.time)
    for backup, log in reach.covered():
        contained_us = log.latest_instant(backup.start.offset, backup.stop.offset)
        if contained_us and is_beyond(contained_us, wanted_us, target.inclusive):
            continue
        if wanted_us < reach.earliest_us(backup, log):
            continue
        beyond = log.first_commit_beyond(backup.stop.offset, wanted_us, inclusive=target.inclusive)
        known_us = reach.complete_until_us(backup, log)
        if beyond is not None:
            stop = _before(beyond)
        elif wanted_us < known_us or (target.inclusive and wanted_us == known_us):
            stop = _at_tail(reach, backup, log)
        else:
            break
        end = beyond.offset if beyond is not None else stop.replayed_max
        return backup, replace(stop, notes=check_readings(reach, backup, end, wanted_us))
    raise reach.refuse(
        f"target time {target.time.isoformat()} is not reachable",
        instant_us=wanted_us,
    )


def _offset_on_path(reach: Reach) -> int:
    position = reach.target.position
    if position is None:
        raise UsageError("a position target needs a position")
    if not position.branch:
        return position.offset
    if reach.stretch_of(position) is None:
        raise TargetUnreachable(
            f"position {reach.history.position_text(position)} is not on the way to branch {reach.branch}",
            detail=f"Branch {reach.branch} left branch {position.branch} before it, or never was on it.",
            hints=[f"`--branch {position.branch}` follows the branch of the position"],
        )
    return position.offset


def _plan_position(reach: Reach, offset: int) -> tuple[BackupSummary, Stop]:
    inclusive = reach.target.inclusive
    for backup, _ in reach.covered():
        if backup.stop.offset > offset:
            continue
        stop = _stop_at(reach, backup, offset, inclusive=inclusive)
        if stop is not None:
            return backup, stop
        break
    raise reach.refuse(f"target position {reach.text(offset)} is not reachable", offset=offset)


def _stop_at(reach: Reach, backup: BackupSummary, offset: int, *, inclusive: bool) -> Stop | None:
    """
    Stop before or after the record that begins at `offset`; None where the log does not reach so far.

    Where none begins there (within a record, at the edge of a page) there is none to include: a server that
    is told "inclusive" would replay the next one, wherever it begins.
    """
    log = reach.log_from(backup)
    inclusive = inclusive and (log.begins_record(offset) or offset >= log.end)
    known_end = log.record_after(offset)
    tail = log.tail()
    if known_end is None and tail.record is not None and tail.record >= offset:
        known_end = tail.end
    if known_end is not None:
        low = offset if inclusive else offset - RECORD_BEGIN_SLACK_BYTES
        return Stop(offset, inclusive, known_end, low, max(known_end, offset))
    # Without a record that begins at the position, everything before it is what was asked for; but for
    # "inclusive" at the very end: the record that begins there may exist and is not stored.
    if offset < tail.end or (offset == tail.end and not inclusive):
        return _at_tail(reach, backup, log)
    return None


def _plan_record(reach: Reach) -> tuple[BackupSummary, Stop]:
    found, too_early = _matches(reach)
    target = reach.target
    what = f"transaction {target.transaction}"
    if target.kind is TargetKind.NAME:
        what = f"restore point {target.name!r}"
    if target.position is not None:
        found = [one for one in found if one.offset == target.position.offset]
    if not found and too_early:
        raise reach.refuse(f"{what} is not reachable", offset=too_early[-1].offset)
    if not found:
        raise reach.refuse(f"{what} is not in the stored log of branch {reach.branch}")
    if len(found) > 1:
        listed = [
            f"{reach.text(one.offset)} at {instant_text(one.instant_us)}"
            for one in found[-CANDIDATES_LISTED_MAX:]
        ]
        raise TargetUnreachable(
            f"{what} is ambiguous: it occurs {len(found)} times",
            detail="It occurs at " + "; ".join(listed) + ".",
            hints=["give the one that is meant as --position"],
        )
    record = found[0]
    for backup, log in reach.covered():
        if backup.stop.offset <= record.offset < log.end:
            if isinstance(record, Commit) and not target.inclusive:
                return backup, _before(record)
            return backup, _after(record.offset, record.end_offset)
    raise reach.refuse(f"{what} is not reachable", offset=record.offset)


def _matches(reach: Reach) -> tuple[list[Commit | RestorePoint], list[Commit | RestorePoint]]:
    """The records that the target names: those that can be reached, and those before any backup's stop."""
    target = reach.target
    found: dict[int, Commit | RestorePoint] = {}
    early: dict[int, Commit | RestorePoint] = {}
    searched = -1
    for backup, log in reversed(list(reach.covered())):
        begin = max(backup.start.offset, searched)
        records: Iterator[Commit | RestorePoint]
        if target.kind is TargetKind.NAME:
            if target.name is None:
                raise UsageError("a name target needs a name")
            records = log.restore_points(begin, name=target.name)
        else:
            records = (
                one
                for one in log.commits(begin, wanted=lambda extent: extent.segment.commit_last_us != 0)
                if one.transaction == target.transaction
            )
        for one in records:
            (found if one.offset >= backup.stop.offset or one.offset in found else early)[one.offset] = one
        searched = max(searched, log.end)
    reachable = [one for _, one in sorted(found.items())]
    return reachable, [one for offset, one in sorted(early.items()) if offset not in found]


def _plan_latest(reach: Reach) -> tuple[BackupSummary, Stop]:
    for backup, log in reach.covered():
        furthest = reach.ledger.furthest(reach.branch)
        if furthest > log.end or any(one.stop.offset > log.end for one in reach.backups):
            raise reach.refuse(f"the latest state of branch {reach.branch} is not reachable", offset=furthest)
        stop = _at_tail(reach, backup, log)
        last = log.last_commit_before(log.end, begin=backup.start.offset)
        if last is None:
            return backup, stop
        note = f"the last commit in the stored log is of {instant_text(last.instant_us)}"
        return backup, replace(stop, notes=(note,))
    raise reach.refuse(f"no backup of branch {reach.branch} can be made consistent")


def _plan_immediate(reach: Reach) -> tuple[BackupSummary, Stop]:
    """
    Before the first record after the backup. The server's own "immediate" sees that it is consistent only
    when it has read one more record, which may not be stored.

    Source: PostgreSQL recoveryStopsAfter(), which looks at records of transactions alone.
    """
    for backup, _ in reach.covered():
        stop = _stop_at(reach, backup, backup.stop.offset, inclusive=False)
        if stop is None:
            continue
        notes: tuple[str, ...] = ()
        if backup is not reach.backups[0]:
            notes = (f"newer backup {reach.backups[0].backup_id} lacks log and cannot be used",)
        return backup, replace(stop, notes=notes)
    raise reach.refuse(f"no backup of branch {reach.branch} can be made consistent")


# ---- stops ----


def _before(commit: Commit) -> Stop:
    """Stop before a commit. The server reads the whole record to decide."""
    offset = commit.offset
    return Stop(
        recovery_end=offset,
        inclusive=False,
        log_end=commit.end_offset,
        replayed_min=offset - RECORD_BEGIN_SLACK_BYTES,
        replayed_max=offset,
    )


def _after(record: int, end: int) -> Stop:
    """Stop after the record [record, end)."""
    return Stop(
        recovery_end=record,
        inclusive=True,
        log_end=end,
        replayed_min=end - RECORD_BEGIN_SLACK_BYTES,
        replayed_max=end,
    )


def _at_tail(reach: Reach, backup: BackupSummary, log: LogPath) -> Stop:
    """Stop after the last complete record."""
    tail = log.tail()
    if tail.record is None or tail.end < backup.stop.offset:
        raise reach.refuse("the end of the stored log is not reachable", offset=tail.end)
    return _after(tail.record, tail.end)


# ---- the plan ----


def _assemble(reach: Reach, backup: BackupSummary, stop: Stop) -> RecoveryPlan:
    path, branch = _path_to(reach, backup, stop)
    needed = [step for step, _, end in path if end is None or end > backup.start.offset]
    histories = tuple(step for step in needed if step != reach.history.first_branch)
    for step in histories:
        reach.need_history(step)
    # Over the whole path: the end of a branch may be stored with its child alone, which repeats it.
    cover = reach.ledger.cover(reach.path, backup.log_begin, stop.log_end)
    if not cover.complete:
        raise reach.refuse("the target is not reachable", offset=cover.end)
    log = reach.log_from(backup)
    position = stop.recovery_end
    bound = position + 1 if stop.inclusive else position
    return RecoveryPlan(
        target=reach.target,
        backup=backup,
        branch=branch,
        path=path,
        extents=cover.extents,
        stop=stop,
        histories=histories,
        last_commit=log.last_commit_before(bound, begin=backup.start.offset),
        first_left_out=log.first_commit(bound),
        position_text=reach.text(position),
        notes=(*stop.notes, *_notes(reach, backup)),
    )


def _path_to(reach: Reach, backup: BackupSummary, stop: Stop) -> tuple[tuple[Stretch, ...], str]:
    """
    The stretches from the backup to the stop, and the branch of the last one, which the server is to follow.

    A server that is told to follow a later branch, and stops before that one began, writes a history in
    which the later branch ends before it begins.
    Source: PostgreSQL writeTimeLineHistory(), called with the target timeline as the parent.
    """
    steps = [step for step in reach.path if step[2] is None or step[2] > backup.log_begin]
    reached = [step for step in steps if step[1] < stop.log_end] or steps[:1]
    branch, begin, _ = reached[-1]
    return (*reached[:-1], (branch, begin, None)), branch


def _notes(reach: Reach, backup: BackupSummary) -> Iterator[str]:
    newer = [one for one in reach.history.ancestry.ancestors if one > reach.branch]
    if newer:
        yield f"the source has also been on branch {', '.join(sorted(newer))}, which is not followed"
    for backup_id in reach.history.unreadable:
        yield f"backup {backup_id} is damaged and was left aside: run `cloudsave verify`"
    if backup.corrupt_pages:
        yield f"the backup holds {backup.corrupt_pages} pages that were already damaged in the source"
    mode = backup.settings.get("archive_mode", "off")
    if mode != "off":
        yield f"archive_mode was {mode} on the source and is switched off in the restored server"
    yield from backup.notes


def _commit_dict(commit: Commit | None) -> dict[str, Any] | None:
    if commit is None:
        return None
    return {
        "offset": commit.offset,
        "instant": instant_text(commit.instant_us),
        "transaction": commit.transaction,
    }


def _commit_text(commit: Commit | None) -> str:
    if commit is None:
        return "none in the stored log"
    return f"transaction {commit.transaction} at {instant_text(commit.instant_us)}"
