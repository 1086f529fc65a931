"""`cloudsave hold`: backups that stay whatever the retention rules say."""

from __future__ import annotations

import click

from cloudsave import assembly
from cloudsave.cli.frame import Command, CommandContext, Group, with_context
from cloudsave.errors import ExitCode, UsageError
from cloudsave.repository.holds import holds_of, put_hold, release_holds
from cloudsave.repository.repository import Repository

REASON_CHARACTERS_MAX = 500


@click.group("hold", cls=Group)
def hold() -> None:
    """Keep single backups, whatever the retention rules say."""


def _repository(context: CommandContext) -> Repository:
    return assembly.open_repository(context.config, context.secrets(), clock=context.clock)


@hold.command("add", cls=Command, exit_codes=(ExitCode.BUSY,))
@click.argument("backup_id", metavar="BACKUP")
@click.option("--reason", required=True, help="Why; shown wherever the backup is.")
@with_context
def add(context: CommandContext, backup_id: str, reason: str) -> None:
    """
    Hold BACKUP until it is released. `cloudsave expire` does not remove it meanwhile.

    It needs no right to delete. With exit code 6 the backup is being removed by a run of `cloudsave expire`.
    """
    reason = reason.strip()
    if not reason or len(reason) > REASON_CHARACTERS_MAX:
        raise UsageError(f"a reason has 1 to {REASON_CHARACTERS_MAX} characters")
    held = put_hold(assembly.lineage_with(_repository(context), backup_id), backup_id, reason)
    context.output.emit(held, lambda: context.output.line(f"backup {backup_id} is held: {reason}"))


@hold.command("release", cls=Command)
@click.argument("backup_id", metavar="BACKUP")
@with_context
def release(context: CommandContext, backup_id: str) -> None:
    """End all holds of BACKUP. It stays as long as a retention rule keeps it."""
    repository = _repository(context)
    released = [
        one
        for lineage_id in repository.lineage_ids()
        for one in release_holds(repository.lineage(lineage_id), backup_id)
    ]
    if not released:
        raise UsageError(
            f"backup {backup_id!r} is not held", hints=["`cloudsave hold list` shows all that are"]
        )
    count = len(released)
    text = f"backup {backup_id} is held no more ({count} {'hold' if count == 1 else 'holds'} released)"
    context.output.emit({"released": released}, lambda: context.output.line(text))


@hold.command("list", cls=Command)
@click.argument("name", required=False)
@with_context
def list_holds(context: CommandContext, name: str | None) -> None:
    """List the holds of backups of source NAME, or of all sources."""
    repository = _repository(context)
    lineages = (
        [assembly.lineage_of(repository, name)]
        if name
        else [repository.lineage(lineage_id) for lineage_id in repository.lineage_ids()]
    )
    found = [one for lineage in lineages for one in holds_of(lineage)]
    output = context.output

    def human() -> None:
        if found:
            rows = [[one.backup_id, one.since_utc or "-", one.reason] for one in found]
            output.table(["BACKUP", "SINCE", "REASON"], rows)
        else:
            output.line("no backup is held")

    output.emit(found, human)
