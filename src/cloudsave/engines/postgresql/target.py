"""
A restored data directory as a server: private until it has proved to be in the wanted state.

It listens on a Unix socket in a directory that nobody else can enter, where every role is trusted; other
addresses only by the rules of its own pg_hba.conf. Recovery always pauses at its target: the state is
queried, compared by the caller, and only then is the server promoted. Nothing is concluded from exit codes:
`pg_ctl -w start` succeeds before recovery fails.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg

from cloudsave.clock import SYSTEM_CLOCK, Clock
from cloudsave.engines.postgresql.dialect import followed_branch, last_ancestor
from cloudsave.engines.postgresql.exclusions import CONTROL_FILE
from cloudsave.engines.postgresql.format_control import parse_control
from cloudsave.engines.postgresql.leftover import end_leftover_server
from cloudsave.engines.postgresql.log import branch_of, parse_lsn
from cloudsave.engines.postgresql.programs import (
    UNPRIVILEGED_USERS,
    find_programs,
    readable_programs,
    run_program,
)
from cloudsave.engines.postgresql.recovery_settings import (
    AUTO_CONF,
    KEPT_AFTERWARDS,
    RECOVERY_SIGNAL,
    STANDBY_SIGNAL,
    has_ended_recovery,
    recovery_settings,
    refuse_held_settings,
    with_settings,
)
from cloudsave.engines.processes import ServerUser, server_user
from cloudsave.errors import CloudsaveError, RecoveryMismatch, ServerDidNotStart
from cloudsave.model.engine_facts import ServerRequest, ServerState

DEFAULT_PORT = 5432
POLL_SECONDS = 0.05
CONNECT_SECONDS_MAX = 5
STOP_SECONDS_MAX = 120.0
LOG_TAIL_LINES = 12
LOG_NAME = "cloudsave.server.log"
SOCKET_DIRECTORY_BYTES_MAX = 90
"""Limit: the path of a Unix socket has 107 bytes; the server's name for it takes up to 16."""
SHORT_PREFIX = "cloudsave-"
DATABASES = ("postgres", "template1")
_TOO_LOW = re.compile(
    r"(max_\w+) = \d+ is a lower setting than on the primary server, where its value was (\d+)"
)

_STATE = """
select pg_is_in_recovery(),
       case when pg_is_in_recovery() then pg_get_wal_replay_pause_state() = 'paused' else false end,
       case when pg_is_in_recovery() then pg_last_wal_replay_lsn()::text
            else pg_current_wal_lsn()::text end,
       case when pg_is_in_recovery()
            then greatest((pg_control_checkpoint()).timeline_id,
                          (pg_control_recovery()).min_recovery_end_timeline)
            else ('x' || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8))::bit(32)::int end,
       (extract(epoch from pg_last_xact_replay_timestamp()) * 1000000)::bigint
"""


class PostgresTarget:
    """`RestoreTarget` of PostgreSQL."""

    def __init__(self, *, clock: Clock = SYSTEM_CLOCK) -> None:
        self._clock = clock
        self._request: ServerRequest | None = None
        self._user: ServerUser | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._private: Path | None = None
        self._programs = Path()
        self._login = ("postgres", "postgres")
        self._log_begin = 0
        """Where the log of this run begins in its file, in characters."""
        self._opened_before = False

    # ---- the life of a restored server

    def configure(self, request: ServerRequest) -> None:
        """See `RestoreTarget.configure`."""
        refuse_held_settings(request.settings)
        self._request = request
        data = request.data_directory
        if self._process is None:
            end_leftover_server(data, private=lambda path: is_private(path, data), clock=self._clock)
        self._user = server_user(UNPRIVILEGED_USERS, owner_uid=data.stat().st_uid)
        # One that was opened for writing goes on as it is: another recovery would not find its place.
        self._opened_before = has_ended_recovery(data)
        if self._opened_before:
            return
        auto_conf = data / AUTO_CONF
        content = auto_conf.read_text(errors="surrogateescape") if auto_conf.exists() else ""
        needed = _needed_settings(data)
        self._put(auto_conf, with_settings(content, recovery_settings(request, needed)))
        (data / STANDBY_SIGNAL).unlink(missing_ok=True)
        self._put(data / RECOVERY_SIGNAL, "")

    def start(self) -> None:
        """See `RestoreTarget.start`. Returns at once; `await_target` sees whether it goes well."""
        request = self._asked()
        data = request.data_directory
        major = int((data / "PG_VERSION").read_text().strip())
        found = find_programs(major, request.bin_directory)
        self._private = _private_directory(data)
        self._programs = readable_programs(found, self._user, self._private / "programs")
        self._write_hba(data)
        self._own(self._private)
        command = [str(self._programs / "postgres"), "-D", str(self._config_directory(data))]
        for name, value in self._private_settings(request).items():
            command += ["-c", f"{name}={value}"]
        self._log_begin = _characters_in(self._log_path())
        with self._log_path().open("ab") as log:
            self._own(self._log_path())
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                start_new_session=True,
                env=_environment(),
                **(self._user.process_arguments() if self._user else {}),  # type: ignore[call-overload]
            )

    def await_target(self, *, timeout_seconds: float) -> ServerState:
        """
        See `RestoreTarget.await_target`. When the time is over, the state so far is returned:
        `paused_at_target` is false then, and `replayed_offset` None where nobody can connect yet.
        """
        deadline = self._clock.monotonic() + timeout_seconds
        while True:
            state = self._state()
            if state is not None and not state.in_recovery:
                return self._opened_by_itself(state)
            if state is not None and state.paused_at_target:
                if self._too_low():
                    raise self._did_not("replay all of the log: the source's settings were raised in it")
                return state
            if self._clock.monotonic() >= deadline:
                return state or ServerState(
                    in_recovery=True,
                    paused_at_target=False,
                    replayed_offset=None,
                    branch=self._asked().branch,
                    last_commit_us=None,
                )
            self._clock.sleep(POLL_SECONDS)

    def _opened_by_itself(self, state: ServerState) -> ServerState:
        """
        Where such a server ended its recovery, by the history that it wrote: one that an earlier run opened,
        or one that cannot let readers in yet (a transaction with many subtransactions was open), which does
        not pause at its target.

        Source: PostgreSQL recoveryPausesHere(), src/backend/access/transam/xlogrecovery.c.
        """
        state = replace(state, opened_before=self._opened_before)
        history = self._asked().data_directory / "pg_wal" / f"{state.branch}.history"
        ended = last_ancestor(history.read_bytes()) if history.exists() else None
        if ended is None:
            return state
        return replace(state, replayed_offset=ended.end_offset, branch=ended.branch)

    def promote(self, *, timeout_seconds: float) -> ServerState:
        """See `RestoreTarget.promote`. Raises: ServerDidNotStart, RecoveryMismatch."""
        request = self._asked()
        data = request.data_directory
        run_program(self._programs, self._user, ["pg_ctl", "promote", "--no-wait", "-D", str(data)])
        deadline = self._clock.monotonic() + timeout_seconds
        while (state := self._state()) is None or state.in_recovery:
            if self._clock.monotonic() >= deadline:
                raise self._did_not("open for writing in time")
            self._clock.sleep(POLL_SECONDS)
        self._check_parent(data, state.branch, request.branch)
        auto_conf = data / AUTO_CONF
        self._put(auto_conf, with_settings(auto_conf.read_text(errors="surrogateescape"), KEPT_AFTERWARDS))
        return state

    def stop(self) -> None:
        """See `RestoreTarget.stop`."""
        process, self._process = self._process, None
        if process is not None and process.poll() is None:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(timeout=STOP_SECONDS_MAX)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGQUIT)
                process.wait(timeout=STOP_SECONDS_MAX)
        if self._private is not None:
            shutil.rmtree(self._private, ignore_errors=True)
            self._private = None

    def connection_url(self) -> str:
        """See `RestoreTarget.connection_url`."""
        role, database = self._login
        return f"postgresql://{role}@/{database}?host={self._private}&port={self._port()}"

    # ---- how it is started

    def _private_settings(self, request: ServerRequest) -> dict[str, str]:
        data = request.data_directory
        settings = {
            "data_directory": str(data),
            "hba_file": str(self._private_path() / "pg_hba.conf"),
            "external_pid_file": "",
            "listen_addresses": "" if request.private_socket else "localhost",
            "port": str(self._port()),
            "unix_socket_directories": str(self._private_path()),
            "unix_socket_group": "",
            "unix_socket_permissions": "0700",
            "logging_collector": "off",
            "log_destination": "stderr",
            "lc_messages": "C",
            "synchronous_standby_names": "",
            "archive_mode": "off",
        }
        ident = self._outside("pg_ident.conf")
        if not (data / "pg_ident.conf").exists() and ident is not None:
            settings["ident_file"] = str(ident)
        if request.private_socket:
            settings["ssl"] = "off"
        settings.update(request.settings)
        return settings

    def _config_directory(self, data: Path) -> Path:
        """Where postgresql.conf is: in the data directory, or (Debian) restored beside it."""
        if (data / "postgresql.conf").exists():
            return data
        outside = self._outside("postgresql.conf")
        if outside is not None:
            return outside.parent
        self._put(data / "postgresql.conf", "# the backup held no configuration: all defaults\n")
        return data

    def _outside(self, name: str) -> Path | None:
        """A configuration file that was restored beside the data directory."""
        data = self._asked().data_directory
        beside = data.with_name(data.name + ".config")
        return min(beside.rglob(name), key=lambda path: len(path.parts), default=None)

    def _write_hba(self, data: Path) -> None:
        own = data / "pg_hba.conf"
        source = own if own.exists() else self._outside("pg_hba.conf")
        rules = source.read_text(errors="surrogateescape") if source else ""
        private = (
            "# the directory of the socket is private\nlocal all all trust\nlocal replication all trust\n"
        )
        self._put(self._private_path() / "pg_hba.conf", private + rules)

    def _port(self) -> int:
        return self._asked().port or DEFAULT_PORT

    def _private_path(self) -> Path:
        if self._private is None:
            raise ValueError("the server has not been started")
        return self._private

    def _asked(self) -> ServerRequest:
        if self._request is None:
            raise ValueError("configure comes first")
        return self._request

    def _put(self, path: Path, content: str) -> None:
        """Write a file that the server's user owns; it is replaced as a whole."""
        new = path.with_name(path.name + ".cloudsave-new")
        with new.open("w", errors="surrogateescape") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        new.chmod(0o600)
        self._own(new)
        new.replace(path)

    def _own(self, path: Path) -> None:
        if self._user is not None:
            os.chown(path, self._user.uid, self._user.gid)

    # ---- what it says

    def _state(self) -> ServerState | None:
        """The state as queried; None while nobody can connect. Raises: ServerDidNotStart when it is gone."""
        for role, database in self._logins():
            try:
                with self._connect(role, database) as connection:
                    row = connection.execute(_STATE).fetchone()
            except psycopg.Error as error:
                if f'"{role}" does not exist' in str(error) or f'"{database}" does not exist' in str(error):
                    continue
                break
            self._login = (role, database)
            if row is None:
                break
            in_recovery, paused, lsn, timeline, instant_us = row
            return ServerState(
                in_recovery=in_recovery,
                paused_at_target=paused,
                replayed_offset=parse_lsn(lsn) if lsn else None,
                branch=branch_of(timeline),
                last_commit_us=instant_us,
            )
        if self._process is not None and self._process.poll() is not None:
            raise self._did_not("reach its target")
        return None

    def _connect(self, role: str, database: str) -> psycopg.Connection[tuple[Any, ...]]:
        return psycopg.connect(
            host=str(self._private_path()),
            port=self._port(),
            user=role,
            dbname=database,
            connect_timeout=CONNECT_SECONDS_MAX,
            client_encoding="UTF8",
            application_name="cloudsave restore",
            autocommit=True,
        )

    def _logins(self) -> Iterator[tuple[str, str]]:
        """Roles and databases that may be there; the one that worked comes first."""
        yield self._login
        names = ["postgres", os.environ.get("PGUSER", ""), self._user.name if self._user else _user_name()]
        for name in dict.fromkeys(name for name in names if name):
            for database in DATABASES:
                if (name, database) != self._login:
                    yield name, database

    def _check_parent(self, data: Path, branch: str, wanted: str) -> None:
        """The new branch must have left the one that was to be followed."""
        history = data / "pg_wal" / f"{branch}.history"
        parent = followed_branch(history.read_bytes())
        if parent != wanted:
            raise RecoveryMismatch(
                "server has followed another branch than the plan",
                detail=f"Its new branch {branch} left branch {parent or 'none'}, not {wanted}.",
            )

    def _log_path(self) -> Path:
        return self._asked().data_directory / LOG_NAME

    def _did_not(self, what: str) -> ServerDidNotStart:
        with contextlib.suppress(OSError):
            lines = self._log_path().read_text(errors="replace").splitlines()
            telling = [line for line in lines if any(word in line for word in ("FATAL", "PANIC", "ERROR"))]
            shown = telling[-LOG_TAIL_LINES:] or lines[-LOG_TAIL_LINES:]
            return ServerDidNotStart(
                f"restored server did not {what}",
                detail=" | ".join(shown),
                hints=[*self._too_low(), f"its whole log is {self._log_path()}"],
            )
        return ServerDidNotStart(f"restored server did not {what}")

    def _too_low(self) -> list[str]:
        """Settings that the log asks for, as arguments, where the server has stopped because of them."""
        with contextlib.suppress(OSError):
            said = self._log_path().read_text(errors="replace")[self._log_begin :]
            return [f"--set {name}={value}" for name, value in dict(_TOO_LOW.findall(said)).items()]
        return []


def _characters_in(path: Path) -> int:
    return len(path.read_text(errors="replace")) if path.exists() else 0


def _needed_settings(data: Path) -> Mapping[str, int]:
    """By the control file that was restored; none where it cannot be read: the server will say so."""
    try:
        return parse_control((data / CONTROL_FILE).read_bytes()).needed_settings
    except (FileNotFoundError, CloudsaveError):
        return {}


def _private_directory(data: Path) -> Path:
    """A new directory for the socket: beside the data, where it goes with it, unless its path is too long."""
    made = Path(tempfile.mkdtemp(prefix=f"{data.name}.run-", dir=data.parent))
    if len(str(made).encode()) <= SOCKET_DIRECTORY_BYTES_MAX:
        return made
    made.rmdir()
    return Path(tempfile.mkdtemp(prefix=SHORT_PREFIX, dir="/tmp"))


def is_private(path: Path, data: Path) -> bool:
    """Whether `_private_directory` made it."""
    return path.name.startswith((f"{data.name}.run-", SHORT_PREFIX))


def _environment() -> dict[str, str]:
    """Nothing of the caller's libpq or locale settings reaches the server."""
    return {"LC_ALL": "C", "PATH": os.environ.get("PATH", "/usr/bin:/bin"), "HOME": "/"}


def _user_name() -> str:
    return pwd.getpwuid(os.geteuid()).pw_name
