"""
Brings a restored directory to the planned state where its server does not fetch its log: the log is laid
out as files, the engine's applier replays it, and what the server says of itself is compared with the plan.

A restore that was killed after the files were complete begins anew: from then on servers write into them,
and some of what they replay cannot be replayed twice.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cloudsave.engines.apply_api import AppliedState, ApplyLog, ApplyRequest, LogApplier
from cloudsave.engines.dialect_api import Dialect
from cloudsave.errors import (
    LockError,
    NotEnoughSpace,
    RecoveryMismatch,
    TargetDirectoryInUse,
    TargetUnreachable,
)
from cloudsave.model.ledger import Extent
from cloudsave.model.log import LogSegment
from cloudsave.recovery.bring_up import BringUpOptions, spool_of
from cloudsave.recovery.durable import sync_file_systems
from cloudsave.recovery.journal import JOURNAL_FILES, Journal
from cloudsave.recovery.plan import RecoveryPlan
from cloudsave.recovery.restore import SPACE_RESERVE_BYTES
from cloudsave.repository.lineage import Lineage
from cloudsave.repository.log_copies import reading_copies
from cloudsave.telemetry import Progress

BEGUN_NAME = "cloudsave.restore.applying"
"""In the directory, once something else than the restore of files has written there."""


@dataclass(frozen=True, slots=True)
class ApplyContext:
    """What a recovery works with."""

    lineage: Lineage
    dialect: Dialect
    applier: LogApplier
    progress: Progress
    journal: Journal
    """Of the directory, held by `held`."""


@dataclass(frozen=True, slots=True)
class Applied:
    """A directory in the wanted state. `url`: its server may be looked at there; "": it was shut down."""

    state: AppliedState
    url: str


def begin_anew(directory: Path) -> bool:
    """
    Remove what a killed restore has left in its own directory, if its server had begun to work in it; whether
    there was any. Raises: LockError, TargetDirectoryInUse.
    """
    begun = directory / BEGUN_NAME
    if not begun.exists():
        return False
    with Journal(directory) as journal:
        head = journal.head()
        if head is None:
            begun.unlink()
            raise TargetDirectoryInUse(
                f"directory holds a restore that is complete: {directory}",
                detail="It was killed when all was done. Nothing was touched now.",
                hints=["start the server on it, or choose another directory"],
            )
        # From here on nothing in it counts as restored; the mark goes last.
        journal.forget_files(head)
        for path in directory.iterdir():
            if path.name in JOURNAL_FILES or path.name == BEGUN_NAME:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        begun.unlink()
    return True


@contextmanager
def held(directory: Path) -> Iterator[Journal]:
    """
    Keep every other restore out of a directory whose files are complete. Raises: LockError.

    Invariant: held from before the mark is put until no server of ours runs there. Another restore would take
    the mark for that of a killed one, and remove the files under a server that goes on and tells of success.
    """
    with Journal(directory) as journal:
        if journal.head() is None or (directory / BEGUN_NAME).exists():
            raise LockError(
                f"another restore has worked in {directory} meanwhile",
                hints=["look whether it is complete, or run the command again"],
            )
        yield journal


def apply_log(plan: RecoveryPlan, directory: Path, context: ApplyContext, options: BringUpOptions) -> Applied:
    """
    Bring the restored files in `directory` to the planned state.

    Raises: RecoveryMismatch, RecoveryError, ServerDidNotStart, ServerToolsMissing, IntegrityError,
    StoreError; the server is stopped then, and the same restore may be run again, from the begin.
    """
    applier = context.applier
    (directory / BEGUN_NAME).touch()
    sync_file_systems([directory])
    spool = spool_of(directory, options)
    try:
        shutil.rmtree(spool, ignore_errors=True)
        log = _lay_out(plan, spool, context)
        applier.prepare(
            ApplyRequest(
                data_directory=directory,
                bin_directory=options.bin_directory,
                server_version=plan.backup.server_version,
                base=plan.backup.settings,
                settings=options.settings,
            )
        )
        applier.start(log)
        state = applier.apply(_progress(plan, context.progress))
        context.progress.finish()
        _compare(state)
        if options.look:
            return Applied(state, applier.look())
        applier.hand_over()
        sync_file_systems([directory])
        # In this order: a mark without a journal says that the restore was complete.
        context.journal.finish()
        (directory / BEGUN_NAME).unlink()
    except BaseException:
        applier.stop()
        raise
    finally:
        shutil.rmtree(spool, ignore_errors=True)
    return Applied(state, "")


def check_named(plan: RecoveryPlan, text: str, lineage: Lineage, dialect: Dialect) -> None:
    """
    The index knows a transaction by a number: see that the planned one is the one that was named.

    Raises: TargetUnreachable.
    """
    offset = plan.stop.recovery_end
    found = ""
    for extent in plan.extents:
        if extent.first <= offset < extent.last:
            log = memoryview(lineage.read_log(extent.segment))[offset - extent.segment.first :]
            found = dialect.transaction_text(log)
    if found and text.strip() not in (found, found.rpartition("-")[2], found.rpartition(":")[2]):
        raise TargetUnreachable(
            f"transaction {text.strip()} is not in the stored log",
            detail=f"The transaction of that number is {found}.",
        )


def _lay_out(plan: RecoveryPlan, spool: Path, context: ApplyContext) -> ApplyLog:
    """The files of the log from the one on in which the backup begins: what it holds is not applied again."""
    size = plan.backup.log_file_bytes
    needed = plan.extents
    spool.mkdir(mode=0o700, parents=True)
    free, wanted = shutil.disk_usage(spool).free, sum(one.segment.size_bytes for one in needed)
    if free < wanted + SPACE_RESERVE_BYTES:
        raise NotEnoughSpace(
            f"not enough space for the log at {spool}",
            detail=f"It needs {wanted} bytes at least; {free} are free.",
        )
    read = reading_copies(context.lineage.read_log, context.lineage.logs())
    files: dict[str, int] = {}
    for extent in needed:
        name = context.dialect.log_file_name(extent.segment.branch, extent.first, log_file_bytes=size)
        files.setdefault(name, extent.first - extent.first % size)
        _write(spool / name, extent, read, size)
    stop = plan.stop
    return ApplyLog(spool, tuple(files.items()), stop.recovery_end, stop.inclusive)


def _write(path: Path, extent: Extent, read: Callable[[LogSegment], bytes], size: int) -> None:
    begin = extent.segment.first
    log = memoryview(read(extent.segment))[extent.first - begin : extent.last - begin]
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        at = extent.first % size
        while log:
            written = os.pwrite(descriptor, log, at)
            log, at = log[written:], at + written
    finally:
        os.close(descriptor)


def _progress(plan: RecoveryPlan, progress: Progress) -> Callable[[int], None]:
    """
    Tells how far replay is, in bytes of log. Offsets jump between files, so that no total is known.
    """
    progress.begin("replay log", bytes_total=None)
    reached = plan.backup.start.offset
    size = plan.backup.log_file_bytes

    def passed(offset: int) -> None:
        nonlocal reached
        if offset > reached:
            same_file = offset // size == reached // size
            progress.advance(offset - reached if same_file else offset % size)
            reached = offset

    return passed


def _compare(state: AppliedState) -> None:
    if state.reached != state.wanted:
        raise RecoveryMismatch(
            "restored server is not in the state that was planned",
            detail=f"It has executed {state.reached or 'nothing'}; wanted is {state.wanted or 'nothing'}.",
            hints=["do not use it; please report this with the server's log"],
        )
