"""Sessions to MySQL and MariaDB, and what their failures mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import pymysql
from pymysql.constants import CR, ER
from pymysql.cursors import Cursor, DictCursor

from cloudsave.engines.binlog.address import Address
from cloudsave.errors import EngineError, EngineUnavailable, PermissionMissing

CONNECT_TIMEOUT_SECONDS = 15
READ_TIMEOUT_SECONDS = 60
"""Limit: a statement of ours answers within this."""
IDLE_SECONDS_MAX = 120
"""Limit: a server gives up a session, and its locks, when it has heard nothing of us for so long."""
_LOGINS = ("caching_sha2_password", "mysql_native_password", "ed25519", "sha256_password")
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
        return self._all(Cursor, statement, values, doing)

    def records(self, statement: str, *, doing: str) -> list[dict[str, Any]]:
        """All rows of a statement, by the names of its columns. Raises: EngineError of the kind that fits."""
        return self._all(DictCursor, statement, (), doing)

    def _all(self, kind: type[Cursor], statement: str, values: tuple[object, ...], doing: str) -> list[Any]:
        try:
            with self.connection.cursor(kind) as cursor:
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
    options = Address.of(url).for_driver()
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


def translate(error: Exception, doing: str) -> EngineError:
    """The error of ours for a driver's error while `doing` something ("read the settings")."""
    number = error.args[0] if error.args and isinstance(error.args[0], int) else 0
    text = str(error.args[1]) if len(error.args) > 1 else str(error)
    detail = f"The server said: {' '.join(text.split())}" if text else "The server closed the connection."
    if number in _REFUSED:
        return PermissionMissing(f"account may not {doing}", detail=detail, hints=_refusal_hints(number))
    if number == CR.CR_AUTH_PLUGIN_CANNOT_LOAD:
        hints = [f"make an account that logs in by one of: {', '.join(_LOGINS)}"]
        return EngineError(f"could not {doing}", detail=detail, hints=hints)
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
