"""Instants of log."""

from __future__ import annotations

from datetime import UTC, datetime

from cloudsave.model.log import INSTANT_US_MAX, instant_from_us, us_from_instant


def test_instants_of_every_64_bit_number_can_be_shown() -> None:
    assert instant_from_us(0) == datetime(1970, 1, 1, tzinfo=UTC)
    last = instant_from_us(INSTANT_US_MAX)
    assert us_from_instant(last) == INSTANT_US_MAX
    assert last.year == 9999
    assert instant_from_us((1 << 64) - 1) == last
