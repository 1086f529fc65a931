"""
What every command is made of: its class, its context, and the options that several share.

A command is a function that gets a CommandContext first, and returns nothing or an ExitCode:

    @click.command("list", cls=Command)
    @click.argument("name", required=False)
    @with_context
    def list_backups(context: CommandContext, name: str | None) -> None: ...
"""

from __future__ import annotations

import difflib
import functools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import click
from click.shell_completion import CompletionItem

from cloudsave.cli.help_page import write_epilog
from cloudsave.cli.invocation import GLOBAL_FLAGS, Invocation, global_options, invocation_of
from cloudsave.cli.output import Output
from cloudsave.cli.progress import PhasedProgress, choose_progress
from cloudsave.cli.times import open_zone
from cloudsave.clock import Clock
from cloudsave.config.credentials import FoundSecrets, find_secrets
from cloudsave.config.files import file_to_edit
from cloudsave.config.load import load_config
from cloudsave.config.model import Config, SourceConfig
from cloudsave.config.options import Value, option
from cloudsave.config.values import BadValue, parse_text
from cloudsave.errors import CloudsaveError, ConfigurationError, ExitCode, UnknownSource, UsageError
from cloudsave.telemetry import Progress, configure_logging

P = ParamSpec("P")
R = TypeVar("R")
F = TypeVar("F", bound=Callable[..., object])


class Command(click.Command):
    """A command with the global options; its help lists the exit codes that it can end with."""

    def __init__(self, *args: Any, exit_codes: Sequence[ExitCode] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.exit_codes = exit_codes

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """The command's own parameters and the hidden global ones."""
        return [*super().get_params(ctx), *_hidden_options()]

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """Global options by name, and exit codes."""
        write_epilog(formatter, self.exit_codes, flags=GLOBAL_FLAGS)


class Group(click.Group):
    """A command of commands."""

    command_class = Command

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """As for a command."""
        return [*super().get_params(ctx), *_hidden_options()]

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """As for a command."""
        write_epilog(formatter, (), flags=GLOBAL_FLAGS)


@functools.cache
def _hidden_options() -> tuple[click.Option, ...]:
    return tuple(global_options(hidden=True))


class CommandContext:
    """Configuration, output, progress and clock of one command; each is made when it is first asked for."""

    def __init__(self, invocation: Invocation) -> None:
        self.invocation = invocation

    @property
    def clock(self) -> Clock:
        """The clock of this run."""
        return self.invocation.clock

    @functools.cached_property
    def config(self) -> Config:
        """The configuration. Raises: ConfigurationError, SecretInline."""
        return self.load_config()

    @property
    def explicit_file(self) -> Path | None:
        """The file that --config or CLOUDSAVE_CONFIG names."""
        named = os.environ.get("CLOUDSAVE_CONFIG")
        return self.invocation.config_path or (Path(named) if named else None)

    @property
    def file_to_edit(self) -> Path:
        """The file that gets new sources; it may not exist yet."""
        return file_to_edit(self.explicit_file, os.environ)

    def load_config(self, *, missing_ok: bool = False) -> Config:
        """The configuration as it is now."""
        overrides: dict[str, Value] = {
            name: _parse_flag(name, text) for name, text in self.invocation.overrides.items()
        }
        return load_config(
            path=self.explicit_file, environ=os.environ, overrides=overrides, missing_ok=missing_ok
        )

    @functools.cached_property
    def output(self) -> Output:
        """Where results go. A broken configuration shows itself only if a zone has to be looked up."""
        zone_name = self.invocation.overrides.get("timezone") or self._configured_zone()
        return Output(
            json_wanted=self.invocation.json_wanted,
            quiet=self.invocation.quiet,
            zone=open_zone(zone_name) if zone_name else None,
        )

    @functools.cached_property
    def progress(self) -> Progress:
        """Who watches long work."""
        invocation = self.invocation
        silent = invocation.quiet or invocation.json_wanted
        return choose_progress(
            mode=invocation.progress, silent=silent, stderr=sys.stderr, clock=invocation.clock
        )

    @property
    def zone_name(self) -> str | None:
        """The zone for times that are given without one."""
        return self.config.timezone

    def repository_url(self) -> str:
        """Where the repository is. Raises: UsageError if nothing says so."""
        url = self.config.repository.url
        if url is None:
            raise UsageError(
                "no repository is named",
                hints=["--repository URL, CLOUDSAVE_REPOSITORY_URL or url in [repository] name one"],
            )
        return url

    def source(self, name: str) -> SourceConfig:
        """A source of the configuration. Raises: UnknownSource."""
        sources = self.config.sources
        if name not in sources:
            close = difflib.get_close_matches(name, sources, n=1)
            hints = [f"did you mean {close[0]!r}?"] if close else []
            files = ", ".join(f'"{path}"' for path in self.config.files) or "none"
            raise UnknownSource(
                f"unknown source {name!r}",
                detail=f"Configuration files read: {files}.",
                hints=[*hints, "cloudsave source list shows the names"],
            )
        return sources[name]

    def secrets(self, *, new: bool = False) -> FoundSecrets:
        """
        Passphrase and recovery key; a person at a terminal is asked where nothing was found.

        `new`: for a new repository; the passphrase is asked for twice.
        Raises: ConfigurationError if nothing was found and nobody is there.
        """
        found = find_secrets(self.config.repository, os.environ)
        if found.passphrase is not None or (found.recovery_key is not None and not new):
            return found
        if not (sys.stdin.isatty() and sys.stderr.isatty()):
            raise ConfigurationError(
                "no passphrase was given",
                detail="Nobody is at a terminal to be asked.",
                hints=[
                    "set CLOUDSAVE_PASSPHRASE_FILE or repository.passphrase_file to a file of mode 0600",
                    "docs/reference/configuration.md lists the other ways",
                ],
            )
        text = "New passphrase" if new else "Passphrase"
        typed = click.prompt(text, hide_input=True, confirmation_prompt=new, err=True)
        return FoundSecrets(passphrase=str(typed), recovery_key=found.recovery_key)

    def close(self) -> None:
        """Take the progress off the screen."""
        progress = self.__dict__.get("progress")
        if isinstance(progress, PhasedProgress):
            progress.abandon()

    def _configured_zone(self) -> str | None:
        try:
            return self.config.timezone
        except CloudsaveError:
            # The command that needs the configuration reports it; one that does not can still speak.
            return None


def with_context(function: Callable[Concatenate[CommandContext, P], R]) -> Callable[P, R]:
    """Give a command its CommandContext, with logging set up, and close it at the end."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        invocation = invocation_of(click.get_current_context())
        configure_logging(verbose=invocation.verbose, quiet=invocation.quiet)
        context = CommandContext(invocation)
        try:
            return function(context, *args, **kwargs)
        finally:
            context.close()

    return call


def config_option(name: str) -> Callable[[F], F]:
    """
    A command-line option from the table of configuration options, by its path there.

    Its value goes into the configuration that the command reads, not to the function.
    """
    entry = option(name)

    def keep(context: click.Context, _: click.Parameter, value: str | None) -> None:
        if value is not None:
            invocation_of(context).overrides[name] = value

    flag = "--" + name.rpartition(".")[2].replace("_", "-")
    if entry.kind.name == "BOOLEAN":
        return click.option(
            flag,
            help=entry.help,
            callback=keep,
            expose_value=False,
            flag_value="true",
            type=str,
            default=None,
        )
    return click.option(flag, help=entry.help, callback=keep, expose_value=False, metavar=entry.kind.name)


def source_argument(function: F) -> F:
    """The argument NAME, completed from the configuration."""
    return click.argument("name", metavar="NAME", shell_complete=_complete_source)(function)


def _complete_source(context: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem]:
    try:
        sources = CommandContext(invocation_of(context)).config.sources
    except CloudsaveError:
        return []
    return [CompletionItem(name) for name in sources if name.startswith(incomplete)]


def _parse_flag(name: str, text: str) -> Value:
    entry = option(name)
    try:
        return parse_text(entry, text)
    except BadValue as error:
        flag = name.rpartition(".")[2].replace("_", "-") if name != "repository.url" else "repository"
        raise UsageError(
            f"cannot use option --{flag}",
            detail=f"Its value {error}.",
            hints=["docs/reference/configuration.md lists all options and their values"],
        ) from None
