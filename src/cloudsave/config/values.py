"""From what was written to a value of the right kind, or a reason why not. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from zoneinfo import ZoneInfo

from cloudsave.config.options import Kind, Option, Value

_UNITS: Mapping[str, int] = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
_SIZE = re.compile(r"(\d{1,18})(?:\.(\d{1,6}))?\s*([A-Za-z]*)")
_TRUE = frozenset({"true", "yes", "on", "1"})
_FALSE = frozenset({"false", "no", "off", "0"})


class BadValue(ValueError):
    """A value does not fit its option; the text says why, as the end of a sentence, without the value."""


def parse_text(option: Option, text: str) -> Value:
    """The value of an environment variable or command-line option. Raises: BadValue."""
    if option.kind in (Kind.TEXT, Kind.PATH):
        return check_value(option, text)
    if option.kind is Kind.SIZE:
        return check_value(option, text)
    if option.kind is Kind.BOOLEAN:
        word = text.strip().lower()
        if word not in _TRUE | _FALSE:
            raise BadValue("must be true or false")
        return word in _TRUE
    try:
        number = int(text) if option.kind is Kind.INTEGER else float(text)
    except ValueError:
        raise BadValue(_wanted(option)) from None
    return check_value(option, number)


def check_value(option: Option, value: object) -> Value:
    """A value as TOML gives it, checked and in the option's kind. Raises: BadValue."""
    if option.kind is Kind.BOOLEAN:
        if not isinstance(value, bool):
            raise BadValue("must be true or false")
        return value
    if option.kind in (Kind.TEXT, Kind.PATH):
        return _check_text(option, value)
    if option.kind is Kind.SIZE and isinstance(value, str):
        value = parse_size(value)
    return _check_number(option, value)


def parse_size(text: str) -> int:
    """Bytes from a number with an optional unit: 16 MiB is 2^24, 16 MB is 16 million. Raises: BadValue."""
    match = _SIZE.fullmatch(text.strip())
    unit = _UNITS.get(match[3].lower()) if match else None
    if match is None or unit is None:
        raise BadValue("must be a number of bytes, with a unit such as MiB or MB if wanted")
    fraction = match[2] or ""
    return int(match[1] + fraction) * unit // int("1" + "0" * len(fraction))


def _check_text(option: Option, value: object) -> str:
    if not isinstance(value, str):
        raise BadValue("must be text in quotes")
    if not value.strip() or "\0" in value:
        raise BadValue("must not be empty")
    if option.choices and value not in option.choices:
        raise BadValue(f"must be one of {', '.join(option.choices)}")
    if option.pattern and not re.fullmatch(option.pattern, value):
        raise BadValue(f"must match {option.pattern}")
    if option.name == "timezone" and not zone_exists(value):
        raise BadValue("must be a zone of the time zone database, such as Europe/Berlin")
    return value


def zone_exists(name: str) -> bool:
    """Whether the machine's time zone database knows `name`."""
    try:
        ZoneInfo(name)
    except (KeyError, ValueError, OSError):
        return False
    return True


def _check_number(option: Option, value: object) -> int | float:
    whole = option.kind is not Kind.NUMBER
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        raise BadValue(_wanted(option))
    if not math.isfinite(value):
        raise BadValue(_wanted(option))
    if option.minimum is not None and value < option.minimum:
        raise BadValue(f"must be at least {_plain(option.minimum)}")
    if option.maximum is not None and value > option.maximum:
        raise BadValue(f"must be at most {_plain(option.maximum)}")
    return int(value) if whole else float(value)


def _wanted(option: Option) -> str:
    return {
        Kind.INTEGER: "must be a whole number",
        Kind.SIZE: "must be a number of bytes, with a unit such as MiB or MB if wanted",
    }.get(option.kind, "must be a number")


def _plain(number: float) -> str:
    return str(int(number)) if number == int(number) else str(number)
