"""`cloudsave store`: whether a store keeps the promises that backups rest on."""

from __future__ import annotations

import click

from cloudsave.cli.frame import Command, CommandContext, Group, with_context
from cloudsave.errors import ExitCode
from cloudsave.store.contract import run_contract
from cloudsave.store.open import open_store

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


def _yes(promised: bool) -> str:
    return "yes" if promised else "NO"
