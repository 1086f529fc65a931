"""
Bring a restored directory up: feed it its log, wait until it pauses at the target, compare what it says with
what the plan promised, and only then open it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from cloudsave.clock import Clock
from cloudsave.engines.api import RestoreTarget
from cloudsave.engines.dialect_api import Dialect
from cloudsave.errors import (
    CloudsaveError,
    RecoveryError,
    RecoveryMismatch,
    ServerDidNotStart,
    TargetDirectoryInUse,
)
from cloudsave.model.engine_facts import ServerRequest, ServerState
from cloudsave.model.position import Position
from cloudsave.recovery.plan import RecoveryPlan
from cloudsave.recovery.reach import instant_text
from cloudsave.recovery.replay import READERS, READERS_DISTANT, Feeder, replay_log
from cloudsave.recovery.restore import finish_restore
from cloudsave.repository.lineage import Lineage
from cloudsave.repository.log_copies import reading_copies
from cloudsave.telemetry import Progress

SLICE_SECONDS = 1.0
STALL_SECONDS_MAX = 900.0
"""Limit: a server that replays nothing for so long is given up."""
PROMOTE_SECONDS_MAX = 600.0
SPOOL_DIGITS = 12
COMMIT_SKEW_US = 60_000_000
"""Aborts count for what a server calls its last transaction; they may be this much older than a commit."""


@dataclass(frozen=True, slots=True)
class BringUpOptions:
    """How the server is to run."""

    bin_directory: Path | None = None
    port: int | None = None
    look: bool = False
    """Leave it paused and read-only."""
    spool_directory: Path | None = None
    """Where log is fetched ahead, in a directory of this restore's own; None: beside the data."""
    later_command: str = ""
    """The restore command of a server that is left in recovery, once nobody feeds it any more."""
    settings: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class BringUpContext:
    """What a recovery works with."""

    lineage: Lineage
    dialect: Dialect
    target: RestoreTarget
    clock: Clock
    progress: Progress


@dataclass(frozen=True, slots=True)
class BroughtUp:
    """A server that is in the wanted state, as it said itself."""

    at_target: ServerState
    opened: ServerState | None
    """After promotion; None where it was left paused."""
    connection_url: str


def recovery_digest(plan: RecoveryPlan) -> str:
    """What decides where replay ends."""
    parts = [plan.backup.backup_id, plan.branch, str(plan.stop.recovery_end), str(plan.stop.inclusive)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def server_request(
    plan: RecoveryPlan, directory: Path, *, fetch_command: str, options: BringUpOptions
) -> ServerRequest:
    """The plan in the words of an engine."""
    return ServerRequest(
        data_directory=directory,
        bin_directory=options.bin_directory,
        port=options.port,
        private_socket=options.look or options.port is None,
        fetch_command=fetch_command,
        recovery_end=plan.stop.recovery_end,
        inclusive=plan.stop.inclusive,
        branch=plan.branch,
        consistent_offset=plan.backup.stop.offset,
        settings=options.settings,
    )


def leave_for_later(
    plan: RecoveryPlan, directory: Path, target: RestoreTarget, options: BringUpOptions
) -> None:
    """Configure recovery for a server that a person starts."""
    target.configure(server_request(plan, directory, fetch_command=options.later_command, options=options))
    finish_restore(directory)


def bring_up(
    plan: RecoveryPlan, directory: Path, context: BringUpContext, options: BringUpOptions
) -> BroughtUp:
    """
    Start the server on the restored `directory`; it runs when this returns.

    Raises: RecoveryMismatch, ServerDidNotStart, ServerToolsMissing, IntegrityError, StoreError; the server
    is stopped then, and the same restore may be run again.
    """
    owner = directory.stat()
    replayed_end = plan.stop.replayed_max if plan.stop.inclusive else plan.stop.recovery_end
    feeder = Feeder(
        replay_log(plan, context.dialect),
        reading_copies(context.lineage.read_log, context.lineage.logs()),
        spool=spool_of(directory, options),
        dialect=context.dialect,
        check=lambda begin, log: context.dialect.check_replay(
            log, until=replayed_end - begin, log_file_bytes=plan.backup.log_file_bytes, directory=directory
        ),
        readers=READERS_DISTANT if context.lineage.store.capabilities.distant else READERS,
        clock=context.clock,
    )
    try:
        feeder.open(context.lineage.readable_histories(), uid=owner.st_uid, gid=owner.st_gid)
        request = server_request(plan, directory, fetch_command=feeder.command(), options=options)
        context.target.configure(request)
        context.target.start()
        at_target = _await_target(plan, context, feeder)
        if options.look and at_target.opened_before:
            raise TargetDirectoryInUse(
                f"server in {directory} was opened for writing already",
                hints=["`--start` finishes that restore; a look needs another directory"],
            )
        compare(plan, at_target, context.dialect, may_be_open=not options.look)
        opened = None
        if options.look:
            later = replace(request, fetch_command=options.later_command)
            context.target.configure(later)
        else:
            opened = context.target.promote(timeout_seconds=PROMOTE_SECONDS_MAX)
            finish_restore(directory)
        return BroughtUp(at_target, opened, context.target.connection_url())
    except BaseException as error:
        context.target.stop()
        _raise_cause(feeder, error)
        raise
    finally:
        feeder.close()


def spool_of(directory: Path, options: BringUpOptions) -> Path:
    """The spool of this restore alone: restores of other directories may run at the same time."""
    if options.spool_directory is None:
        return directory.with_name(directory.name + ".spool")
    digest = hashlib.sha256(str(directory.absolute()).encode()).hexdigest()[:SPOOL_DIGITS]
    return options.spool_directory / f"{directory.name}-{digest}.spool"


def _raise_cause(feeder: Feeder, error: BaseException) -> None:
    """Where feeding failed, that is the news, not that the server stopped because of it."""
    if feeder.error is None or not isinstance(error, ServerDidNotStart):
        return
    if isinstance(feeder.error, CloudsaveError):
        raise feeder.error from error
    raise RecoveryError("could not feed the log to the server", detail=f"{feeder.error}.") from feeder.error


def _await_target(plan: RecoveryPlan, context: BringUpContext, feeder: Feeder) -> ServerState:
    total = plan.stop.log_end - plan.backup.start.offset
    context.progress.begin("replay log", bytes_total=total)
    reported = 0
    moved_at = context.clock.monotonic()
    while True:
        state = context.target.await_target(timeout_seconds=SLICE_SECONDS)
        if state.paused_at_target or not state.in_recovery:
            context.progress.advance(total - reported)
            context.progress.finish()
            return state
        done = max(state.replayed_offset or 0, feeder.position()) - plan.backup.start.offset
        done = min(max(done, 0), total)
        if done > reported:
            context.progress.advance(done - reported)
            reported, moved_at = done, context.clock.monotonic()
        elif context.clock.monotonic() - moved_at > STALL_SECONDS_MAX:
            raise ServerDidNotStart(
                "restored server has stopped replaying",
                detail=f"Nothing was replayed for {STALL_SECONDS_MAX:.0f} seconds.",
                hints=["its log is in the restored directory"],
            )


def compare(plan: RecoveryPlan, state: ServerState, dialect: Dialect, *, may_be_open: bool) -> None:
    """
    Is the server where the plan said it would be? `may_be_open`: a server that did not pause there but opened
    is as good. Raises: RecoveryMismatch.
    """
    faults = _faults(plan, state, lambda offset: dialect.format_position(Position(plan.branch, offset)))
    if not state.in_recovery and not may_be_open:
        faults.append("It opened by itself instead of pausing at the target.")
    if faults:
        raise RecoveryMismatch(
            "restored server is not in the state that was planned",
            detail=" ".join(faults),
            hints=["do not use it; please report this with the server's log"],
        )


def _faults(plan: RecoveryPlan, state: ServerState, text: Callable[[int], str]) -> list[str]:
    faults = []
    replayed = state.replayed_offset
    if replayed is None or not plan.stop.replayed_min <= replayed <= plan.stop.replayed_max:
        shown = "nothing" if replayed is None else f"up to {text(replayed)}"
        faults.append(f"It has replayed {shown}; wanted is {text(plan.stop.replayed_max)}.")
    if state.branch != plan.branch and state.branch not in {step[0] for step in plan.path}:
        faults.append(f"It is on branch {state.branch}, not {plan.branch}.")
    expected = None if state.opened_before else plan.last_commit
    # A server that stops after a record does not count it, even if it is a commit; its position proves it.
    if expected is not None and not (plan.stop.inclusive and expected.offset == plan.stop.recovery_end):
        if state.last_commit_us is None:
            faults.append(f"It knows of no transaction; the last is of {instant_text(expected.instant_us)}.")
        elif state.last_commit_us < expected.instant_us - COMMIT_SKEW_US:
            faults.append(
                f"Its last transaction is of {instant_text(state.last_commit_us)}; the last one planned of"
                f" {instant_text(expected.instant_us)}."
            )
    return faults
