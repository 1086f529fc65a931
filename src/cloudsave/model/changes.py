"""
What the log says of changed blocks: of one stretch, and the union over all stretches since a backup.

A block is named by the object that holds it, which is three numbers (of PostgreSQL: tablespace, database,
relation), and by its number in that object. ANY in place of one of the three stands for all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

ANY = 0xFFFFFFFF
CHANGE_BLOCK, CHANGE_FROM = 1, 2
CHANGE_TYPE = np.dtype(
    [("space", "<u4"), ("database", "<u4"), ("object", "<u4"), ("block", "<u4"), ("kind", "<u4")]
)
"""One changed block (kind 1), or all blocks of an object from `block` on (kind 2)."""
Change = tuple[int, int, int, int, int]
ObjectKey = tuple[int, int, int]
EVERYTHING: Change = (ANY, ANY, ANY, 0, CHANGE_FROM)

SPAN_BLOCKS = 1 << 17
"""Changed blocks of an object are kept as one byte each in spans of so many blocks."""
SPANS_MAX = 4096
"""Limit: spans kept (512 MiB for changes all over 4 TiB); with more, everything counts as changed."""


def sorted_changes(rows: npt.NDArray[np.void]) -> npt.NDArray[np.void]:
    """Each change once, by kind, space, database, object, block."""
    parts, left = [], rows
    while len(left):
        # One database after the other, since there are few: sorting one column is ten times as fast as five.
        first = left[0]
        mine = (
            (left["database"] == first["database"])
            & (left["kind"] == first["kind"])
            & (left["space"] == first["space"])
        )
        low = left["object"][mine].astype(np.uint64) << np.uint64(32) | left["block"][mine]
        low.sort()
        low = low[np.concatenate(([True], low[1:] != low[:-1]))]
        part = np.empty(len(low), CHANGE_TYPE)
        for name in ("kind", "space", "database"):
            part[name] = first[name]
        part["object"], part["block"] = low >> np.uint64(32), low & np.uint64(ANY)
        parts.append((tuple(int(first[name]) for name in ("kind", "space", "database")), part))
        left = left[~mine]
    parts.sort(key=lambda one: one[0])
    return np.concatenate([part for _, part in parts]) if parts else np.empty(0, CHANGE_TYPE)


def groups_of(rows: npt.NDArray[np.void]) -> Iterator[tuple[ObjectKey, int, npt.NDArray[np.uint32]]]:
    """(object, kind, blocks) of sorted changes."""
    if not len(rows):
        return
    new = np.zeros(len(rows) - 1, bool)
    for name in ("kind", "space", "database", "object"):
        new |= rows[name][1:] != rows[name][:-1]
    for part in np.split(rows, np.flatnonzero(new) + 1):
        space, database, number, _, kind = part[0].tolist()
        yield (space, database, number), kind, part["block"]


@dataclass(frozen=True, slots=True, eq=False)
class LogChanges:
    """
    What a stretch of log changes: all records that begin at `seen_from` or later and end in the stretch.

    `rows` are CHANGE_TYPE, in the order of `sorted_changes`.
    """

    seen_from: int
    rows: npt.NDArray[np.void]

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, LogChanges)
            and self.seen_from == other.seen_from
            and np.array_equal(self.rows, other.rows)
        )

    def __hash__(self) -> int:
        return hash((self.seen_from, self.rows.tobytes()))


@dataclass(frozen=True, slots=True)
class StorageKey:
    """How the log names the blocks of a file: the object, and the number in it of the file's first block."""

    object: ObjectKey
    first_block: int


class ChangedBlocks:
    """The union of changes. Lookups are pure."""

    def __init__(self) -> None:
        self._spans: dict[tuple[ObjectKey, int], npt.NDArray[np.bool_]] = {}
        self._limits: dict[ObjectKey, int] = {}
        self._patterns: set[ObjectKey] = set()
        """Objects all of whose blocks are changed, with ANY in them."""

    def add(self, rows: npt.NDArray[np.void]) -> None:
        """Take in sorted changes."""
        for key, kind, blocks in groups_of(rows):
            if kind == CHANGE_BLOCK:
                self._add_blocks(key, blocks)
            elif ANY in key:
                self._patterns.add(key)
            else:
                self._limits[key] = min(int(blocks[0]), self._limits.get(key, ANY))

    def unchanged(self, key: StorageKey, count: int) -> npt.NDArray[np.bool_]:
        """Which of the first `count` blocks of a file the log leaves alone."""
        mask = np.ones(count, bool)
        if self._is_changed_whole(key.object):
            mask[:] = False
            return mask
        limit = self._limits.get(key.object)
        if limit is not None:
            mask[max(0, limit - key.first_block) :] = False
        last = key.first_block + count
        for span in range(key.first_block // SPAN_BLOCKS, -(-last // SPAN_BLOCKS)):
            changed = self._spans.get((key.object, span))
            if changed is None:
                continue
            begin, end = max(key.first_block, span * SPAN_BLOCKS), min(last, (span + 1) * SPAN_BLOCKS)
            within = slice(begin - span * SPAN_BLOCKS, end - span * SPAN_BLOCKS)
            mask[begin - key.first_block : end - key.first_block] &= ~changed[within]
        return mask

    @property
    def everything(self) -> bool:
        """Nothing can be told: all blocks count as changed."""
        return (ANY, ANY, ANY) in self._patterns

    def _is_changed_whole(self, key: ObjectKey) -> bool:
        return any(
            all(wanted in (ANY, mine) for wanted, mine in zip(pattern, key, strict=True))
            for pattern in self._patterns
        )

    def _add_blocks(self, key: ObjectKey, blocks: npt.NDArray[np.uint32]) -> None:
        spans = blocks // SPAN_BLOCKS
        for span in np.unique(spans).tolist():
            changed = self._spans.get((key, span))
            if changed is None:
                if len(self._spans) == SPANS_MAX:
                    self._patterns.add((ANY, ANY, ANY))
                    self._spans.clear()
                    return
                changed = self._spans[key, span] = np.zeros(SPAN_BLOCKS, bool)
            changed[blocks[spans == span] % SPAN_BLOCKS] = True
