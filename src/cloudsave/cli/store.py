"""`cloudsave store`: whether a store keeps the promises that backups rest on."""

from __future__ import annotations

from datetime import timedelta

import click

from cloudsave.cli.frame import Command, CommandContext, Group, with_context
from cloudsave.cli.times import parse_instant
from cloudsave.errors import ExitCode
from cloudsave.store.contract import run_contract
from cloudsave.store.open import open_store, open_versions

PREFIX = "cloudsave-validate"


@click.group("store", cls=Group)
def store() -> None:
    """Places that hold repositories."""


@store.command("validate", cls=Command, exit_codes=(ExitCode.FINDINGS,))
@click.argument("url", metavar="[URL]", required=False)
@with_context
def validate(context: CommandContext, url: str | None) -> ExitCode:
    """
    Write, read, list, race and delete small objects at URL, and say which promises are kept.

    Without URL the configured repository's store is tested. All happens below a new prefix, which is empty
    again at the end; nothing else is touched.
    """
    target = open_store(url or context.repository_url(), clock=context.clock)
    prefix = f"{PREFIX}/{context.clock.random_bytes(8).hex()}/"
    # A store that cannot be reached at all keeps no promise and breaks none: that is an error, not a finding.
    next(iter(target.list(prefix)), None)
    results = run_contract(target, prefix)
    capabilities = target.capabilities
    kept = all(result.passed for result in results)
    output = context.output

    def human() -> None:
        for result in results:
            name = result.name.replace("_", " ")
            output.line(f"{'kept  ' if result.passed else 'BROKEN'}  {name}")
            if not result.passed:
                output.line(f"        {' '.join(result.detail.split())}")
        output.line(f"durable when stored: {_yes(capabilities.durable_put)}")
        output.line(f"safe for several writers: {_yes(capabilities.conditional_put)}")
        output.line(
            "this store is fit for a repository" if kept else "this store is NOT fit for a repository"
        )

    output.emit(
        {
            "url": target.url,
            "fit": kept,
            "durable_put": capabilities.durable_put,
            "conditional_put": capabilities.conditional_put,
            "checks": results,
        },
        human,
    )
    return ExitCode.DONE if kept else ExitCode.FINDINGS


@store.command("rewind", cls=Command)
@click.argument("url", metavar="[URL]", required=False)
@click.option("--to", "to", required=True, metavar="TIME", help="The state of this instant is wanted.")
@click.option("--dry-run", is_flag=True, help="Say what would be done.")
@with_context
def rewind(context: CommandContext, url: str | None, to: str, *, dry_run: bool) -> None:
    """
    Bring back what was deleted or overwritten in an S3 bucket with versions, as it was at an instant.

    For a bucket with Object Lock this undoes whatever somebody did with stolen credentials: locked versions
    are still there. Nothing is deleted; objects that were stored later stay. May be run again.
    """
    bucket = open_versions(url or context.repository_url())
    instant = parse_instant(to, zone_name=context.zone_name)
    days = context.config.repository.lock_days
    until = None if days is None else context.clock.now() + timedelta(days=days)
    changes = list(bucket.rewind(instant, lock_until=until, dry_run=dry_run))
    done = [one for one in changes if one.kind != "left"]
    output = context.output

    def human() -> None:
        for one in done:
            output.line(f"{'would be ' if dry_run else ''}{one.kind}: {one.name}")
        left = len(changes) - len(done)
        output.line(f"{len(done)} objects {'would be ' if dry_run else ''}changed, {left} younger ones left")

    output.emit({"url": bucket.url, "to": instant, "dry_run": dry_run, "changes": changes}, human)


def _yes(promised: bool) -> str:
    return "yes" if promised else "NO"
