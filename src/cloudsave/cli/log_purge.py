"""`cloudsave logs purge`: log files that a server keeps for its own time, removed once they are stored."""

from __future__ import annotations

import click

from cloudsave import assembly
from cloudsave.cli.formats import format_duration, format_rate, format_size
from cloudsave.cli.frame import Command, CommandContext, source_argument, with_context
from cloudsave.cli.output import Column
from cloudsave.config.redact import holds_secret
from cloudsave.errors import ExitCode, SecretInline, UsageError
from cloudsave.logs.purge import Purge
from cloudsave.logs.purge import purge as run_purge
from cloudsave.model.log import instant_from_us
from cloudsave.policy.purge import growth

SECONDS_PER_HOUR = 3600.0


@click.command("purge", cls=Command, exit_codes=(ExitCode.FINDINGS, ExitCode.INTEGRITY))
@source_argument
@click.option(
    "--keep-hours",
    type=click.FloatRange(min=0, max=1_000_000),
    default=24.0,
    show_default=True,
    help="Files that ended less than so long ago stay.",
)
@click.option(
    "--replica",
    "replicas",
    multiple=True,
    metavar="URL",
    help="A server that replicates from this one; may be repeated. All have to be named.",
)
@click.option("--dry-run", is_flag=True, help="Only say what stays and what would go, and why.")
@with_context
def purge(
    context: CommandContext, name: str, keep_hours: float, replicas: tuple[str, ...], dry_run: bool
) -> ExitCode:
    """
    Remove binlog files of MySQL or MariaDB from the server of source NAME that the repository has.

    A file goes only when all of it is durable in the repository, it is older than --keep-hours, and every
    replica has applied it. The server does not know of replicas that are away: name all of them. Somebody
    who is sent the binlog and is not among them stops it. A capture of the source has to run. Each file is
    removed by itself, and all is looked at anew before the next.

    With exit code 3 files stay for a reason that somebody should look at, such as a replica that lags.
    """
    source = context.source(name)
    for url in replicas:
        if holds_secret(url):
            raise SecretInline(
                "a URL with a password cannot be given on the command line",
                detail="Other users of this machine can read it there, in an option --replica.",
                hints=["put the password into MYSQL_PWD, or into [client] of ~/.my.cnf"],
            )
    identity = assembly.engine(source).identify()
    purger = assembly.log_purger(source, identity, replicas)
    if purger is None:
        raise UsageError(
            f"cannot remove log of {identity.engine}",
            detail="It keeps log only while a replication slot needs it, and then removes it itself.",
            hints=["`cloudsave check` tells what its slots hold"],
        )
    repository = assembly.open_repository(context.config, context.secrets(), clock=context.clock)
    lineage = assembly.lineage_for(repository, identity, source=name, record=False)
    try:
        done = run_purge(
            lineage,
            purger,
            keep_seconds=keep_hours * SECONDS_PER_HOUR,
            dry_run=dry_run,
            advance=context.progress.advance,
        )
    finally:
        purger.close()
    _show(context, done, dry_run=dry_run)
    blocked = any(one.blocked for one in done.verdicts) or done.stopped_by is not None
    return ExitCode.FINDINGS if blocked else ExitCode.DONE


def _show(context: CommandContext, done: Purge, *, dry_run: bool) -> None:
    output = context.output
    rate = growth(done.verdicts)
    free = done.held.free_bytes
    full_seconds = free / rate if free is not None and rate else None

    def state(file_name: str, *, remove: bool) -> str:
        if any(one.name == file_name for one in done.removed):
            return "removed"
        return "would be removed" if remove and dry_run else "kept"

    def human() -> None:
        rows = [
            [
                one.file.name,
                format_size(one.file.size_bytes),
                output.instant(instant_from_us(one.ended_us) if one.ended_us else None),
                state(one.file.name, remove=one.remove),
                one.reason,
            ]
            for one in done.verdicts
        ]
        output.table(["FILE", Column("SIZE", right=True), "ENDED", "STATE", "WHY"], rows)
        if done.stopped_by is not None:
            stopped = done.stopped_by
            output.line(f"stopped before {stopped.file.name}: {stopped.reason}")
        grows = f"grows by {format_rate(rate)}" if rate else "grows at a rate that is not known yet"
        room = "free space is not seen from here" if free is None else f"{format_size(free)} are free"
        full = f", full in {format_duration(full_seconds)} if nothing is removed" if full_seconds else ""
        output.line(f"the server's log {grows}; {room}{full}")

    facts = {
        "dry_run": dry_run,
        "files": [
            {
                "name": one.file.name,
                "size_bytes": one.file.size_bytes,
                "ended": instant_from_us(one.ended_us) if one.ended_us else None,
                "state": state(one.file.name, remove=one.remove),
                "reason": one.reason,
                "blocked": one.blocked,
            }
            for one in done.verdicts
        ],
        "removed_bytes": sum(one.size_bytes for one in done.removed),
        "stopped_by": done.stopped_by,
        "log_bytes_per_second": rate,
        "free_bytes": free,
        "seconds_until_full": full_seconds,
    }
    output.emit(facts, human)
