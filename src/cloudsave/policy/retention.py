"""
Which backups stay, and why each. Pure.

Rules, and what each guards against:
- A backup counts only where it can be restored: five broken ones do not make "the newest five".
- Every line of history that lives keeps the newest backup that it can be restored from, whatever the rules
  say. A line lives when it is the one that a restore follows unasked, when it has the latest commit or
  backup, or when it reaches into the window.
- The window begins so many days before the newest instant that is stored, or before now if that is earlier:
  where backups have stopped nothing runs out, and one clock that is wrong expires nothing.
- Of a page that is damaged in a backup that stays, the last undamaged copy before it stays, with the log.
- What cannot be restored now stays for as long as it would if it could: the reason may pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, tzinfo

from cloudsave.model.history import Ancestry
from cloudsave.model.ledger import Stretch
from cloudsave.model.log import LogSegment, instant_from_us
from cloudsave.model.position import Position
from cloudsave.model.retention import Page, RetentionRules, StoredBackup, Verdict

US_PER_DAY = 86400 * 1_000_000
PAGES_NAMED_MAX = 3
"""Limit: damaged pages that a reason names."""


@dataclass(frozen=True, slots=True)
class RetentionHistory:
    """All that is stored of one lineage, in any order."""

    backups: tuple[StoredBackup, ...]
    segments: tuple[LogSegment, ...]
    ancestry: Ancestry
    now_us: int
    zone: tzinfo
    """Where days begin."""


@dataclass(frozen=True, slots=True)
class Decision:
    """The verdicts, oldest backup first, and the lines of history that live."""

    verdicts: tuple[Verdict, ...]
    living: frozenset[str]
    """Branches."""
    window_begin_us: int | None


def reaches(ancestry: Ancestry, position: Position, branch: str) -> bool:
    """Whether `position` is in the past of `branch`'s end."""
    return any(
        position.branch == name and (end is None or position.offset <= end)
        for name, _, end in ancestry.lineage_of(branch)
    )


def decide(rules: RetentionRules, history: RetentionHistory) -> Decision:
    """Apply `rules`. Every backup gets at least one reason."""
    run = _Run(rules, history)
    if not rules.any:
        run.keep(run.backups, "no retention policy is configured", with_log=True)
        return run.decision()
    run.newest_of_lines()
    run.window()
    run.last()
    run.periods()
    run.proved()
    run.held_and_built_on()
    run.last_good_pages()
    return run.decision()


@dataclass(slots=True)
class _Kept:
    reasons: list[str] = field(default_factory=list)
    with_log: bool = False


class _Run:
    def __init__(self, rules: RetentionRules, history: RetentionHistory) -> None:
        self._rules = rules
        self._history = history
        self.backups = sorted(history.backups, key=lambda one: (one.finished_us, one.backup_id))
        self._usable = [one for one in self.backups if not one.trouble]
        self._kept: dict[str, _Kept] = {}
        self._latest_us = self._latest_by_branch()
        self._begin_us = self._window_begin()
        self._living = self._living_branches()

    def _latest_by_branch(self) -> dict[str, int]:
        """The latest instant that is stored of each branch itself."""
        latest: dict[str, int] = {}
        stored = [(one.branch, one.commit_last_us) for one in self._history.segments]
        for branch, instant_us in stored + [(one.stop.branch, one.finished_us) for one in self.backups]:
            latest[branch] = max(latest.get(branch, 0), instant_us)
        return latest

    def _window_begin(self) -> int | None:
        if not self._rules.days:
            return None
        newest = max(self._latest_us.values(), default=0)
        return min(self._history.now_us, newest) - int(self._rules.days * US_PER_DAY)

    def _living_branches(self) -> frozenset[str]:
        # Where no backup leads there is nothing to keep, and nothing that could stand for a line that lives.
        latest = {branch: us for branch, us in self._latest_us.items() if self._on_line(branch)}
        if not latest:
            return frozenset()
        living = {max(latest), max(latest, key=lambda branch: (latest[branch], branch))}
        if self._begin_us is not None:
            living |= {branch for branch, instant_us in latest.items() if instant_us >= self._begin_us}
        return frozenset(living)

    def keep(self, backups: Iterable[StoredBackup], reason: str, *, with_log: bool = False) -> None:
        """One more reason for each."""
        for one in backups:
            kept = self._kept.setdefault(one.backup_id, _Kept())
            kept.reasons.append(reason)
            kept.with_log = kept.with_log or with_log

    def _on_line(self, branch: str) -> list[StoredBackup]:
        """Backups that the state of `branch` can be reached from, by their place on its line."""
        ancestry = self._history.ancestry
        found = [
            one
            for one in self._usable
            if reaches(ancestry, one.stop, branch) and reaches(ancestry, one.start, branch)
        ]
        return sorted(found, key=lambda one: (one.stop.offset, one.start.offset))

    def newest_of_lines(self) -> None:
        """What the latest state is restored from."""
        for branch in sorted(self._living):
            self.keep(self._on_line(branch)[-1:], f"the newest of branch {branch}", with_log=True)

    def window(self) -> None:
        """All backups in the window, and on each line the one that its begin is reached from."""
        begin_us = self._begin_us
        if begin_us is None:
            return
        days = f"{self._rules.days:g} days"
        inside = [one for one in self.backups if one.reached_us > begin_us]
        self.keep(inside, f"in the window of {days}", with_log=True)
        for branch in sorted(self._living):
            before = [one for one in self._on_line(branch) if one.reached_us <= begin_us]
            self.keep(before[-1:], f"the begin of the window of {days} is reached from it", with_log=True)

    def last(self) -> None:
        """The newest ones."""
        count = self._rules.last
        if count:
            self.keep(self._usable[-count:], f"among the newest {count}", with_log=True)

    def periods(self) -> None:
        """The newest of each of the last hours, days, weeks, months and years that have one."""
        for count, name, period_of in (
            (self._rules.hourly, "hour", _hour),
            (self._rules.daily, "day", _day),
            (self._rules.weekly, "week", _week),
            (self._rules.monthly, "month", _month),
            (self._rules.yearly, "year", _year),
        ):
            newest = self._newest_of_periods(period_of)
            for period in sorted(newest)[-count:] if count else []:
                self.keep([newest[period]], f"the newest of {name} {period}")

    def _newest_of_periods(self, period_of: Callable[[datetime], str]) -> dict[str, StoredBackup]:
        zone = self._history.zone
        instants = ((instant_from_us(one.finished_us).astimezone(zone), one) for one in self._usable)
        return {period_of(instant): one for instant, one in instants}

    def proved(self) -> None:
        """The newest that a drill has restored."""
        count = self._rules.proved
        if count:
            proved = [one for one in self._usable if one.proved][-count:]
            self.keep(proved, f"among the newest {count} that are proved")

    def held_and_built_on(self) -> None:
        """What somebody asked for, and what is needed right now."""
        for one in self.backups:
            for hold in one.holds:
                self.keep([one], f"held: {hold}")
            for child in one.children:
                self.keep([one], f"unfinished backup {child} builds on it", with_log=True)

    def last_good_pages(self) -> None:
        """The last undamaged copy of each page that is damaged in what stays; until nothing is added."""
        done: set[str] = set()
        while more := [one for one in self.backups if one.backup_id in self._kept.keys() - done]:
            for damaged in more:
                done.add(damaged.backup_id)
                for source, pages in self._copies_before(damaged).items():
                    shown = ", ".join(f"{path}:{block}" for path, block in sorted(pages)[:PAGES_NAMED_MAX])
                    reason = f"has the last undamaged copy of {len(pages)} pages before"
                    rest = " ..." if len(pages) > PAGES_NAMED_MAX else ""
                    text = f"{reason} {damaged.backup_id}: {shown}{rest}"
                    self.keep([self._named(source)], text, with_log=True)

    def _copies_before(self, damaged: StoredBackup) -> dict[str, list[Page]]:
        """For each damaged page the newest backup before that has it, best one that checked it."""
        before = [
            one
            for one in self._on_line(damaged.stop.branch)
            if one.stop.offset < damaged.stop.offset and one is not damaged
        ]
        found: dict[str, list[Page]] = {}
        for page in damaged.corrupt:
            holders = [one for one in before if page in one.good]
            checked = [one for one in holders if one.good[page]]
            for best in (checked or holders)[-1:]:
                found.setdefault(best.backup_id, []).append(page)
        return found

    def _named(self, backup_id: str) -> StoredBackup:
        return next(one for one in self.backups if one.backup_id == backup_id)

    def decision(self) -> Decision:
        """A verdict on each; what nothing keeps may go once something that can be restored stays."""
        if not any(one.backup_id in self._kept for one in self._usable):
            self.keep(self.backups, "nothing that stays could be restored", with_log=True)
        verdicts = []
        for one in self.backups:
            kept = self._kept.get(one.backup_id)
            if kept is not None:
                verdicts.append(
                    Verdict(one.backup_id, keep=True, with_log=kept.with_log, reasons=tuple(kept.reasons))
                )
            else:
                verdicts.append(
                    Verdict(one.backup_id, keep=False, with_log=False, reasons=self._why_not(one))
                )
        return Decision(tuple(verdicts), self._living, self._begin_us)

    def _why_not(self, one: StoredBackup) -> tuple[str, ...]:
        reasons = []
        if one.trouble:
            reasons.append(f"it cannot be restored: {one.trouble}")
        if self._begin_us is not None:
            begin = instant_from_us(self._begin_us).isoformat(timespec="seconds")
            reasons.append(f"before the window, which begins {begin}")
        if self._rules.last and not one.trouble:
            reasons.append(f"not among the newest {self._rules.last}")
        if self._has_periods() and not one.trouble:
            reasons.append("a newer one stands for its periods, or they are past")
        return tuple(reasons) or ("no rule keeps it",)

    def _has_periods(self) -> bool:
        rules = self._rules
        return bool(rules.hourly or rules.daily or rules.weekly or rules.monthly or rules.yearly)


# ---- names of periods, which sort by time


def _hour(instant: datetime) -> str:
    # The offset tells the two hours apart that share a name when clocks are put back.
    return instant.strftime("%Y-%m-%d %H:00") + f" {instant.strftime('%z')}"


def _day(instant: datetime) -> str:
    return instant.strftime("%Y-%m-%d")


def _week(instant: datetime) -> str:
    year, week, _ = instant.isocalendar()
    return f"{year}-W{week:02d}"


def _month(instant: datetime) -> str:
    return instant.strftime("%Y-%m")


def _year(instant: datetime) -> str:
    return instant.strftime("%Y")


# ---- log


def decide_log(history: RetentionHistory, decision: Decision, *, first_branch: str) -> tuple[LogSegment, ...]:
    """
    Which stretches of log no backup that stays needs, and no moment that was promised; the oldest first.

    A stretch stays: where it holds log that makes a kept backup consistent; where it lies after the start of
    a kept backup `with_log` on any line of history through that backup; on branches whose ancestry is not
    known; and on branches that no kept backup leads to, and that have anything later than the oldest kept
    one: a backup may be on its way.
    """
    ancestry = history.ancestry
    by_id = {one.backup_id: one for one in history.backups}
    kept = [(by_id[verdict.backup_id], verdict.with_log) for verdict in decision.verdicts if verdict.keep]
    needs = [(ancestry.lineage_of(one.stop.branch), one.log_begin, one.stop.offset) for one, _ in kept]
    branches = {one.branch for one in history.segments}
    since = {
        branch: min(
            (one.log_begin for one, with_log in kept if with_log and reaches(ancestry, one.stop, branch)),
            default=None,
        )
        for branch in branches
    }
    known = set(ancestry.ancestors) | {first_branch}
    oldest_us = min((one.finished_us for one, _ in kept), default=0)
    later = {one.branch for one in history.segments if one.commit_last_us >= oldest_us}

    def needed(segment: LogSegment) -> bool:
        branch = segment.branch
        begin = since[branch]
        if branch not in known or (begin is None and branch in later):
            return True
        if begin is not None and segment.last > begin:
            return True
        return any(_touches(segment, *need) for need in needs)

    unneeded = [one for one in history.segments if not needed(one)]
    return tuple(sorted(unneeded, key=lambda one: (one.branch, one.first, one.last)))


def _touches(segment: LogSegment, path: Sequence[Stretch], first: int, last: int) -> bool:
    """
    Whether a stretch holds log of [first, last] of `path`, or what follows at once. A branch's first log file
    repeats what is before it, so that where the branch begins does not count.
    """
    on_path = any(name == segment.branch for name, _, _ in path)
    return on_path and segment.last > first and segment.first <= last
