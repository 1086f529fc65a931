"""docs/reference/commands.md is what the commands say of themselves."""

from __future__ import annotations

from pathlib import Path

from cloudsave.cli.reference import render
from cloudsave.cli.table import COMMANDS

PAGE = Path(__file__).parents[2] / "docs/reference/commands.md"


def test_commands_are_documented_as_they_are() -> None:
    assert PAGE.read_text() == render(), "run python -m cloudsave.cli.reference > docs/reference/commands.md"


def test_every_command_has_its_section() -> None:
    text = PAGE.read_text()
    assert [name for name in COMMANDS if f"## `cloudsave {name}`" not in text] == []
