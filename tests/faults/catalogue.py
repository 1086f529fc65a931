"""
The catalogue of faults: what happens, what a user would otherwise lose, and how it must end.

It is the tables of docs/reliability.md, read from there, so that no second list can differ. Tests name the
faults that they play with `@pytest.mark.fault("name", ...)` (tests/fault_report.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs/reliability.md"
HEADING = "## The faults"
_GROUP = re.compile(r"^### (?P<group>.+)$")
_ROW = re.compile(
    r"^\| `(?P<name>[a-z0-9-]+)` \| (?P<happens>[^|]+) \| (?P<lost>[^|]+) \| (?P<outcome>\w+) \|$"
)
_FURNITURE = ("| fault | what happens | otherwise lost | outcome |", "|---|---|---|---|", "")


class Outcome(StrEnum):
    """How a fault must end. There is no fourth: silence is a defect."""

    PREVENTED = "prevented"
    """The command succeeds, and what it makes is right."""
    REFUSED = "refused"
    """A typed error; nothing wrong is stored or started."""
    ALARMED = "alarmed"
    """It goes on with what is left, and says so where a person looks: exit code, finding, event, note."""


class CatalogueError(ValueError):
    """The page does not hold the tables as they must be."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One entry."""

    name: str
    group: str
    happens: str
    otherwise: str
    """What would be lost if nobody noticed."""
    outcome: Outcome


def parse(page: str) -> Iterator[Fault]:
    """The faults of a page. Raises: CatalogueError where a line of the tables is malformed."""
    _, found, tables = page.partition(f"{HEADING}\n")
    if not found:
        raise CatalogueError(f"no heading {HEADING!r}")
    group = ""
    for line in tables.splitlines():
        if heading := _GROUP.match(line):
            group = heading["group"]
        elif row := _ROW.match(line):
            yield Fault(row["name"], group, row["happens"], row["lost"], _outcome(row["outcome"]))
        elif line not in _FURNITURE:
            raise CatalogueError(f"not a row of the catalogue: {line!r}")


def _outcome(word: str) -> Outcome:
    if word not in set(Outcome):
        raise CatalogueError(f"a fault ends {word!r}, which is none of {', '.join(Outcome)}")
    return Outcome(word)


FAULTS = tuple(parse(PAGE.read_text()))
BY_NAME = {one.name: one for one in FAULTS}
