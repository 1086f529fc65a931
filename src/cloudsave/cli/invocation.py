"""The global options, which may stand before or after the command's name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import click

from cloudsave.clock import SYSTEM_CLOCK, Clock

PROGRESS_MODES = ("auto", "json", "off")


@dataclass(slots=True)
class Invocation:
    """What the command line said before any configuration was read."""

    clock: Clock = SYSTEM_CLOCK
    config_path: Path | None = None
    json_wanted: bool = False
    quiet: bool = False
    verbose: bool = False
    progress: str = "auto"
    overrides: dict[str, str] = field(default_factory=dict)
    """Options of the configuration's table, by name, as text."""


def invocation_of(context: click.Context) -> Invocation:
    """The invocation that all contexts of one run share."""
    return context.ensure_object(Invocation)


def global_options(*, hidden: bool) -> list[click.Option]:
    """Fresh parameters; below the top they are hidden, since each help would repeat them."""

    def option(
        flag: str, text: str, store: Callable[[Invocation, str], None], **more: object
    ) -> click.Option:
        def keep(context: click.Context, _: click.Parameter, value: object) -> None:
            if value is not None and value is not False:
                store(invocation_of(context), str(value))

        return click.Option(
            [flag],
            help=text,
            callback=keep,
            expose_value=False,
            hidden=hidden,
            **more,  # type: ignore[arg-type]
        )

    def config(invocation: Invocation, value: str) -> None:
        invocation.config_path = Path(value)

    def repository(invocation: Invocation, value: str) -> None:
        invocation.overrides["repository.url"] = value

    def timezone(invocation: Invocation, value: str) -> None:
        invocation.overrides["timezone"] = value

    def progress(invocation: Invocation, value: str) -> None:
        invocation.progress = value

    def no_progress(invocation: Invocation, _: str) -> None:
        invocation.progress = "off"

    def json_wanted(invocation: Invocation, _: str) -> None:
        invocation.json_wanted = True

    def quiet(invocation: Invocation, _: str) -> None:
        invocation.quiet = True

    def verbose(invocation: Invocation, _: str) -> None:
        invocation.verbose = True

    path = click.Path(dir_okay=False)
    modes = click.Choice(PROGRESS_MODES)
    return [
        option("--config", "The only configuration file to read.", config, type=path, metavar="FILE"),
        option("--repository", "Where the repository is.", repository, metavar="URL"),
        option("--json", "Results as JSON on stdout, errors as JSON on stderr.", json_wanted, is_flag=True),
        option("--quiet", "Print nothing but errors.", quiet, is_flag=True),
        option("--progress", "How progress is shown on stderr.", progress, type=modes),
        option("--no-progress", "The same as --progress off.", no_progress, is_flag=True),
        option("--verbose", "Log what is done; show where unexpected errors arose.", verbose, is_flag=True),
        option(
            "--timezone",
            "Zone of times given without one, and for showing times.",
            timezone,
            metavar="ZONE",
        ),
    ]


GLOBAL_FLAGS = tuple(option.opts[0] for option in global_options(hidden=True))
