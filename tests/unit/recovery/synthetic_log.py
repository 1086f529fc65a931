"""A synthetic log of records, its stored form, and a server that replays a plan the way PostgreSQL does."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from cloudsave.model.history import Ancestry, BranchPoint
from cloudsave.model.log import Commit, LogIndex, LogSegment, RestorePoint
from cloudsave.model.position import Position
from cloudsave.recovery.history import BackupSummary, History
from cloudsave.recovery.plan import RecoveryPlan

SECOND = 1_000_000
START_US = 1_700_000_000 * SECOND


@dataclass(frozen=True)
class Record:
    """A log record; `transaction` is 0 for what is no commit, `name` is set for restore points."""

    offset: int
    end: int
    instant_us: int = 0
    transaction: int = 0
    name: str = ""


@dataclass
class World:
    """Branches with their records, what is stored of them, and the backups."""

    records: dict[str, list[Record]] = field(default_factory=dict)
    ancestors: dict[str, tuple[BranchPoint, ...]] = field(default_factory=dict)
    segments: list[LogSegment] = field(default_factory=list)
    indexes: dict[LogSegment, LogIndex] = field(default_factory=dict)
    backups: list[BackupSummary] = field(default_factory=list)

    def path_records(self, branch: str) -> list[Record]:
        """All records of the history of `branch`, in order."""
        found: list[Record] = []
        for step, begin, end in Ancestry(self.ancestors).lineage_of(branch):
            found += [
                one for one in self.records[step] if one.offset >= begin and (end is None or one.offset < end)
            ]
        return found

    def store(self, branch: str, first: int, last: int, *, complete_until_us: int = 0) -> LogSegment:
        """Store the log [first, last) of `branch`, indexed the way capture does it."""
        inside = [one for one in self.records[branch] if first < one.end <= last]
        begins = [one.offset for one in self.records[branch] if first <= one.offset < last]
        commits = [one for one in inside if one.transaction]
        segment = LogSegment(
            branch,
            first,
            last,
            min((one.instant_us for one in commits), default=0),
            max((one.instant_us for one in commits), default=0),
            size_bytes=last - first,
        )
        self.indexes[segment] = LogIndex(
            commits=tuple(Commit(one.offset, one.end, one.instant_us, one.transaction) for one in commits),
            restore_points=tuple(
                RestorePoint(one.offset, one.end, one.instant_us, one.name) for one in inside if one.name
            ),
            record_first=begins[0] if begins else None,
            record_last=begins[-1] if begins else None,
            records_end=inside[-1].end if inside else 0,
            complete_until_us=complete_until_us,
        )
        self.segments.append(segment)
        return segment

    def backup(
        self,
        number: int,
        branch: str,
        start: int,
        stop: int,
        *,
        started_us: int = START_US,
        complete_until_us: int = 0,
    ) -> BackupSummary:
        """Take a backup."""
        summary = BackupSummary(
            f"B{number}",
            Position(branch, start),
            Position(branch, stop),
            started_us,
            started_us,
            data_bytes=1000,
            log_file_bytes=1,
            complete_until_us=complete_until_us,
        )
        self.backups.append(summary)
        return summary

    def history(self) -> History:
        """What planning sees."""
        return History(
            backups=tuple(self.backups),
            segments=tuple(self.segments),
            ancestry=Ancestry(self.ancestors),
            first_branch="1",
        )

    def __call__(self, segment: LogSegment) -> LogIndex:
        return self.indexes[segment]

    def last_record(self, segment: LogSegment, end: int) -> int | None:
        """As a reader of the log itself would answer."""
        begins = [
            one.offset for one in self.records[segment.branch] if segment.first <= one.offset < segment.last
        ]
        return max((one for one in begins if one < end), default=None)

    def begins(self, segment: LogSegment, offset: int) -> bool:
        """As a reader of the log itself would answer."""
        return any(one.offset == offset for one in self.records[segment.branch])


class ReplayFailed(Exception):
    """The server would have stopped with an error."""


def replay(world: World, plan: RecoveryPlan) -> list[Record]:
    """The records that a server applies which is given exactly the log of the plan."""
    available_end = plan.extents[-1].last if plan.extents else plan.log_begin
    cursor = plan.log_begin
    for extent in plan.extents:
        assert extent.first == cursor
        cursor = extent.last
    applied: list[Record] = []
    consistent = plan.backup.stop.offset
    end, inclusive = plan.stop.recovery_end, plan.stop.inclusive
    for record in world.path_records(plan.branch):
        if record.offset < plan.log_begin:
            continue
        if record.end > available_end:
            break
        if not inclusive and record.offset >= end:
            return _consistent(applied, consistent, plan.log_begin)
        applied.append(record)
        if inclusive and record.offset >= end:
            return _consistent(applied, consistent, plan.log_begin)
    raise ReplayFailed("recovery ended before the target")


def _consistent(applied: list[Record], consistent: int, begin: int) -> list[Record]:
    if (applied[-1].end if applied else begin) < consistent:
        raise ReplayFailed("requested stop point is before the consistent point")
    return applied


def commits_of(records: Iterable[Record]) -> list[int]:
    """The transactions among records."""
    return [one.transaction for one in records if one.transaction]
