"""
Which log files a server may lose. Pure.

A file goes only when all of it is durable in the repository, byte for byte as long as on the server; when it
ended longer ago than the keep time; and when no reader needs it. Since servers remove from the oldest on,
a file that stays keeps all that follow it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cloudsave.model.held_log import HeldFile, HeldLog
from cloudsave.model.ledger import Ledger
from cloudsave.model.log import LogHole, LogSegment

_SECOND_US = 1_000_000


@dataclass(frozen=True, slots=True)
class StoredLog:
    """What the repository holds of a server's branch. It was listed before the server was looked at."""

    segments: Sequence[LogSegment]
    holes: Sequence[LogHole]
    paddings: Mapping[int, frozenset[int]]
    """Where a file's place in the log ends: how many of its last bytes the stored copies say it has not."""


@dataclass(frozen=True, slots=True)
class FileVerdict:
    """Whether a file may go, and why. `blocked`: it stays by something that a person should look at."""

    file: HeldFile
    remove: bool
    reason: str
    blocked: bool = False
    ended_us: int = 0
    """No later than this the file was full, microseconds since 1970 by the source's clock; 0: not known."""


def decide(held: HeldLog, stored: StoredLog, *, keep_seconds: float) -> tuple[FileVerdict, ...]:
    """The verdict for each file, oldest first."""
    ledger = Ledger(stored.segments)
    verdicts: list[FileVerdict] = []
    for number, file in enumerate(held.files):
        if verdicts and not verdicts[-1].remove:
            verdicts.append(FileVerdict(file, remove=False, reason="an older file stays"))
        elif number == len(held.files) - 1:
            verdicts.append(FileVerdict(file, remove=False, reason="the server writes it"))
        else:
            verdicts.append(_verdict(held, stored, ledger, file, keep_seconds))
    return tuple(verdicts)


def _verdict(
    held: HeldLog, stored: StoredLog, ledger: Ledger, file: HeldFile, keep_seconds: float
) -> FileVerdict:
    ended_us = _ended_us(stored, file)
    obstacle = (
        _not_captured(held)
        or _put_back(held, ledger)
        or _not_stored(held, stored, ledger, file)
        or _too_young(held, ended_us, keep_seconds)
        or _needed(held, file)
    )
    if obstacle is None:
        return FileVerdict(file, remove=True, reason="stored, and read by all", ended_us=ended_us)
    reason, blocked = obstacle
    return FileVerdict(file, remove=False, reason=reason, blocked=blocked, ended_us=ended_us)


_Obstacle = tuple[str, bool] | None
"""A reason to keep a file, and whether a person should look at it."""


def _not_captured(held: HeldLog) -> _Obstacle:
    return None if held.captured else ("no capture of this source runs", True)


def _put_back(held: HeldLog, ledger: Ledger) -> _Obstacle:
    """Files of a server that was reset bear the names, and may have the sizes, of those that are stored."""
    newest = held.files[-1]
    if newest.first + newest.size_bytes < ledger.furthest(held.branch):
        return "the server has less log than is stored of it: was its binlog reset?", True
    return None


def _not_stored(held: HeldLog, stored: StoredLog, ledger: Ledger, file: HeldFile) -> _Obstacle:
    reach, removed = file.first, False
    while reach < file.last:
        durable = ledger.frontier(held.branch, reach)
        if durable > reach:
            reach = durable
            continue
        expired = [
            hole.last
            for hole in stored.holes
            if hole.expired and hole.branch == held.branch and hole.first <= reach < hole.last
        ]
        if not expired:
            return _missing(held, ledger, file)
        reach, removed = max(expired), True
    sizes = {file.last - file.first - padding for padding in stored.paddings.get(file.last, frozenset())}
    if sizes <= {file.size_bytes} and (sizes or removed):
        return None
    shown = " or ".join(str(size) for size in sorted(sizes)) or "an unknown number of"
    return f"the repository has {shown} bytes of it, the server {file.size_bytes}", True


def _missing(held: HeldLog, ledger: Ledger, file: HeldFile) -> _Obstacle:
    if ledger.furthest(held.branch) < file.last:
        return "capture is not through it yet", False
    if file.last <= ledger.ranges(held.branch)[0][0]:
        return "written before capture began: remove it by hand, or leave it to the server's expiry", True
    return "not all of it is stored, and never will be", True


def _too_young(held: HeldLog, ended_us: int, keep_seconds: float) -> _Obstacle:
    if not ended_us:
        return "no commit follows it yet, to tell how old it is", False
    age_seconds = (held.clock_us - ended_us) / _SECOND_US
    if age_seconds < keep_seconds:
        return "younger than the keep time", False
    return None


def _needed(held: HeldLog, file: HeldFile) -> _Obstacle:
    for reader in held.readers:
        if reader.needs_from is None:
            return f"replica {reader.name} may need it: {reader.trouble}", True
        if reader.needs_from < file.last:
            return f"replica {reader.name} has not applied all of it", True
    if held.strangers:
        return f"somebody reads the log whom no --replica names: {', '.join(held.strangers)}", True
    return None


def _ended_us(stored: StoredLog, file: HeldFile) -> int:
    """
    The latest commit in the file and in the first stored stretch behind it that has one; 0 where none has.
    """
    behind = [one for one in stored.segments if one.first >= file.last and one.commit_last_us]
    if not behind:
        return 0
    following = min(behind, key=lambda one: one.first)
    inside = [one.commit_last_us for one in stored.segments if file.first <= one.first < file.last]
    return max(following.commit_last_us, *inside, 0)


def growth(verdicts: Sequence[FileVerdict]) -> float | None:
    """Bytes of log per second, between the ends of the oldest and the newest file that have one."""
    ended = [one for one in verdicts if one.ended_us]
    if len(ended) < 2 or ended[-1].ended_us <= ended[0].ended_us:
        return None
    size = sum(one.file.size_bytes for one in ended[1:])
    return size / ((ended[-1].ended_us - ended[0].ended_us) / _SECOND_US)
