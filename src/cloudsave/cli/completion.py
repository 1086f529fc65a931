"""`cloudsave completion SHELL`."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from cloudsave.cli.frame import Command, CommandContext, with_context
from cloudsave.cli.main import COMPLETION_VARIABLE, PROGRAM

SHELLS = ("bash", "zsh", "fish")
_WHERE = {
    "bash": "/etc/bash_completion.d/cloudsave",
    "zsh": "a directory of $fpath, as _cloudsave",
    "fish": "~/.config/fish/completions/cloudsave.fish",
}


@click.command("completion", cls=Command)
@click.argument("shell", type=click.Choice(SHELLS))
@with_context
def completion(context: CommandContext, shell: str) -> None:
    """
    Print the script that makes SHELL complete commands, options and source names.

    For this shell alone: eval "$(cloudsave completion bash)"
    """
    kind = get_completion_class(shell)
    assert kind is not None, f"click knows no {shell}"
    root = click.get_current_context().find_root().command
    script = kind(root, {}, PROGRAM, COMPLETION_VARIABLE).source()
    context.output.emit({"shell": shell, "script": script}, lambda: context.output.line(script.strip("\n")))
    context.output.note(f"# for all sessions, store this as {_WHERE[shell]}")
