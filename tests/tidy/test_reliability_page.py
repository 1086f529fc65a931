"""The catalogue of faults in docs/reliability.md is well formed, and each fault is played by some test."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.faults.catalogue import BY_NAME, FAULTS, HEADING, PAGE, CatalogueError, parse

TESTS = Path(__file__).parents[1]
FAULTS_MIN = 80


def quoted() -> set[str]:
    """Names in quotes in the tests."""
    pattern = re.compile(r'"([a-z0-9]+(?:-[a-z0-9]+)+)"')
    return {name for path in TESTS.rglob("test_*.py") for name in pattern.findall(path.read_text())}


def test_faults_are_documented_once_each() -> None:
    assert len(BY_NAME) == len(FAULTS) >= FAULTS_MIN


def test_every_documented_fault_is_played() -> None:
    assert not BY_NAME.keys() - quoted()


@pytest.mark.parametrize(
    "line",
    [
        "| `a-b` | it breaks | all | silent |",
        "| `a-b` | it breaks | refused |",
        "| a-b | it | all | refused |",
    ],
)
def test_a_row_that_is_malformed_or_silent_is_noticed(line: str) -> None:
    page = PAGE.read_text()
    with pytest.raises(CatalogueError):
        list(parse(f"{page}{line}\n"))
    with pytest.raises(CatalogueError):
        list(parse(page.replace(HEADING, "")))
