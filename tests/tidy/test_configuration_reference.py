"""docs/reference/configuration.md is what the table of options gives."""

from __future__ import annotations

from pathlib import Path

from cloudsave.config.options import OPTIONS
from cloudsave.config.reference import render

PAGE = Path(__file__).parents[2] / "docs/reference/configuration.md"


def test_configuration_is_documented_as_it_is() -> None:
    assert PAGE.read_text() == render(), (
        "run python -m cloudsave.config.reference > docs/reference/configuration.md"
    )


def test_every_option_has_its_section() -> None:
    text = PAGE.read_text()
    assert [entry.toml for entry in OPTIONS if f"### `{entry.toml}`\n\n{entry.help}" not in text] == []
