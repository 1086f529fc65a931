"""
The command `cloudsave`: finds the command, runs it, and is the only place that prints errors and exits.

Commands are imported when they run, so that `--help` and completion answer at once.
"""

from __future__ import annotations

import gc
import importlib
import os
import select
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn

import click
from click.shell_completion import CompletionItem, shell_complete

from cloudsave.cli.help_page import write_epilog
from cloudsave.cli.interruption import signals_interrupt
from cloudsave.cli.invocation import Invocation, global_options
from cloudsave.cli.private_memory import forbid_core_dumps
from cloudsave.cli.table import COMMANDS
from cloudsave.clock import SYSTEM_CLOCK, Clock
from cloudsave.errors import CloudsaveError, ExitCode
from cloudsave.version import VERSION

PROGRAM = "cloudsave"
COMPLETION_VARIABLE = "_CLOUDSAVE_COMPLETE"
GC_THRESHOLDS = (50_000, 20, 50)
"""We make hundreds of thousands of objects and hardly a cycle: looking for some less often saves CPU."""


class LazyGroup(click.Group):
    """The top: knows the names and short helps of all commands without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """In the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Import the one command."""
        entry = COMMANDS.get(cmd_name)
        if entry is None:
            return None
        module, _, attribute = entry.target.partition(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command), f"{entry.target} is no command"
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """A name that is none is compared with the table's."""
        if args[0] not in COMMANDS and not args[0].startswith("-") and not ctx.resilient_parsing:
            raise click.NoSuchCommand(args[0], possibilities=COMMANDS, ctx=ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """Names and short helps from the table."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.short_help) for name, entry in COMMANDS.items()])

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """All exit codes."""
        write_epilog(formatter, list(ExitCode))

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Commands from the table, then options."""
        names = [
            CompletionItem(name, help=entry.short_help)
            for name, entry in COMMANDS.items()
            if name.startswith(incomplete)
        ]
        return [*names, *click.Command.shell_complete(self, ctx, incomplete)]


cli = LazyGroup(
    PROGRAM,
    help="Application-consistent backup and point-in-time recovery for databases.",
    params=list(global_options(hidden=False)),
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
click.version_option(VERSION, prog_name=PROGRAM)(cli)


def main() -> NoReturn:
    """The entry point of the console script."""
    gc.set_threshold(*GC_THRESHOLDS)
    forbid_core_dumps()
    status = run(sys.argv[1:])
    if status in (ExitCode.DONE, ExitCode.FINDINGS):
        _leave_at_once(status)
    sys.exit(status)


def _leave_at_once(status: int) -> None:
    """
    End a command that has done its work without taking the interpreter apart, which takes as long as a small
    backup. Returns where a thread is still at work, or what was said cannot be written: that needs the usual
    end, as whatever failed or was interrupted does.
    """
    if any(not thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread()):
        return
    with suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def run(arguments: Sequence[str], *, clock: Clock = SYSTEM_CLOCK) -> int:
    """Run one command line and report its errors. Returns the exit code."""
    instruction = os.environ.get(COMPLETION_VARIABLE)
    if instruction:
        return shell_complete(cli, {}, PROGRAM, COMPLETION_VARIABLE, instruction)
    # We use no linear algebra; the threads that numpy keeps for it would only spin.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    with signals_interrupt(clock):
        return _run_and_report(arguments, Invocation(clock=clock))


def _run_and_report(arguments: Sequence[str], invocation: Invocation) -> int:
    try:
        status = _invoke(arguments, invocation)
        sys.stdout.flush()
    except SystemExit:
        raise
    except BaseException as error:  # noqa: BLE001 - see below
        # The one place that turns whatever happened into an exit code.
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            _discard_stdout()
            return ExitCode.FAILED
        status = _report(error, arguments, invocation)
        _flush_or_discard()
    return status


def _invoke(arguments: Sequence[str], invocation: Invocation) -> int:
    try:
        with cli.make_context(PROGRAM, list(arguments), obj=invocation) as context:
            result = cli.invoke(context)
    except click.exceptions.Exit as done:
        return done.exit_code
    return int(result) if isinstance(result, ExitCode) else ExitCode.DONE


def _report(error: BaseException, arguments: Sequence[str], invocation: Invocation) -> int:
    """Say on stderr what went wrong. Returns the exit code."""
    from cloudsave.cli import render

    known = render.as_cloudsave_error(error)
    # A line that could not be parsed may have told nothing to the invocation yet.
    if invocation.json_wanted or "--json" in arguments:
        text = render.error_json(known)
    elif isinstance(error, click.exceptions.NoArgsIsHelpError):
        text = error.format_message()
    else:
        text = render.error_text(known)
    if invocation.verbose and type(known) is CloudsaveError:
        text = render.traceback_text(error) + "\n" + text
    with suppress(OSError, ValueError, AttributeError):
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
    return known.exit_code


def _reader_is_gone() -> bool:
    """Whether it was our stdout whose reader has left, as `head` does, and not some other pipe or socket."""
    with suppress(OSError, ValueError, AttributeError):
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    return False


def _flush_or_discard() -> None:
    """An error has been reported; a second one from the same stdout would only hide it."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        _discard_stdout()


def _discard_stdout() -> None:
    """Let the interpreter's last flush succeed."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
