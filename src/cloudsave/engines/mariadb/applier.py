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
from contextlib import closing
from pathlib import Path
from typing import Any

import pymysql
from pymysql.cursors import DictCursor

from cloudsave.clock import SYSTEM_CLOCK, Clock
from cloudsave.engines.apply_api import AppliedState, ApplyLog, ApplyRequest
from cloudsave.engines.binlog.connection import Session, translate
from cloudsave.engines.binlog.cut import cut_mariadb
from cloudsave.engines.binlog.format_event import MAGIC
from cloudsave.engines.binlog.position import (
    LOG_FILE_BYTES,
    file_number,
    number_of,
    offset_of,
    place_of,
)
from cloudsave.engines.binlog.private_server import (
    ACCOUNT,
    POLL_SECONDS,
    PrivateServer,
    account_statements,
    buffer_pool_bytes,
    die_with_parent,
    free_port,
    random_server_id,
)
from cloudsave.engines.binlog.programs import UNPRIVILEGED_USERS, find_program, parse_release
from cloudsave.engines.binlog.server_settings import copied_settings
from cloudsave.engines.processes import ServerUser, server_user
from cloudsave.errors import IntegrityError, RecoveryError, ServerDidNotStart

NAME = "mariadb"
SERVER_PROGRAMS = ("mariadbd", "mysqld")
BACKUP_PROGRAMS = ("mariadb-backup", "mariabackup")
GTID_SETTING = "gtid_binlog_pos"
PREPARE_MEMORY = "512M"
APPLY_THREADS_MAX = 4
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
        self._request: ApplyRequest | None = None
        self._user: ServerUser | None = None
        self._program = Path()
        self._restored: PrivateServer | None = None
        self._scratch: PrivateServer | None = None
        self._session: Session | None = None
        self._log: ApplyLog | None = None

    # ---- the life of a restored directory

    def prepare(self, request: ApplyRequest) -> None:
        """See `LogApplier.prepare`."""
        self._request = request
        data = request.data_directory
        self._user = server_user(UNPRIVILEGED_USERS, owner_uid=data.stat().st_uid)
        series = parse_release(request.server_version)[:2]
        self._program = find_program(SERVER_PROGRAMS, series, request.bin_directory)
        backup = find_program(BACKUP_PROGRAMS, series, request.bin_directory)
        done = subprocess.run(
            [str(backup), "--prepare", f"--use-memory={PREPARE_MEMORY}", f"--target-dir={data}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            check=False,
            cwd="/",
            preexec_fn=die_with_parent,
            **(self._user.process_arguments() if self._user else {}),  # type: ignore[call-overload]
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
        self._log = log
        request = self._asked()
        self._restored = PrivateServer(NAME, self._program, request.data_directory, self._user, self._clock)
        place = self._restored.place
        settings = {
            **copied_settings(request.base),
            "skip-networking": "",
            "skip-log-bin": "",
            "skip-slave-start": "",
            "event-scheduler": "OFF",
            "server-id": random_server_id(self._clock),
            "relay-log": str(place / "relay"),
            "master-info-file": str(place / "master.info"),
            "relay-log-info-file": str(place / "relay-log.info"),
            "slave-parallel-threads": str(min(APPLY_THREADS_MAX, os.cpu_count() or 1)),
            "slave-max-allowed-packet": "1G",
            "relay-log-space-limit": RELAY_BYTES_MAX,
            "max-allowed-packet": "1G",
            # Nothing is durable before the shutdown; a restore that is killed begins anew.
            "innodb-flush-log-at-trx-commit": "0",
            "innodb-doublewrite": "0",
            "innodb-buffer-pool-size": str(buffer_pool_bytes()),
            **request.settings,
        }
        statements = account_statements(self._restored.password, "localhost", "ALL PRIVILEGES")
        self._session = self._restored.start(settings, statements)

    def apply(self, passed: Callable[[int], None]) -> AppliedState:
        """See `LogApplier.apply`."""
        log = self._log
        assert log is not None, "start comes first"
        base = _positions(self._asked().base.get(GTID_SETTING, ""))
        wanted = {**base, **self._cut(log)}
        behind = [domain for domain, gtid in base.items() if _number(wanted[domain]) < _number(gtid)]
        if behind:
            raise IntegrityError(
                "stored binlog ends before the base backup",
                detail=f"The backup holds {_text(base)}, the binlog {_text(wanted)}.",
            )
        self._say("SET GLOBAL gtid_slave_pos = %s", _text(base))
        if wanted != base:
            self._replicate(log, wanted, passed)
        (reached,) = self._ask("SELECT @@GLOBAL.gtid_slave_pos")
        return AppliedState(_text(_positions(str(reached))), _text(wanted))

    def look(self) -> str:
        """See `LogApplier.look`."""
        self._say("SET GLOBAL read_only = ON")
        assert self._restored is not None
        return self._restored.url

    def hand_over(self) -> None:
        """See `LogApplier.hand_over`."""
        self._say("RESET SLAVE ALL")
        self._say("SET GLOBAL innodb_fast_shutdown = 1")
        self._say(f"DROP USER '{ACCOUNT}'@'localhost'")
        assert self._restored is not None
        assert self._session is not None
        self._session.close()
        self._restored.stop()
        data = self._asked().data_directory
        for name in _INFO_FILES:
            (data / name).unlink(missing_ok=True)
        self.stop()

    def stop(self) -> None:
        """See `LogApplier.stop`."""
        if self._session is not None:
            self._session.close()
        for server in (self._scratch, self._restored):
            if server is not None:
                server.close()
        self._session = self._scratch = self._restored = None

    # ---- replication

    def _cut(self, log: ApplyLog) -> dict[int, str]:
        """
        End the last file where replay ends, and remove those of which no transaction is wanted; the newest
        GTID of each domain that is left, none where nothing is.
        """
        for name, begin in reversed(log.files):
            path = log.directory / name
            if number_of(begin) <= number_of(log.stop):
                last = number_of(begin) == number_of(log.stop)
                stop = max(place_of(log.stop), len(MAGIC)) if last else LOG_FILE_BYTES
                cut = cut_mariadb(path.read_bytes(), stop=stop, inclusive=log.inclusive and last)
                if cut.transactions:
                    os.truncate(path, cut.place)
                    return cut.executed
            path.unlink()
        return {}

    def _replicate(self, log: ApplyLog, wanted: dict[int, str], passed: Callable[[int], None]) -> None:
        port = free_port()
        password = self._start_scratch(log, port)
        self._say(
            "CHANGE MASTER TO MASTER_HOST = '127.0.0.1', MASTER_PORT = %s, MASTER_USER = %s,"
            " MASTER_PASSWORD = %s, MASTER_CONNECT_RETRY = 1, MASTER_USE_GTID = slave_pos",
            port,
            ACCOUNT,
            password,
        )
        self._say("START SLAVE UNTIL MASTER_GTID_POS = %s", _text(wanted))
        while True:
            status = self._status()
            for what in ("SQL", "IO"):
                if status[f"Last_{what}_Errno"]:
                    raise RecoveryError(
                        "restored server could not apply its log",
                        detail=f"{status[f'Last_{what}_Error']}",
                    )
            if status["Slave_SQL_Running"] == "No":
                return
            if status["Relay_Master_Log_File"]:
                number = file_number(status["Relay_Master_Log_File"])
                passed(offset_of(number, int(status["Exec_Master_Log_Pos"])))
            self._clock.sleep(POLL_SECONDS)

    def _start_scratch(self, log: ApplyLog, port: int) -> str:
        """Serve the binlog files; the password of our account there."""
        data = log.directory
        (data / "binlog.index").write_text(
            "".join(f"./{name}\n" for name, _ in log.files if (data / name).exists())
        )
        _copy_accounts(self._asked().data_directory, data)
        for path in (data, *data.rglob("*")):
            if self._user is not None:
                os.chown(path, self._user.uid, self._user.gid)
        self._scratch = PrivateServer(NAME, self._program, data, self._user, self._clock)
        settings = {
            **{
                name: value
                for name, value in copied_settings(self._asked().base).items()
                if "innodb" not in name
            },
            "skip-innodb": "",
            "default-storage-engine": "MyISAM",
            "log-bin": "binlog",
            "bind-address": "127.0.0.1",
            "port": str(port),
            "server-id": random_server_id(self._clock),
            "max-allowed-packet": "1G",
            **self._asked().settings,
        }
        rights = "REPLICATION SLAVE"
        account = account_statements(self._scratch.password, "127.0.0.1", rights)
        local = account_statements(self._scratch.password, "localhost", rights)[1:]
        self._scratch.start(settings, [account[0], _SLAVE_POS_TABLE, *account[1:], *local]).close()
        return self._scratch.password

    # ---- talking to the restored server

    def _asked(self) -> ApplyRequest:
        assert self._request is not None, "prepare comes first"
        return self._request

    def _say(self, statement: str, *values: object) -> None:
        assert self._session is not None, "start comes before"
        self._session.rows(statement, *values, doing="bring the restored server to its state")

    def _ask(self, statement: str) -> tuple[Any, ...]:
        assert self._session is not None, "start comes before"
        return self._session.row(statement, doing="ask the restored server for its state")

    def _status(self) -> Mapping[str, Any]:
        assert self._session is not None, "start comes before"
        assert self._restored is not None
        try:
            with closing(self._session.connection.cursor(DictCursor)) as cursor:
                cursor.execute("SHOW SLAVE STATUS")
                found = cursor.fetchone()
                assert found is not None, "a replica was set up"
                return found
        except (pymysql.Error, OSError) as error:
            if not self._restored.running():
                raise self._restored.failed("go on while it applied its log") from error
            raise translate(error, "ask the restored server for its state") from None


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
