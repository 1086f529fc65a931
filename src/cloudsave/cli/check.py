"""`cloudsave check`: can the source be protected, and is it?"""

from __future__ import annotations

import click

from cloudsave import assembly
from cloudsave.cli.frame import Command, CommandContext, source_argument, with_context
from cloudsave.diagnosis.check import check_protection
from cloudsave.errors import ExitCode
from cloudsave.model.finding import Finding, Severity

_MARKS = {Severity.OK: "ok", Severity.NOTICE: "note", Severity.WARNING: "WARN", Severity.PROBLEM: "BAD"}


@click.command("check", cls=Command, exit_codes=(ExitCode.FINDINGS,))
@source_argument
@with_context
def check(context: CommandContext, name: str) -> ExitCode:
    """
    Look at the server and the repository: is source NAME protectable, and is it protected right now?

    Changes nothing. With exit code 3 something stands in the way, or the protection has a gap.
    """
    source = context.source(name)
    engine = assembly.engine(source)
    identity = engine.identify()
    findings: list[Finding] = list(engine.findings())
    repository = assembly.open_repository(context.config, context.secrets(), clock=context.clock)
    lineage = assembly.lineage_for(repository, identity, source=name, record=False)
    findings += check_protection(
        engine, lineage, slot=source.slot, rpo_seconds=source.rpo_seconds, clock=context.clock
    )
    output = context.output

    def human() -> None:
        for finding in findings:
            output.line(f"{_MARKS[finding.severity]:5} {finding.subject}: {finding.fact}")
            if finding.hint:
                for line in finding.hint.splitlines():
                    output.line(f"      hint: {line}")

    output.emit({"identity": identity, "findings": findings}, human)
    bad = any(finding.severity is Severity.PROBLEM for finding in findings)
    return ExitCode.FINDINGS if bad else ExitCode.DONE
