"""`cloudsave check`: can the source be protected, and is it? With --pages: is it sound?"""

from __future__ import annotations

from dataclasses import replace

import click

from cloudsave import assembly
from cloudsave.cli.formats import format_duration, format_rate, format_size
from cloudsave.cli.frame import Command, CommandContext, config_option, source_argument, with_context
from cloudsave.cli.live_limits import followed
from cloudsave.config.model import SourceConfig
from cloudsave.diagnosis.check import check_protection
from cloudsave.diagnosis.scrub import Scrubbed, scrub, scrub_findings
from cloudsave.engines.api import Engine
from cloudsave.errors import ExitCode, UsageError
from cloudsave.model.finding import Finding, Severity
from cloudsave.model.identity import SourceIdentity

_MARKS = {Severity.OK: "ok", Severity.NOTICE: "note", Severity.WARNING: "WARN", Severity.PROBLEM: "BAD"}


@click.command("check", cls=Command, exit_codes=(ExitCode.FINDINGS,))
@source_argument
@click.option("--pages", is_flag=True, help="Also read and check every page of the server; stores nothing.")
@click.option("--mode", type=click.Choice(("auto", "local", "remote")), help="How --pages reads files.")
@config_option("workers")
@config_option("read_limit_bytes_per_second")
@with_context
def check(context: CommandContext, name: str, pages: bool, mode: str | None) -> ExitCode:
    """
    Look at the server and the repository: is source NAME protectable, and is it protected right now?

    Changes nothing. With --pages all files are read as a base backup reads them, and damaged pages are named.
    With exit code 3 something stands in the way, the protection has a gap, or pages are damaged.
    """
    if mode and not pages:
        raise UsageError("option --mode is of use with --pages only")
    source = context.source(name)
    engine = assembly.engine(source)
    identity = engine.identify()
    findings: list[Finding] = list(engine.findings())
    reader = assembly.backup_engine(source)
    if source.backup_url:
        findings += [replace(one, subject=f"backup_url: {one.subject}") for one in reader.findings()]
    repository = assembly.open_repository(context.config, context.secrets(), clock=context.clock)
    lineage = assembly.lineage_for(repository, identity, source=name, record=False)
    findings += check_protection(
        engine, lineage, slot=source.slot, rpo_seconds=source.rpo_seconds, clock=context.clock
    )
    scrubbed = _check_pages(context, reader, source, identity, mode) if pages else None
    if scrubbed:
        findings += scrub_findings(scrubbed)
    _show(context, identity, findings, scrubbed)
    bad = any(finding.severity is Severity.PROBLEM for finding in findings)
    return ExitCode.FINDINGS if bad else ExitCode.DONE


def _check_pages(
    context: CommandContext, engine: Engine, source: SourceConfig, identity: SourceIdentity, mode: str | None
) -> Scrubbed:
    config, clock, progress = context.config, context.clock, context.progress
    limits = assembly.Limits(config, clock=clock)
    reading = assembly.backup_source(engine, source, limits, mode=mode)
    with followed(limits, config.files, context.load_config, progress.note):
        return scrub(
            reading,
            page_checksums=identity.page_checksums,
            readers=config.workers,
            clock=clock,
            progress=progress,
        )


def _show(
    context: CommandContext, identity: SourceIdentity, findings: list[Finding], scrubbed: Scrubbed | None
) -> None:
    output = context.output

    def human() -> None:
        for finding in findings:
            output.line(f"{_MARKS[finding.severity]:5} {finding.subject}: {finding.fact}")
            if finding.hint:
                for line in finding.hint.splitlines():
                    output.line(f"      hint: {line}")
        if scrubbed:
            rate = format_rate(scrubbed.bytes_read / max(scrubbed.seconds, 0.001))
            size, time = format_size(scrubbed.bytes_read), format_duration(scrubbed.seconds)
            output.line(f"{size} of {scrubbed.files} files read in {time}, {rate}")
            for note in scrubbed.notes:
                output.line(f"note: {note}")

    facts: dict[str, object] = {"identity": identity, "findings": findings}
    output.emit(facts if scrubbed is None else facts | {"pages": scrubbed}, human)
