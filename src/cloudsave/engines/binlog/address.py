"""
Source URLs of MySQL and MariaDB: where the server is, as whom to connect, and how the connection is
protected; for the driver and for the servers' own programs.

A password is never in a URL: it comes from MYSQL_PWD or from an option file, as for the servers' own clients.
"""

from __future__ import annotations

import configparser
import os
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from pymysql.optionfile import Parser

from cloudsave.errors import UnusableUrl

_SOCKETS = ("/run/mysqld/mysqld.sock", "/var/lib/mysql/mysql.sock", "/tmp/mysql.sock")  # noqa: S108
_FILES = ("ssl-ca", "ssl-cert", "ssl-key")
_PARAMETERS = ("socket", "ssl-mode", *_FILES, "defaults-file")
_SSL_MODES = ("DISABLED", "PREFERRED", "REQUIRED", "VERIFY_CA", "VERIFY_IDENTITY")


@dataclass(frozen=True, slots=True)
class Address:
    """How to reach a server."""

    engine: str
    """`mysql` or `mariadb`: their programs call some options differently."""
    user: str
    password: str
    socket: str
    """"": by TCP, to `host` and `port`."""
    host: str
    port: int
    option_file: str
    """The user's own, which may know what the URL does not; "": there is none."""
    ssl_mode: str
    """One of MySQL's; PREFERRED: TLS where the server has it, no matter whose certificate it shows."""
    ssl_files: Mapping[str, str]
    tls: ssl.SSLContext | None
    """The TLS that must be had; None where none must."""

    @classmethod
    def of(cls, url: str) -> Address:
        """Understand a source URL. Raises: UnusableUrl."""
        try:
            parts = urlsplit(url)
            parameters = dict(
                parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
            )
            port = parts.port
        except ValueError:
            raise _unusable("It does not have the form of a URL.") from None
        if unknown := sorted(set(parameters) - set(_PARAMETERS)):
            raise _unusable(f"It has the parameter {unknown[0]!r}; known are {', '.join(_PARAMETERS)}.")
        socket = parameters.get("socket") or ("" if parts.hostname else _usual_socket())
        usual = "DISABLED" if socket else "PREFERRED"
        files = {name: parameters[name] for name in _FILES if parameters.get(name)}
        if files:
            usual = "VERIFY_CA" if "ssl-ca" in files else "REQUIRED"
        mode = parameters.get("ssl-mode", usual).upper()
        if mode not in _SSL_MODES:
            raise _unusable(f"ssl-mode is {mode!r}; known are {', '.join(_SSL_MODES)}.")
        file = Path(parameters.get("defaults-file") or "~/.my.cnf").expanduser()
        if "defaults-file" in parameters and not file.is_file():
            raise _unusable(f'There is no option file "{file}".')
        return cls(
            engine=parts.scheme,
            user=unquote(parts.username or ""),
            password="" if _has_password(file) else os.environ.get("MYSQL_PWD", ""),
            socket=socket,
            host=parts.hostname or "127.0.0.1",
            port=port or 3306,
            option_file=str(file) if file.is_file() else "",
            ssl_mode=mode,
            ssl_files=files,
            tls=_tls(mode, files),
        )

    @property
    def place(self) -> str:
        """Where the server is, for people."""
        return self.socket or f"{self.host}:{self.port}"

    def for_driver(self) -> dict[str, Any]:
        """What PyMySQL is to be told."""
        options: dict[str, Any] = {"user": self.user or None}
        options |= {"unix_socket": self.socket} if self.socket else {"host": self.host, "port": self.port}
        if self.password:
            options["password"] = self.password
        if self.option_file:
            options["read_default_file"] = self.option_file
        if self.ssl_mode == "DISABLED":
            options["ssl_disabled"] = True
        elif self.tls is not None:
            options["ssl"] = self.tls
        return options

    def for_programs(self) -> str:
        """An option file that tells the servers' own programs the same."""
        lines = [f"!include {self.option_file}"] if self.option_file else []
        lines.append("[client]")
        settings = {"user": self.user, "password": self.password, "socket": self.socket}
        if not self.socket:
            settings |= {"host": self.host, "port": str(self.port), "protocol": "tcp"}
        lines += [f"{name}={_quoted(value)}" for name, value in settings.items() if value]
        lines += [f"{name}={_quoted(value)}" for name, value in self.ssl_files.items()]
        if self.engine == "mysql":
            lines.append(f"ssl-mode={self.ssl_mode}")
        elif self.ssl_mode == "DISABLED":
            lines.append("skip-ssl")
        else:
            lines += ["ssl"] if self.ssl_mode != "PREFERRED" else []
            lines.append(f"ssl-verify-server-cert={int(self.ssl_mode.startswith('VERIFY'))}")
        return "\n".join(lines) + "\n"


def _tls(mode: str, files: Mapping[str, str]) -> ssl.SSLContext | None:
    """Raises: UnusableUrl."""
    if mode in ("DISABLED", "PREFERRED"):
        return None
    try:
        context = ssl.create_default_context(cafile=files.get("ssl-ca"))
        if certificate := files.get("ssl-cert"):
            context.load_cert_chain(certificate, files.get("ssl-key"))
    except OSError as error:
        raise _unusable(f"Its certificates cannot be read: {error.strerror or error}.") from None
    context.check_hostname = mode == "VERIFY_IDENTITY"
    if mode == "REQUIRED":
        context.verify_mode = ssl.CERT_NONE
    return context


def _has_password(file: Path) -> bool:
    """
    Whether an option file has one, which goes before MYSQL_PWD then, as in the servers' own clients. Raises:
    UnusableUrl.
    """
    options = Parser(strict=False)
    try:
        options.read(file)
    except (configparser.Error, UnicodeError, OSError) as error:
        cause = getattr(error, "strerror", None) or type(error).__name__
        raise _unusable(f'The option file "{file}" cannot be read: {cause}.') from None
    return options.has_option("client", "password")


def _quoted(value: str) -> str:
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _usual_socket() -> str:
    return next((path for path in _SOCKETS if Path(path).exists()), "")


def _unusable(detail: str) -> UnusableUrl:
    return UnusableUrl(
        "cannot understand source URL",
        detail=detail,
        hints=[
            "a source URL looks like mysql://user@host:3306",
            "or, on this host, like mariadb://user@localhost?socket=/run/mysqld/mysqld.sock",
            "are special characters in the user's name percent-encoded?",
        ],
    )
