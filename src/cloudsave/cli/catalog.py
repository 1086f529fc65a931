"""`cloudsave list` and `cloudsave show`: what the repository holds."""

from __future__ import annotations

import click

from cloudsave import assembly
from cloudsave.cli.formats import format_duration, format_size
from cloudsave.cli.frame import Command, CommandContext, with_context
from cloudsave.cli.manifest_text import CORRUPT_PAGES_SHOWN_MAX, detection_text, manifest_facts
from cloudsave.cli.output import Column
from cloudsave.engines.registry import dialect
from cloudsave.errors import ExitCode, IntegrityError, UnknownBackup
from cloudsave.model.log import instant_from_us
from cloudsave.model.manifest import Manifest


@click.command("list", cls=Command, exit_codes=(ExitCode.INTEGRITY,))
@click.argument("name", required=False)
@with_context
def list_backups(context: CommandContext, name: str | None) -> None:
    """
    List the backups of source NAME, or of all sources that the repository knows, oldest first.

    Ends with code 5 when the manifest of a backup is damaged, after the others have been listed.
    """
    repository = assembly.open_repository(context.config, context.secrets(), clock=context.clock)
    lineages = (
        [assembly.lineage_of(repository, name)]
        if name
        else [repository.lineage(lineage_id) for lineage_id in repository.lineage_ids()]
    )
    manifests: list[Manifest] = []
    damage: list[IntegrityError] = []
    for lineage, backup_id in ((one, backup_id) for one in lineages for backup_id in one.backup_ids()):
        try:
            manifests.append(lineage.manifest(backup_id))
        except UnknownBackup:
            continue  # It was expired since it was listed.
        except IntegrityError as error:
            damage.append(error)
    output = context.output

    def human() -> None:
        if not manifests:
            output.line("no backups")
            return
        columns = [
            Column("SOURCE"),
            Column("BACKUP"),
            Column("KIND"),
            Column("FINISHED"),
            Column("SIZE", right=True),
            Column("STORED", right=True),
            Column("DAMAGED PAGES", right=True),
        ]
        output.table(columns, [_row(context, manifest) for manifest in manifests])

    output.emit([_facts(manifest) for manifest in manifests], human)
    if damage:
        raise damage[0]


def _row(context: CommandContext, manifest: Manifest) -> list[str]:
    return [
        manifest.source,
        manifest.backup_id,
        manifest.kind,
        context.output.instant(instant_from_us(manifest.finished_us)),
        format_size(manifest.statistics.bytes_read),
        format_size(manifest.statistics.bytes_stored),
        str(len(manifest.corrupt_pages)),
    ]


def _facts(manifest: Manifest) -> dict[str, object]:
    formats = dialect(manifest.engine)
    facts = manifest_facts(manifest)
    return facts | {
        "started": instant_from_us(manifest.started_us),
        "finished": instant_from_us(manifest.finished_us),
        "start_position": formats.format_position(manifest.start),
        "stop_position": formats.format_position(manifest.stop),
    }


@click.command("show", cls=Command)
@click.argument("backup_id", metavar="BACKUP")
@click.option("--files", is_flag=True, help="List the files, too.")
@with_context
def show(context: CommandContext, backup_id: str, files: bool) -> None:
    """Show one backup: positions, sizes, settings, notes, damaged pages."""
    repository = assembly.open_repository(context.config, context.secrets(), clock=context.clock)
    manifest = assembly.lineage_with(repository, backup_id).manifest(backup_id)
    output, facts = context.output, _facts(manifest)

    def human() -> None:
        output.pairs(
            [
                ("backup", manifest.backup_id),
                ("source", f"{manifest.source} ({manifest.lineage})"),
                ("server", f"{manifest.engine} {manifest.server_version}"),
                (
                    "kind",
                    manifest.kind + (f", reusing pages of {manifest.parent}" if manifest.parent else ""),
                ),
                ("read", manifest.method),
                ("changes", detection_text(manifest.detection)),
                ("started", output.instant(instant_from_us(manifest.started_us))),
                ("finished", output.instant(instant_from_us(manifest.finished_us))),
                ("took", format_duration(manifest.statistics.seconds)),
                (
                    "log",
                    f"{facts['start_position']} to {facts['stop_position']} on branch {manifest.stop.branch}",
                ),
                ("files", f"{len(manifest.files)}, {format_size(sum(f.size_bytes for f in manifest.files))}"),
                (
                    "stored",
                    f"{format_size(manifest.statistics.bytes_stored)} new, in {len(manifest.packs)} packs",
                ),
            ]
        )
        for oid, path in manifest.tablespaces.items():
            output.line(f"tablespace {oid}: {path}")
        for note in manifest.notes:
            output.line(f"note: {note}")
        for page in manifest.corrupt_pages[:CORRUPT_PAGES_SHOWN_MAX]:
            output.line(f"DAMAGED IN THE SOURCE: page {page.block} of {page.path}: {page.reason}")
        if files:
            output.table(
                [Column("SIZE", right=True), Column("FILE")],
                [[str(entry.size_bytes), entry.path] for entry in manifest.files],
            )

    if files:
        facts["file_table"] = list(manifest.files)
    output.emit(facts, human)
