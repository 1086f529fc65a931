"""
Times on the command line. A time that could mean two moments is refused: a restore to the wrong hour looks
like a success.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from zoneinfo import ZoneInfo

from cloudsave.errors import TimeWithoutZone, UsageError

_FORM = re.compile(
    r"(?P<date>[0-9]{4}-(?:0[1-9]|1[0-2])-(?:0[1-9]|[12][0-9]|3[01]))"
    r"[Tt ]"
    r"(?P<time>(?:[01][0-9]|2[0-3]):[0-5][0-9](?::[0-5][0-9](?:\.[0-9]{1,6})?)?)"
    r"(?: ?(?P<zone>[Zz]|UTC|[+-](?:[01][0-9]|2[0-3])(?::?[0-5][0-9])?))?"
)
_EXAMPLES = "a time looks like 2026-11-21T05:00:00Z or 2026-11-21T06:00:00.25+01:00"


def parse_instant(text: str, *, zone_name: str | None) -> datetime:
    """
    An instant in UTC from RFC 3339 text; seconds and fractions may be left out, a space may stand for `T`.

    Args:
        zone_name: Zone of a time that has none; a time that has one keeps its own.
    Raises: TimeWithoutZone; UsageError for other text, and for a local time that a change of the clocks made
        ambiguous or skipped, with both candidates.
    """
    match = _FORM.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"cannot understand time {text!r}", hints=[_EXAMPLES])
    try:
        naive = datetime.fromisoformat(f"{match['date']}T{_six_digits(match['time'])}")
        if match["zone"] is None:
            return _in_zone(naive, zone_name)
        return datetime.fromisoformat(naive.isoformat() + _offset(match["zone"])).astimezone(UTC)
    except (ValueError, OverflowError):
        raise UsageError(
            f"cannot use time {text!r}",
            detail="There is no such day, or it lies outside of the years 1 to 9999.",
            hints=[_EXAMPLES],
        ) from None


def open_zone(name: str) -> ZoneInfo:
    """A zone of the time zone database. Raises: UsageError."""
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError):
        raise UsageError(
            f"unknown time zone {name!r}",
            hints=["a zone looks like Europe/Berlin or UTC", "is the package tzdata installed?"],
        ) from None


def _six_digits(time: str) -> str:
    """Python 3.11 takes any number of digits, but only three or six have been there for long."""
    whole, dot, fraction = time.partition(".")
    return whole + dot + fraction.ljust(6, "0") if dot else whole


def _offset(zone: str) -> str:
    if zone in ("Z", "z", "UTC"):
        return "+00:00"
    digits = zone[1:].replace(":", "").ljust(4, "0")
    return f"{zone[0]}{digits[:2]}:{digits[2:]}"


def _in_zone(naive: datetime, zone_name: str | None) -> datetime:
    if zone_name is None:
        raise TimeWithoutZone(
            f"time {naive.isoformat(sep=' ')!r} has no zone",
            detail="It would mean another moment on another machine.",
            hints=[
                f"{naive.isoformat()}Z is that time in UTC",
                "--timezone Europe/Berlin says in which zone such times are meant",
            ],
        )
    zone = open_zone(zone_name)
    earlier, later = (naive.replace(tzinfo=zone, fold=fold).astimezone(UTC) for fold in (0, 1))
    real = [
        instant
        for instant in (earlier, later)
        if instant.astimezone(zone).replace(tzinfo=None, fold=0) == naive
    ]
    if len(real) == 2 and earlier == later:
        return earlier
    happened = "happened twice" if real else "was skipped"
    # Around a skipped time the two readings are in reverse order.
    candidates = sorted({earlier, later})
    raise UsageError(
        f"time {naive.isoformat(sep=' ')!r} {happened} in {zone_name}",
        detail="The clocks were changed then.",
        hints=[
            f"did you mean {instant.astimezone(zone).isoformat()}, which is "
            f"{instant.replace(tzinfo=None).isoformat()}Z?"
            for instant in candidates
        ],
    )
