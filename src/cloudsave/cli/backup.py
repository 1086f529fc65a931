"""`cloudsave backup`: a base backup."""

from __future__ import annotations

import dataclasses

import click

from cloudsave import assembly
from cloudsave.backup.plan import BackupPlan, BackupRequest, plan_backup
from cloudsave.backup.run import BackupContext, run_backup
from cloudsave.cli.formats import format_duration, format_rate, format_size
from cloudsave.cli.frame import Command, CommandContext, config_option, source_argument, with_context
from cloudsave.cli.live_limits import followed
from cloudsave.errors import ExitCode
from cloudsave.model.manifest import ChangeDetection, Manifest, Rung

CORRUPT_PAGES_SHOWN_MAX = 10


@click.command("backup", cls=Command, exit_codes=(ExitCode.FINDINGS, ExitCode.INTEGRITY, ExitCode.BUSY))
@source_argument
@click.option("--full", is_flag=True, help="Store every page again instead of reusing stored ones.")
@click.option("--read-all", is_flag=True, help="Read every page, and prove what the log says of changes.")
@click.option("--mode", type=click.Choice(("auto", "local", "remote")), help="How files are read.")
@click.option("--dry-run", is_flag=True, help="Say what would be done.")
@config_option("compression_level")
@config_option("workers")
@config_option("rate_limit_bytes_per_second")
@config_option("read_limit_bytes_per_second")
@config_option("paranoid")
@with_context
def backup(
    context: CommandContext, name: str, *, full: bool, read_all: bool, mode: str | None, dry_run: bool
) -> ExitCode:
    """
    Take a base backup of source NAME while it works; the log that it needs is captured too.

    The first backup of a database is full. Each later one stores only the pages that are not stored yet,
    and reads back as a full one. Where the captured log tells which pages have changed since, only those are
    read. With exit code 3 the backup is complete, but pages of the source itself are damaged, or a page had
    changed of which the log knew nothing.
    """
    config, clock = context.config, context.clock
    source = context.source(name)
    engine = assembly.backup_engine(source)
    limits = assembly.Limits(config, clock=clock)
    repository = assembly.open_repository(config, context.secrets(), clock=clock, limits=limits)
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
        prove_all=read_all,
    )
    plan = plan_backup(request, identity, lineage.backup_ids())
    if dry_run:
        _show_plan(context, plan)
        return ExitCode.DONE
    backup_context = BackupContext(
        lineage=lineage,
        open_source=lambda: assembly.backup_source(engine, source, limits, mode=mode),
        cover=assembly.log_cover(source, lineage, clock=clock),
        dialect=engine.dialect,
        clock=clock,
        progress=context.progress,
        workers_now=limits.workers,
        renew=assembly.lock_renewal(config, clock=clock),
    )
    with followed(limits, config.files, context.load_config, context.progress.note):
        manifest = run_backup(plan, backup_context)
    _show(context, manifest)
    bad = manifest.corrupt_pages or manifest.detection.contradicted
    return ExitCode.FINDINGS if bad else ExitCode.DONE


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
        stored = f"{format_size(counts.bytes_stored)}; {pages}"
        output.pairs([("read", read), ("stored", stored), ("changes", detection_text(manifest.detection))])
        for note in manifest.notes:
            output.line(f"note: {note}")
        for page in manifest.corrupt_pages[:CORRUPT_PAGES_SHOWN_MAX]:
            output.line(f"DAMAGED IN THE SOURCE: page {page.block} of {page.path}: {page.reason}")
        if manifest.corrupt_pages:
            output.line(
                f"{len(manifest.corrupt_pages)} damaged pages: older backups may hold good copies; keep them"
            )

    output.emit(manifest_facts(manifest), human)


def detection_text(detection: ChangeDetection) -> str:
    """How the backup learned what had changed, in a sentence."""
    if detection.rung is Rung.LOG:
        unread = format_size(detection.bytes_unread)
        whole = len(detection.whole_files)
        return f"told by the log; {unread} taken unread" + (f", {whole} files read whole" if whole else "")
    if detection.rung is Rung.COMPARE:
        return f"everything was read and compared: {detection.reason}"
    return "everything was stored" if detection.rung is Rung.FULL else "not recorded"


def manifest_facts(manifest: Manifest) -> dict[str, object]:
    """A manifest for JSON: all but the file table, of which the number is told."""
    facts: dict[str, object] = {
        field.name: getattr(manifest, field.name)
        for field in dataclasses.fields(manifest)
        if field.name not in ("files", "maps", "packs")
    }
    return facts | {"files": len(manifest.files), "packs": len(manifest.packs), "maps": len(manifest.maps)}
