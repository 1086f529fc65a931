"""
Which blocks changed since the parent backup, by the log that was captured, or else by the source's own
summaries of its log: so that the others are not read.

Why a block that no record of [parent's start, this start) names may be taken from the parent: replay of the
parent begins at its start, so everything older was on the disk when it was read; everything that changed it
since, before this backup began, is named; and what changes it after this start is repaired by replay, as in
any backup. What is never logged stays as the parent has it: hint bits, which the server sets again.
Where any of that is in doubt the blocks are read and compared, and the manifest says why.

Invariant: a share of the blocks that count as unchanged is read all the same, another one with each backup.
One that differs by more than what is never logged ends the backup; it is made anew by comparing everything.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cloudsave.engines.dialect_api import Dialect
from cloudsave.errors import EngineError, IntegrityError, ObjectMissing
from cloudsave.model.changes import ChangedBlocks
from cloudsave.model.history import Ancestry
from cloudsave.model.identity import SourceIdentity
from cloudsave.model.item import Item
from cloudsave.model.ledger import Extent, Ledger, Stretch, read_extents
from cloudsave.model.log import LogIndex
from cloudsave.model.manifest import Manifest, Rung
from cloudsave.model.position import Position
from cloudsave.repository.lineage import Lineage

PROVED_SHARE = 16
"""One of so many stretches is read although nothing in it is said to have changed."""
PROVED_STRETCH_BLOCKS = 512
"""Blocks of such a stretch (4 MiB)."""
STORED_LOOKED_AT_MAX = 1024
"""Limit: blocks that differ and are compared with what is stored; the others are judged by themselves."""
DEVIATIONS_MAX = 1000
"""Limit: files named in a manifest as read whole."""


class MapContradicted(Exception):
    """A block has changed of which the log knows nothing."""

    def __init__(self, path: str, block: int, detail: str) -> None:
        super().__init__(path, block, detail)
        self.alarm = (
            f"ALARM: page {block} of {path} differs from the parent backup although the log names no change"
            f" ({detail}); everything was read and compared instead"
        )


class MapRefused(Exception):
    """What changed cannot be told from the log; the text says why."""


@dataclass(frozen=True, slots=True)
class ChangeQuestion:
    """What changed between a parent and a backup that has begun?"""

    parent: Manifest
    identity: SourceIdentity
    start: Position
    lineage: Lineage
    dialect: Dialect
    told: Callable[[Position, int], Iterable[npt.NDArray[np.void]]] | None = None
    """See `BackupStart.changes_told`."""


@dataclass(frozen=True, slots=True)
class ChangesTold:
    """What has changed, who tells it, and why nobody better."""

    changed: ChangedBlocks
    rung: Rung
    reason: str


def changes_since(question: ChangeQuestion) -> ChangesTold:
    """
    The blocks that the log of [parent's start, `start`) names; that log is durable as far as it ever will be.
    Where it does not tell, the source itself is asked if it can.

    Raises: MapRefused; StoreError.
    """
    parent = question.parent
    if question.identity.page_checksums and not parent.page_checksums:
        raise MapRefused("page checksums were switched on since the parent")
    path = _path_to(question)
    _see_that_parent_is_before(parent, path, question.start)
    try:
        return ChangesTold(_by_log(question, path), Rung.LOG, "")
    except MapRefused as refusal:
        return ChangesTold(_by_source(question, path, str(refusal)), Rung.SUMMARIES, str(refusal))


@contextmanager
def _unreadable_refused() -> Iterator[None]:
    """Stored log, or its history, that is damaged or gone tells nothing."""
    try:
        yield
    except (IntegrityError, ObjectMissing) as error:
        raise MapRefused(f"the stored log cannot be read: {error.message}") from error


def _path_to(question: ChangeQuestion) -> tuple[Stretch, ...]:
    with _unreadable_refused():
        histories = question.lineage.histories()
        ancestry = Ancestry({b: question.dialect.parse_history(raw) for b, raw in histories.items()})
        return ancestry.lineage_of(question.start.branch)


def _by_log(question: ChangeQuestion, path: tuple[Stretch, ...]) -> ChangedBlocks:
    lineage, parent = question.lineage, question.parent
    with _unreadable_refused():
        cover = Ledger(lineage.logs()).cover(path, parent.start.offset, question.start.offset)
        if not cover.complete:
            raise MapRefused(
                f"log of branch {cover.branch} from"
                f" {question.dialect.format_position(Position(cover.branch, cover.end))} on is not stored"
            )
        changed = _Collector(question, cover.extents).collect()
    if changed.everything:
        raise MapRefused("the log has records that may have changed anything, such as a minimal wal_level")
    return changed


def _by_source(question: ChangeQuestion, path: tuple[Stretch, ...], refusal: str) -> ChangedBlocks:
    """What the source's own summaries tell. Raises: MapRefused, with `refusal` where they cannot be asked."""
    first, (branch, branch_begin, _) = question.parent.start, path[-1]
    if question.told is None or not first.branch == question.parent.stop.branch == branch:
        raise MapRefused(refusal)
    union = ChangedBlocks()
    try:
        for rows in question.told(first, branch_begin):
            union.add(rows)
    except EngineError as error:
        raise MapRefused(f"{refusal}; {error.message}") from error
    if union.everything:
        raise MapRefused(f"{refusal}; the source's summaries name too much")
    return union


def _see_that_parent_is_before(parent: Manifest, path: tuple[Stretch, ...], start: Position) -> None:
    """
    The parent's pages hold changes up to its stop. They must all belong to this history, and none may be
    younger than this start. Raises: MapRefused.
    """
    for branch, _, end in path:
        if branch == parent.stop.branch and (end is None or parent.stop.offset <= end):
            if parent.stop.offset <= start.offset:
                return
            raise MapRefused("the parent ends after this backup's start")
    raise MapRefused(f"the parent ends on branch {parent.stop.branch}, off the history of this server")


class _Collector:
    """Goes along stored log that touches, and sees that no record is left out."""

    def __init__(self, question: ChangeQuestion, extents: tuple[Extent, ...]) -> None:
        self._question = question
        self._extents = extents
        self._at = question.parent.start.offset
        """All records that begin before this offset are accounted for; a record boundary."""

    def collect(self) -> ChangedBlocks:
        """The union. Raises: IntegrityError, ObjectMissing, StoreError."""
        union = ChangedBlocks()
        for number, extent in enumerate(self._extents):
            index = self._question.lineage.log_index(extent.segment)
            if index.changes is None or index.changes.seen_from > self._at:
                index = self._walk(number)
            assert index.changes is not None
            union.add(index.changes.rows)
            self._at = max(self._at, min(index.records_end, extent.last))
        return union

    def _walk(self, number: int) -> LogIndex:
        """Read the log itself, from the first record that is not accounted for to the end of an extent."""
        begin, last = self._at, self._extents[number]
        parts = tuple(
            Extent(one.segment, max(begin, one.first), one.last)
            for one in self._extents[: number + 1]
            if one.last > begin
        )
        identity = self._question.identity
        indexer = self._question.dialect.indexer(
            Position(last.segment.branch, begin),
            log_file_bytes=identity.log_file_bytes,
            system_identifier=identity.system_identifier,
        )
        indexer.feed(read_extents(self._question.lineage.read_log, parts))
        return indexer.take()


class LogTrust:
    """`Trust` of a writer in what the log says. Thread-safe."""

    def __init__(
        self,
        changed: ChangedBlocks,
        parent: Manifest,
        start: Position,
        block_position: Callable[[bytes], int],
        *,
        rotation: int,
        prove_all: bool,
    ) -> None:
        """`rotation` counts up from backup to backup and says which share is proved; `prove_all`: all."""
        self._changed = changed
        self._corrupt = {(page.path, page.block) for page in parent.corrupt_pages}
        self._start = start
        self._parent_start = parent.start
        self._block_position = block_position
        self._rotation = rotation
        self._prove_all = prove_all
        self._lock = threading.Lock()
        self._looked_at = 0
        self.deviations: set[str] = set()
        """Files whose blocks may all have changed, by the log."""
        self.blocks_unlogged = 0
        """Blocks that were read and differ by what is never logged."""

    def unchanged(self, item: Item, blocks: int) -> npt.NDArray[np.bool_] | None:
        """See `Trust.unchanged`."""
        if item.storage is None:
            return None
        mask = self._changed.unchanged(item.storage, blocks)
        for path, block in self._corrupt:
            if path == item.path and 0 <= block - item.storage.first_block < blocks:
                mask[block - item.storage.first_block] = False
        if not mask.any() and blocks > 1:
            self.deviations.add(item.path)
        return mask

    def proved(self, item: Item, blocks: int) -> npt.NDArray[np.bool_]:
        """See `Trust.proved`."""
        if self._prove_all:
            return np.ones(blocks, bool)
        begin = zlib.crc32(item.path.encode("utf-8", "surrogateescape")) + self._rotation
        stretches = np.arange(begin, begin - (-blocks // PROVED_STRETCH_BLOCKS))
        return np.repeat(stretches % PROVED_SHARE == 0, PROVED_STRETCH_BLOCKS)[:blocks]

    def differs(self, item: Item, block: int, found: bytes, stored: Callable[[], bytes]) -> None:
        """See `Trust.differs`. Raises: MapContradicted."""
        position = self._block_position(found)
        if position > self._start.offset:
            return  # It changed after this backup began: replay brings it to where it belongs.
        with self._lock:
            self.blocks_unlogged += 1
            self._looked_at += 1
            compare = self._looked_at <= STORED_LOOKED_AT_MAX
        if not any(found):
            raise MapContradicted(item.path, block, "it is all zero now")
        if not compare and position <= self._parent_start.offset:
            return
        before = self._block_position(stored())
        if before != position:
            raise MapContradicted(item.path, block, f"its log position was {before:#x} and is {position:#x}")
