"""
What can be reached on one path of history: the path itself, the backups that lie on it, the ranges that they
and the log make reachable, and the refusals that name them. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator

from cloudsave.errors import IntegrityError, ReachablePoint, TargetUnreachable, UnknownBackup
from cloudsave.model.ledger import Ledger, Stretch
from cloudsave.model.log import instant_from_us
from cloudsave.model.position import Position
from cloudsave.model.ranges import RecoverableRange
from cloudsave.model.target import Target, TargetKind
from cloudsave.recovery.history import BackupSummary, History, Indexes
from cloudsave.recovery.log_path import LogPath


class Reach:
    """One path and what can be reached on it."""

    def __init__(self, target: Target, history: History, indexes: Indexes) -> None:
        self.target = target
        self.history = history
        self.indexes = indexes
        self.ledger = Ledger(history.segments)
        self.branch = self._choose_branch()
        self._check_ancestry()
        self.path = history.ancestry.lineage_of(self.branch)
        chosen = target.branch or (target.position and target.position.branch)
        if not chosen and not (target.kind is TargetKind.IMMEDIATE and target.backup_id):
            self._check_rivals()
        self._log_paths: dict[int, LogPath] = {}
        self.backups = self._backups_on_path()

    def _choose_branch(self) -> str:
        target, history = self.target, self.history
        known = {*self.ledger.branches(), *(one.stop.branch for one in history.backups)}
        if target.branch is not None:
            branch = target.branch
            if branch not in known | set(history.ancestry.ancestors):
                raise TargetUnreachable(
                    f"branch {branch} is not stored",
                    hints=[f"stored branches: {', '.join(sorted(known))}"],
                )
        elif target.kind is TargetKind.POSITION and target.position and target.position.branch:
            branch = target.position.branch
        elif target.backup_id is not None and target.kind is TargetKind.IMMEDIATE:
            branch = self._backup(target.backup_id).stop.branch
        else:
            branch = self._newest_branch()
        self.need_history(branch)
        return branch

    def _newest_branch(self) -> str:
        damaged = self.history.unreadable_branches
        if damaged:
            raise IntegrityError(
                f"history of branch {damaged[0]} is damaged",
                detail="It may be the newest branch; another one would be followed without it.",
                hints=[
                    "a branch that is chosen with --branch needs only its own history",
                    "`cloudsave verify` shows what else is damaged",
                ],
            )
        stored = {*self.ledger.branches(), *(one.stop.branch for one in self.history.backups)}
        return max(stored, default=self.history.first_branch)

    def need_history(self, branch: str) -> None:
        """Raises: TargetUnreachable where the ancestry of `branch` is not known."""
        if branch == self.history.first_branch or branch in self.history.ancestry.ancestors:
            return
        if branch in self.history.unreadable_branches:
            raise IntegrityError(
                f"history of branch {branch} is damaged",
                hints=["an older branch can be chosen with --branch"],
            )
        raise TargetUnreachable(
            f"history of branch {branch} is not stored",
            detail="Without it a server would stay on an older branch and lose all of this one.",
            hints=[
                "`cloudsave logs capture NAME` stores history files while the source has them",
                "an older branch can be chosen with --branch",
            ],
        )

    def _check_ancestry(self) -> None:
        """Two servers that both called a branch by the same name must not be mixed."""
        ancestry = self.history.ancestry
        points = ancestry.path(self.branch)
        for number, point in enumerate(points):
            own = ancestry.ancestors.get(point.branch)
            if own is not None and own != points[:number]:
                raise TargetUnreachable(
                    f"history of branch {point.branch} contradicts that of branch {self.branch}",
                    detail="Their history files differ: two servers used the same branch number.",
                    hints=["choose a branch with --branch"],
                )

    def _check_rivals(self) -> None:
        """
        The newest branch is followed unasked only where it is the one that lives. A restored copy that was
        captured into the same repository has a newer branch too, and lacks what the source did since.
        """
        ancestry, segments = self.history.ancestry, self.history.segments
        ends = {branch: end for branch, _, end in self.path}
        own_us = max((one.commit_last_us for one in segments if one.branch == self.branch), default=0)
        for segment in segments:
            apart = ends.get(segment.branch, ancestry.lineage_of(segment.branch)[-1][1])
            if apart is None or segment.last <= apart or segment.commit_last_us <= own_us:
                continue
            commits = [one for one in self.indexes(segment).commits if one.offset >= apart]
            latest_us = max((one.instant_us for one in commits), default=0)
            if latest_us > own_us:
                raise TargetUnreachable(
                    f"branches {segment.branch} and {self.branch} both go on: which one is meant?",
                    detail=f"Branch {segment.branch} has commits of {instant_text(latest_us)} that are not on"
                    f" the way to branch {self.branch}, whose last one is of {instant_text(own_us)}.",
                    hints=[
                        f"--branch {segment.branch} or --branch {self.branch} says which",
                        "was a restored copy captured or backed up into the repository of its source?",
                    ],
                )

    def stretch_of(self, position: Position) -> Stretch | None:
        """The stretch of the path that `position` lies on; None: it is not on the path."""
        for branch, begin, end in self.path:
            if branch == position.branch and (end is None or position.offset <= end):
                return (branch, begin, end)
        return None

    def _backup(self, backup_id: str) -> BackupSummary:
        for one in self.history.backups:
            if one.backup_id == backup_id:
                return one
        if backup_id in self.history.unreadable:
            raise IntegrityError(
                f"manifest of backup {backup_id!r} is damaged",
                hints=["another backup may lead to the same state: leave --backup out", "`cloudsave verify`"],
            )
        raise UnknownBackup(
            f"backup {backup_id!r} is not in the repository", hints=["`cloudsave list` shows the backups"]
        )

    def _backups_on_path(self) -> list[BackupSummary]:
        """Backups whose start and stop lie on the path, the newest stop first."""
        chosen = self.target.backup_id
        pool = (self._backup(chosen),) if chosen is not None else self.history.backups
        usable = [one for one in pool if self.stretch_of(one.stop) and self.stretch_of(one.start)]
        if not usable:
            detail = f"No backup lies on the way to branch {self.branch}."
            if chosen is not None:
                detail = f"Backup {chosen!r} is not on the way to branch {self.branch}."
            raise TargetUnreachable(
                "no backup leads to the target", detail=detail, hints=["choose a branch with --branch"]
            )
        return sorted(usable, key=lambda one: (one.stop.offset, one.start.offset), reverse=True)

    def log_from(self, backup: BackupSummary) -> LogPath:
        """The durable log from the log file in which `backup` starts on: servers read whole files."""
        start = backup.log_begin
        if start not in self._log_paths:
            self._log_paths[start] = LogPath(self.ledger, self.path, first=start, indexes=self.indexes)
        return self._log_paths[start]

    def covered(self) -> Iterator[tuple[BackupSummary, LogPath]]:
        """Backups that can be made consistent from durable log, the newest first."""
        for backup in self.backups:
            log = self.log_from(backup)
            if log.end >= backup.stop.offset:
                yield backup, log

    def earliest_us(self, backup: BackupSummary, log: LogPath) -> int:
        """
        The earliest time that a restore from this backup can stand for: not before any commit that it
        contains, those before its start included, and so not before the source's clock when it had begun.
        """
        return max(log.latest_instant(backup.start.offset, backup.stop.offset), backup.started_us)

    def complete_until_us(self, backup: BackupSummary, log: LogPath) -> int:
        """
        An instant such that every commit acknowledged before it is in this log, or in this backup which it
        completes; 0 where unknown.
        """
        return max(log.complete_until_us(), backup.complete_until_us)

    def ranges(self) -> tuple[RecoverableRange, ...]:
        """All recoverable ranges of the path, oldest first."""
        runs: dict[int, list[tuple[BackupSummary, LogPath]]] = {}
        for backup, log in self.covered():
            runs.setdefault(log.end, []).append((backup, log))
        found = []
        for _, run in sorted(runs.items()):
            backup, log = min(run, key=lambda pair: pair[0].stop.offset)
            end = max(log.tail().end, backup.stop.offset)
            # By the newest backup, which a time is planned from first: where the source's clock was set back
            # meanwhile, older log has later instants, which its clock has yet to reach again.
            begin_us, end_us = min(self.earliest_us(*pair) for pair in run), self.complete_until_us(*run[0])
            found.append(
                RecoverableRange(
                    branch=self.branch,
                    begin=self.position(backup.stop.offset),
                    end=self.position(end),
                    begin_us=begin_us if begin_us <= end_us else 0,
                    end_us=end_us if begin_us <= end_us else 0,
                    backups=tuple(one.backup_id for one, _ in reversed(run)),
                )
            )
        return tuple(found)

    def refuse(
        self, message: str, *, offset: int | None = None, instant_us: int | None = None
    ) -> TargetUnreachable:
        """The refusal of a target at `offset` or `instant_us`, with the nearest reachable points."""
        before, after = None, None
        for one in self.ranges():
            if (instant_us is not None and one.end_us <= instant_us) or (
                offset is not None and one.end.offset <= offset
            ):
                before = one
            starts_later = (instant_us is not None and one.begin_us > instant_us) or (
                offset is not None and one.begin.offset > offset
            )
            if starts_later and after is None:
                after = one
        nearest_before = self._point(before.end, before.end_us) if before else None
        nearest_after = self._point(after.begin, after.begin_us) if after else None
        return TargetUnreachable(
            message,
            detail=self._why(before, after),
            hints=_nearest_hints(nearest_before, nearest_after) or self._range_hints(),
            before=nearest_before,
            after=nearest_after,
        )

    def _why(self, before: RecoverableRange | None, after: RecoverableRange | None) -> str:
        first = before.end.offset if before else 0
        last = after.begin.offset if after else None
        for hole in self.history.holes:
            if hole.last > first and (last is None or hole.first < last) and self._on_path(hole.branch):
                span = f"{self.text(hole.first)} to {self.text(hole.last)}"
                return f"The log has a hole from {span}: {hole.cause}."
        if before is None and after is not None:
            return f"It lies before the end of the oldest backup that can be used, {after.backups[0]!r}."
        if before is not None and after is None:
            beyond = max(self.ledger.furthest(branch) for branch, _, _ in self.path) > before.end.offset
            missing = (
                " Log from there on is missing, and later log cannot be used without it." if beyond else ""
            )
            return f"It lies after the end of the durable log, {self.text(before.end.offset)}.{missing}"
        if before is not None:
            return f"The log that follows {self.text(before.end.offset)} is missing."
        return f"Branch {self.branch} was searched."

    def _on_path(self, branch: str) -> bool:
        return any(step == branch for step, _, _ in self.path)

    def _range_hints(self) -> list[str]:
        return [
            f"reachable: {self.text(one.begin.offset)} to {self.text(one.end.offset)},"
            f" {instant_text(one.begin_us)} to {instant_text(one.end_us)}"
            for one in self.ranges()
        ] or ["`cloudsave ranges NAME` shows what can be restored"]

    def _point(self, position: Position, instant_us: int) -> ReachablePoint:
        instant = instant_from_us(instant_us) if instant_us else None
        return ReachablePoint(self.history.position_text(position), instant)

    def position(self, offset: int) -> Position:
        """An offset of the path with the branch that it lies on."""
        for branch, begin, end in self.path:
            if begin <= offset and (end is None or offset < end):
                return Position(branch, offset)
        return Position(self.branch, offset)

    def text(self, offset: int) -> str:
        """An offset of the path in the engine's text form."""
        return self.history.position_text(self.position(offset))


def instant_text(instant_us: int) -> str:
    """An instant for people, UTC."""
    if not instant_us:
        return "an unknown instant"
    return instant_from_us(instant_us).isoformat(sep=" ", timespec="microseconds").replace("+00:00", " UTC")


def _nearest_hints(before: ReachablePoint | None, after: ReachablePoint | None) -> list[str]:
    hints = []
    for side, point in (("before", before), ("after", after)):
        if point is not None:
            at = f" ({point.instant.isoformat()})" if point.instant else ""
            hints.append(f"the nearest reachable state {side} it is {point.position}{at}")
    return hints
