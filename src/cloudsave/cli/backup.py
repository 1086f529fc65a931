"""`cloudsave backup`: a base backup."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from cloudsave import assembly
from cloudsave.cli.frame import Command, CommandContext, config_option, source_argument, with_context
from cloudsave.cli.live_limits import followed
from cloudsave.errors import ExitCode
from cloudsave.repository.parallel import begin

if TYPE_CHECKING:
    from cloudsave.backup.plan import BackupPlan


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
    limits = assembly.Limits(config, clock=clock)
    # The key is derived while the rest is imported, and the server asked who it is.
    opened = assembly.begin_opening(config, context.secrets(), clock=clock, limits=limits)
    engine = assembly.backup_engine(source)
    identified = begin(engine.identify, "identify")
    from cloudsave.backup.plan import BackupRequest, plan_backup
    from cloudsave.backup.run import BackupContext, run_backup
    from cloudsave.cli.manifest_text import show_backup

    repository, identity = opened(), identified()
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
    show_backup(context, manifest)
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
