"""`cloudsave key`: who can open the repository."""

from __future__ import annotations

from pathlib import Path

import click

from cloudsave import assembly
from cloudsave.cli.frame import Command, CommandContext, Group, with_context
from cloudsave.config.credentials import read_passphrase_file
from cloudsave.errors import UsageError
from cloudsave.repository.repository import Repository


@click.group("key", cls=Group)
def key() -> None:
    """Passphrases and recipients that open the repository."""


def _repository(context: CommandContext) -> Repository:
    return assembly.open_repository(context.config, context.secrets(), clock=context.clock)


@key.command("list", cls=Command)
@with_context
def list_keys(context: CommandContext) -> None:
    """List the key slots. No secret is shown."""
    slots = _repository(context).key_slots()
    output = context.output
    output.emit(
        slots,
        lambda: output.table(
            ["SLOT", "TYPE", "RECIPIENT"],
            [[slot.slot_id, slot.type, slot.recipient or "-"] for slot in slots],
        ),
    )


@key.command("add", cls=Command)
@click.option("--recipient", metavar="AGE1...", help="The public part of an age key.")
@click.option(
    "--passphrase-from",
    "passphrase_from",
    type=click.Path(exists=True, dir_okay=False),
    metavar="FILE",
    help="File of mode 0600 that holds a further passphrase.",
)
@with_context
def add(context: CommandContext, recipient: str | None, passphrase_from: str | None) -> None:
    """Add a slot for an age recipient or for a further passphrase."""
    if (recipient is None) == (passphrase_from is None):
        raise UsageError("give either --recipient or --passphrase-from")
    repository = _repository(context)
    if recipient is not None:
        repository.add_recipient(recipient)
    elif passphrase_from is not None:
        repository.add_passphrase(read_passphrase_file(Path(passphrase_from)))
    context.output.emit({"added": True}, lambda: context.output.line("a key slot was added"))
