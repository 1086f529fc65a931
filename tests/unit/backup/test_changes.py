"""When the log is trusted, and how a page that differs is judged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest

from cloudsave.backup.changes import (
    PROVED_SHARE,
    STORED_LOOKED_AT_MAX,
    ChangeQuestion,
    LogTrust,
    MapContradicted,
    MapRefused,
    changes_since,
)
from cloudsave.engines.postgresql.dialect import PostgresDialect
from cloudsave.errors import EngineError
from cloudsave.model.changes import (
    CHANGE_BLOCK,
    CHANGE_TYPE,
    EVERYTHING,
    Change,
    ChangedBlocks,
    LogChanges,
    StorageKey,
    sorted_changes,
)
from cloudsave.model.item import CorruptPage
from cloudsave.model.log import LogIndex, LogSegment
from cloudsave.model.manifest import Manifest, Rung
from cloudsave.model.position import Position
from cloudsave.repository.lineage import Lineage
from cloudsave.store.memory import MemoryStore
from tests.unit.repository.samples import BLOCK, IDENTITY, SEGMENT, draft_manifest, file_item, lineage_on

TABLE = (1663, 5, 16384)
ITEM = replace(file_item("base/5/16384"), storage=StorageKey(TABLE, 0))
PARENT = replace(
    draft_manifest("a"), start=Position("00000001", SEGMENT + 40), stop=Position("00000001", SEGMENT + 400)
)
START = Position("00000001", 2 * SEGMENT + 40)


def page(position: int) -> bytes:
    """A page whose last change ends at `position`."""
    return position.to_bytes(8, "little") + bytes(BLOCK - 9) + b"x"


def position_of(block: bytes) -> int:
    return int.from_bytes(block[:8], "little")


def trust(*, rotation: int = 0, prove_all: bool = False, parent: Manifest = PARENT) -> LogTrust:
    return LogTrust(ChangedBlocks(), parent, START, position_of, rotation=rotation, prove_all=prove_all)


def test_all_stretches_are_proved_in_turns() -> None:
    seen = np.zeros(20_000, int)
    for rotation in range(100, 100 + PROVED_SHARE):
        proved = trust(rotation=rotation).proved(ITEM, len(seen))
        assert 0 < proved.sum() < len(seen) / PROVED_SHARE * 1.5
        seen += proved
    assert set(seen.tolist()) == {1}
    assert trust(prove_all=True).proved(ITEM, 100).all()


def test_files_of_which_the_log_tells_nothing_and_pages_that_were_damaged_are_not_trusted() -> None:
    parent = replace(PARENT, corrupt_pages=(CorruptPage(ITEM.path, 3, "checksum"),))
    known = trust(parent=parent)
    assert known.unchanged(replace(ITEM, storage=None), 5) is None
    unchanged = known.unchanged(ITEM, 5)
    assert unchanged is not None
    assert unchanged.tolist() == [True, True, True, False, True]
    assert known.deviations == set()


def test_a_page_that_changed_later_or_by_what_is_never_logged_is_accepted() -> None:
    known = trust()
    known.differs(ITEM, 1, page(START.offset + 24), lambda: pytest.fail("there is no need to look"))
    assert known.blocks_unlogged == 0
    old = PARENT.start.offset - 80
    known.differs(ITEM, 1, page(old), lambda: page(old)[:-1] + b"y")
    assert known.blocks_unlogged == 1


@pytest.mark.parametrize(
    ("found", "stored"),
    [
        (page(START.offset - 8), page(80)),
        (page(80), page(160)),
        (page(160), page(80)),
        (page(START.offset), page(80)),
        (bytes(BLOCK), page(80)),
        (bytes(BLOCK), bytes(8) + page(80)[8:]),
    ],
)
def test_any_other_difference_contradicts_the_log(found: bytes, stored: bytes) -> None:
    with pytest.raises(MapContradicted) as contradiction:
        trust().differs(ITEM, 7, found, lambda: stored)
    assert "ALARM: page 7 of base/5/16384" in contradiction.value.alarm


def test_beyond_a_number_of_looks_only_what_is_older_than_the_parent_is_accepted() -> None:
    known = trust()
    for number in range(STORED_LOOKED_AT_MAX):
        known.differs(ITEM, number, page(80), lambda: page(80))
    known.differs(ITEM, 1, page(80), lambda: pytest.fail("too many looks"))
    with pytest.raises(MapContradicted):
        known.differs(ITEM, 1, page(PARENT.start.offset + 8), lambda: page(80))


def question(lineage: Lineage, parent: Manifest = PARENT, start: Position = START) -> ChangeQuestion:
    return ChangeQuestion(parent, IDENTITY, start, lineage, PostgresDialect())


def logged(*stretches: tuple[int, int, LogChanges | None]) -> Lineage:
    """A lineage with the log [first, last) of timeline 1, of zeros, with notes of changes."""
    lineage = lineage_on(MemoryStore())
    for first, last, changes in stretches:
        index = LogIndex(records_end=last, changes=changes)
        lineage.put_log(LogSegment("00000001", first, last), [bytes(last - first)], index)
    return lineage


def noted(seen_from: int, *changes: Change) -> LogChanges:
    return LogChanges(seen_from, sorted_changes(np.array(list(changes), CHANGE_TYPE)))


def test_changes_of_all_log_since_the_parents_start_are_united() -> None:
    middle = SEGMENT + (1 << 20)
    lineage = logged(
        (SEGMENT, middle, noted(SEGMENT, (*TABLE, 3, CHANGE_BLOCK))),
        (middle, 3 * SEGMENT, noted(middle, (*TABLE, 5, CHANGE_BLOCK))),
    )
    told = changes_since(question(lineage))
    assert (told.rung, told.reason) == (Rung.LOG, "")
    changed = told.changed
    assert changed.unchanged(StorageKey(TABLE, 0), 7).tolist() == [True] * 3 + [False, True, False, True]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"start": replace(START, offset=PARENT.stop.offset - 8)}, "after this backup's start"),
        ({"start": replace(START, branch="00000002")}, "off the history"),
        ({"parent": replace(PARENT, page_checksums=False)}, "checksums were switched on"),
        ({"start": replace(START, offset=4 * SEGMENT)}, "is not stored"),
    ],
)
def test_why_the_log_is_not_asked(change: dict[str, object], why: str) -> None:
    lineage = logged((SEGMENT, 3 * SEGMENT, noted(SEGMENT)))
    asked = replace(question(lineage), **change)  # type: ignore[arg-type]
    with pytest.raises(MapRefused, match=why):
        changes_since(asked)


def test_log_that_may_have_changed_everything_is_no_help() -> None:
    lineage = logged((SEGMENT, 3 * SEGMENT, noted(SEGMENT, EVERYTHING)))
    with pytest.raises(MapRefused, match="may have changed anything"):
        changes_since(question(lineage))


@pytest.mark.parametrize("changes", [None, noted(SEGMENT + (1 << 20) + 8)])
def test_log_that_was_not_noted_or_has_a_record_that_nobody_saw_is_read_itself(
    changes: LogChanges | None,
) -> None:
    """Here it consists of zeros, which is no log: that it was read shows by the refusal."""
    middle = SEGMENT + (1 << 20)
    lineage = logged((SEGMENT, middle, noted(SEGMENT)), (middle, 3 * SEGMENT, changes))
    with pytest.raises(MapRefused, match="cannot be read"):
        changes_since(question(lineage))


# ---- the source's own summaries


def told_by_source(*changes: Change, error: str = "") -> Callable[[Position, int], Iterator[np.ndarray]]:
    def tell(first: Position, branch_begin: int) -> Iterator[np.ndarray]:
        assert (first, branch_begin) == (PARENT.start, 0)
        if error:
            raise EngineError(error)
        yield sorted_changes(np.array(list(changes), CHANGE_TYPE))

    return tell


def test_where_log_is_missing_the_source_is_asked() -> None:
    asked = replace(question(logged()), told=told_by_source((*TABLE, 3, CHANGE_BLOCK)))
    told = changes_since(asked)
    assert told.rung is Rung.SUMMARIES
    assert "is not stored" in told.reason
    assert told.changed.unchanged(StorageKey(TABLE, 0), 5).tolist() == [True] * 3 + [False, True]


@pytest.mark.parametrize(
    ("told", "why"),
    [
        (told_by_source(error="it has no summary"), "is not stored; it has no summary"),
        (told_by_source(EVERYTHING), "is not stored; the source's summaries name too much"),
        (None, "is not stored$"),
    ],
)
def test_a_source_that_does_not_know_either_is_no_help(
    told: Callable[[Position, int], Iterator[np.ndarray]] | None, why: str
) -> None:
    with pytest.raises(MapRefused, match=why):
        changes_since(replace(question(logged()), told=told))


def test_a_source_is_not_asked_about_pages_that_are_not_in_its_past() -> None:
    start = replace(START, branch="00000002")
    with pytest.raises(MapRefused, match="off the history"):
        changes_since(replace(question(logged(), start=start), told=told_by_source()))
