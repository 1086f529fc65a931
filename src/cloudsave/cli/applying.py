"""`cloudsave restore` of engines whose log is applied by the restored server's own replication."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qs, urlsplit

from cloudsave.cli.formats import format_size
from cloudsave.cli.frame import CommandContext
from cloudsave.engines.apply_api import LogApplier
from cloudsave.engines.dialect_api import Dialect
from cloudsave.errors import ExitCode, UsageError
from cloudsave.model.log import instant_from_us
from cloudsave.recovery.apply import ApplyContext, apply_log, held
from cloudsave.recovery.bring_up import BringUpOptions
from cloudsave.recovery.plan import RecoveryPlan
from cloudsave.recovery.restore import RestoredFiles
from cloudsave.repository.lineage import Lineage

LOOK_SECONDS = 1.0
_NOT_HERE = ("start", "delta", "tablespace", "port", "name_of_point")


def check_options(engine: str, given: Mapping[str, Any]) -> None:
    """Raises: UsageError for what is not possible with such engines."""
    for option in _NOT_HERE:
        if given[option]:
            flag = {"name_of_point": "name"}.get(option, option)
            raise UsageError(
                f"cannot use --{flag} with {engine}",
                detail="Its log is applied during the restore, and the server is shut down at the end.",
                hints=[
                    "restore with --into DIR, then start the server on DIR",
                    "--look keeps it running",
                ],
            )


def run_applier(
    context: CommandContext,
    lineage: Lineage,
    parts: tuple[Dialect, LogApplier],
    plan: RecoveryPlan,
    files: RestoredFiles,
    options: BringUpOptions,
) -> ExitCode | None:
    """Replay and compare; with `look` the server runs until Ctrl-C."""
    with held(files.directory) as journal:
        return _run(context, ApplyContext(lineage, *parts, context.progress, journal), plan, files, options)


def _run(
    context: CommandContext,
    work: ApplyContext,
    plan: RecoveryPlan,
    files: RestoredFiles,
    options: BringUpOptions,
) -> ExitCode | None:
    applied = apply_log(plan, files.directory, work, options)
    last = instant_from_us(plan.last_commit.instant_us) if plan.last_commit else None
    facts = {
        "directory": files.directory,
        "owner": files.owner,
        "bytes_written": files.bytes_written,
        "resumed": files.resumed,
        "plan": plan.as_dict(),
        "executed": applied.state.reached,
        "last_commit": last,
        "started": options.look,
        "connection_url": applied.url or None,
    }

    def human() -> None:
        output = context.output
        output.line(f"restored {format_size(plan.backup.data_bytes)} into {files.directory}")
        output.line(f"asked, the server has executed {applied.state.reached or 'nothing'}, as planned")
        output.line(f"last commit {output.instant(last)}")
        if not options.look:
            output.line("it was shut down in order, and nothing of ours is left: start it as you start yours")

    context.output.emit(facts, human)
    if not options.look:
        return None
    (file,) = parse_qs(urlsplit(applied.url).query)["defaults-file"]
    context.output.note(f"read-only; connect with: mysql --defaults-file={file}; Ctrl-C stops it")
    try:
        while True:
            context.clock.sleep(LOOK_SECONDS)
    except KeyboardInterrupt:
        return ExitCode.DONE
    finally:
        work.applier.stop()
