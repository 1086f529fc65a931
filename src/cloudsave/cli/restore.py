"""`cloudsave restore`: plan, restore files, replay log, compare, open; or refuse with nothing touched."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from cloudsave.assembly import Limits, lineage_of, open_repository
from cloudsave.cli.applying import check_options, run_applier
from cloudsave.cli.extraction import FORMATS, is_extraction, run_extraction
from cloudsave.cli.formats import format_size
from cloudsave.cli.frame import Command, CommandContext, source_argument, with_context
from cloudsave.cli.live_limits import followed
from cloudsave.cli.times import parse_instant
from cloudsave.engines.dialect_api import Dialect
from cloudsave.engines.registry import (
    collation_inspector,
    dialect,
    directory_inspector,
    log_applier,
    restore_target,
    server_account,
)
from cloudsave.errors import EngineError, ExitCode, UsageError
from cloudsave.model.log import instant_from_us
from cloudsave.model.position import Position
from cloudsave.model.target import Target, TargetKind
from cloudsave.recovery.apply import begin_anew, check_named
from cloudsave.recovery.bring_up import (
    BringUpContext,
    BringUpOptions,
    BroughtUp,
    bring_up,
    leave_for_later,
    recovery_digest,
)
from cloudsave.recovery.collations import CollationReport, report_collations
from cloudsave.recovery.continuation import plan_or_continue
from cloudsave.recovery.delta import DeltaPlan, delta_options
from cloudsave.recovery.history import History, IndexReader, read_history
from cloudsave.recovery.journal import ReplayStop
from cloudsave.recovery.past_damage import plan_past_damage
from cloudsave.recovery.plan import RecoveryPlan
from cloudsave.recovery.replay import later_fetch_command
from cloudsave.recovery.restore import RestoredFiles, RestoreRequest, look_ahead, restore_files
from cloudsave.repository.lineage import Lineage
from cloudsave.repository.reader import BackupReader

LOOK_SECONDS = 1.0
TARGET_FLAGS = ("time", "position", "transaction", "name_of_point", "latest", "immediate")


@dataclass(frozen=True, slots=True)
class _Parts:
    """What a restore works with."""

    context: CommandContext
    lineage: Lineage
    dialect: Dialect
    source: str
    limits: Limits


@click.command(
    "restore", cls=Command, exit_codes=(ExitCode.UNREACHABLE, ExitCode.INTEGRITY, ExitCode.CANCELLED)
)
@source_argument
@click.option("--into", type=click.Path(path_type=Path), help="Empty or absent directory for the data.")
@click.option(
    "--delta",
    is_flag=True,
    help="DIR may be a data directory of the same server: keep what is right, remove what is too much.",
)
@click.option("--time", metavar="TIME", help="The state at that time, with its zone (RFC 3339).")
@click.option("--position", metavar="POS", help="The state at that position of the log (LSN, file:place).")
@click.option("--transaction", metavar="ID", help="The state after that transaction (XID, GTID).")
@click.option("--name", "name_of_point", metavar="POINT", help="The state at that named restore point.")
@click.option("--latest", is_flag=True, help="The last state that is stored (the default).")
@click.option("--immediate", is_flag=True, help="The state at the end of the base backup.")
@click.option("--exclusive", is_flag=True, help="Stop before the target instead of after it.")
@click.option("--branch", metavar="BRANCH", help="Timeline to follow.  [default: the newest]")
@click.option("--backup", "backup_id", metavar="BACKUP", help="Base backup to begin with.  [default: best]")
@click.option("--tablespace", multiple=True, metavar="OID=DIR", help="New place of a tablespace; repeatable.")
@click.option("--owner", metavar="USER", help="User who gets the files, when run by root.")
@click.option("--start", is_flag=True, help="Start the server, compare it with the plan, and open it.")
@click.option("--look", is_flag=True, help="Start it read-only on a private socket until Ctrl-C.")
@click.option("--port", type=click.IntRange(1, 65535), help="Port of the server that --start leaves running.")
@click.option("--bin-dir", type=click.Path(path_type=Path), help="Directory of the server's programs.")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="Server setting; repeatable.")
@click.option("--database", metavar="NAME", help="Take out this database alone, by way of a sandbox.")
@click.option("--table", multiple=True, metavar="[SCHEMA.]TABLE", help="Only this table of it; repeatable.")
@click.option(
    "--output", type=click.Path(path_type=Path, dir_okay=False), help="New file for what is taken out."
)
@click.option(
    "--format", type=click.Choice(FORMATS), help="Of that file.  [default: sql for *.sql, else archive]"
)
@click.option("--to-url", metavar="URL", help="Server and database that get what is taken out.")
@click.option("--replace", is_flag=True, help="What is taken out replaces what is there.")
@click.option("--no-owner", is_flag=True, help="Leave owners and rights out.")
@click.option("--dry-run", is_flag=True, help="Print the plan and touch nothing.")
@with_context
def restore(context: CommandContext, /, name: str, **given: Any) -> ExitCode | None:
    """
    Restore the database NAME into a new directory, to any state that is stored.

    A state that cannot be reached is refused before anything is touched, with the nearest ones that can.
    A restore that was interrupted goes on when the same command is run again.
    With --database single databases and tables are taken out of a restored server that is gone afterwards.
    """
    extracts = is_extraction(given)
    if given["into"] is None and not given["dry_run"] and not extracts:
        raise UsageError("a restore needs --into DIR", hints=["--dry-run shows the plan without it"])
    if given["look"] and given["start"]:
        raise UsageError("cannot use --look with --start: one stays read-only, the other opens the server")
    parts, history = _open(context, name)
    applier = log_applier(parts.dialect.name)
    if applier is not None:
        check_options(parts.dialect.name, given)
    target = _target(context, parts.dialect, given)
    log_file_bytes = history.backups[-1].log_file_bytes
    indexes = IndexReader(parts.lineage, parts.dialect, log_file_bytes=log_file_bytes)
    begun_in = None if extracts else given["into"]
    plan = plan_or_continue(target, lambda one: plan_past_damage(one, history, indexes), begun_in)
    if given["transaction"]:
        check_named(plan, given["transaction"], parts.lineage, parts.dialect)
    reader = BackupReader(parts.lineage, parts.lineage.manifest(plan.backup.backup_id))
    if given["dry_run"]:
        ahead = look_ahead(reader.manifest, _request(parts, plan, given, history)) if begun_in else None
        _show_plan(context, plan, reader, ahead)
        return None
    for line in plan.describe():
        context.output.note(line)
    if extracts:
        run_extraction(context, parts.lineage, parts.dialect, plan, given, _pairs("--set", given["settings"]))
        return None
    if applier is not None and begin_anew(given["into"]):
        context.output.note("note: a restore that was killed while it replayed begins anew")
    request = _request(parts, plan, given, history)
    with followed(parts.limits, context.config.files, context.load_config, context.progress.note):
        files = restore_files(reader, request, progress=context.progress)
    for note in files.notes:
        context.output.note(f"note: {note}")
    options = BringUpOptions(
        bin_directory=given["bin_dir"] or context.config.bin_directory_of(parts.dialect.name),
        spool_directory=context.config.spool_directory,
        port=given["port"],
        look=given["look"],
        later_command=later_fetch_command(_program(context), name),
        settings=_pairs("--set", given["settings"]),
    )
    if applier is not None:
        return run_applier(context, parts.lineage, (parts.dialect, applier), plan, files, options)
    if given["start"] or given["look"]:
        return _run_server(parts, plan, files, options)
    leave_for_later(plan, files.directory, restore_target(reader.manifest.engine), options)
    _show_files(context, plan, files)
    return None


def _open(context: CommandContext, name: str) -> tuple[_Parts, History]:
    limits = Limits(context.config, clock=context.clock)
    repository = open_repository(context.config, context.secrets(), clock=context.clock, limits=limits)
    lineage = lineage_of(repository, name)
    formats = dialect(lineage.id.partition("-")[0])
    return _Parts(context, lineage, formats, name, limits), read_history(lineage, formats)


def _request(parts: _Parts, plan: RecoveryPlan, given: dict[str, Any], history: History) -> RestoreRequest:
    inspector = directory_inspector(parts.dialect.name) if given["delta"] else None
    return RestoreRequest(
        directory=given["into"],
        tablespaces=_pairs("--tablespace", given["tablespace"]),
        owner=given["owner"],
        server_account=server_account(parts.dialect.name),
        workers_now=parts.limits.workers,
        recovery_digest=recovery_digest(plan),
        replay=ReplayStop(plan.backup.backup_id, plan.stop.recovery_end, plan.stop.inclusive, plan.branch),
        delta=delta_options(inspector, history) if inspector else None,
    )


def _target(context: CommandContext, formats: Dialect, given: dict[str, Any]) -> Target:
    chosen = [flag for flag in TARGET_FLAGS if given[flag] not in (None, False)]
    # A position beside a transaction or a name says which of several is meant.
    if len(chosen) > 1 and not (len(chosen) == 2 and "position" in chosen and _has_record(chosen)):
        raise UsageError(
            "a restore has one target",
            detail=f"Given are {', '.join(chosen)}.",
            hints=["keep one of them; --position may stand beside --transaction or --name"],
        )
    branch = given["branch"]
    position = None
    if given["position"] is not None:
        position = Position(branch or "", formats.parse_position(given["position"], branch=branch or ""))
    kinds = {
        "time": TargetKind.TIME,
        "transaction": TargetKind.TRANSACTION,
        "name_of_point": TargetKind.NAME,
        "immediate": TargetKind.IMMEDIATE,
        "position": TargetKind.POSITION,
    }
    kind = next((kinds[flag] for flag in kinds if flag in chosen), TargetKind.LATEST)
    if given["exclusive"] and kind in (TargetKind.LATEST, TargetKind.IMMEDIATE, TargetKind.NAME):
        raise UsageError(
            "--exclusive goes with --time, --position or --transaction",
            hints=["leave --exclusive out, or name one of these"],
        )
    time = parse_instant(given["time"], zone_name=context.zone_name) if given["time"] else None
    return Target(
        kind,
        time=time,
        position=position,
        transaction=formats.parse_transaction(given["transaction"]) if given["transaction"] else None,
        name=given["name_of_point"],
        inclusive=not given["exclusive"],
        branch=branch,
        backup_id=given["backup_id"],
    )


def _has_record(chosen: list[str]) -> bool:
    return "transaction" in chosen or "name_of_point" in chosen


def _pairs(flag: str, given: tuple[str, ...]) -> dict[str, str]:
    pairs = {}
    for text in given:
        key, separator, value = text.partition("=")
        if not separator or not key:
            raise UsageError(f"cannot understand {flag} {text!r}", hints=[f"{flag} KEY=VALUE"])
        pairs[key] = value
    return pairs


def _program(context: CommandContext) -> list[str]:
    """How this very cloudsave is run again, by a server in another directory."""
    words = [sys.executable, "-m", "cloudsave"]
    if context.explicit_file is not None:
        words += ["--config", os.path.abspath(context.explicit_file)]
    override = context.invocation.overrides.get("repository.url")
    return words + (["--repository", override] if override else [])


def _run_server(
    parts: _Parts, plan: RecoveryPlan, files: RestoredFiles, options: BringUpOptions
) -> ExitCode | None:
    context = parts.context
    server = restore_target(parts.lineage.id.partition("-")[0])
    work = BringUpContext(parts.lineage, parts.dialect, server, context.clock, context.progress)
    up = bring_up(plan, files.directory, work, options)
    _show_server(context, plan, files, up, _collations(parts, plan, files, up))
    if not options.look:
        return None
    context.output.note("read-only; Ctrl-C stops it")
    try:
        while True:
            context.clock.sleep(LOOK_SECONDS)
    except KeyboardInterrupt:
        return ExitCode.DONE
    finally:
        server.stop()


def _collations(
    parts: _Parts, plan: RecoveryPlan, files: RestoredFiles, up: BroughtUp
) -> CollationReport | None:
    """What sorts otherwise here; None, with a remark, where the server, which runs by now, did not tell."""
    inspector = collation_inspector(parts.dialect.name)
    try:
        report = report_collations(inspector, up.connection_url, plan.backup.settings, files.directory)
    except EngineError as error:
        parts.context.output.note(f"note: could not compare sort orders with the source's: {error.detail}")
        return None
    if report.file is not None:
        databases = ", ".join(dict.fromkeys(one.database for one in report.changes))
        parts.context.output.note(
            f"warning: text sorts otherwise here than where the indexes were built ({databases}); queries may"
            f" miss rows until they are rebuilt: {report.file} has the statements"
        )
    return report


# ---- what is said


def _show_plan(
    context: CommandContext, plan: RecoveryPlan, reader: BackupReader, ahead: DeltaPlan | None
) -> None:
    fetch_bytes = reader.bytes_to_fetch()
    tablespaces = dict(reader.manifest.tablespaces)

    def human() -> None:
        for line in plan.describe():
            context.output.line(line)
        context.output.line(
            f"to fetch     {format_size(fetch_bytes)} of data, {format_size(plan.log_stored_bytes)} of log"
        )
        for oid, place in tablespaces.items():
            context.output.line(f"tablespace   {oid} was at {place}")
        for one in ahead.set_aside if ahead else ():
            context.output.line(f"sets aside   {one.path}")
        for path in ahead.removed if ahead else ():
            context.output.line(f"removes      {path}")

    facts = {**plan.as_dict(), "fetch_bytes": fetch_bytes, "tablespaces": tablespaces}
    if ahead is not None:
        facts["removes"] = [str(path) for path in ahead.removed]
        facts["sets_aside"] = [str(one.path) for one in ahead.set_aside]
    context.output.emit(facts, human)


def _facts(plan: RecoveryPlan, files: RestoredFiles) -> dict[str, Any]:
    return {
        "directory": files.directory,
        "config_directory": files.config_directory,
        "tablespaces": dict(files.tablespaces),
        "owner": files.owner,
        "resumed": files.resumed,
        "bytes_written": files.bytes_written,
        "bytes_kept": files.bytes_kept,
        "removed": files.removed,
        "log_set_aside": files.set_aside,
        "plan": plan.as_dict(),
    }


def _show_files(context: CommandContext, plan: RecoveryPlan, files: RestoredFiles) -> None:
    def human() -> None:
        context.output.line(f"restored {format_size(plan.backup.data_bytes)} into {files.directory}")
        context.output.line("started, the server replays log, pauses at the target and is read-only until")
        context.output.line("SELECT pg_wal_replay_resume() opens it; its user must be able to run cloudsave")

    context.output.emit({**_facts(plan, files), "started": False}, human)


def _show_server(
    context: CommandContext,
    plan: RecoveryPlan,
    files: RestoredFiles,
    up: BroughtUp,
    report: CollationReport | None,
) -> None:
    # The server has proved its position; it does not count a commit that it was to stop after.
    last = instant_from_us(plan.last_commit.instant_us) if plan.last_commit else None
    state = up.opened or up.at_target
    facts = {
        **_facts(plan, files),
        "started": True,
        "open": up.opened is not None,
        "last_commit": last,
        "replayed_offset": up.at_target.replayed_offset,
        "branch": state.branch,
        "connection_url": up.connection_url,
        "collation_changes": report.changes if report else None,
        "reindex_file": report.file if report else None,
    }

    def human() -> None:
        opened = "open for writing" if up.opened else "read-only"
        context.output.line(f"restored into {files.directory}; the server runs, {opened}")
        context.output.line(f"asked, it is where the plan ends; last commit {context.output.instant(last)}")
        context.output.line(f"connect with: psql '{up.connection_url}'")

    context.output.emit(facts, human)
