"""
Runs a base backup: engine on one side, repository on the other.

Order, each step with its reason: 1. the log is being captured before the backup begins, so that nothing
between is missed; 2. the engine begins, pieces flow into packs, the engine finishes; 3. the log up to the
end of the backup is durable in the repository: without it the backup could not be restored; 4. the manifest
is put. Killed before, there is no backup, and the next run adopts the packs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from cloudsave.backup.plan import BackupPlan
from cloudsave.clock import Clock
from cloudsave.engines.api import BackupSource
from cloudsave.errors import ForeignSystem
from cloudsave.model.engine_facts import BackupStart, BackupStop
from cloudsave.model.manifest import BackupStatistics, Manifest
from cloudsave.model.position import Position
from cloudsave.repository.lineage import Lineage
from cloudsave.repository.writer import BackupWriter, WriterOptions
from cloudsave.telemetry import Progress
from cloudsave.version import VERSION


class LogCover(Protocol):
    """
    Sees to it that the log of the backup becomes durable: a capture that runs already, or one of its own.
    """

    def begin(self) -> str:
        """Make sure that log from now on is captured; how, in a sentence."""

    def wait_until_durable(self, start: Position, stop: Position) -> None:
        """Return when all log of [start, stop) is stored. Raises: BackupNotCovered, BackupLogLost."""

    def close(self) -> None:
        """Stop what `begin` started. Never raises."""


@dataclass(frozen=True, slots=True)
class BackupContext:
    """What a backup works with."""

    lineage: Lineage
    source: BackupSource
    cover: LogCover
    clock: Clock
    progress: Progress


def run_backup(plan: BackupPlan, context: BackupContext) -> Manifest:
    """
    Take the planned backup and return its manifest, which is committed.

    Raises: EngineError, StoreError, IntegrityError; nothing is committed then, and a later run goes on from
    what is stored.
    """
    lineage, clock = context.lineage, context.clock
    if plan.identity.lineage != lineage.id:
        raise ForeignSystem(
            f"server is not source {plan.request.source!r}",
            detail=f"It is {plan.identity.lineage}, the backups are of {lineage.id}.",
        )
    started = clock.now()
    backup_id = f"{started:%Y%m%dT%H%M%SZ}-{clock.random_bytes(2).hex()}"
    lineage.record_identity(plan.identity, source=plan.request.source)
    parent = lineage.manifest(plan.parent) if plan.parent else None
    options = WriterOptions(plan.request.workers, plan.request.level, plan.request.paranoid)
    writer = BackupWriter(
        lineage, backup_id, parent=parent, options=options, advance=context.progress.advance
    )
    try:
        notes = [plan.reason, context.cover.begin()]
        adopted = writer.open()
        if adopted:
            notes.append(f"{adopted} packs of an unfinished backup were taken over")
        begun = context.source.begin()
        begun_at = clock.monotonic()
        stop = _copy(context, writer, begun)
        context.progress.note("waiting for the log up to the end of the backup")
        # From the begin of the log file: that is where a server will begin to read.
        begin = begun.position.offset - begun.position.offset % plan.identity.log_file_bytes
        context.cover.wait_until_durable(Position(begun.position.branch, begin), stop.position)
        # By the source's clock, as the instants of its commits are: ours may differ from it.
        finished_us = begun.clock_us + round((clock.monotonic() - begun_at) * 1e6)
        facts = _Facts(backup_id, begun.clock_us, finished_us, tuple(notes))
        return writer.commit(_draft(plan, begun, stop, facts))
    except BaseException:
        context.source.abort()
        writer.abort()
        raise
    finally:
        context.cover.close()


def _copy(context: BackupContext, writer: BackupWriter, begun: BackupStart) -> BackupStop:
    """All pieces into packs, then the files that are known only at the end."""
    context.progress.begin("backup", bytes_total=begun.bytes_expected)
    for piece in context.source.pieces():
        writer.store(piece)
    writer.settle()
    stop = context.source.finish()
    for item in stop.directories:
        writer.add_entry(item)
    for late in stop.late_files:
        writer.store_content(late.item, late.content)
    writer.drain()
    context.progress.finish()
    return stop


@dataclass(frozen=True, slots=True)
class _Facts:
    backup_id: str
    started_us: int
    finished_us: int
    notes: tuple[str, ...]


def _draft(plan: BackupPlan, begun: BackupStart, stop: BackupStop, facts: _Facts) -> Manifest:
    """The manifest but for files, maps, packs and counts."""
    identity = plan.identity
    return Manifest(
        backup_id=facts.backup_id,
        lineage=identity.lineage,
        source=plan.request.source,
        engine=identity.engine,
        server_version=identity.version,
        kind=plan.kind,
        parent=plan.parent,
        method=begun.method,
        tool_version=VERSION,
        started_us=facts.started_us,
        finished_us=facts.finished_us,
        start=begun.position,
        stop=stop.position,
        log_file_bytes=identity.log_file_bytes,
        page_bytes=identity.page_bytes,
        page_checksums=identity.page_checksums,
        tablespaces=dict(begun.tablespaces),
        settings=dict(begun.settings),
        packs=(),
        maps=(),
        files=(),
        corrupt_pages=stop.corrupt_pages,
        statistics=BackupStatistics(),
        notes=facts.notes + begun.notes + stop.notes,
    )
