"""Source URLs of MySQL and MariaDB."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest

from cloudsave.engines.binlog.address import Address
from cloudsave.errors import UnusableUrl


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("MYSQL_PWD", raising=False)
    return tmp_path


def test_url_says_how_to_connect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MYSQL_PWD", "secret")
    found = Address.of("mysql://it%27s@db1:3307").for_driver()
    assert found == {"user": "it's", "host": "db1", "port": 3307, "password": "secret"}
    by_socket = Address.of("mariadb://u@localhost?socket=/s").for_driver()
    assert (by_socket["unix_socket"], by_socket["ssl_disabled"]) == ("/s", True)


@pytest.mark.parametrize(
    ("mode", "verified", "host_verified"),
    [
        ("REQUIRED", ssl.CERT_NONE, False),
        ("VERIFY_CA", ssl.CERT_REQUIRED, False),
        ("verify_identity", ssl.CERT_REQUIRED, True),
    ],
)
def test_tls_is_had_where_it_is_asked_for(mode: str, verified: int, host_verified: bool) -> None:
    context = Address.of(f"mysql://u@h?ssl-mode={mode}").for_driver()["ssl"]
    assert (context.verify_mode, context.check_hostname) == (verified, host_verified)


@pytest.mark.parametrize(
    ("url", "lines"),
    [
        ("mysql://u@localhost?socket=/s", ['socket="/s"', "ssl-mode=DISABLED"]),
        ("mysql://u@h:3307?ssl-mode=VERIFY_CA", ['host="h"', 'port="3307"', "ssl-mode=VERIFY_CA"]),
        ("mariadb://u@localhost?socket=/s", ['socket="/s"', "skip-ssl"]),
        ("mariadb://u@h", ['protocol="tcp"', "ssl-verify-server-cert=0"]),
        ("mariadb://u@h?ssl-mode=REQUIRED", ["ssl", "ssl-verify-server-cert=0"]),
        ("mariadb://u@h?ssl-mode=VERIFY_IDENTITY", ["ssl", "ssl-verify-server-cert=1"]),
    ],
)
def test_programs_connect_as_we_do(url: str, lines: list[str]) -> None:
    told = Address.of(url).for_programs().splitlines()
    assert [line for line in lines if line not in told] == []


def test_the_option_file_keeps_any_password_whole(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    monkeypatch.setenv("MYSQL_PWD", 'a"b\\c#d')
    own = home / ".my.cnf"
    own.touch()
    told = Address.of("mariadb://me@localhost?socket=/s").for_programs().splitlines()
    assert told == [
        f"!include {own}",
        "[client]",
        'user="me"',
        'password="a\\"b\\\\c#d"',
        'socket="/s"',
        "skip-ssl",
    ]


@pytest.mark.parametrize(
    "url",
    [
        "mysql://u@h:port",
        "mysql://u@h?colour=red",
        "mysql://u@h?ssl-mode=MAYBE",
        "mysql://u@h?ssl-ca=/none",
        "mysql://u@h?defaults-file=/none",
    ],
)
def test_url_that_cannot_be_understood_is_refused_at_once(url: str) -> None:
    with pytest.raises(UnusableUrl):
        Address.of(url)


@pytest.mark.parametrize("content", [b"password = secret\n", b"[client]\npassword = \xff\xfe secret\n"])
def test_an_option_file_that_cannot_be_read_is_told_without_what_it_says(home: Path, content: bytes) -> None:
    (home / ".my.cnf").write_bytes(content)
    with pytest.raises(UnusableUrl) as caught:
        Address.of("mysql://u@h")
    assert "secret" not in str(caught.value)
    (home / ".my.cnf").write_bytes(b"[client]\npassword = secret\n")
    assert Address.of("mysql://u@h").password == ""
