"""`cloudsave gc`: frees the space of what nothing needs any more."""

from __future__ import annotations

from datetime import timedelta

import click

from cloudsave import assembly
from cloudsave.cli.formats import format_size
from cloudsave.cli.frame import Command, CommandContext, with_context
from cloudsave.cli.output import Column
from cloudsave.errors import ExitCode
from cloudsave.repository.collect import GRACE, Collected, CollectRequest, collect
from cloudsave.repository.sparse import SPARSE_SHARE

GRACE_HOURS = GRACE.total_seconds() / 3600


@click.command("gc", cls=Command, exit_codes=(ExitCode.INTEGRITY,))
@click.argument("name", required=False)
@click.option(
    "--grace-hours",
    type=click.FloatRange(0),
    default=GRACE_HOURS,
    show_default=True,
    help="After so long without a sign of life an unfinished backup is given up.",
)
@click.option(
    "--compact",
    is_flag=True,
    help="Have coming backups store the rest of mostly dead packs anew. Reads all manifests and maps.",
)
@click.option("--dry-run", is_flag=True, help="Only say what would be deleted.")
@with_context
def gc(
    context: CommandContext, name: str | None, *, grace_hours: float, compact: bool, dry_run: bool
) -> None:
    """
    Delete pages and maps that no backup of source NAME, or of any source, needs any more.

    It may run at any time: while backups are made, beside another one, and again after it was killed. A
    backup that is given up, and lives all the same, fails; nothing of any other is lost.
    """
    repository = assembly.open_repository(context.config, context.secrets(), clock=context.clock)
    lineages = (
        [assembly.lineage_of(repository, name)]
        if name
        else [repository.lineage(lineage_id) for lineage_id in repository.lineage_ids()]
    )
    request = CollectRequest(
        timedelta(hours=grace_hours),
        dry_run,
        sparse_share=SPARSE_SHARE if compact else 0.0,
        advance=context.progress.advance,
    )
    results = [collect(lineage, request) for lineage in lineages]
    _show(context, results, dry_run=dry_run)


def _show(context: CommandContext, results: list[Collected], *, dry_run: bool) -> None:
    output = context.output

    def human() -> None:
        freed = "WOULD FREE" if dry_run else "FREED"
        titles = [Column("LINEAGE"), *(Column(title, right=True) for title in ("OBJECTS", freed, "KEPT"))]
        rows = [
            [
                one.lineage,
                str(one.packs + one.maps),
                format_size(one.bytes_freed),
                format_size(one.bytes_kept),
            ]
            for one in results
        ]
        output.table(titles, rows)
        for one in results:
            for backup_id in one.given_up:
                output.line(f"{one.lineage}: unfinished backup {backup_id} was silent for too long: given up")
            for backup_id in one.waiting:
                output.line(f"{one.lineage}: unfinished backup {backup_id} may be running: its pages stay")
            if one.sparse:
                size = format_size(one.sparse_bytes)
                output.line(
                    f"{one.lineage}: {one.sparse} packs of {size} are mostly dead: backups leave them"
                )
            if one.blocked:
                output.line(f"{one.lineage}: nothing can be deleted now: {one.blocked}")

    output.emit({"dry_run": dry_run, "lineages": results}, human)
