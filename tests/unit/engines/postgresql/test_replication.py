"""What a server says while it streams becomes an error of ours that says what to do."""

from __future__ import annotations

import pytest

from cloudsave.engines.postgresql.replication import translate_error
from cloudsave.errors import EngineError, EngineUnavailable, LogRemoved, SlotLost

REMOVED = "ERROR:  requested WAL segment 000000010000000000000005 has already been removed\n"


@pytest.mark.parametrize("sqlstate", ["58P01", "XX000"])
def test_removed_log_is_known_whether_the_server_finds_it_gone_or_loses_it_while_reading(
    sqlstate: str,
) -> None:
    assert isinstance(translate_error(REMOVED, sqlstate, doing="stream the log"), LogRemoved)


@pytest.mark.parametrize(
    ("message", "sqlstate"),
    [
        ("ERROR:  could not read from WAL segment 000000010000000000000005, offset 0: read 0 of 8", "XX000"),
        ("ERROR:  unexpected state", "XX000"),
        ('ERROR:  could not open file "base/5/1"', "58P01"),
    ],
)
def test_other_failures_of_the_server_are_not_taken_for_removed_log(message: str, sqlstate: str) -> None:
    """Negative control: removed log is recorded as lost for good."""
    assert type(translate_error(message, sqlstate, doing="stream the log")) is EngineError


@pytest.mark.parametrize(
    ("message", "sqlstate", "wanted"),
    [
        (
            "FEHLER:  das angeforderte WAL-Segment 0000000100000000000000A5 wurde schon entfernt",
            "58P01",
            LogRemoved,
        ),
        ("FEHLER:  Replikations-Slot »x« existiert nicht", "42704", SlotLost),
    ],
)
def test_a_server_may_speak_another_language(message: str, sqlstate: str, wanted: type[EngineError]) -> None:
    assert type(translate_error(message, sqlstate, doing="stream the log")) is wanted


def test_a_server_that_closes_the_connection_is_asked_again() -> None:
    assert isinstance(translate_error("", "", doing="stream the log"), EngineUnavailable)
