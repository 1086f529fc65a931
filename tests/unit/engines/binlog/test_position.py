"""Positions and URLs of MySQL and MariaDB, as text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudsave.engines.binlog.position import (
    FILE_NUMBER_MAX,
    LOG_FILE_BYTES,
    file_number,
    format_offset,
    offset_of,
    parse_offset,
)
from cloudsave.engines.registry import dialect
from cloudsave.errors import UsageError


@given(number=st.integers(1, FILE_NUMBER_MAX), place=st.integers(0, LOG_FILE_BYTES - 1))
def test_position_is_read_back_as_it_is_written(number: int, place: int) -> None:
    offset = offset_of(number, place)
    assert parse_offset(format_offset(offset)) == offset < 1 << 63
    assert parse_offset(f"mysql-bin.{number:06}:{place}") == offset
    assert file_number(f"a.b.{number:06}") == number


@pytest.mark.parametrize("text", ["", "12", "000012:", "0:4", "x:4", "000012:4294967296", "1:2:3"])
def test_text_that_is_no_position_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="cannot understand position"):
        dialect("mysql").parse_position(text, branch="b")
