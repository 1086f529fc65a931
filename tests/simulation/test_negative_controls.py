"""
The product, broken in the ways in which backup tools have lost data: the simulation must find each, and
within how many seeds is said. A defect that it cannot find would make its silence worthless.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from cloudsave.backup import run as backup_run
from cloudsave.kernels import pages
from cloudsave.logs import background, branches, capture, resume, writer
from cloudsave.logs.ledger import Step, file_begin
from cloudsave.model import changes
from cloudsave.model.ledger import Cover, Ledger
from cloudsave.recovery import log_path
from cloudsave.repository import writer as backup_writer
from tests.simulation.histories import play
from tests.simulation.world import Violation

SEEDS_MAX = 200
"""Limit: a defect is found within so many seeds."""
Break = Callable[[pytest.MonkeyPatch], None]


def acknowledges_before_the_put(patch: pytest.MonkeyPatch) -> None:
    """Log is acknowledged when it was received: a crash loses what the server has dropped."""
    store = writer.LogWriter._store

    def early(self: Any, job: Any) -> None:
        self._durable(job.last, job.last - job.first)
        store(self, job)

    patch.setattr(writer.LogWriter, "_store", early)


def goes_on_at_now(patch: pytest.MonkeyPatch) -> None:
    """After each connect capture begins with the log file that the slot holds, not with what is missing."""

    def now(ledger: Any, holes: Any, path: Any, *, fresh: int, log_file_bytes: int) -> Step:
        return Step(path[-1][0], file_begin(fresh, log_file_bytes), None, resumed=False)

    patch.setattr(capture, "next_step", now)


def believes_that_a_pack_was_stored(patch: pytest.MonkeyPatch) -> None:
    """An error of a put that runs beside other work is forgotten."""
    patch.setattr(backup_writer.BackupWriter, "_fail", lambda self, error: None)


def commits_before_the_log_is_there(patch: pytest.MonkeyPatch) -> None:
    """The manifest does not wait for the log that makes the backup consistent."""
    patch.setattr(background.BackupLogCover, "wait_until_durable", lambda self, start, stop, at_hand: None)


def plans_across_holes(patch: pytest.MonkeyPatch) -> None:
    """Missing log is taken for log that is not needed."""
    cover = Ledger.cover

    def blind(self: Ledger, path: Any, first: int, last: int | None) -> Cover:
        found = cover(self, path, first, last)
        reaches = max((self.furthest(step) for step, _, _ in path), default=0)
        return replace(found, end=max(found.end, reaches), complete=True)

    patch.setattr(Ledger, "cover", blind)


def forgets_changed_blocks(patch: pytest.MonkeyPatch) -> None:
    """Where stretches of log are put together, the changes of the last one are left out."""
    patch.setattr(changes.ChangedBlocks, "add", lambda self, rows: None)


def takes_any_fingerprint_for_equal(patch: pytest.MonkeyPatch) -> None:
    """Fingerprints of 4 bits."""
    plain = pages.fingerprints

    def short(*arguments: Any, out: Any, **named: Any) -> Any:
        zero = plain(*arguments, out=out, **named)
        out &= 15
        return zero

    patch.setattr(backup_writer, "fingerprints", short)


def mixes_servers_of_one_branch_number(patch: pytest.MonkeyPatch) -> None:
    """Neither how a branch began nor what is stored at its end is compared with what a server sends."""

    def unseen(self: Any, offset: int, data: bytes) -> bytes:
        return data if offset >= self.last else data[self.last - offset :]

    patch.setattr(resume.Overlap, "strip", unseen)
    patch.setattr(branches.Branches, "confirm_origins", lambda self, *arguments, **named: None)


def stops_a_commit_late(patch: pytest.MonkeyPatch) -> None:
    """A time target includes the first commit after it."""
    first = log_path.LogPath.first_commit_beyond

    def late(self: Any, begin: int, instant_us: int, *, inclusive: bool) -> Any:
        one = first(self, begin, instant_us, inclusive=inclusive)
        return None if one is None else first(self, one.end_offset, instant_us, inclusive=inclusive) or one

    patch.setattr(log_path.LogPath, "first_commit_beyond", late)


def begins_replay_too_late(patch: pytest.MonkeyPatch) -> None:
    """The backup's start is noted when it has ended: what changed meanwhile is not replayed."""
    draft = backup_run._draft

    def late(plan: Any, begun: Any, stop: Any, facts: Any) -> Any:
        return replace(draft(plan, begun, stop, facts), start=stop.position)

    patch.setattr(backup_run, "_draft", late)


BREAKS: tuple[Break, ...] = (
    acknowledges_before_the_put,
    goes_on_at_now,
    believes_that_a_pack_was_stored,
    commits_before_the_log_is_there,
    plans_across_holes,
    forgets_changed_blocks,
    takes_any_fingerprint_for_equal,
    mixes_servers_of_one_branch_number,
    stops_a_commit_late,
    begins_replay_too_late,
)


@pytest.fixture
def patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as made:
        yield made


@pytest.mark.parametrize("broken", BREAKS, ids=lambda one: one.__name__)
def test_the_simulation_finds_it(broken: Break, patch: pytest.MonkeyPatch) -> None:
    broken(patch)
    for seed in range(1, SEEDS_MAX + 1):
        try:
            play(seed)
        except Violation as violation:
            print(f"{broken.__name__}: found by seed {seed}: {str(violation).splitlines()[0]}")
            return
    pytest.fail(f"{broken.__name__} was not found within {SEEDS_MAX} seeds")
