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
from contextlib import suppress
from pathlib import Path

from cloudsave.clock import SYSTEM_CLOCK, Clock
from cloudsave.engines.apply_api import AppliedState, ApplyLog, ApplyRequest
from cloudsave.engines.binlog.cut import GtidSet, cut_mysql
from cloudsave.engines.binlog.position import LOG_FILE_BYTES
from cloudsave.engines.binlog.restored_server import (
    APPLY_WORKERS_MAX,
    RestoredServer,
    Status,
    mapped,
    wanted_files,
)
from cloudsave.engines.mysql.engine import NAME
from cloudsave.engines.mysql.format_changes import read_changes
from cloudsave.engines.mysql.source import CHANGES_FILE, FILE_MODE
from cloudsave.errors import IntegrityError, RecoveryError

SERVER_PROGRAMS = ("mysqld",)
RELAY = "relay"
DIRECTORY_MODE = 0o750


class MysqlApplier:
    """`LogApplier` of MySQL."""

    def __init__(self, *, clock: Clock = SYSTEM_CLOCK) -> None:
        self._clock = clock
        self._server: RestoredServer | None = None
        self._wanted = GtidSet()
        self._beyond = GtidSet()
        """What the last file has behind the end of replay."""
        self._relay_begins: dict[str, int] = {}

    # ---- the life of a restored directory

    def prepare(self, request: ApplyRequest) -> None:
        """See `LogApplier.prepare`."""
        self._server = RestoredServer(NAME, SERVER_PROGRAMS, request, self._clock)
        self._apply_changes(request.data_directory)
        self._make_directory(request.data_directory / "mysql")

    def start(self, log: ApplyLog) -> None:
        """See `LogApplier.start`."""
        self._lay_relay_logs(log)
        self._prepared().start(lambda _: _settings(log.directory))

    def apply(self, passed: Callable[[int], None]) -> AppliedState:
        """See `LogApplier.apply`."""
        base, wanted = self._executed(), str(self._wanted)
        ((within,),) = self._prepared().rows(
            "SELECT GTID_SUBTRACT(%s, %s) = GTID_SUBTRACT(%s, '')", base, str(self._beyond), base
        )
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
        self._prepared().rows("SET GLOBAL super_read_only = ON")
        return self._prepared().url

    def hand_over(self) -> None:
        """See `LogApplier.hand_over`."""
        self._prepared().hand_over("RESET REPLICA ALL")

    def stop(self) -> None:
        """See `LogApplier.stop`."""
        if self._server is not None:
            self._server.stop()

    # ---- files

    def _apply_changes(self, data: Path) -> None:
        """Write what changed after a file was copied. Raises: IntegrityError."""
        place = data / CHANGES_FILE
        opened: dict[str, int] = {}
        if not place.is_file():
            raise IntegrityError(
                "backup lacks the changes of its clone", detail=f"There is no {CHANGES_FILE}."
            )
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
        if (user := self._prepared().user) is not None:
            os.chown(path, user.uid, user.gid)

    def _lay_relay_logs(self, log: ApplyLog) -> None:
        """The binlog files become relay logs; the last one ends where replay ends. Raises: IntegrityError."""
        self._own(log.directory)
        for number, file in enumerate(wanted_files(log), start=1):
            with mapped(file.path) as content:
                place = cut_mysql(content, self._wanted, stop=file.stop, inclusive=file.inclusive)
                if file.is_last:
                    cut_mysql(content, self._beyond, begin=place, stop=LOG_FILE_BYTES, inclusive=False)
            os.truncate(file.path, place)
            relay = log.directory / f"{RELAY}.{number:06}"
            file.path.rename(relay)
            self._own(relay)
            self._relay_begins[relay.name] = file.begin
        index = log.directory / f"{RELAY}.index"
        index.write_text("".join(f"{log.directory / name}\n" for name in self._relay_begins))
        self._own(index)

    # ---- the applier

    def _execute(self, wanted: str, passed: Callable[[int], None]) -> None:
        server = self._prepared()
        server.rows(
            "CHANGE REPLICATION SOURCE TO SOURCE_HOST = 'none', SOURCE_USER = 'none',"
            " SOURCE_AUTO_POSITION = 0, RELAY_LOG_FILE = %s, RELAY_LOG_POS = 4",
            min(self._relay_begins),
        )
        server.rows("START REPLICA SQL_THREAD UNTIL SQL_AFTER_GTIDS = %s", wanted)
        server.await_applier("SHOW REPLICA STATUS", "Replica_SQL_Running", self._offset, passed)

    def _offset(self, status: Status) -> int | None:
        begin = self._relay_begins.get(Path(status["Relay_Log_File"]).name)
        return None if begin is None else begin + int(status["Relay_Log_Pos"])

    def _executed(self) -> str:
        ((text,),) = self._prepared().rows("SELECT REPLACE(@@GLOBAL.gtid_executed, '\\n', '')")
        return str(text)

    def _subset(self, one: str, other: str) -> bool:
        ((found,),) = self._prepared().rows("SELECT GTID_SUBSET(%s, %s)", one, other.strip(","))
        return bool(found)

    def _prepared(self) -> RestoredServer:
        assert self._server is not None, "prepare comes first"
        return self._server


def _settings(relay_logs: Path) -> Mapping[str, str]:
    return {
        "mysqlx": "0",
        "skip-replica-start": "",
        "gtid-mode": "ON",
        "enforce-gtid-consistency": "ON",
        "relay-log": str(relay_logs / RELAY),
        "relay-log-index": str(relay_logs / f"{RELAY}.index"),
        "relay-log-recovery": "OFF",
        "relay-log-purge": "OFF",
        "replica-parallel-workers": str(min(APPLY_WORKERS_MAX, os.cpu_count() or 1)),
        "replica-max-allowed-packet": "1G",
        "secure-file-priv": "NULL",
        "auto-generate-certs": "OFF",
        "loose-sha256-password-auto-generate-rsa-keys": "OFF",
        "caching-sha2-password-auto-generate-rsa-keys": "OFF",
    }
