"""`cloudsave source`: the servers in the configuration. Nothing here connects to one."""

from __future__ import annotations

import os
from pathlib import Path

import click

from cloudsave.cli.frame import Command, CommandContext, Group, source_argument, with_context
from cloudsave.cli.output import Column
from cloudsave.config.edit import add_source, remove_source
from cloudsave.config.files import candidate_files, read_file
from cloudsave.config.load import default_slot
from cloudsave.config.model import SourceConfig
from cloudsave.config.options import Value
from cloudsave.config.redact import holds_secret, redact
from cloudsave.engines.registry import SCHEMES
from cloudsave.errors import ConfigurationError, UnknownSource, UnusableUrl, UsageError


@click.group("source", cls=Group)
def source() -> None:
    """The database servers to protect."""


@source.command("add", cls=Command)
@source_argument
@click.argument("url", metavar="URL")
@click.option("--backup-url", metavar="URL", help="Server that base backups are read from: a standby.")
@click.option("--slot", help="Name of the replication slot.  [default: cloudsave_NAME]")
@click.option("--checkpoint", type=click.Choice(("fast", "spread")), help="How a base backup begins.")
@click.option("--mode", type=click.Choice(("auto", "local", "remote")), help="How files are read.")
@click.option("--rpo-seconds", type=float, help="How much may be lost with the server.")
@with_context
def add(context: CommandContext, /, name: str, url: str, **given: str | float | None) -> None:
    """
    Add the server at URL as NAME to the configuration file.

    The URL has no password: that stands in ~/.pgpass, PGPASSFILE or PGPASSWORD. `cloudsave check NAME` then
    tells whether the server can be protected.
    """
    settings: dict[str, Value] = {"url": url}
    settings |= {key: value for key, value in given.items() if value is not None}
    path = context.file_to_edit
    config = context.load_config(missing_ok=True)
    if name in config.sources:
        raise ConfigurationError(
            f"source {name!r} exists already", hints=[f"cloudsave source show {name} tells where it stands"]
        )
    for one in (url, str(given.get("backup_url") or url)):
        if not holds_secret(one):
            check_url_form(one)
    slot = str(given.get("slot") or default_slot(name))
    for other in config.sources.values():
        if (other.url, other.slot) == (url, slot):
            raise ConfigurationError(
                f"source {other.name!r} has the same server and slot",
                detail="Each would release log that the other still needs.",
            )
    add_source(path, name, settings)
    added = context.load_config().sources[name]
    context.output.emit(
        {**_facts(added), "file": path}, lambda: context.output.line(f'source {name!r} added to "{path}"')
    )
    context.output.note(f"next: cloudsave check {name}")


@source.command("list", cls=Command)
@with_context
def list_sources(context: CommandContext) -> None:
    """List all sources."""
    sources = sorted(context.config.sources.values(), key=lambda entry: entry.name)

    def human() -> None:
        columns: list[Column | str] = ["NAME", "URL", "SLOT", "MODE", Column("RPO", right=True)]
        rows = [
            (entry.name, redact(entry.url), entry.slot, entry.mode, f"{entry.rpo_seconds:g} s")
            for entry in sources
        ]
        context.output.table(columns, rows)
        if not sources:
            context.output.note("no source yet: cloudsave source add NAME URL")

    context.output.emit({"sources": [_facts(entry) for entry in sources]}, human)


@source.command("show", cls=Command)
@source_argument
@with_context
def show(context: CommandContext, name: str) -> None:
    """Show the settings of one source, and the files that have it."""
    entry = context.source(name)
    files = _files_with(context, name)
    facts = _facts(entry)
    pairs = [(key, f"{value:g}" if isinstance(value, float) else value) for key, value in facts.items()]
    pairs.append(("files", ", ".join(str(path) for path in files) or "none: it comes from the environment"))
    context.output.emit({**facts, "files": files}, lambda: context.output.pairs(pairs))


@source.command("remove", cls=Command)
@source_argument
@click.option("--yes", is_flag=True, help="Really remove it.")
@with_context
def remove(context: CommandContext, name: str, yes: bool) -> None:
    """
    Remove a source from the configuration.

    Its backups and log in the repository stay. Its replication slot on the server stays as well.
    """
    entry = context.source(name)
    if not yes:
        raise UsageError(
            f"source {name!r} is removed only with --yes",
            detail="It would not be backed up any more; what the repository holds of it stays.",
            hints=[f"cloudsave source remove {name} --yes"],
        )
    files = _files_with(context, name)
    if not files:
        raise UnknownSource(
            f"source {name!r} is in no configuration file", detail="It comes from the environment."
        )
    for path in files:
        remove_source(path, name)
    context.output.emit(
        {"name": name, "removed_from": files, "slot": entry.slot},
        lambda: context.output.line(f"source {name!r} removed from {', '.join(map(str, files))}"),
    )
    context.output.note(
        f"warning: if log was captured, drop the replication slot {entry.slot!r} on the server, or it keeps "
        "log until the disk is full"
    )


def check_url_form(url: str) -> None:
    """Raises UnusableUrl for what no engine would take."""
    scheme, separator, rest = url.partition("://")
    if not separator or scheme not in SCHEMES:
        raise UnusableUrl(
            f"cannot use source URL {redact(url)!r}",
            detail=f"It must begin with one of {', '.join(f'{known}://' for known in SCHEMES)}.",
            hints=["a source URL looks like postgresql://user@host:5432/postgres"],
        )
    if any(char.isspace() or not char.isprintable() for char in rest):
        raise UnusableUrl(
            "cannot use source URL",
            detail="It has a space or a control character in it.",
            hints=["are special characters in user, password and names percent-encoded?"],
        )


def _files_with(context: CommandContext, name: str) -> list[Path]:
    """The configuration files that have a table for the source."""
    found = []
    for path in candidate_files(context.explicit_file, os.environ):
        file = read_file(path)
        sources = file.tables.get("sources") if file is not None else None
        if isinstance(sources, dict) and name in sources:
            found.append(path)
    return found


def _facts(entry: SourceConfig) -> dict[str, str | float]:
    """What may be shown of a source."""
    return {
        "name": entry.name,
        "url": redact(entry.url),
        "backup_url": redact(entry.backup_url or entry.url),
        "slot": entry.slot,
        "checkpoint": entry.checkpoint,
        "mode": entry.mode,
        "rpo_seconds": entry.rpo_seconds,
    }
