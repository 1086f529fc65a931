"""Positions and URLs of MySQL and MariaDB, as text."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudsave.engines.binlog.connection import connect_options
from cloudsave.engines.binlog.position import (
    FILE_NUMBER_MAX,
    LOG_FILE_BYTES,
    file_number,
    format_offset,
    offset_of,
    parse_offset,
)
from cloudsave.engines.registry import dialect
from cloudsave.errors import UnusableUrl, UsageError


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


def test_url_says_how_to_connect(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MYSQL_PWD", "secret")
    found = connect_options("mysql://it%27s@db1:3307")
    assert found == {"user": "it's", "host": "db1", "port": 3307, "password": "secret"}
    assert connect_options("mariadb://u@localhost?socket=/s")["unix_socket"] == "/s"
    assert "ssl" not in found
    assert connect_options("mysql://u@h?ssl-mode=VERIFY_IDENTITY")["ssl"].check_hostname
    assert not connect_options("mysql://u@h?ssl-mode=REQUIRED")["ssl"].check_hostname


@pytest.mark.parametrize(
    "url",
    ["mysql://u@h:port", "mysql://u@h?colour=red", "mysql://u@h?ssl-mode=MAYBE", "mysql://u@h?ssl-ca=/none"],
)
def test_url_that_cannot_be_understood_is_refused_at_once(url: str) -> None:
    with pytest.raises(UnusableUrl):
        connect_options(url)
