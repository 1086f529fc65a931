"""`cloudsave init`: a new repository."""

from __future__ import annotations

from pathlib import Path

import click

from cloudsave import assembly
from cloudsave.cli.frame import Command, CommandContext, with_context
from cloudsave.cli.private_files import write_private_file
from cloudsave.errors import ExitCode, UsageError
from cloudsave.repository.repository import Repository


@click.command("init", cls=Command, exit_codes=(ExitCode.USAGE,))
@click.option(
    "--recovery-key-to",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write the recovery key to this new file instead of printing it.",
)
@click.option(
    "--recipient",
    "recipients",
    multiple=True,
    metavar="AGE1...",
    help="An age recipient who may open the repository too; may be repeated.",
)
@with_context
def init(context: CommandContext, recovery_key_to: Path | None, recipients: tuple[str, ...]) -> None:
    """
    Make a new repository at the configured URL, and a recovery key for it.

    The recovery key opens the repository when the passphrase is lost. It is shown once and stored nowhere:
    print it, or keep it with another person. The standard program `age` opens the key slots with it as
    well.
    """
    config = context.config
    context.repository_url()
    if recovery_key_to is not None and recovery_key_to.exists():
        raise UsageError(f"file for the recovery key exists: {recovery_key_to}", hints=["choose a new file"])
    secrets = context.secrets(new=True)
    assembly.lock_renewal(config, clock=context.clock)
    store = assembly.build_store(config, clock=context.clock)
    created = Repository.create(
        store, passphrase=secrets.passphrase, recipients=recipients, clock=context.clock
    )
    key = created.recovery_key
    if recovery_key_to is not None:
        write_private_file(recovery_key_to, f"# recovery key of {store.url}\n{key.identity}\n")
    output = context.output

    def human() -> None:
        output.line(f"made repository {created.repository.repository_id} at {store.url}")
        if recovery_key_to is not None:
            output.line(
                f"the recovery key is in {recovery_key_to}: move it to a place apart from this machine"
            )
            return
        output.line()
        output.line("recovery key (shown once, stored nowhere; whoever has it can read all backups):")
        output.line(f"    {key.identity}")
        output.line("print it or give it to a second person; without it a lost passphrase loses all backups")

    shown = None if recovery_key_to is not None else key.identity
    output.emit(
        {
            "repository_id": created.repository.repository_id,
            "url": store.url,
            "recovery_recipient": key.recipient,
            "recovery_key": shown,
        },
        human,
    )
