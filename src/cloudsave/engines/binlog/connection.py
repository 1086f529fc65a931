"""
Sessions to MySQL and MariaDB: how they are opened from a URL, and what their failures mean.

A password is never in a URL: it comes from MYSQL_PWD or from an option file, as for the servers' own clients.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qsl, unquote, urlsplit

import pymysql
from pymysql.constants import ER

from cloudsave.errors import EngineError, EngineUnavailable, PermissionMissing, UnusableUrl

CONNECT_TIMEOUT_SECONDS = 15
READ_TIMEOUT_SECONDS = 60
"""Limit: a statement of ours answers within this."""
IDLE_SECONDS_MAX = 120
"""Limit: a server gives up a session, and its locks, when it has heard nothing of us for so long."""
_SOCKETS = ("/run/mysqld/mysqld.sock", "/var/lib/mysql/mysql.sock", "/tmp/mysql.sock")  # noqa: S108
_PARAMETERS = ("socket", "ssl-mode", "ssl-ca", "ssl-cert", "ssl-key", "defaults-file")
_SSL_MODES = ("DISABLED", "REQUIRED", "VERIFY_CA", "VERIFY_IDENTITY")
_REFUSED = (
    ER.ACCESS_DENIED_ERROR,
    ER.DBACCESS_DENIED_ERROR,
    ER.TABLEACCESS_DENIED_ERROR,
    ER.SPECIFIC_ACCESS_DENIED_ERROR,
    1698,  # ER_ACCESS_DENIED_NO_PASSWORD_ERROR
)
_PASSING = (ER.CON_COUNT_ERROR, ER.SERVER_SHUTDOWN, ER.TOO_MANY_USER_CONNECTIONS, 1317, 1927, 3169, 4031)
"""Too many sessions, shutting down, statement or session killed."""


class Session:
    """One autocommit session. Its rows are tuples."""

    def __init__(self, connection: pymysql.connections.Connection[Any]) -> None:
        self.connection = connection

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self.close()

    def rows(self, statement: str, *values: object, doing: str) -> list[tuple[Any, ...]]:
        """All rows of a statement. Raises: EngineError of the kind that fits."""
        try:
            with self.connection.cursor() as cursor:
                cursor.execute(statement, values or None)
                return list(cursor.fetchall())
        except (pymysql.Error, OSError) as error:
            raise translate(error, doing) from None

    def row(self, statement: str, *values: object, doing: str) -> tuple[Any, ...]:
        """The only row of a statement."""
        (found,) = self.rows(statement, *values, doing=doing)
        return found

    def variables(self, like: str) -> Mapping[str, str]:
        """Global variables whose names match; those that the server does not know are missing."""
        return dict(self.rows("SHOW GLOBAL VARIABLES LIKE %s", like, doing="read the settings"))

    def close(self) -> None:
        """Leave. Never raises."""
        try:
            self.connection.close()
        except (pymysql.Error, OSError):
            return


def connect(url: str, *, read_timeout_seconds: int = READ_TIMEOUT_SECONDS) -> Session:
    """
    A session that no setting of the server or of the account's can make behave otherwise.

    Raises: UnusableUrl, EngineUnavailable, PermissionMissing, EngineError.
    """
    options = connect_options(url)
    try:
        connection = pymysql.connect(
            **options,
            autocommit=True,
            charset="utf8mb4",
            connect_timeout=CONNECT_TIMEOUT_SECONDS,
            read_timeout=read_timeout_seconds,
            write_timeout=READ_TIMEOUT_SECONDS,
            program_name="cloudsave",
        )
    except (pymysql.Error, OSError, RuntimeError) as error:
        raise translate(error, "connect to the server") from None
    session = Session(connection)
    settings = f"time_zone = '+00:00', sql_mode = '', wait_timeout = {IDLE_SECONDS_MAX}"
    session.rows(f"SET SESSION {settings}", doing="set up the session")
    return session


def connect_options(url: str) -> dict[str, Any]:
    """What PyMySQL is to be told for a source URL. Raises: UnusableUrl."""
    try:
        parts = urlsplit(url)
        parameters = dict(parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query)))
        port = parts.port
    except ValueError:
        raise _unusable("It does not have the form of a URL.") from None
    if unknown := sorted(set(parameters) - set(_PARAMETERS)):
        raise _unusable(f"It has the parameter {unknown[0]!r}; known are {', '.join(_PARAMETERS)}.")
    options: dict[str, Any] = {"user": unquote(parts.username or "") or None}
    socket = parameters.get("socket") or ("" if parts.hostname else _usual_socket())
    if socket:
        options["unix_socket"] = socket
    else:
        options |= {"host": parts.hostname or "127.0.0.1", "port": port or 3306}
    if password := os.environ.get("MYSQL_PWD"):
        options["password"] = password
    file = Path(parameters.get("defaults-file") or "~/.my.cnf").expanduser()
    if file.is_file():
        options["read_default_file"] = str(file)
    elif "defaults-file" in parameters:
        raise _unusable(f'There is no option file "{file}".')
    if context := _tls(parameters):
        options["ssl"] = context
    return options


def translate(error: Exception, doing: str) -> EngineError:
    """The error of ours for a driver's error while `doing` something ("read the settings")."""
    number = error.args[0] if error.args and isinstance(error.args[0], int) else 0
    text = str(error.args[1]) if len(error.args) > 1 else str(error)
    detail = f"The server said: {' '.join(text.split())}" if text else "The server closed the connection."
    if number in _REFUSED:
        return PermissionMissing(f"account may not {doing}", detail=detail, hints=_refusal_hints(number))
    if isinstance(error, OSError) or number in _PASSING or number == 0 or 2000 <= number < 3000:
        hints = ["is the server running, and are host, port and socket of the URL right?"]
        return EngineUnavailable(f"could not {doing}", detail=detail, hints=hints)
    return EngineError(f"could not {doing}", detail=f"{detail} (error {number})")


def _refusal_hints(number: int) -> Sequence[str]:
    if number in (ER.ACCESS_DENIED_ERROR, 1698):
        return [
            "is the password in MYSQL_PWD or in [client] of ~/.my.cnf?",
            "may the account log in from this host?",
        ]
    return ["cloudsave check prints the rights that an account needs"]


def _usual_socket() -> str:
    return next((path for path in _SOCKETS if Path(path).exists()), "")


def _tls(parameters: Mapping[str, str]) -> ssl.SSLContext | None:
    """The TLS context; None where the URL asks for none. Raises: UnusableUrl."""
    authority = parameters.get("ssl-ca")
    mode = parameters.get("ssl-mode", "VERIFY_CA" if authority else "DISABLED").upper()
    if mode not in _SSL_MODES:
        raise _unusable(f"ssl-mode is {mode!r}; known are {', '.join(_SSL_MODES)}.")
    if mode == "DISABLED":
        return None
    try:
        context = ssl.create_default_context(cafile=authority)
        if certificate := parameters.get("ssl-cert"):
            context.load_cert_chain(certificate, parameters.get("ssl-key"))
    except OSError as error:
        raise _unusable(f"Its certificates cannot be read: {error.strerror or error}.") from None
    context.check_hostname = mode == "VERIFY_IDENTITY"
    if mode == "REQUIRED":
        context.verify_mode = ssl.CERT_NONE
    return context


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
