"""The newest log of a source whose files are at hand: stored without waiting for whoever captures it."""

from __future__ import annotations

from dataclasses import replace

from cloudsave.clock import Clock
from cloudsave.engines.dialect_api import Dialect
from cloudsave.errors import LogConflict, LogDamaged, SourceUnreadable
from cloudsave.logs.ledger import Step, file_begin
from cloudsave.logs.resume import Resume, Resumer
from cloudsave.logs.status import CaptureOptions
from cloudsave.logs.writer import LogArchive, LogWriter, window_bytes
from cloudsave.model.engine_facts import LogAtHand
from cloudsave.model.identity import Role
from cloudsave.model.ledger import Ledger
from cloudsave.model.position import Position

TAIL_BYTES_MAX = 64 << 20
"""Limit: with more log than this to store, capture is waited for."""
_OPTIONS = replace(CaptureOptions(), queue_bytes_max=2 * TAIL_BYTES_MAX)


def _ignore(end: int, size_bytes: int) -> None:
    """Nobody waits for the single objects, [`end` - `size_bytes`, `end`)."""


def store_tail(
    archive: LogArchive, dialect: Dialect, at_hand: LogAtHand, span: tuple[Position, Position], clock: Clock
) -> bool:
    """
    Store what is missing of the log `span` = [start, stop) of one branch, which begins with a log file;
    whether all of it is durable then. A capture that runs stores the same bytes once more, in its own
    stretches. The files must repeat what is stored before the missing log: those of another server, and files
    that are recycled under the names of log to come, are left alone.

    Raises: LogConflict, StoreError.
    """
    start, stop = span
    ledger = Ledger(archive.logs())
    frontier = ledger.frontier(start.branch, start.offset)
    if frontier >= stop.offset:
        return True
    if start.branch != stop.branch or stop.offset - frontier > TAIL_BYTES_MAX:
        return False
    resumed = any(first < frontier <= last for first, last in ledger.ranges(start.branch))
    step = Step(start.branch, frontier, None, resumed)
    window = window_bytes(at_hand.identity.log_file_bytes, _OPTIONS)
    resumer = Resumer(archive, dialect, at_hand.identity, window_size=window)
    try:
        taken = _take(resumer, at_hand, step, ledger, stop.offset)
        if taken is None:
            return False
        made_ready, new = taken
        writer = LogWriter(archive, made_ready.start, window_size=window, options=_OPTIONS, durable=_ignore)
        writer.append(new, clock.monotonic())
        writer.finish()
    except (LogDamaged, SourceUnreadable):
        return False  # The files are not what they seem.
    return True


def _take(
    resumer: Resumer, at_hand: LogAtHand, step: Step, ledger: Ledger, end: int
) -> tuple[Resume, bytes] | None:
    """
    The log of [frontier, `end`) from the files, and how it continues what is stored; None where they do not
    hold it, or do not repeat what is stored.
    """
    identity = at_hand.identity
    # A primary recycles older files with every checkpoint, and the frontier's own holds log of this server,
    # or none: what is recycled names itself otherwise. A replica may be fed by whoever; all must be there.
    newest = file_begin(step.frontier, identity.log_file_bytes)
    for available in (0, newest) if identity.role is Role.PRIMARY else (0,):
        made_ready = resumer.prepare(step, ledger, available=available)
        begin = made_ready.stream_from
        log = at_hand.read(Position(step.branch, begin), end)
        if len(log) < end - begin:
            continue
        try:
            return made_ready, made_ready.overlap.strip(begin, log)
        except LogConflict:
            return None  # A recycled file, or another server; capture hears from the server itself.
    return None
