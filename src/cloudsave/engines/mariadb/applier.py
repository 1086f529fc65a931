"""
Brings a copy by mariadb-backup to a state: prepared by the program that made it, then replicated from a
scratch server whose binlog is the stored one.

The scratch server has the copy's accounts and one of ours, and nothing else. Its last binlog file ends
where replay is to end, so that there is nothing more to replicate; that the replica got to just there is
asked of itself.
Source: decision 0036; knowledge of the server's own replication: MariaDB manual, START SLAVE UNTIL.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

from cloudsave.clock import SYSTEM_CLOCK, Clock
from cloudsave.engines.apply_api import AppliedState, ApplyLog, ApplyRequest
from cloudsave.engines.binlog.cut import cut_mariadb
from cloudsave.engines.binlog.position import file_number, offset_of
from cloudsave.engines.binlog.private_server import (
    ACCOUNT,
    account_statements,
    die_with_parent,
    free_port,
    random_server_id,
)
from cloudsave.engines.binlog.programs import find_program
from cloudsave.engines.binlog.restored_server import (
    APPLY_WORKERS_MAX,
    RestoredServer,
    Status,
    mapped,
    wanted_files,
)
from cloudsave.engines.binlog.server_settings import GTID_SETTING, copied_settings
from cloudsave.engines.mariadb.backup_program import BACKUP_PROGRAMS
from cloudsave.engines.mariadb.engine import NAME
from cloudsave.errors import IntegrityError, ServerDidNotStart

SERVER_PROGRAMS = ("mariadbd", "mysqld")
PREPARE_MEMORY = "512M"
PREPARE_LOG_LINES = 12
RELAY_BYTES_MAX = "1G"
"""Limit: of the log that has been sent and not been applied yet."""
_INFO_FILES = (
    "backup-my.cnf",
    *(f"{owner}_{kind}" for owner in ("xtrabackup", "mariadb_backup") for kind in ("info", "checkpoints")),
    "xtrabackup_binlog_info",
    "mariadb_backup_binlog_info",
    "xtrabackup_binlog_pos_innodb",
    "mariadb_backup_binlog_pos_innodb",
)
"""Files of mariadb-backup's own, of no use to a server."""
_SLAVE_POS_TABLE = (
    "CREATE TABLE IF NOT EXISTS mysql.gtid_slave_pos"
    " (domain_id INT UNSIGNED NOT NULL, sub_id BIGINT UNSIGNED NOT NULL, server_id INT UNSIGNED NOT NULL,"
    " seq_no BIGINT UNSIGNED NOT NULL, PRIMARY KEY (domain_id, sub_id)) ENGINE=MyISAM"
)


class MariadbApplier:
    """`LogApplier` of MariaDB."""

    def __init__(self, *, clock: Clock = SYSTEM_CLOCK) -> None:
        self._clock = clock
        self._server: RestoredServer | None = None
        self._log_directory = Path()
        self._wanted: dict[int, str] = {}
        self._names: list[str] = []
        """The log files of which something is wanted."""

    # ---- the life of a restored directory

    def prepare(self, request: ApplyRequest) -> None:
        """See `LogApplier.prepare`."""
        server = self._server = RestoredServer(NAME, SERVER_PROGRAMS, request, self._clock)
        backup = find_program(BACKUP_PROGRAMS, server.series, request.bin_directory)
        done = subprocess.run(
            [str(backup), "--prepare", f"--use-memory={PREPARE_MEMORY}", f"--target-dir={server.data}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            check=False,
            cwd="/",
            preexec_fn=die_with_parent,
            **(server.user.process_arguments() if server.user else {}),  # type: ignore[call-overload]
        )
        lines = done.stderr.splitlines()
        if done.returncode != 0 or not any(line.endswith("completed OK!") for line in lines[-3:]):
            raise ServerDidNotStart(
                "restored files could not be made consistent",
                detail="\n".join(lines[-PREPARE_LOG_LINES:]) or f"{backup} said nothing.",
                hints=["is there enough space, and is it the release that took the backup?"],
            )

    def start(self, log: ApplyLog) -> None:
        """See `LogApplier.start`."""
        base = self._base()
        self._log_directory = log.directory
        self._wanted = {**base, **self._cut(log)}
        behind = [domain for domain, gtid in base.items() if _number(self._wanted[domain]) < _number(gtid)]
        if behind:
            raise IntegrityError(
                "stored binlog ends before the base backup",
                detail=f"The backup holds {_text(base)}, the binlog {_text(self._wanted)}.",
            )
        self._prepared().start(_settings)

    def apply(self, passed: Callable[[int], None]) -> AppliedState:
        """See `LogApplier.apply`."""
        server, base = self._prepared(), self._base()
        server.rows("SET GLOBAL gtid_slave_pos = %s", _text(base))
        if self._wanted != base:
            self._replicate(passed)
        ((reached,),) = server.rows("SELECT @@GLOBAL.gtid_slave_pos")
        return AppliedState(_text(_positions(str(reached))), _text(self._wanted))

    def look(self) -> str:
        """See `LogApplier.look`."""
        self._prepared().rows("SET GLOBAL read_only = ON")
        return self._prepared().url

    def hand_over(self) -> None:
        """See `LogApplier.hand_over`."""
        server = self._prepared()
        server.hand_over("RESET SLAVE ALL")
        for name in _INFO_FILES:
            (server.data / name).unlink(missing_ok=True)

    def stop(self) -> None:
        """See `LogApplier.stop`."""
        if self._server is not None:
            self._server.stop()

    # ---- replication

    def _base(self) -> dict[int, str]:
        """The newest GTID of each domain that the copy has."""
        return _positions(self._prepared().request.base.get(GTID_SETTING, ""))

    def _cut(self, log: ApplyLog) -> dict[int, str]:
        """
        End the last file where replay ends, and remove those of which no transaction is wanted; the newest
        GTID of each domain that is left, none where nothing is.
        """
        files = list(wanted_files(log))
        while files:
            file = files[-1]
            with mapped(file.path) as content:
                cut = cut_mariadb(content, stop=file.stop, inclusive=file.inclusive)
            if cut.transactions:
                os.truncate(file.path, cut.place)
                self._names = [one.path.name for one in files]
                return cut.executed
            files.pop().path.unlink()
        return {}

    def _replicate(self, passed: Callable[[int], None]) -> None:
        server, port = self._prepared(), free_port()
        password = self._start_scratch(port)
        server.rows(
            "CHANGE MASTER TO MASTER_HOST = '127.0.0.1', MASTER_PORT = %s, MASTER_USER = %s,"
            " MASTER_PASSWORD = %s, MASTER_CONNECT_RETRY = 1, MASTER_USE_GTID = slave_pos",
            port,
            ACCOUNT,
            password,
        )
        server.rows("START SLAVE UNTIL MASTER_GTID_POS = %s", _text(self._wanted))
        server.await_applier("SHOW SLAVE STATUS", "Slave_SQL_Running", _offset, passed)

    def _start_scratch(self, port: int) -> str:
        """Serve the binlog files; the password of our account there."""
        server, data = self._prepared(), self._log_directory
        (data / "binlog.index").write_text("".join(f"./{name}\n" for name in self._names))
        _copy_accounts(server.data, data)
        scratch = server.new_server(data)
        for path in (data, *data.rglob("*")):
            scratch.own(path)
        copied = copied_settings(server.request.base)
        settings = {
            **{name: value for name, value in copied.items() if "innodb" not in name},
            "skip-innodb": "",
            "default-storage-engine": "MyISAM",
            "log-bin": "binlog",
            "bind-address": "127.0.0.1",
            "port": str(port),
            "server-id": random_server_id(self._clock),
            "max-allowed-packet": "1G",
            **server.request.settings,
        }
        account = account_statements(scratch.password, "127.0.0.1", "REPLICATION SLAVE")
        local = account_statements(scratch.password, "localhost", "REPLICATION SLAVE")[1:]
        scratch.start(settings, [account[0], _SLAVE_POS_TABLE, *account[1:], *local]).close()
        return scratch.password

    def _prepared(self) -> RestoredServer:
        assert self._server is not None, "prepare comes first"
        return self._server


def _settings(place: Path) -> Mapping[str, str]:
    return {
        "skip-slave-start": "",
        "relay-log": str(place / "relay"),
        "master-info-file": str(place / "master.info"),
        "relay-log-info-file": str(place / "relay-log.info"),
        "slave-parallel-threads": str(min(APPLY_WORKERS_MAX, os.cpu_count() or 1)),
        "slave-max-allowed-packet": "1G",
        "relay-log-space-limit": RELAY_BYTES_MAX,
    }


def _offset(status: Status) -> int | None:
    name = status["Relay_Master_Log_File"]
    return offset_of(file_number(name), int(status["Exec_Master_Log_Pos"])) if name else None


def _copy_accounts(source: Path, data: Path) -> None:
    """The tables of accounts of a prepared copy, but for those of InnoDB, and what their engine needs."""
    (data / "mysql").mkdir(mode=0o700)
    for path in (source / "mysql").iterdir():
        if path.is_file() and not (source / "mysql" / f"{path.stem}.ibd").exists():
            shutil.copyfile(path, data / "mysql" / path.name)
    for path in source.glob("aria_log*"):
        shutil.copyfile(path, data / path.name)


def _positions(text: str) -> dict[int, str]:
    """`0-11-7,1-11-3` by domain."""
    return {int(one.partition("-")[0]): one for one in text.replace(" ", "").split(",") if one}


def _text(positions: Mapping[int, str]) -> str:
    return ",".join(positions[domain] for domain in sorted(positions))


def _number(gtid: str) -> int:
    return int(gtid.rpartition("-")[2])
