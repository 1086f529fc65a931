"""The newest log of a source whose files are at hand: stored without waiting for whoever captures it."""

from __future__ import annotations

from dataclasses import replace

from cloudsave.clock import Clock
from cloudsave.engines.api import Dialect
from cloudsave.errors import LogConflict, LogDamaged, SourceUnreadable
from cloudsave.logs.ledger import Step
from cloudsave.logs.resume import Resumer
from cloudsave.logs.status import CaptureOptions
from cloudsave.logs.writer import LogArchive, LogWriter, window_bytes
from cloudsave.model.engine_facts import LogAtHand
from cloudsave.model.ledger import Ledger
from cloudsave.model.position import Position

TAIL_BYTES_MAX = 64 << 20
"""Limit: with more log than this to store, capture is waited for."""
_OPTIONS = CaptureOptions()


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
    try:
        window = window_bytes(at_hand.identity.log_file_bytes, _OPTIONS)
        resumer = Resumer(archive, dialect, at_hand.identity, window_size=window)
        made_ready = resumer.prepare(Step(start.branch, frontier, None, resumed), ledger, overlap=True)
        begin = made_ready.stream_from
        log = at_hand.read(Position(start.branch, begin), stop.offset)
        if len(log) < stop.offset - begin:
            return False
        try:
            new = made_ready.overlap.strip(begin, log)
        except LogConflict:
            return False  # A recycled file, or another server; capture hears from the server itself.
        options = replace(_OPTIONS, queue_bytes_max=2 * TAIL_BYTES_MAX)
        writer = LogWriter(archive, made_ready.start, window_size=window, options=options, durable=_ignore)
        writer.append(new, clock.monotonic())
        writer.finish()
    except (LogDamaged, SourceUnreadable):
        return False  # The files are not what they seem.
    return True
