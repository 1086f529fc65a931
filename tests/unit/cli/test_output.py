"""Results for people and for programs; progress that disturbs neither."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from enum import StrEnum
from pathlib import Path

import pytest

from cloudsave.cli.formats import format_duration, format_rate, format_size, printable
from cloudsave.cli.output import Column, Output, to_jsonable
from cloudsave.cli.progress import BarProgress, JsonProgress, LineProgress, choose_progress
from cloudsave.clock import Clock
from cloudsave.telemetry import NoProgress


class Hands(Clock):
    """A clock whose hands the test moves."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def monotonic(self) -> float:
        return self.seconds


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


class Colour(StrEnum):
    RED = "red"


@dataclass(frozen=True)
class Row:
    name: str
    when: datetime
    path: Path
    colours: tuple[Colour, ...]
    digest: bytes


ROW = Row(
    "ä", datetime(2026, 1, 1, 1, tzinfo=timezone(timedelta(hours=1))), Path("/x"), (Colour.RED,), b"\x00\xff"
)


def _output(**options: bool) -> tuple[Output, io.StringIO, io.StringIO]:
    out, err = io.StringIO(), io.StringIO()
    return Output(stdout=out, stderr=err, **options), out, err


def test_json_is_one_document_on_one_line() -> None:
    output, out, err = _output(json_wanted=True, quiet=True)
    output.emit({"rows": [ROW], "took": timedelta(seconds=1.5)}, lambda: output.line("no"))
    output.note("not shown")
    assert out.getvalue().count("\n") == 1
    assert json.loads(out.getvalue()) == {
        "rows": [
            {"name": "ä", "when": "2026-01-01T00:00:00Z", "path": "/x", "colours": ["red"], "digest": "00ff"}
        ],
        "took": 1.5,
    }
    assert err.getvalue() == ""


def test_what_has_no_json_form_is_an_error() -> None:
    with pytest.raises(TypeError):
        to_jsonable({"x": object()})
    output, out, _ = _output(json_wanted=True)
    with pytest.raises(ValueError, match="JSON"):
        output.emit({"x": float("nan")}, lambda: None)
    assert out.getvalue() == ""


def test_people_get_lines_and_quiet_gets_none() -> None:
    for quiet, wanted in ((False, "hello\n"), (True, "")):
        output, out, err = _output(quiet=quiet)
        output.emit({}, lambda: output.line("hello"))  # noqa: B023 - called at once
        output.note("see postgresql://u:geheim@h/")
        assert out.getvalue() == wanted
        assert err.getvalue() == ("" if quiet else "see postgresql://u:***@h/\n")


def test_a_table_in_a_pipe_is_neither_wrapped_nor_cut() -> None:
    output, out, _ = _output()
    output.table(["NAME", Column("SIZE", right=True)], [("x" * 300, "1"), ("b\x1b[31m\n", "22")])
    header, long, short = out.getvalue().splitlines()
    assert long == "x" * 300 + "     1"
    assert short.split() == ["b\\x1b[31m\\n", "22"]
    assert header.endswith("SIZE")


def test_a_table_on_a_terminal_shows_markup_as_it_is() -> None:
    out = Terminal()
    Output(stdout=out, stderr=io.StringIO()).table(["NAME"], [("[bold]x[/bold]",)])
    assert "[bold]x[/bold]" in out.getvalue()


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "0.98 KiB"),
        (1 << 20, "1.00 MiB"),
        (15 << 29, "7.50 GiB"),
        (123 << 20, "123 MiB"),
        (1 << 60, "1024 PiB"),
    ],
)
def test_sizes_have_three_digits(size_bytes: int, text: str) -> None:
    assert format_size(size_bytes) == text
    assert format_rate(size_bytes) == text + "/s"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.251, "0.25 s"),
        (42.4, "42 s"),
        (59.9, "1 min 00 s"),
        (187, "3 min 07 s"),
        (7500, "2 h 05 min"),
        (273600, "3 d 04 h"),
        (-5, "-5.00 s"),
    ],
)
def test_durations_have_two_units(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_terminal_codes_are_made_visible() -> None:
    assert printable("a\x1b]0;x\x07\r\u202eb ä") == "a\\x1b]0;x\\x07\\r\\u202eb ä"


def test_a_pipe_gets_one_line_each_ten_seconds() -> None:
    err, clock = io.StringIO(), Hands()
    progress = LineProgress(err, clock)
    progress.begin("backup of orders", bytes_total=100 << 20)
    for _ in range(25):
        clock.seconds += 1
        progress.advance(1 << 20)
    assert err.getvalue().splitlines() == [
        "backup of orders: 10.0 MiB of 100 MiB, 1.00 MiB/s, about 1 min 30 s left",
        "backup of orders: 20.0 MiB of 100 MiB, 1.00 MiB/s, about 1 min 20 s left",
    ]
    progress.finish()
    progress.finish()
    progress.advance(5)
    assert err.getvalue().splitlines()[2:] == ["backup of orders: 25.0 MiB in 25 s, 1.00 MiB/s"]


def test_json_progress_is_lines_of_json() -> None:
    err, clock = io.StringIO(), Hands()
    progress = JsonProgress(err, clock)
    progress.note("waiting for postgresql://u:geheim@h/")
    progress.begin("restore", bytes_total=None)
    clock.seconds += 2
    progress.advance(100)
    progress.finish()
    lines = [json.loads(line) for line in err.getvalue().splitlines()]
    assert lines[0] == {"note": "waiting for postgresql://u:***@h/"}
    assert [line["progress"]["done"] for line in lines[1:]] == [False, True]
    assert lines[1]["progress"]["bytes_per_second"] == 50


def test_a_phase_that_failed_is_not_said_to_be_done() -> None:
    for kind in (LineProgress, JsonProgress):
        err, clock = io.StringIO(), Hands()
        progress = kind(err, clock)
        progress.begin("backup", bytes_total=10)
        progress.advance(5)
        progress.abandon()
        assert err.getvalue() == ""


def test_a_bar_ends_with_a_plain_line() -> None:
    err, clock = Terminal(), Hands()
    progress = BarProgress(err, clock)
    progress.begin("backup [red]", bytes_total=10)
    clock.seconds += 1
    progress.advance(10)
    progress.note("half [way]")
    progress.finish()
    assert "half [way]" in err.getvalue()
    assert err.getvalue().endswith("backup [red]: 10 B in 1.00 s, 10 B/s\n")


def test_a_closed_stderr_stops_no_work() -> None:
    err, clock = io.StringIO(), Hands()
    progress = LineProgress(err, clock)
    progress.begin("backup", bytes_total=None)
    err.close()
    clock.seconds += 20
    progress.advance(1)
    progress.finish()


def test_who_watches_decides_the_form() -> None:
    clock = Clock()

    def choose(mode: str, *, silent: bool = False, tty: bool = False) -> type:
        stderr = Terminal() if tty else io.StringIO()
        return type(choose_progress(mode=mode, silent=silent, stderr=stderr, clock=clock))

    assert choose("auto") is LineProgress
    assert choose("auto", tty=True) is BarProgress
    assert choose("auto", silent=True, tty=True) is NoProgress
    assert choose("off", tty=True) is NoProgress
    assert choose("json", silent=True) is JsonProgress
