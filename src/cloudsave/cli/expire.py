"""`cloudsave expire`: retention of one source, always with the reason for each backup."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from datetime import UTC
from typing import TypeVar

import click

from cloudsave import assembly
from cloudsave.cli.formats import format_size
from cloudsave.cli.frame import Command, CommandContext, source_argument, with_context
from cloudsave.cli.times import open_zone
from cloudsave.config.options import RETENTION_OPTIONS, Option
from cloudsave.config.values import BadValue, parse_text
from cloudsave.engines.registry import dialect
from cloudsave.errors import ExitCode, UsageError
from cloudsave.model.log import LogSegment
from cloudsave.model.retention import RetentionRules
from cloudsave.retention.expire import Expired, ExpiryPlan, plan_expiry, run_expiry
from cloudsave.retention.history import HistoryReader

F = TypeVar("F", bound=Callable[..., object])


def _rule_options(function: F) -> F:
    """A command-line option for each retention rule of the configuration."""
    for entry in reversed(RETENTION_OPTIONS):
        flag = "--" + entry.name.replace("_", "-")
        metavar = entry.kind.name
        function = click.option(flag, help=f"{entry.toml}, for this run.", metavar=metavar)(function)
    return function


@click.command("expire", cls=Command, exit_codes=(ExitCode.INTEGRITY, ExitCode.BUSY))
@source_argument
@_rule_options
@click.option(
    "--remove",
    multiple=True,
    metavar="BACKUP",
    help="A backup that goes whatever the rules say; may be repeated.",
)
@click.option("--dry-run", is_flag=True, help="Only say what stays and what would go, and why.")
@with_context
def expire(
    context: CommandContext, /, name: str, *, remove: tuple[str, ...], dry_run: bool, **rules: str | None
) -> None:
    """
    Remove the backups of source NAME that no rule keeps, and the log that nothing needs then.

    The rules are those of the configuration (keep_days, keep_last, keep_daily ...); without any, nothing is
    removed. Backups that are held, that an unfinished backup builds on, or that hold the last undamaged
    copy of a page, stay, and so does the newest one of each line of history that lives. Space is freed by
    `cloudsave gc`.
    """
    repository = assembly.open_repository(context.config, context.secrets(), clock=context.clock)
    lineage = assembly.lineage_of(repository, name)
    configured = context.config.sources.get(name)
    chosen = _overridden(configured.retention if configured else RetentionRules(), rules)
    zone = open_zone(context.zone_name) if context.zone_name else UTC
    reader = HistoryReader(lineage, dialect(lineage.id.partition("-")[0]), zone)
    plan = plan_expiry(reader, chosen, remove=remove)
    if dry_run:
        _show(context, plan, None)
        return
    _show(context, plan, run_expiry(lineage, reader, plan, context.progress.advance))


def _overridden(configured: RetentionRules, given: dict[str, str | None]) -> RetentionRules:
    """The configured rules, with those of the command line in place of them."""
    values = {
        entry.name.removeprefix("keep_"): _parsed(entry, text)
        for entry in RETENTION_OPTIONS
        if (text := given[entry.name]) is not None
    }
    return dataclasses.replace(configured, **values)  # type: ignore[arg-type]


def _parsed(entry: Option, text: str) -> float | int:
    try:
        value = parse_text(entry, text)
    except BadValue as error:
        flag = "--" + entry.name.replace("_", "-")
        raise UsageError(f"cannot use option {flag}", detail=f"Its value {error}.") from None
    assert isinstance(value, float | int)
    return value


def _show(context: CommandContext, plan: ExpiryPlan, done: Expired | None) -> None:
    output = context.output
    log = plan.log if done is None else done.log
    waits = bool(plan.unfinished or plan.unreadable) and bool(plan.log) if done is None else done.log_waits

    def human() -> None:
        gone = "would be removed" if done is None else "removed"
        spared = done.spared if done else ()
        rows = [
            (
                one.backup_id,
                "kept" if one.keep or one.backup_id in spared else gone,
                "; ".join(one.reasons)
                if one.backup_id not in spared
                else "held or built on since a moment ago",
            )
            for one in plan.verdicts
        ]
        rows += [(name, "kept", "its manifest cannot be read") for name in plan.unreadable]
        if not rows:
            output.line("no backups")
        else:
            output.table(["BACKUP", "STATE", "WHY"], rows)
        if not plan.rules.any:
            output.note("no retention policy is configured: nothing runs out")
        if waits:
            output.line("log stays until no backup is being made and every manifest can be read")
        elif log:
            output.line(f"log {gone}: {len(log)} objects, {format_size(_stored_bytes(log))}")
        if done is not None and done.backups:
            output.note("`cloudsave gc` frees the space of the pages that nothing needs any more")

    facts: dict[str, object] = {
        "rules": plan.rules,
        "backups": plan.verdicts,
        "unreadable": plan.unreadable,
        "unfinished": plan.unfinished,
        "dry_run": done is None,
        "removed": plan.remove if done is None else done.backups,
        "spared": () if done is None else done.spared,
        "log_objects": len(log),
        "log_bytes": _stored_bytes(log),
        "log_waits": waits,
    }
    output.emit(facts, human)


def _stored_bytes(log: tuple[LogSegment, ...]) -> int:
    return sum(one.size_bytes for one in log)
