"""
SQL sessions: how they are opened, what is pinned in them, and what their failures mean.

A session never depends on what a role, a database or the environment has set: search path, date style and
time-outs are pinned. A password never appears in an error: libpq quotes parts of a URL that it cannot parse,
so its text is shown only for a URL that parsed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from cloudsave.errors import EngineError, EngineUnavailable, PermissionMissing, UnusableUrl

CONNECT_TIMEOUT_SECONDS = 15
"""Limit: one host of the URL answers within this."""
PORT_MAX = 65535
LOCK_TIMEOUT_MS = 10_000
"""Limit: we wait for no lock of the database longer than this."""
_KEEPALIVES = {"keepalives": 1, "keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3}

_PINNED = f"""
set search_path = pg_catalog;
set datestyle = 'ISO, YMD';
set intervalstyle = 'postgres';
set timezone = 'UTC';
set bytea_output = 'hex';
set extra_float_digits = 1;
set statement_timeout = 0;
set lock_timeout = {LOCK_TIMEOUT_MS};
set idle_in_transaction_session_timeout = 0;
set standard_conforming_strings = on;
"""
_IDLE_SESSION_TIMEOUT = "set idle_session_timeout = 0"
"""Since PostgreSQL 14. A held backup session is idle for hours, on purpose."""

_UNAVAILABLE_CLASSES = ("08", "53", "57")
"""SQLSTATE classes: connection exception, insufficient resources, operator intervention."""

FUNCTION_SIGNATURES = {
    "pg_backup_start": "pg_backup_start(text, boolean)",
    "pg_backup_stop": "pg_backup_stop(boolean)",
    "pg_start_backup": "pg_start_backup(text, boolean, boolean)",
    "pg_stop_backup": "pg_stop_backup(boolean, boolean)",
    "pg_hba_file_rules": "pg_hba_file_rules()",
    "pg_ident_file_mappings": "pg_ident_file_mappings()",
    "pg_show_all_file_settings": "pg_show_all_file_settings()",
    "pg_stat_file": "pg_stat_file(text)",
}
"""Functions that an ordinary role may not call, as GRANT names them."""


def conninfo(url: str, **overrides: str | int) -> str:
    """
    The libpq connection string of a source URL, with keep-alives and `overrides`. Raises: UnusableUrl.

    An "@" left in the host is refused: it is the rest of a password that was not percent-encoded. So is a
    port that is none, which would show itself as a host that cannot be found.
    """
    try:
        given = conninfo_to_dict(url)
        ports = [port for port in str(given.get("port", "")).split(",") if port]
        if "@" in str(given.get("host", "")) or not all(map(_is_port, ports)):
            raise psycopg.ProgrammingError
        merged = {"connect_timeout": CONNECT_TIMEOUT_SECONDS, **_KEEPALIVES, **given, **overrides}
        return make_conninfo("", **merged)
    except psycopg.Error:
        # `from None` and no text of libpq: it quotes what it could not parse, which may be a password.
        raise UnusableUrl(
            "cannot understand source URL",
            detail="It does not have the form that libpq accepts.",
            hints=[
                "a source URL looks like postgresql://user@host:5432/postgres",
                "are special characters in user, password and names percent-encoded?",
            ],
        ) from None


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdigit() and 1 <= int(text) <= PORT_MAX


def with_database(info: str) -> str:
    """
    `info` with a database that is always there, where it names none: libpq would take one that is named like
    the role. Raises: psycopg.ProgrammingError.
    """
    return info if "dbname" in conninfo_to_dict(info) else make_conninfo(info, dbname="postgres")


def connect(url: str, *, application_name: str, dbname: str | None = None) -> psycopg.Connection:
    """
    An autocommit session with everything pinned that a role or database could have set otherwise.

    Raises: UnusableUrl, EngineUnavailable, PermissionMissing, EngineError.
    """
    overrides = {"application_name": application_name, "client_encoding": "UTF8"}
    if dbname is not None:
        overrides["dbname"] = dbname
    info = with_database(conninfo(url, **overrides))
    try:
        connection = psycopg.connect(info, autocommit=True)
    except psycopg.Error as error:
        raise translate(error, "connect to the server") from None
    try:
        connection.execute(_PINNED.encode())
        if connection.info.server_version >= 140000:
            connection.execute(_IDLE_SESSION_TIMEOUT.encode())
    except psycopg.Error as error:
        connection.close()
        raise translate(error, "set up the session") from None
    return connection


def translate(error: psycopg.Error, doing: str) -> EngineError:
    """The error of ours for a driver's error while `doing` something ("start the backup")."""
    state = error.sqlstate or ""
    text = error.diag.message_primary or " ".join(str(error).split())
    detail = f"The server said: {text}" if text else "The server closed the connection."
    if state == "42501":
        return PermissionMissing(f"role may not {doing}", detail=detail, hints=_grant_hints(text))
    if state.startswith("28") or _is_refused_login(text):
        return PermissionMissing(f"role may not {doing}", detail=detail, hints=_LOGIN_HINTS)
    if state == "3D000" or ("database" in text and "does not exist" in text):
        return EngineError(f"could not {doing}", detail=detail, hints=["does the URL name a database?"])
    if isinstance(error, psycopg.OperationalError) and not state:
        return EngineUnavailable(f"could not {doing}", detail=detail, hints=_CONNECT_HINTS)
    if state[:2] in _UNAVAILABLE_CLASSES:
        return EngineUnavailable(f"could not {doing}", detail=detail)
    return EngineError(f"could not {doing}", detail=f"{detail} (SQLSTATE {state or 'none'})")


_LOGIN_HINTS = (
    "is the password in ~/.pgpass, PGPASSWORD or a service file for this host, port, database and user?",
    "does pg_hba.conf have a line for this user, database and address?",
)
_CONNECT_HINTS = ("is the server running, and are host and port of the URL right?",)


def _is_refused_login(text: str) -> bool:
    """A refused login carries no SQLSTATE in libpq."""
    return any(
        part in text
        for part in (
            "authentication failed",
            "no pg_hba.conf entry",
            "no password supplied",
            "is not permitted to log in",
        )
    ) or bool(re.search(r'role "[^"]*" does not exist', text))


def _grant_hints(text: str) -> Sequence[str]:
    """The statement that gives what is missing, where the server's text names it."""
    found = re.search(r"permission denied for function (\w+)", text)
    if found and (signature := FUNCTION_SIGNATURES.get(found[1])):
        return (f"as a superuser: GRANT EXECUTE ON FUNCTION pg_catalog.{signature} TO <role>;",)
    if "replication" in text.lower():
        return ("as a superuser: ALTER ROLE <role> REPLICATION;",)
    return ("cloudsave check prints the rights that a role needs",)


def grant_statement(function: str, role: str) -> str:
    """The GRANT of one function of `FUNCTION_SIGNATURES`."""
    name = sql.Identifier(role).as_string(None)
    return f"GRANT EXECUTE ON FUNCTION pg_catalog.{FUNCTION_SIGNATURES[function]} TO {name};"
