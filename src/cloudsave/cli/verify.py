"""`cloudsave verify`: what is stored against what manifests and names promise."""

from __future__ import annotations

import click

from cloudsave.assembly import lineage_of, open_repository
from cloudsave.cli.frame import Command, CommandContext, with_context
from cloudsave.engines.registry import dialect
from cloudsave.errors import ExitCode, UnknownBackup, UnknownSource, UsageError
from cloudsave.model.finding import Finding, Severity
from cloudsave.recovery.verify import VerifyRequest, has_problem, verify_lineage
from cloudsave.recovery.verify_records import verify_repository
from cloudsave.repository.lineage import Lineage
from cloudsave.repository.repository import Repository
from cloudsave.repository.verifications import put_verification


@click.command("verify", cls=Command, exit_codes=(ExitCode.FINDINGS, ExitCode.INTEGRITY))
@click.argument("what", metavar="[NAME|BACKUP]", required=False)
@click.option("--read-all", is_flag=True, help="Read and open every byte instead of sizes and indexes.")
@click.option(
    "--record", is_flag=True, help="Note the result in the repository, for `check` and the metrics."
)
@with_context
def verify(context: CommandContext, what: str | None, read_all: bool, record: bool) -> ExitCode | None:
    """
    Check what is stored: everything, that of the source NAME, or one BACKUP with the log it needs.

    Ends with code 3 when something is wrong. With --record the result is stored, for which the repository
    has to be writable: `check` and the metrics of a capture tell then when all of a source was last sound.
    """
    repository = open_repository(context.config, context.secrets(), clock=context.clock)
    chosen = _chosen(repository, what)
    if record and any(backup_id is not None for _, backup_id in chosen):
        raise UsageError(
            "cannot use --record for a single backup",
            detail="What is recorded is that all of a source was verified.",
            hints=["give the source's name"],
        )
    of_repository = verify_repository(repository)
    results: dict[str, list[Finding]] = {}
    for lineage, backup_id in chosen:
        formats = dialect(lineage.id.partition("-")[0])
        request = VerifyRequest(backup_id, read_all)
        found = verify_lineage(lineage, formats, request, progress=context.progress)
        results[lineage.id] = found
        if record:
            sound = not has_problem([*of_repository, *found])
            put_verification(lineage, sound=sound, read_all=read_all)
    everything = [*of_repository, *(finding for findings in results.values() for finding in findings)]

    def human() -> None:
        rows = [(one.severity.value, one.subject, one.fact) for one in everything]
        context.output.table(["STATE", "WHAT", "FACT"], rows)
        for one in everything:
            if one.severity is Severity.PROBLEM and one.hint:
                context.output.note(f"hint: {one.subject}: {one.hint}")

    facts = {"repository": of_repository, "lineages": results, "sound": not has_problem(everything)}
    context.output.emit(facts, human)
    return ExitCode.FINDINGS if has_problem(everything) else None


def _chosen(repository: Repository, what: str | None) -> list[tuple[Lineage, str | None]]:
    """The lineages to check, each with the one backup to check in it. Raises: UnknownSource."""
    if what is None:
        return [(repository.lineage(lineage_id), None) for lineage_id in repository.lineage_ids()]
    try:
        return [(lineage_of(repository, what), None)]
    except UnknownSource as unknown:
        for lineage_id in repository.lineage_ids():
            lineage = repository.lineage(lineage_id)
            if what in lineage.backup_ids():
                return [(lineage, what)]
        raise UnknownBackup(
            f"the repository holds neither a source nor a backup {what!r}",
            hints=["`cloudsave list` shows both"],
        ) from unknown
