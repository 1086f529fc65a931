"""A time on the command line means one moment or is refused."""

from __future__ import annotations

from contextlib import suppress
from datetime import UTC, datetime, timedelta, timezone
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudsave.cli.formats import format_instant, format_utc
from cloudsave.cli.times import open_zone, parse_instant
from cloudsave.errors import TimeWithoutZone, UsageError

BERLIN = "Europe/Berlin"


def _utc(*parts: int) -> datetime:
    return datetime(*parts, tzinfo=UTC)  # type: ignore[arg-type,misc]


@pytest.mark.parametrize(
    ("text", "instant"),
    [
        ("2026-11-21T05:00:00Z", _utc(2026, 11, 21, 5)),
        ("2026-11-21t05:00:00z", _utc(2026, 11, 21, 5)),
        ("2026-11-21 05:00:00 UTC", _utc(2026, 11, 21, 5)),
        ("2026-11-21 06:00+01", _utc(2026, 11, 21, 5)),
        ("2026-11-21 06:00:00.5+0100", _utc(2026, 11, 21, 5, 0, 0, 500_000)),
        ("2026-11-21T00:30:00.000001-05:30", _utc(2026, 11, 21, 6, 0, 0, 1)),
        ("  2026-11-21T05:00:00-00:00 ", _utc(2026, 11, 21, 5)),
        ("2024-02-29T23:59:59Z", _utc(2024, 2, 29, 23, 59, 59)),
    ],
)
def test_a_time_with_a_zone_keeps_it(text: str, instant: datetime) -> None:
    assert parse_instant(text, zone_name=None) == instant
    assert parse_instant(text, zone_name="Asia/Tokyo") == instant
    assert parse_instant(text, zone_name=None).utcoffset() == timedelta(0)


@pytest.mark.parametrize("text", ["2026-11-21T05:00:00", "2026-11-21 05:00", "2026-11-21 05:00:00.25"])
def test_a_time_without_a_zone_is_refused(text: str) -> None:
    with pytest.raises(TimeWithoutZone) as caught:
        parse_instant(text, zone_name=None)
    assert any("--timezone" in hint for hint in caught.value.hints)
    assert parse_instant(caught.value.hints[0].split()[0], zone_name=None) == parse_instant(
        text, zone_name="UTC"
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "now",
        "yesterday",
        "13am",
        "1pm",
        "05:00:00Z",
        "2026-11-21",
        "2026-11-21Z",
        "21.11.2026 05:00",
        "11/21/2026 05:00Z",
        "20261121T050000Z",
        "2026-W47-6T05:00:00Z",
        "2026-325T05:00:00Z",
        "2026-11-21T24:00:00Z",
        "2026-11-21T25:00:00Z",
        "2026-11-21T05:60:00Z",
        "2026-12-31T23:59:60Z",
        "2026-11-21T05:00:00.1234567Z",
        "2026-11-21T05:00:00,5Z",
        "2026-11-21T05:00:00+24:00",
        "2026-11-21T05:00:00+01:60",
        "2026-11-21T05:00:00 CET",
        "2026-11-21T05:00:00 PM",
        "2026-13-01T05:00:00Z",
        "2026-02-29T05:00:00Z",
        "2026-04-31T05:00:00Z",
        "0000-01-01T00:00:00Z",
        "0001-01-01T00:00:00+01:00",
        "9999-12-31T23:59:59-01:00",
        "1763701200",
        "２０２６-11-21T05:00:00Z",
        "2026-11-21T05:00:00Z\n2026",
        "2026-11-21T05Z",
    ],
)
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_instant(text, zone_name="UTC")
    assert caught.value.exit_code == 2


@pytest.mark.fault("target-at-clock-change", control="test_the_edges_of_a_clock_change_are_clear")
def test_a_time_that_happened_twice_is_refused_with_both_candidates() -> None:
    with pytest.raises(UsageError, match="happened twice in Europe/Berlin") as caught:
        parse_instant("2026-10-25T02:30:00", zone_name=BERLIN)
    assert caught.value.hints == (
        "did you mean 2026-10-25T02:30:00+02:00, which is 2026-10-25T00:30:00Z?",
        "did you mean 2026-10-25T02:30:00+01:00, which is 2026-10-25T01:30:00Z?",
    )


@pytest.mark.fault("target-at-clock-change", control="test_the_edges_of_a_clock_change_are_clear")
def test_a_time_that_was_skipped_is_refused_with_both_candidates() -> None:
    with pytest.raises(UsageError, match="was skipped in Europe/Berlin") as caught:
        parse_instant("2026-03-29T02:30:00", zone_name=BERLIN)
    assert caught.value.hints == (
        "did you mean 2026-03-29T01:30:00+01:00, which is 2026-03-29T00:30:00Z?",
        "did you mean 2026-03-29T03:30:00+02:00, which is 2026-03-29T01:30:00Z?",
    )


@pytest.mark.parametrize(
    ("text", "instant"),
    [
        ("2026-10-25T01:59:59.999999", _utc(2026, 10, 24, 23, 59, 59, 999_999)),
        ("2026-10-25T03:00:00", _utc(2026, 10, 25, 2)),
        ("2026-03-29T01:59:59", _utc(2026, 3, 29, 0, 59, 59)),
        ("2026-03-29T03:00:00", _utc(2026, 3, 29, 1)),
    ],
)
def test_the_edges_of_a_clock_change_are_clear(text: str, instant: datetime) -> None:
    assert parse_instant(text, zone_name=BERLIN) == instant


@pytest.mark.parametrize("name", ["", "CEST", "Europe/Berln", "../../etc/passwd", "/etc/localtime", "Europe"])
def test_an_unknown_zone_is_refused(name: str) -> None:
    with pytest.raises(UsageError):
        open_zone(name)


@given(
    st.datetimes(min_value=datetime(1, 1, 3), max_value=datetime(9999, 12, 29)),  # noqa: DTZ001
    st.integers(-23 * 60 - 59, 23 * 60 + 59),
)
def test_what_python_writes_is_read_as_the_same_moment(moment: datetime, offset_minutes: int) -> None:
    aware = moment.replace(tzinfo=timezone(timedelta(minutes=offset_minutes)))
    assert parse_instant(aware.isoformat(), zone_name=None) == aware
    assert parse_instant(format_utc(aware), zone_name=None) == aware


@given(
    st.datetimes(min_value=datetime(1990, 1, 1), max_value=datetime(2037, 1, 1)),  # noqa: DTZ001
    st.sampled_from(
        [BERLIN, "America/New_York", "Australia/Lord_Howe", "Asia/Kathmandu", "Africa/Casablanca"]
    ),
)
def test_a_local_time_is_exact_or_refused(naive: datetime, zone_name: str) -> None:
    zone = ZoneInfo(zone_name)
    readings = {naive.replace(tzinfo=zone, fold=fold).astimezone(UTC) for fold in (0, 1)}
    try:
        assert {parse_instant(naive.isoformat(), zone_name=zone_name)} == readings
    except UsageError as error:
        assert len(readings) == 2
        said = {parse_instant(hint.split()[3].rstrip(","), zone_name=None) for hint in error.hints}
        assert said == readings


@given(st.text(max_size=30))
def test_any_text_is_a_time_or_a_usage_error(text: str) -> None:
    with suppress(UsageError):
        assert parse_instant(text, zone_name=BERLIN).tzinfo is UTC


def test_both_shown_forms_can_be_given_back() -> None:
    instant = _utc(2026, 11, 21, 5, 0, 0, 250_000)
    shown = format_instant(instant, ZoneInfo(BERLIN))
    assert shown == "2026-11-21T05:00:00.25Z (2026-11-21T06:00:00.25+01:00)"
    first, second = shown.rstrip(")").split(" (")
    assert parse_instant(first, zone_name=None) == parse_instant(second, zone_name=None) == instant
    assert format_instant(instant, ZoneInfo("UTC")) == "2026-11-21T05:00:00.25Z"
