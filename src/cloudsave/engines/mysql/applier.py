"""
Brings a clone to a state: what changed while it was copied is applied, and the stored binlog, laid out as
relay logs, is executed by the server's own applier.

The clone itself knows which GTIDs it has, and the applier passes over those. The last relay log ends where
replay is to end; what the server has executed afterwards is asked of itself.
Source: decision 0036; MySQL manual, CHANGE REPLICATION SOURCE TO and START REPLICA UNTIL.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pymysql
from pymysql.cursors import DictCursor

from cloudsave.clock import SYSTEM_CLOCK, Clock
from cloudsave.engines.apply_api import AppliedState, ApplyLog, ApplyRequest
from cloudsave.engines.binlog.connection import Session, translate
from cloudsave.engines.binlog.cut import GtidSet, cut_mysql
from cloudsave.engines.binlog.format_event import MAGIC
from cloudsave.engines.binlog.position import LOG_FILE_BYTES, number_of, place_of
from cloudsave.engines.binlog.private_server import (
    ACCOUNT,
    POLL_SECONDS,
    PrivateServer,
    account_statements,
    buffer_pool_bytes,
    random_server_id,
)
from cloudsave.engines.binlog.programs import UNPRIVILEGED_USERS, find_program, parse_release
from cloudsave.engines.binlog.server_settings import copied_settings
from cloudsave.engines.mysql.format_changes import read_changes
from cloudsave.engines.mysql.source import CHANGES_FILE, FILE_MODE
from cloudsave.engines.processes import ServerUser, server_user
from cloudsave.errors import IntegrityError, RecoveryError

NAME = "mysql"
SERVER_PROGRAMS = ("mysqld",)
RELAY = "relay"
APPLY_WORKERS_MAX = 4
DIRECTORY_MODE = 0o750
_SCHEMAS = (
    "SELECT SCHEMA_NAME FROM information_schema.SCHEMATA"
    " WHERE SCHEMA_NAME NOT IN ('information_schema', 'performance_schema')"
)


_WITHIN = "SELECT GTID_SUBTRACT(%s, GTID_SUBTRACT(%s, %s)) = GTID_SUBTRACT(%s, '')"


class MysqlApplier:
    """`LogApplier` of MySQL."""

    def __init__(self, *, clock: Clock = SYSTEM_CLOCK) -> None:
        self._clock = clock
        self._request: ApplyRequest | None = None
        self._user: ServerUser | None = None
        self._program = Path()
        self._server: PrivateServer | None = None
        self._session: Session | None = None
        self._wanted = GtidSet()
        self._all = GtidSet()
        """Of the last file, what lies behind the end of replay too."""
        self._relay_begins: dict[str, int] = {}

    # ---- the life of a restored directory

    def prepare(self, request: ApplyRequest) -> None:
        """See `LogApplier.prepare`."""
        self._request = request
        data = request.data_directory
        self._user = server_user(UNPRIVILEGED_USERS, owner_uid=data.stat().st_uid)
        series = parse_release(request.server_version)[:2]
        self._program = find_program(SERVER_PROGRAMS, series, request.bin_directory)
        self._apply_changes(data)
        self._make_directory(data / "mysql")

    def start(self, log: ApplyLog) -> None:
        """See `LogApplier.start`."""
        request = self._asked()
        self._lay_relay_logs(log)
        self._server = PrivateServer(NAME, self._program, request.data_directory, self._user, self._clock)
        settings = {
            **copied_settings(request.base),
            "skip-networking": "",
            "mysqlx": "0",
            "skip-log-bin": "",
            "skip-replica-start": "",
            "event-scheduler": "OFF",
            "gtid-mode": "ON",
            "enforce-gtid-consistency": "ON",
            "server-id": random_server_id(self._clock),
            "relay-log": str(log.directory / RELAY),
            "relay-log-index": str(log.directory / f"{RELAY}.index"),
            "relay-log-recovery": "OFF",
            "relay-log-purge": "OFF",
            "replica-parallel-workers": str(min(APPLY_WORKERS_MAX, os.cpu_count() or 1)),
            "replica-max-allowed-packet": "1G",
            "max-allowed-packet": "1G",
            "secure-file-priv": "NULL",
            "auto-generate-certs": "OFF",
            "loose-sha256-password-auto-generate-rsa-keys": "OFF",
            "caching-sha2-password-auto-generate-rsa-keys": "OFF",
            # Nothing is durable before the shutdown; a restore that is killed begins anew.
            "innodb-flush-log-at-trx-commit": "0",
            "innodb-doublewrite": "OFF",
            "innodb-buffer-pool-size": str(buffer_pool_bytes()),
            **request.settings,
        }
        statements = account_statements(self._server.password, "localhost", "ALL")
        self._session = self._server.start(settings, statements)
        for (name,) in self._rows(_SCHEMAS):
            if (encoded := _file_name(name)) is not None:
                self._make_directory(request.data_directory / encoded)

    def apply(self, passed: Callable[[int], None]) -> AppliedState:
        """See `LogApplier.apply`."""
        base, wanted = self._executed(), str(self._wanted)
        ((within,),) = self._rows(_WITHIN, base, str(self._all), wanted, base)
        if not within:
            raise IntegrityError(
                "clone holds transactions that lie behind the target",
                detail=f"It has {base}; wanted is {wanted}.",
                hints=["choose an earlier backup with --backup", "please report this"],
            )
        if not self._subset(wanted, base):
            self._execute(wanted, passed)
        reached = self._executed()
        exact = self._subset(wanted, reached) and self._subset(reached, f"{base},{wanted}")
        return AppliedState(reached, reached if exact else f"{base} and {wanted}")

    def look(self) -> str:
        """See `LogApplier.look`."""
        self._rows("SET GLOBAL super_read_only = ON")
        assert self._server is not None
        return self._server.url

    def hand_over(self) -> None:
        """See `LogApplier.hand_over`."""
        assert self._server is not None
        assert self._session is not None
        self._rows("RESET REPLICA ALL")
        self._rows(f"DROP USER '{ACCOUNT}'@'localhost'")
        self._session.close()
        self._server.stop()
        self.stop()

    def stop(self) -> None:
        """See `LogApplier.stop`."""
        if self._session is not None:
            self._session.close()
        if self._server is not None:
            self._server.close()
        self._session = self._server = None

    # ---- files

    def _apply_changes(self, data: Path) -> None:
        """Write what changed after a file was copied. Raises: IntegrityError."""
        place = data / CHANGES_FILE
        opened: dict[str, int] = {}
        try:
            with place.open("rb") as file:
                for change in read_changes(file):
                    if change.path not in opened:
                        opened[change.path] = self._open(data, change.path)
                    descriptor = opened[change.path]
                    if change.data is None:
                        os.ftruncate(descriptor, change.offset)
                    elif os.pwrite(descriptor, change.data, change.offset) != len(change.data):
                        raise RecoveryError("could not write all of a page", detail=f"In {change.path!r}.")
        except FileNotFoundError as error:
            raise IntegrityError(
                "backup lacks the changes of its clone", detail=f"There is no {CHANGES_FILE}."
            ) from error
        finally:
            for descriptor in opened.values():
                os.close(descriptor)
        place.unlink()

    def _open(self, data: Path, path: str) -> int:
        target = data / path
        self._make_directory(target.parent)
        new = not target.exists()
        descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, FILE_MODE)
        if new:
            self._own(target)
        return descriptor

    def _make_directory(self, path: Path) -> None:
        with suppress(FileExistsError):
            path.mkdir(mode=DIRECTORY_MODE)
            self._own(path)

    def _own(self, path: Path) -> None:
        if self._user is not None:
            os.chown(path, self._user.uid, self._user.gid)

    def _lay_relay_logs(self, log: ApplyLog) -> None:
        """The binlog files become relay logs; the last one ends where replay ends. Raises: IntegrityError."""
        names = []
        self._own(log.directory)
        for number, (name, begin) in enumerate(log.files, start=1):
            path = log.directory / name
            if number_of(begin) > number_of(log.stop):
                path.unlink()
                continue
            last = number_of(begin) == number_of(log.stop)
            stop = max(place_of(log.stop), len(MAGIC)) if last else LOG_FILE_BYTES
            content = path.read_bytes()
            place = cut_mysql(content, self._wanted, stop=stop, inclusive=log.inclusive and last)
            if last:
                cut_mysql(content, self._all, stop=LOG_FILE_BYTES, inclusive=False)
            os.truncate(path, place)
            relay = log.directory / f"{RELAY}.{number:06}"
            path.rename(relay)
            self._own(relay)
            self._relay_begins[relay.name] = begin
            names.append(relay)
        index = log.directory / f"{RELAY}.index"
        index.write_text("".join(f"{name}\n" for name in names))
        self._own(index)

    # ---- the applier

    def _execute(self, wanted: str, passed: Callable[[int], None]) -> None:
        first = min(self._relay_begins)
        self._rows(
            "CHANGE REPLICATION SOURCE TO SOURCE_HOST = 'none', SOURCE_USER = 'none',"
            " SOURCE_AUTO_POSITION = 0, RELAY_LOG_FILE = %s, RELAY_LOG_POS = 4",
            first,
        )
        self._rows("START REPLICA SQL_THREAD UNTIL SQL_AFTER_GTIDS = %s", wanted)
        while True:
            status = self._status()
            if status["Last_SQL_Errno"]:
                detail = str(status["Last_SQL_Error"])
                raise RecoveryError("restored server could not apply its log", detail=detail)
            if status["Replica_SQL_Running"] == "No":
                return
            begin = self._relay_begins.get(Path(status["Relay_Log_File"]).name)
            if begin is not None:
                passed(begin + int(status["Relay_Log_Pos"]))
            self._clock.sleep(POLL_SECONDS)

    def _executed(self) -> str:
        ((text,),) = self._rows("SELECT REPLACE(@@GLOBAL.gtid_executed, '\\n', '')")
        return str(text)

    def _subset(self, one: str, other: str) -> bool:
        ((found,),) = self._rows("SELECT GTID_SUBSET(%s, %s)", one, other.strip(","))
        return bool(found)

    # ---- talking to the restored server

    def _asked(self) -> ApplyRequest:
        assert self._request is not None, "prepare comes first"
        return self._request

    def _rows(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        assert self._session is not None, "start comes before"
        return self._session.rows(statement, *values, doing="bring the restored server to its state")

    def _status(self) -> Mapping[str, Any]:
        assert self._session is not None, "start comes before"
        assert self._server is not None
        try:
            with closing(self._session.connection.cursor(DictCursor)) as cursor:
                cursor.execute("SHOW REPLICA STATUS")
                found = cursor.fetchone()
                assert found is not None, "a replica was set up"
                return found
        except (pymysql.Error, OSError) as error:
            if not self._server.running():
                raise self._server.failed("go on while it applied its log") from error
            raise translate(error, "ask the restored server for its state") from None


def _file_name(schema: str) -> str | None:
    """
    The directory of a schema; None for names with other than ASCII characters, of which a clone has a
    directory only where they have tables. Source: MySQL manual, Mapping of Identifiers to File Names.
    """
    if not schema.isascii():
        return None
    return "".join(one if one.isalnum() or one == "_" else f"@{ord(one):04x}" for one in schema)
