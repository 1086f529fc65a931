"""Which log files a server may lose: each reason to keep one, and its control, in which it goes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cloudsave.model.held_log import HeldFile, HeldLog, NamedReader
from cloudsave.model.log import LogHole, LogSegment
from cloudsave.policy.purge import StoredLog, decide, growth

WIDTH = 1 << 32
BRANCH = "a-server"
HOUR_US = 3_600_000_000
SIZE = 1000


def held(count: int = 4) -> HeldLog:
    """Files 1 to `count`, all of one size; the clock stands at hour 100."""
    files = tuple(
        HeldFile(f"binlog.{n:06}", n * WIDTH, (n + 1) * WIDTH, SIZE + n) for n in range(1, count + 1)
    )
    return HeldLog(BRANCH, files, 100 * HOUR_US, captured=True, readers=(), strangers=(), free_bytes=None)


def stored(count: int = 4) -> StoredLog:
    """All of them but the last one's end, in two segments each; file n has its commits in hour n."""
    segments = []
    for number in range(1, count + 1):
        first, middle = number * WIDTH, number * WIDTH + 500
        instant = number * HOUR_US
        segments.append(LogSegment(BRANCH, first, middle, instant, instant))
        if number < count:
            segments.append(LogSegment(BRANCH, middle, first + WIDTH, instant, instant))
    paddings = {(n + 1) * WIDTH: frozenset({WIDTH - SIZE - n}) for n in range(1, count)}
    return StoredLog(tuple(segments), (), paddings)


def gone(log: HeldLog, kept: StoredLog, *, keep_seconds: float = 0) -> list[int]:
    """The numbers of the files that may go."""
    return [one.file.first // WIDTH for one in decide(log, kept, keep_seconds=keep_seconds) if one.remove]


def reasons(log: HeldLog, kept: StoredLog, *, keep_seconds: float = 0) -> list[tuple[str, bool]]:
    return [(one.reason, one.blocked) for one in decide(log, kept, keep_seconds=keep_seconds)]


def test_all_that_is_stored_goes_but_what_the_server_writes() -> None:
    assert gone(held(), stored()) == [1, 2, 3]
    assert reasons(held(), stored())[-1] == ("the server writes it", False)
    assert decide(replace(held(), files=()), stored(), keep_seconds=0) == ()


@pytest.mark.parametrize("lost", range(6))
def test_a_file_of_which_anything_is_missing_stays_with_all_that_follow(lost: int) -> None:
    log = stored()
    lacking = replace(log, segments=tuple(one for n, one in enumerate(log.segments) if n != lost))
    assert gone(held(), lacking) == list(range(1, lost // 2 + 1))
    assert [blocked for _, blocked in reasons(held(), lacking)].count(True) == 1


def test_a_file_that_is_longer_or_shorter_than_what_is_stored_stays() -> None:
    log = stored()
    for size in (WIDTH - SIZE - 1, WIDTH - SIZE - 3):
        assert gone(held(), replace(log, paddings={**log.paddings, 3 * WIDTH: frozenset({size})})) == [1]
    both = frozenset({WIDTH - SIZE - 2, WIDTH - SIZE - 9})
    assert gone(held(), replace(log, paddings={**log.paddings, 3 * WIDTH: both})) == [1]
    assert gone(held(), replace(log, paddings={2 * WIDTH: log.paddings[2 * WIDTH]})) == [1]


def test_log_of_another_branch_proves_nothing() -> None:
    log = stored()
    others = replace(log, segments=tuple(replace(one, branch="another") for one in log.segments))
    assert gone(held(), others) == []


def test_what_retention_removed_may_go_and_what_was_lost_may_not() -> None:
    log = stored()
    later = tuple(one for one in log.segments if one.first >= 2 * WIDTH)
    hole = LogHole(BRANCH, WIDTH, 2 * WIDTH, "expired", expired=True)
    paddings = {end: value for end, value in log.paddings.items() if end > 2 * WIDTH}
    assert gone(held(), StoredLog(later, (hole,), paddings)) == [1, 2, 3]
    assert gone(held(), StoredLog(later, (replace(hole, last=2 * WIDTH - 1),), paddings)) == []
    assert gone(held(), StoredLog(later, (replace(hole, expired=False),), paddings)) == []
    assert "before capture began" in reasons(held(), StoredLog(later, (), paddings))[0][0]


def test_a_file_stays_for_the_keep_time_after_its_end() -> None:
    # File 1 ended when file 2 had its first commit, in hour 2; it is hour 100.
    assert gone(held(), stored(), keep_seconds=98 * 3600) == [1]
    assert gone(held(), stored(), keep_seconds=98 * 3600 + 1) == []
    assert gone(held(), stored(), keep_seconds=97 * 3600) == [1, 2]
    assert ("younger than the keep time", False) in reasons(held(), stored(), keep_seconds=98 * 3600)
    early = replace(held(), clock_us=HOUR_US)
    assert gone(early, stored()) == [], "a server's clock that was set back makes nothing old"


def test_a_file_that_no_commit_follows_stays() -> None:
    log = stored()
    quiet = tuple(
        replace(one, commit_first_us=0, commit_last_us=0) if one.first >= 3 * WIDTH else one
        for one in log.segments
    )
    assert gone(held(), replace(log, segments=quiet)) == [1]


def test_without_a_capture_nothing_goes() -> None:
    assert gone(replace(held(), captured=False), stored()) == []


def test_capture_that_is_not_through_yet_is_no_reason_to_look() -> None:
    log = stored()
    young = replace(log, segments=tuple(one for one in log.segments if one.first <= 3 * WIDTH))
    assert reasons(held(), young)[2] == ("capture is not through it yet", False)


def test_a_server_that_has_less_log_than_is_stored_keeps_all() -> None:
    log = stored()
    end = max(one.last for one in log.segments)
    newest = held().files[-1]
    for size, wanted in ((end - newest.first, [1, 2, 3]), (end - newest.first - 1, [])):
        files = (*held().files[:-1], replace(newest, size_bytes=size))
        assert gone(replace(held(), files=files), log) == wanted
    assert gone(held(2), log) == [], "it was reset, and its new files are as long as the old ones"


def test_whoever_is_not_named_keeps_everything() -> None:
    assert gone(replace(held(), strangers=("app@host",)), stored()) == []


def test_the_slowest_replica_decides() -> None:
    fast = NamedReader("fast", 4 * WIDTH)
    slow = NamedReader("slow", 2 * WIDTH)
    away = NamedReader("away", None, "could not connect")
    assert gone(replace(held(), readers=(fast,)), stored()) == [1, 2, 3]
    assert gone(replace(held(), readers=(fast, slow)), stored()) == [1]
    assert gone(replace(held(), readers=(fast, away)), stored()) == []
    assert reasons(replace(held(), readers=(fast, slow)), stored())[1] == (
        "replica slow has not applied all of it",
        True,
    )


def test_growth_is_measured_between_ends() -> None:
    rate = growth(decide(held(), stored(), keep_seconds=0))
    assert rate == (SIZE + 2 + SIZE + 3) / 7200
    assert growth(decide(held(2), stored(2), keep_seconds=0)) is None
