"""`cloudsave backup`: a base backup."""

from __future__ import annotations

import dataclasses

import click

from cloudsave import assembly
from cloudsave.backup.plan import BackupPlan, BackupRequest, plan_backup
from cloudsave.backup.run import BackupContext, run_backup
from cloudsave.cli.formats import format_duration, format_rate, format_size
from cloudsave.cli.frame import Command, CommandContext, config_option, source_argument, with_context
from cloudsave.errors import ExitCode
from cloudsave.model.manifest import Manifest

CORRUPT_PAGES_SHOWN_MAX = 10


@click.command("backup", cls=Command, exit_codes=(ExitCode.FINDINGS, ExitCode.INTEGRITY, ExitCode.BUSY))
@source_argument
@click.option("--full", is_flag=True, help="Store every page again instead of reusing stored ones.")
@click.option("--mode", type=click.Choice(("auto", "local", "remote")), help="How files are read.")
@click.option("--dry-run", is_flag=True, help="Say what would be done.")
@config_option("compression_level")
@config_option("workers")
@config_option("rate_limit_bytes_per_second")
@config_option("paranoid")
@with_context
def backup(context: CommandContext, name: str, full: bool, mode: str | None, dry_run: bool) -> ExitCode:
    """
    Take a base backup of source NAME while it works; the log that it needs is captured too.

    The first backup of a database is full. Each later one stores only the pages that are not stored yet,
    and reads back as a full one. With exit code 3 the backup is complete but pages of the source itself are
    damaged.
    """
    config, clock = context.config, context.clock
    source = context.source(name)
    engine = assembly.engine(source)
    repository = assembly.open_repository(config, context.secrets(), clock=clock)
    identity = engine.identify()
    lineage = assembly.lineage_for(repository, identity, source=name, record=not dry_run)
    request = BackupRequest(
        source=name,
        mode=mode or source.mode,
        full=full,
        fast_checkpoint=source.checkpoint == "fast",
        workers=config.workers,
        level=config.compression_level,
        paranoid=config.paranoid,
    )
    plan = plan_backup(request, identity, lineage.backup_ids())
    if dry_run:
        _show_plan(context, plan)
        return ExitCode.DONE
    manifest = run_backup(
        plan,
        BackupContext(
            lineage=lineage,
            source=engine.backup_source(
                mode=request.mode, fast=request.fast_checkpoint, label=f"cloudsave {name}"
            ),
            cover=assembly.log_cover(engine, source, lineage, clock=clock),
            clock=clock,
            progress=context.progress,
        ),
    )
    _show(context, manifest)
    return ExitCode.FINDINGS if manifest.corrupt_pages else ExitCode.DONE


def _show_plan(context: CommandContext, plan: BackupPlan) -> None:
    output = context.output

    def human() -> None:
        output.line(f"would take {plan.kind} backup of {plan.request.source}: {plan.reason}")
        output.pairs([("parent", plan.parent or "-"), ("read", plan.request.mode)])

    output.emit(
        {"kind": plan.kind, "parent": plan.parent, "reason": plan.reason, "request": plan.request}, human
    )


def _show(context: CommandContext, manifest: Manifest) -> None:
    output, counts = context.output, manifest.statistics

    def human() -> None:
        how = f"{manifest.kind}, {manifest.method}"
        output.line(f"backup {manifest.backup_id} of {manifest.source} is complete ({how})")
        rate = format_rate(counts.bytes_read / max(counts.seconds, 0.001))
        read = f"{format_size(counts.bytes_read)} in {format_duration(counts.seconds)}, {rate}"
        pages = f"{counts.blocks_stored} pages new, {counts.blocks_reused} reused, {counts.blocks_zero} empty"
        output.pairs([("read", read), ("stored", f"{format_size(counts.bytes_stored)}; {pages}")])
        for note in manifest.notes:
            output.line(f"note: {note}")
        for page in manifest.corrupt_pages[:CORRUPT_PAGES_SHOWN_MAX]:
            output.line(f"DAMAGED IN THE SOURCE: page {page.block} of {page.path}: {page.reason}")
        if manifest.corrupt_pages:
            output.line(
                f"{len(manifest.corrupt_pages)} damaged pages: older backups may hold good copies; keep them"
            )

    output.emit(manifest_facts(manifest), human)


def manifest_facts(manifest: Manifest) -> dict[str, object]:
    """A manifest for JSON: all but the file table, of which the number is told."""
    facts: dict[str, object] = {
        field.name: getattr(manifest, field.name)
        for field in dataclasses.fields(manifest)
        if field.name not in ("files", "maps", "packs")
    }
    return facts | {"files": len(manifest.files), "packs": len(manifest.packs), "maps": len(manifest.maps)}
