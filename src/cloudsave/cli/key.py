"""`cloudsave key`: who can open the repository."""

from __future__ import annotations

from pathlib import Path

import click

from cloudsave import assembly
from cloudsave.cli.frame import Command, CommandContext, Group, with_context
from cloudsave.cli.private_files import write_private_file
from cloudsave.config.credentials import read_passphrase_file
from cloudsave.errors import ExitCode, StorePermission, UsageError
from cloudsave.repository.keys import KeySlot, Secret, new_recovery_key
from cloudsave.repository.repository import Repository

_RECIPIENT = click.option(
    "--recipient",
    "recipients",
    metavar="AGE1...",
    multiple=True,
    help="The public part of an age key; may be repeated.",
)
_PASSPHRASE_FROM = click.option(
    "--passphrase-from",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="File of mode 0600 that holds the new passphrase.",
)
_RECOVERY_KEY_TO = click.option(
    "--recovery-key-to",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Make a new recovery key and write it to this new file.",
)


@click.group("key", cls=Group)
def key() -> None:
    """Passphrases and recipients that open the repository."""


def _repository(context: CommandContext) -> Repository:
    return assembly.open_repository(context.config, context.secrets(), clock=context.clock)


@key.command("list", cls=Command, exit_codes=(ExitCode.INTEGRITY,))
@with_context
def list_keys(context: CommandContext) -> None:
    """List the key slots. No secret is shown."""
    repository = _repository(context)
    slots = repository.key_slots()
    output = context.output
    output.emit(
        slots,
        lambda: output.table(
            ["SLOT", "TYPE", "STORED", "RECIPIENT"],
            [
                [
                    slot.slot_id,
                    slot.type if slot.key_id in ("", repository.key_id) else f"{slot.type} of another key",
                    output.instant(slot.stored_utc),
                    slot.recipient or "-",
                ]
                for slot in slots
            ],
        ),
    )


@key.command("add", cls=Command, exit_codes=(ExitCode.INTEGRITY,))
@_RECIPIENT
@_PASSPHRASE_FROM
@_RECOVERY_KEY_TO
@with_context
def add(
    context: CommandContext,
    recipients: tuple[str, ...],
    passphrase_from: Path | None,
    recovery_key_to: Path | None,
) -> None:
    """Add slots for a further passphrase, a new recovery key, or age recipients."""
    passphrase = _new_passphrase(recipients, passphrase_from, recovery_key_to)
    added = _add(_repository(context), recipients, passphrase, recovery_key_to)
    context.output.emit({"added": added}, lambda: context.output.line(f"added key slot {', '.join(added)}"))


@key.command("remove", cls=Command, exit_codes=(ExitCode.INTEGRITY,))
@click.argument("slots", metavar="SLOT...", nargs=-1, required=True)
@click.option("--dry-run", is_flag=True, help="Say what would be done.")
@with_context
def remove(context: CommandContext, slots: tuple[str, ...], *, dry_run: bool) -> None:
    """
    Remove key slots by their ids, as `key list` shows them.

    The secret of a removed slot opens nothing that it can only open by the slot. Who opened the repository
    before may have kept its key, and who kept a copy of the slot can still use that.
    """
    found = context.secrets()
    repository = assembly.open_repository(context.config, found, clock=context.clock)
    # Which of the two had opened it does not matter: one that stays must.
    secret = Secret(passphrase=found.passphrase, recovery_key=found.recovery_key)
    _remove(context, repository, [], slots, secret=secret, dry_run=dry_run)


@key.command("rotate", cls=Command, exit_codes=(ExitCode.INTEGRITY,))
@_RECIPIENT
@_PASSPHRASE_FROM
@_RECOVERY_KEY_TO
@click.option("--keep", metavar="SLOT", multiple=True, help="Keep this slot; may be repeated.")
@click.option("--dry-run", is_flag=True, help="Say what would be done.")
@with_context
def rotate(
    context: CommandContext,
    recipients: tuple[str, ...],
    passphrase_from: Path | None,
    recovery_key_to: Path | None,
    keep: tuple[str, ...],
    *,
    dry_run: bool,
) -> None:
    """
    Replace all secrets: afterwards only those that are named here open the repository.

    The new slots are stored, read back and opened before an old one is removed; interrupted, old and new
    secrets open, and the command can be run again. Nothing but slots is written, whatever the size of the
    repository: its own key stays, so that who opened it before may have kept that.
    """
    passphrase = _new_passphrase(recipients, passphrase_from, recovery_key_to)
    repository = _repository(context)
    before = {slot.slot_id: slot for slot in repository.key_slots()}
    _refuse_without_recovery(repository, before, keep, new=bool(recipients or recovery_key_to))
    added = [] if dry_run else _add(repository, recipients, passphrase, recovery_key_to)
    _remove(context, repository, added, [one for one in before if one not in keep], dry_run=dry_run)


def _new_passphrase(
    recipients: tuple[str, ...], passphrase: Path | None, recovery: Path | None
) -> str | None:
    """The passphrase to add, if any. Raises: UsageError where nothing is to be added."""
    if not (recipients or passphrase or recovery):
        raise UsageError("give --passphrase-from, --recovery-key-to or --recipient")
    if recovery is not None and recovery.exists():
        raise UsageError(f"file for the recovery key exists: {recovery}", hints=["choose a new file"])
    return read_passphrase_file(passphrase) if passphrase is not None else None


def _refuse_without_recovery(
    repository: Repository, slots: dict[str, KeySlot], keep: tuple[str, ...], *, new: bool
) -> None:
    """Raises: UsageError where only passphrases would be left, or a slot to keep is not there."""
    for slot_id in keep:
        if slot_id not in slots:
            raise UsageError(f"unknown key slot {slot_id!r}", hints=["`cloudsave key list` shows the slots"])
    kept = [slots[one] for one in keep if slots[one].type == "age" and slots[one].key_id == repository.key_id]
    if not new and not kept:
        raise UsageError(
            "cannot rotate to passphrases alone: one that is lost would lose all backups",
            hints=[
                "--recovery-key-to FILE makes a new recovery key",
                "--keep SLOT keeps that of a recipient",
            ],
        )


def _add(
    repository: Repository, recipients: tuple[str, ...], passphrase: str | None, recovery_key_to: Path | None
) -> list[str]:
    """Add slots; their ids. The recovery key is on stable storage before its slot is."""
    added = [repository.add_recipient(recipient) for recipient in recipients]
    if passphrase is not None:
        added.append(repository.add_passphrase(passphrase))
    if recovery_key_to is not None:
        recovery_key = new_recovery_key()
        text = f"# recovery key of {repository.store.url}\n{recovery_key.identity}\n"
        write_private_file(recovery_key_to, text)
        added.append(repository.add_recovery_key(recovery_key))
    return added


def _remove(
    context: CommandContext,
    repository: Repository,
    added: list[str],
    slots: tuple[str, ...] | list[str],
    *,
    secret: Secret | None = None,
    dry_run: bool,
) -> None:
    """Remove slots and say so. Raises: as `Repository.remove_slots`."""
    try:
        # In a dry run of a rotation what will be left is not there yet.
        if not dry_run or secret is not None:
            repository.remove_slots(slots, secret=secret, dry_run=dry_run)
    except StorePermission as error:
        raise StorePermission(
            "could not remove key slots: the old secrets go on opening the repository",
            detail=f"New: {', '.join(added) or 'none'}. To be removed: {', '.join(slots)}. {error.detail}",
            hints=["give `cloudsave key remove` credentials that may delete objects below keys/"],
        ) from error
    output = context.output

    def human() -> None:
        for one in added:
            output.line(f"added key slot {one}")
        for one in slots:
            output.line(f"{'would remove' if dry_run else 'removed'} key slot {one}")
        if not dry_run:
            output.line("who opened the repository before may have kept its key: docs/threat_model.md")

    output.emit({"added": added, "removed": list(slots), "dry_run": dry_run}, human)
