"""
The held SQL session of a backup: backup mode on and off, and the facts that a restore needs.

The session must live from start to stop: when it ends first, the server leaves backup mode by itself and
what was copied is no backup.
Source: PostgreSQL manual, Making a Base Backup Using the Low Level API.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg

from cloudsave.engines.postgresql.collation import LIBRARIES, LIBRARIES_SETTING
from cloudsave.engines.postgresql.connection import translate
from cloudsave.engines.postgresql.format_wal import parse_lsn
from cloudsave.engines.postgresql.log import branch_of
from cloudsave.errors import BackupInvalidated, EngineError, IntegrityError, UnsuitableSettings
from cloudsave.model.identity import Role
from cloudsave.model.item import Item, ItemKind
from cloudsave.model.position import Position

NOT_IN_PREREQUISITE_STATE = "55000"
"""SQLSTATE of a server that cannot be backed up, or not any more."""
OUTSIDE_FILE_BYTES_MAX = 16 << 20
"""Limit: a configuration file larger than this is not one."""

SETTINGS_KEPT = (
    "archive_mode",
    "block_size",
    "config_file",
    "data_checksums",
    "data_directory",
    "full_page_writes",
    "hba_file",
    "ident_file",
    "lc_collate",
    "listen_addresses",
    "max_connections",
    "max_locks_per_transaction",
    "max_prepared_transactions",
    "max_wal_senders",
    "max_worker_processes",
    "port",
    "server_version",
    "shared_preload_libraries",
    "timezone",
    "track_commit_timestamp",
    "unix_socket_directories",
    "wal_level",
    "wal_log_hints",
    "wal_segment_size",
)

_START = "select pg_backup_start(%s, %s)::text"
_START_14 = "select pg_start_backup(%s, %s, false)::text"
_STOP = "select lsn::text, labelfile, spcmapfile from pg_backup_stop(false)"
_STOP_14 = "select lsn::text, labelfile, spcmapfile from pg_stop_backup(false, false)"
_BRANCH = """
select case when pg_is_in_recovery()
            then lpad(upper(to_hex((pg_control_checkpoint()).timeline_id)), 8, '0')
            else substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8) end
"""
_TABLESPACE_VERSION = """
select 'PG_' || current_setting('server_version_num')::int / 10000 || '_' || catalog_version_no
from pg_control_system()
"""
_LABEL_START = re.compile(r"^START WAL LOCATION: ([0-9A-F]+)/([0-9A-F]+) ", re.MULTILINE)
_LABEL_TIMELINE = re.compile(r"^START TIMELINE: (\d+)$", re.MULTILINE)
_FIRST_SERVER_WITH_NEW_NAMES = 150000


def label_start(label: str) -> Position:
    """Where replay begins by a `backup_label`. Raises: IntegrityError."""
    location, timeline = _LABEL_START.search(label), _LABEL_TIMELINE.search(label)
    if location is None or timeline is None:
        raise IntegrityError(
            "backup label of the server cannot be read",
            detail="It lacks START WAL LOCATION or START TIMELINE.",
        )
    return Position(branch_of(int(timeline[1])), (int(location[1], 16) << 32) | int(location[2], 16))


@dataclass(frozen=True, slots=True)
class Stopped:
    """What the server said when it left backup mode."""

    offset: int
    label: str
    tablespace_map: str


class BackupSession:
    """One session; not thread-safe."""

    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        self.connection = connection

    def row(self, query: str, parameters: tuple[object, ...] = (), *, doing: str) -> tuple[Any, ...]:
        """The only row of a query, with the driver's errors translated."""
        try:
            found = self.connection.execute(query.encode(), parameters or None).fetchone()
        except psycopg.Error as error:
            raise translate(error, doing) from None
        if found is None:
            raise EngineError(f"could not {doing}", detail="The server returned no row.")
        row: tuple[Any, ...] = found
        return row

    def column(self, query: str, parameters: tuple[object, ...] = (), *, doing: str) -> list[Any]:
        """The first column of a query's rows, with the driver's errors translated."""
        try:
            return [row[0] for row in self.connection.execute(query.encode(), parameters or None)]
        except psycopg.Error as error:
            raise translate(error, doing) from None

    def start(self, label: str, *, fast: bool) -> Position:
        """Enter backup mode; returns where replay will begin. Waits for the checkpoint."""
        query = _START if self._has_new_names else _START_14
        try:
            found = self.connection.execute(query.encode(), (label, fast)).fetchone()
        except psycopg.Error as error:
            raise _refused(error) from None
        assert found is not None
        (branch,) = self.row(_BRANCH, doing="read the timeline")
        return Position(branch, parse_lsn(found[0]))

    def stop(self) -> Stopped:
        """Leave backup mode. Raises: EngineError where the backup is worthless."""
        query = _STOP if self._has_new_names else _STOP_14
        try:
            found = self.connection.execute(query.encode()).fetchone()
        except psycopg.Error as error:
            if error.sqlstate == NOT_IN_PREREQUISITE_STATE:
                raise worthless(f"The server said: {error.diag.message_primary}") from None
            raise translate(error, "finish the backup") from None
        assert found is not None
        lsn, label, tablespace_map = found
        return Stopped(parse_lsn(lsn), label, tablespace_map or "")

    def settings(self) -> dict[str, str]:
        """The settings of `SETTINGS_KEPT` that the role may see, and the versions of sort orders."""
        query = "select name, setting from pg_settings where name = any(%s) order by name"
        try:
            rows = self.connection.execute(query.encode(), (list(SETTINGS_KEPT),)).fetchall()
        except psycopg.Error as error:
            raise translate(error, "read the settings") from None
        kept = {name: setting for name, setting in rows if setting is not None}
        # A backup does not fail for what only helps to warn.
        with suppress(psycopg.Error):
            found = self.connection.execute(LIBRARIES.encode()).fetchone()
            if found is not None and found[0]:
                kept[LIBRARIES_SETTING] = found[0]
        return kept

    def clock_us(self) -> int:
        """
        The server's clock, in microseconds since 1970. A replica's own may be behind its primary's, by which
        commits are dated: then it is the instant of the last commit that was replayed.
        """
        query = """
            select (extract(epoch from greatest(clock_timestamp(), pg_last_xact_replay_timestamp()))
                    * 1000000)::bigint
        """
        return int(self.row(query, doing="read the server's clock")[0])

    def tablespace_version(self) -> str:
        """The name of the server's directory in each tablespace, such as "PG_18_202506291"."""
        return str(self.row(_TABLESPACE_VERSION, doing="read the catalog version")[0])

    def see_role(self, role: Role) -> None:
        """Raises: EngineError where the session is lost; BackupInvalidated where a replica was promoted."""
        (in_recovery,) = self.row("select pg_is_in_recovery()", doing="go on with the backup")
        if role == Role.REPLICA and not in_recovery:
            raise worthless("The replica was promoted meanwhile.")

    def close(self) -> None:
        """End the session, and with it backup mode. Never raises."""
        with contextlib.suppress(psycopg.Error, OSError):
            self.connection.close()

    @property
    def _has_new_names(self) -> bool:
        return self.connection.info.server_version >= _FIRST_SERVER_WITH_NEW_NAMES


def worthless(detail: str) -> BackupInvalidated:
    """A replica was promoted, or replayed log without full page images: pages may be torn for good."""
    return BackupInvalidated(
        "server declares the backup worthless",
        detail=detail,
        hints=[
            "run the backup again: what is stored is not sent again",
            "is full_page_writes on at the primary, all the time?",
        ],
    )


def _refused(error: psycopg.Error) -> EngineError:
    """The state means: wal_level is minimal, or a replica replayed log without full page writes."""
    if error.sqlstate != NOT_IN_PREREQUISITE_STATE:
        return translate(error, "start the backup")
    hint = error.diag.message_hint
    return UnsuitableSettings(
        "server cannot be backed up with its present settings",
        detail=f"The server said: {error.diag.message_primary}",
        hints=[hint] if hint else (),
    )


# ---- configuration outside of the data directory
# -------------------------------------------------------------

# Functions, not the views over them: the right to call a function can be granted to an ordinary role.
_FILE_QUERIES: Mapping[str, tuple[int, str]] = {
    "settings": (
        0,
        "select setting from pg_settings where name in ('config_file', 'hba_file', 'ident_file')",
    ),
    "included configuration": (0, "select distinct sourcefile from pg_show_all_file_settings()"),
    "included hba files": (160000, "select distinct file_name from pg_hba_file_rules()"),
    "included ident files": (160000, "select distinct file_name from pg_ident_file_mappings()"),
}


@dataclass(frozen=True, slots=True)
class OutsideFiles:
    """Configuration files outside of the data directory, with their contents, and what could not be read."""

    files: tuple[tuple[Item, bytes], ...]
    notes: tuple[str, ...]


def outside_files(
    session: BackupSession, data_directory: str, read: Callable[[str], tuple[Item, bytes]]
) -> OutsideFiles:
    """
    Find and read the configuration outside of `data_directory`. `read` raises EngineError or OSError for
    what it cannot read; that becomes a note.
    """
    paths: set[str] = set()
    notes: list[str] = []
    for what, (version_min, query) in _FILE_QUERIES.items():
        if session.connection.info.server_version < version_min:
            continue
        try:
            paths.update(session.column(query, doing=f"list {what}"))
        except EngineError as error:
            notes.append(f"configuration outside the data directory may be missing: {error.detail}")
    files: list[tuple[Item, bytes]] = []
    for path in sorted(path for path in paths if path and is_outside(path, data_directory)):
        try:
            files.append(read(path))
        except (EngineError, OSError) as error:
            reason = error.strerror if isinstance(error, OSError) else error.detail
            notes.append(f"configuration file {path!r} could not be read: {reason}")
    return OutsideFiles(tuple(files), tuple(notes))


def is_outside(path: str, data_directory: str) -> bool:
    """Whether the server's file at `path` lies outside of the data directory (by name)."""
    return path.startswith("/") and not path.startswith(data_directory.rstrip("/") + "/")


def read_local(path: str) -> tuple[Item, bytes]:
    """A configuration file of this machine. Raises: OSError."""
    with Path(path).open("rb") as file:
        content = file.read(OUTSIDE_FILE_BYTES_MAX)
        facts = Path(path).stat()
    return (
        Item(
            path,
            ItemKind.FILE,
            facts.st_mode & 0o7777,
            len(content),
            facts.st_mtime_ns // 1000,
            outside=True,
        ),
        content,
    )


def read_by_server(session: BackupSession, path: str) -> tuple[Item, bytes]:
    """A configuration file read by the server for us. Raises: EngineError."""
    content, modified = session.row(
        "select pg_read_binary_file(%s, 0, %s),"
        " (extract(epoch from (pg_stat_file(%s)).modification) * 1000000)::bigint",
        (path, OUTSIDE_FILE_BYTES_MAX, path),
        doing=f"read {path}",
    )
    return Item(path, ItemKind.FILE, 0o600, len(content), modified, outside=True), bytes(content)
