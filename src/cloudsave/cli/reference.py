"""`python -m cloudsave.cli.reference`: prints docs/reference/commands.md, the help of every command."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import click

from cloudsave.cli.main import PROGRAM, cli

WIDTH = 100
_HEAD = """# Commands

Made from the commands themselves by `python -m cloudsave.cli.reference`: it is what `--help` prints.
"""


def render() -> str:
    """The whole page."""
    context = click.Context(
        cli,
        info_name=PROGRAM,
        help_option_names=["-h", "--help"],
        terminal_width=WIDTH,
        max_content_width=WIDTH,
    )
    return _HEAD + "".join(_sections(cli, context))


def _sections(command: click.Command, context: click.Context) -> Iterator[str]:
    lines = [line.rstrip() for line in command.get_help(context).splitlines()]
    text = "\n".join(lines)
    yield f"\n## `{context.command_path}`\n\n```text\n{text}\n```\n"
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            assert inner is not None
            yield from _sections(inner, click.Context(inner, info_name=name, parent=context))


if __name__ == "__main__":
    sys.stdout.write(render())
