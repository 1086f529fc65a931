"""Sizes, durations and instants as people read them. Pure."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, tzinfo

_SIZE_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def format_size(size_bytes: int) -> str:
    """Three digits and a binary unit: `1.46 GiB`."""
    value, unit = float(size_bytes), 0
    while value >= 999.5 and unit < len(_SIZE_UNITS) - 1:
        value /= 1024
        unit += 1
    if unit == 0:
        return f"{size_bytes} B"
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f} {_SIZE_UNITS[unit]}"


def format_rate(bytes_per_second: float) -> str:
    """`120 MiB/s`."""
    return f"{format_size(round(bytes_per_second))}/s"


def format_duration(seconds: float) -> str:
    """The two largest units: `0.25 s`, `42 s`, `3 min 07 s`, `2 h 05 min`, `3 d 04 h`."""
    if seconds < 0:
        return "-" + format_duration(-seconds)
    if seconds < 10:
        return f"{seconds:.2f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02} min"
    return f"{whole // 86400} d {whole % 86400 // 3600:02} h"


def format_utc(instant: datetime) -> str:
    """RFC 3339 in UTC, with as many digits as the instant has: `2026-11-21T05:00:00.25Z`."""
    text = instant.astimezone(UTC).replace(tzinfo=None).isoformat()
    return (text.rstrip("0") if "." in text else text) + "Z"


def format_instant(instant: datetime, zone: tzinfo | None) -> str:
    """
    UTC, and beside it the time in `zone` (None: this machine's) where that differs.

    Both can be given to `--time` as they are.
    """
    utc = format_utc(instant)
    local = instant.astimezone(zone)
    if local.utcoffset() == timedelta(0):
        return utc
    text = local.isoformat()
    clock_time, offset = text[:-6], text[-6:]
    return f"{utc} ({clock_time.rstrip('0') if '.' in clock_time else clock_time}{offset})"


def printable(text: str) -> str:
    """`text` on one line, without characters that steer a terminal; names come from strangers' databases."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
