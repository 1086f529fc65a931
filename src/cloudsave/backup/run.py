"""
Runs a base backup: engine on one side, repository on the other.

Order, each step with its reason: 1. the log is being captured before the backup begins, so that nothing
between is missed; 2. the engine begins, while the writer claims its generation and pins what may be reused:
neither knows of the other; with a parent, the log since the parent's start tells which blocks
need not be read; pieces flow into packs, the engine finishes; 3. the log up to the end of the backup is
durable in the repository: without it the backup could not be restored; 4. the manifest is put. Killed
before, there is no backup, and the next run adopts the packs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Protocol

from cloudsave.backup.changes import (
    DEVIATIONS_MAX,
    ChangeQuestion,
    LogTrust,
    MapContradicted,
    MapRefused,
    changes_since,
)
from cloudsave.backup.plan import BackupPlan
from cloudsave.clock import Clock
from cloudsave.engines.api import BackupSource
from cloudsave.engines.dialect_api import Dialect
from cloudsave.errors import BackupInvalidated, BackupNotCovered, ForeignSystem, IntegrityError
from cloudsave.model.engine_facts import BackupStart, BackupStop, LogAtHand
from cloudsave.model.identity import Role
from cloudsave.model.manifest import BackupStatistics, ChangeDetection, Manifest, Rung
from cloudsave.model.position import Position
from cloudsave.repository.lineage import Lineage
from cloudsave.repository.parallel import begin
from cloudsave.repository.writer import BackupWriter, WriterOptions
from cloudsave.telemetry import Progress
from cloudsave.version import VERSION


class LogCover(Protocol):
    """
    Sees to it that the log of the backup becomes durable: a capture that runs already, or one of its own.
    """

    def begin(self) -> str:
        """Make sure that log from now on is captured; how, in a sentence."""

    def fill(self, start: Position, stop: Position, at_hand: LogAtHand) -> bool:
        """
        Store what is missing of the log [start, stop) from the source's own files, if that is little; whether
        all of it is in the repository then. `start` begins a log file.
        """

    def wait_until_durable(self, start: Position, stop: Position, at_hand: LogAtHand | None) -> None:
        """
        Return when all log of [start, stop) is in the repository; `start` begins a log file. The source's own
        files may be read for it where they are `at_hand`. Raises: BackupNotCovered, BackupLogLost.
        """

    def close(self) -> None:
        """Stop what `begin` started. Never raises."""


@dataclass(frozen=True, slots=True)
class BackupContext:
    """What a backup works with."""

    lineage: Lineage
    open_source: Callable[[], BackupSource]
    """Makes a source that has not begun; asked again when a backup has to be made anew."""
    cover: LogCover
    dialect: Dialect
    clock: Clock
    progress: Progress
    workers_now: Callable[[], int] | None = None
    """How many workers the backup may have at the moment; None: as many as planned."""
    renew: Callable[[Iterable[str]], None] | None = None
    """Locks stored objects anew, by their full names; None: the store locks none."""


def run_backup(plan: BackupPlan, context: BackupContext) -> Manifest:
    """
    Take the planned backup and return its manifest, which is committed.

    Raises: EngineError, StoreError, IntegrityError; nothing is committed then, and a later run goes on from
    what is stored.
    """
    lineage = context.lineage
    if plan.identity.lineage != lineage.id:
        raise ForeignSystem(
            f"server is not source {plan.request.source!r}",
            detail=f"It is {plan.identity.lineage}, the backups are of {lineage.id}.",
        )
    lineage.record_identity(plan.identity, source=plan.request.source)
    parent = _parent_of(plan, lineage)
    try:
        return _Run(plan, context, parent).execute()
    except MapContradicted as contradiction:
        context.progress.note(contradiction.alarm)
        return _Run(plan, context, parent, alarm=contradiction.alarm).execute()


def _parent_of(plan: BackupPlan, lineage: Lineage) -> Manifest | None:
    try:
        return lineage.manifest(plan.parent) if plan.parent else None
    except IntegrityError as error:
        raise IntegrityError(
            f"manifest of backup {plan.parent!r}, which this one would build on, is damaged",
            detail=error.detail,
            hints=["`cloudsave backup NAME --full` builds on no other backup", *error.hints],
        ) from error


class _Run:
    """One try. With an `alarm` the log is not asked what has changed."""

    def __init__(
        self, plan: BackupPlan, context: BackupContext, parent: Manifest | None, *, alarm: str = ""
    ) -> None:
        self._plan = plan
        self._context = context
        self._parent = parent
        self._alarm = alarm
        started = context.clock.now()
        self._backup_id = f"{started:%Y%m%dT%H%M%SZ}-{context.clock.random_bytes(2).hex()}"
        request = plan.request
        self._writer = BackupWriter(
            context.lineage,
            self._backup_id,
            parent=parent,
            options=WriterOptions(
                request.workers,
                request.level,
                request.paranoid,
                workers_now=context.workers_now,
                renew=context.renew,
            ),
            advance=context.progress.advance,
        )

    def execute(self) -> Manifest:
        """Take the backup. Raises: see `run_backup`; MapContradicted without an alarm."""
        source, writer = self._context.open_source(), self._writer
        try:
            return self._take(source)
        except BaseException:
            source.abort()
            writer.abort()
            raise
        finally:
            self._context.cover.close()

    def _take(self, source: BackupSource) -> Manifest:
        plan, context, writer, clock = self._plan, self._context, self._writer, self._context.clock
        notes = [plan.reason, context.cover.begin()]
        if self._alarm:
            notes.append(self._alarm)
        # The server makes its checkpoint while the repository is asked for what is stored.
        opened = begin(writer.open, "backup-open")
        begun = source.begin()
        begun_at = clock.monotonic()
        if adopted := opened():
            notes.append(f"{adopted} packs of an unfinished backup were taken over")
        trust, detection = self._trust(begun)
        if trust is not None:
            writer.trust(trust)
        stop = self._copy(source, begun)
        _refuse_other_branch(begun, stop)
        context.progress.note("waiting for the log up to the end of the backup")
        log_begin = self._log_begin(begun.position)
        context.cover.wait_until_durable(log_begin, stop.position, begun.log_at_hand)
        self._refuse_expiring_log(log_begin, stop.position)
        # By the source's clock, as the instants of its commits are: ours may differ from it.
        finished_us = begun.clock_us + round((clock.monotonic() - begun_at) * 1e6)
        facts = _Facts(
            self._backup_id, begun.clock_us, finished_us, self._detection(trust, detection), tuple(notes)
        )
        return writer.commit(_draft(plan, begun, stop, facts))

    def _refuse_expiring_log(self, begin: Position, stop: Position) -> None:
        """
        Log that was condemned before this backup was pinned may go at any time, although it is there now.
        Only a standby whose last restart point is older than all kept backups needs such log.
        """
        claimed = self._writer.claimed
        if claimed is not None and claimed.condemned.touches_log(begin.branch, begin.offset, stop.offset):
            raise BackupNotCovered(
                "log that the backup needs is being expired",
                detail="A run of `cloudsave expire` has announced that it removes it.",
                hints=["run the backup again when that is done"],
            )

    def _log_begin(self, position: Position) -> Position:
        """The begin of the log file: that is where a server will begin to read."""
        offset = position.offset - position.offset % self._plan.identity.log_file_bytes
        return Position(position.branch, offset)

    def _trust(self, begun: BackupStart) -> tuple[LogTrust | None, ChangeDetection]:
        """What is known of changes since the parent, and how; None where everything is to be compared."""
        parent, context = self._parent, self._context
        if parent is None:
            return None, ChangeDetection(Rung.FULL)
        if begun.block_position is None:
            return None, ChangeDetection(Rung.COMPARE, "the server sends all files as a whole")
        if self._alarm:
            reason = "the log was found to be wrong about it"
            return None, ChangeDetection(Rung.COMPARE, reason, contradicted=True)
        context.progress.note("waiting for the log up to the begin of the backup")
        self._complete_log(parent, begun)
        identity = self._plan.identity
        question = ChangeQuestion(
            parent, identity, begun.position, context.lineage, context.dialect, begun.changes_told
        )
        try:
            told = changes_since(question)
        except MapRefused as refusal:
            return None, ChangeDetection(Rung.COMPARE, str(refusal))
        trust = LogTrust(
            told.changed,
            parent,
            begun.position,
            begun.block_position,
            rotation=self._writer.generation,
            prove_all=self._plan.request.prove_all,
        )
        return trust, ChangeDetection(told.rung, told.reason)

    def _complete_log(self, parent: Manifest, begun: BackupStart) -> None:
        """See to it that the log from the parent's start to this one is stored, as far as it will be."""
        cover, start = self._context.cover, begun.position
        at_hand = begun.log_at_hand if parent.start.branch == start.branch else None
        if at_hand is not None and cover.fill(self._log_begin(parent.start), start, at_hand):
            return
        # Capture stores in order: once it is here, whatever it can get of the log before is stored too.
        cover.wait_until_durable(self._log_begin(start), start, None)

    def _detection(self, trust: LogTrust | None, detection: ChangeDetection) -> ChangeDetection:
        """With what came out of it, once all is read."""
        if trust is None:
            return detection
        return replace(
            detection,
            whole_files=tuple(sorted(trust.deviations)[:DEVIATIONS_MAX]),
            bytes_unread=self._writer.bytes_unread,
            blocks_unlogged=trust.blocks_unlogged,
        )

    def _copy(self, source: BackupSource, begun: BackupStart) -> BackupStop:
        """All pieces into packs, then the files that are known only at the end."""
        progress, writer = self._context.progress, self._writer
        progress.begin("backup", bytes_total=begun.bytes_expected)
        for piece in source.pieces():
            writer.store(piece)
        writer.settle()
        stop = source.finish()
        for item in stop.directories:
            writer.add_entry(item)
        for late in stop.late_files:
            writer.store_content(late.item, late.content)
        writer.drain()
        progress.finish()
        return stop


def _refuse_other_branch(begun: BackupStart, stop: BackupStop) -> None:
    """A replica has followed its primary to another branch meanwhile: one backup belongs to one branch."""
    if begun.position.branch != stop.position.branch:
        raise BackupInvalidated(
            "source changed to another branch during the backup",
            detail=f"It began on {begun.position.branch} and ended on {stop.position.branch}.",
            hints=["run the backup again: what is stored is not sent again"],
        )


@dataclass(frozen=True, slots=True)
class _Facts:
    backup_id: str
    started_us: int
    finished_us: int
    detection: ChangeDetection
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
        settings={**begun.settings, **stop.settings},
        packs=(),
        maps=(),
        files=(),
        corrupt_pages=stop.corrupt_pages,
        statistics=BackupStatistics(),
        detection=facts.detection,
        notes=facts.notes + begun.notes + stop.notes,
        # The clock was read before the end of the log, which is the backup's stop.
        complete_until_us=begun.clock_us if identity.role == Role.PRIMARY else 0,
    )
