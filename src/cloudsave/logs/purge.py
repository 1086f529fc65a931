"""Removing log files from a server that keeps them for its own time, once the repository has them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cloudsave.engines.purge_api import LogPurger
from cloudsave.errors import EngineError
from cloudsave.model.held_log import HeldFile, HeldLog
from cloudsave.model.log import LogSegment
from cloudsave.policy.purge import FileVerdict, StoredLog, decide
from cloudsave.repository.lineage import Lineage


@dataclass(frozen=True, slots=True)
class Purge:
    """What was found, and what was removed of it."""

    held: HeldLog
    verdicts: tuple[FileVerdict, ...]
    """Of the files as they were found."""
    removed: tuple[HeldFile, ...]
    stopped_by: FileVerdict | None = None
    """A file that was to go by the verdicts and does not any more."""


def purge(
    lineage: Lineage,
    purger: LogPurger,
    *,
    keep_seconds: float,
    dry_run: bool,
    advance: Callable[[int], None],
) -> Purge:
    """
    Remove the files that may go, the oldest first, one at a time; all is looked at anew before each.

    So what changes meanwhile stops it: a replica that is lost, a binlog that is reset. `advance` is told the
    bytes of each file. It can be killed at any time. Raises: EngineError, StoreError.
    """
    segments = lineage.logs()
    held = purger.look()
    stored = _stored(lineage, segments, held)
    verdicts = decide(held, stored, keep_seconds=keep_seconds)
    removed: list[HeldFile] = []
    for wanted in verdicts:
        if dry_run or not wanted.remove:
            break
        now = purger.look()
        verdict = decide(now, stored, keep_seconds=keep_seconds)[0]
        if not verdict.remove or verdict.file != wanted.file:
            return Purge(held, verdicts, tuple(removed), stopped_by=verdict)
        purger.remove_before(now.files[1])
        _require_gone(purger.look(), wanted.file)
        removed.append(wanted.file)
        advance(wanted.file.size_bytes)
    return Purge(held, verdicts, tuple(removed))


def _require_gone(held: HeldLog, file: HeldFile) -> None:
    if file in held.files:
        raise EngineError(
            "server has not removed a log file",
            detail=f"It keeps {file.name}, as it does while one of its own sessions reads it.",
            hints=["run it again later; the server's error log may tell more"],
        )


def _stored(lineage: Lineage, listed: Sequence[LogSegment], held: HeldLog) -> StoredLog:
    segments = [one for one in listed if one.branch == held.branch]
    ends = {file.last for file in held.files}
    paddings: dict[int, frozenset[int]] = {}
    for segment in segments:
        if segment.last in ends:
            padding = lineage.log_index(segment).padding_bytes
            paddings[segment.last] = paddings.get(segment.last, frozenset()) | {padding}
    return StoredLog(segments, lineage.holes(), paddings)
