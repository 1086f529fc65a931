"""
What a command says: data on stdout, as JSON or for people, everything else on stderr.

With `--json` a result is one JSON document on one line (indented on a terminal); instants are RFC 3339 in
UTC, sizes are bytes and durations seconds, named so.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, tzinfo
from enum import Enum
from pathlib import PurePath
from typing import TextIO

from cloudsave.cli.formats import format_instant, format_utc, printable
from cloudsave.config.redact import redact

_GAP = "  "


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a table; numbers stand to the right."""

    title: str
    right: bool = False


class Output:
    """Where results go. Quiet: nothing but errors and, where `--json` asks for it, JSON."""

    def __init__(
        self,
        *,
        json_wanted: bool = False,
        quiet: bool = False,
        zone: tzinfo | None = None,
        stdout: TextIO | None = None,
        stderr: TextIO | None = None,
    ) -> None:
        self.json_wanted = json_wanted
        self.quiet = quiet
        self._zone = zone
        self._stdout = stdout or sys.stdout
        self._stderr = stderr or sys.stderr

    def emit(self, data: object, human: Callable[[], None]) -> None:
        """
        The result of a command: `data`, a dataclass or mapping, as JSON, or what `human` prints by the
        methods below. A command calls it once, or once per event.
        """
        if self.json_wanted:
            indent = 2 if self._stdout.isatty() else None
            text = json.dumps(to_jsonable(data), indent=indent, ensure_ascii=False, allow_nan=False)
            self._stdout.write(text + "\n")
        elif not self.quiet:
            human()
        self._stdout.flush()

    def note(self, text: str) -> None:
        """One remark for people, on stderr."""
        if not self.quiet and not self.json_wanted:
            self._stderr.write(redact(text) + "\n")
            self._stderr.flush()

    # ---- for `human`

    def line(self, text: str = "") -> None:
        """One line of the result."""
        self._stdout.write(text + "\n")

    def pairs(self, pairs: Sequence[tuple[str, str]]) -> None:
        """Names and values below each other."""
        width = max((len(name) for name, _ in pairs), default=0)
        for name, value in pairs:
            self.line(f"{name:<{width}}{_GAP}{printable(value)}".rstrip())

    def table(self, columns: Sequence[Column | str], rows: Sequence[Sequence[str]]) -> None:
        """A table; in a pipe its lines are never wrapped or cut."""
        titled = [column if isinstance(column, Column) else Column(column) for column in columns]
        clean = [[printable(cell) for cell in row] for row in rows]
        if self._stdout.isatty():
            self._rich_table(titled, clean)
        else:
            for text in plain_table(titled, clean):
                self.line(text)

    def instant(self, instant: datetime | None) -> str:
        """UTC and the zone that was asked for, or this machine's; a dash for none."""
        return "-" if instant is None else format_instant(instant, self._zone)

    def _rich_table(self, columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in columns:
            table.add_column(Text(column.title), justify="right" if column.right else "left", overflow="fold")
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        Console(file=self._stdout).print(table)


def plain_table(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table with a header."""
    all_rows = [[column.title for column in columns], *rows]
    widths = [max(len(row[index]) for row in all_rows) for index in range(len(columns))]
    return [
        _GAP.join(
            cell.rjust(width) if column.right else cell.ljust(width)
            for cell, width, column in zip(row, widths, columns, strict=True)
        ).rstrip()
        for row in all_rows
    ]


def to_jsonable(value: object) -> object:
    """
    Dataclasses, mappings, sequences, instants, paths and enumerations as JSON has them.

    Raises: TypeError for anything else, so that no object is shown by its memory address.
    """
    if value is None or (isinstance(value, bool | int | float | str) and not isinstance(value, Enum)):
        return value
    if isinstance(value, Enum):
        return value.value if isinstance(value.value, str) else value.name.lower()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_jsonable(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_jsonable(item) for key, item in value.items()}
    if isinstance(value, datetime):
        return format_utc(value)
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, list | tuple):
        return [to_jsonable(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((to_jsonable(item) for item in value), key=str)
    raise TypeError(f"no JSON form for {type(value).__name__}")
