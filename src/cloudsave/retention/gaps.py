"""
The holes that removing log leaves between what stays, as records for capture and for people. Pure.

Without them capture, which completes what is missing from the oldest stored log on, would ask the server
for log that was removed on purpose.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cloudsave.model.history import Ancestry
from cloudsave.model.ledger import Ledger
from cloudsave.model.log import LogHole, LogSegment

CAUSE = "removed by the retention policy"


def gaps_after(
    removed: Sequence[LogSegment], left: Sequence[LogSegment], ancestry: Ancestry, known: Iterable[LogHole]
) -> list[LogHole]:
    """
    A hole for each stretch that only `removed` held, together with expired holes of before that it touches.
    On a branch of which nothing later stays it reaches to where the last other branch left it.
    """
    old, kept = Ledger(removed), Ledger(left)
    found = []
    for branch in old.branches():
        spans = [span for begin, end in old.ranges(branch) for span in _without(kept, branch, begin, end)]
        furthest, fork = max(kept.furthest(branch), old.furthest(branch)), _last_fork(ancestry, branch)
        if spans and spans[-1][1] == furthest < fork:
            spans[-1] = (spans[-1][0], fork)
        earlier = [(one.first, one.last) for one in known if one.expired and one.branch == branch]
        merged = _merged([*spans, *earlier])
        found += [
            LogHole(branch, first, last, CAUSE, expired=True)
            for first, last in merged
            if any(first <= begin < last for begin, _ in spans)
        ]
    return found


def outdated(holes: Sequence[LogHole], left: Sequence[LogSegment], ancestry: Ancestry) -> list[LogHole]:
    """
    Records of expired log that nobody asks for any more: within a longer one, or before all log that stays.
    """
    firsts: dict[str, int] = {}
    for one in left:
        firsts[one.branch] = min(firsts.get(one.branch, one.first), one.first)
    expired = [one for one in holes if one.expired]

    def needless(one: LogHole) -> bool:
        within = any(
            other.branch == one.branch
            and other.first <= one.first
            and one.last <= other.last
            and other != one
            for other in expired
        )
        line = [name for name, _, _ in ancestry.lineage_of(one.branch)]
        before = not any(firsts[name] < one.last for name in line if name in firsts)
        return within or before

    return [one for one in expired if needless(one)]


def _last_fork(ancestry: Ancestry, branch: str) -> int:
    """Where the last other branch left `branch`; 0: none did."""
    points = [point for path in ancestry.ancestors.values() for point in path]
    return max((point.end_offset for point in points if point.branch == branch), default=0)


def _without(kept: Ledger, branch: str, first: int, last: int) -> list[tuple[int, int]]:
    """[first, last) without what is kept of the branch."""
    spans = []
    for begin, end in kept.ranges(branch):
        if end <= first or begin >= last:
            continue
        if begin > first:
            spans.append((first, begin))
        first = max(first, end)
    return [*spans, *([(first, last)] if first < last else [])]


def _merged(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans that overlap or touch, as one."""
    merged: list[tuple[int, int]] = []
    for first, last in sorted(spans):
        if merged and first <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], last))
        else:
            merged.append((first, last))
    return merged
