"""
The binlog files of a server, who reads them, and their removal.

A server does not know how far its readers are, nor of readers that are away. So each replica has to be named,
and is asked itself; a reader that is connected beyond them stops everything. What a replica has applied
counts, not what it has fetched: after a crash it may throw its relay log away and fetch from there again
(source: relay_log_recovery in the MySQL manual).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cloudsave.engines.binlog.address import Address
from cloudsave.engines.binlog.connection import Session, connect
from cloudsave.engines.binlog.findings import granted_globally, quoted_account
from cloudsave.engines.binlog.locks import capture_lock, reader_lock
from cloudsave.engines.binlog.log import ask_clock
from cloudsave.engines.binlog.position import LOG_FILE_BYTES, file_number, offset_of
from cloudsave.errors import EngineError, PermissionMissing, UnusableUrl
from cloudsave.model.held_log import HeldFile, HeldLog, NamedReader

LOCK_WAIT_SECONDS_MAX = 10
"""Limit: for so long a removal waits for a backup that keeps the server's files as they are."""


@dataclass(frozen=True, slots=True)
class PurgeRules:
    """In what MySQL and MariaDB differ for it."""

    right: str
    """To remove binlog files, as GRANT wants it."""
    server: str
    """The expression by which replicas know the server."""
    status: str
    """What a replica is asked; then columns of the answer."""
    status_server: str
    status_file: str
    status_connected: str


RULES = {
    "mysql": PurgeRules(
        right="BINLOG_ADMIN",
        server="@@server_uuid",
        status="SHOW REPLICA STATUS",
        status_server="Source_UUID",
        status_file="Relay_Source_Log_File",
        status_connected="Replica_IO_Running",
    ),
    "mariadb": PurgeRules(
        right="BINLOG ADMIN",
        server="@@server_id",
        status="SHOW ALL SLAVES STATUS",
        status_server="Master_Server_Id",
        status_file="Relay_Master_Log_File",
        status_connected="Slave_IO_Running",
    ),
}


class BinlogPurger:
    """See `engines.purge_api.LogPurger`."""

    def __init__(self, engine: str, url: str, *, branch: str, slot: str, replicas: Sequence[str]) -> None:
        self._rules = RULES[engine]
        self._url = url
        self._branch = branch
        self._slot = slot
        self._replicas = [_Replica(_of_engine(engine, one), self._rules) for one in replicas]
        self._session: Session | None = None

    def look(self) -> HeldLog:
        """See `LogPurger.look`."""
        session = self._connected()
        files = _files(session)
        (server,) = session.row(f"SELECT {self._rules.server}", doing="read the server's identity")
        answers = [replica.ask(str(server)) for replica in self._replicas]
        readers, captured = self._readers(session)
        connected = sum(connected for _, connected in answers)
        return HeldLog(
            branch=self._branch,
            files=files,
            clock_us=ask_clock(session),
            captured=captured,
            readers=tuple(reader for reader, _ in answers),
            strangers=tuple(readers) if len(readers) > connected else (),
            free_bytes=_free_bytes(session, files),
        )

    def remove_before(self, file: HeldFile) -> None:
        """See `LogPurger.remove_before`."""
        name = file.name.replace("'", "''").replace("\\", "\\\\")
        self._connected().rows(f"PURGE BINARY LOGS TO '{name}'", doing="remove binlog files")

    def close(self) -> None:
        """See `LogPurger.close`."""
        session, self._session = self._session, None
        if session is not None:
            session.close()
        for replica in self._replicas:
            replica.close()

    def _connected(self) -> Session:
        if self._session is None:
            session = connect(self._url)
            try:
                self._require_rights(session)
                session.rows(
                    f"SET SESSION lock_wait_timeout = {LOCK_WAIT_SECONDS_MAX}", doing="set up the session"
                )
            except EngineError:
                session.close()
                raise
            self._session = session
        return self._session

    def _require_rights(self, session: Session) -> None:
        """Who may not see the sessions of others is told of no reader at all, without an error."""
        rows = session.rows("SHOW GRANTS", doing="read the account's rights")
        granted = granted_globally("\n".join(str(row[0]) for row in rows))
        everything = {"ALL PRIVILEGES", "ALL"}
        enough = {"PROCESS": {"PROCESS"}, self._rules.right: {self._rules.right, "SUPER"}}
        missing = [right for right, names in enough.items() if not granted & (everything | names)]
        if missing:
            (account,) = session.row("SELECT CURRENT_USER()", doing="read the account's name")
            raise PermissionMissing(
                "account may not remove binlog files",
                detail="It has to see who reads the binlog, and to remove files of it.",
                hints=[f"GRANT {', '.join(missing)} ON *.* TO {quoted_account(str(account))};"],
            )

    def _readers(self, session: Session) -> tuple[list[str], bool]:
        """Who is sent the binlog but our capture; whether that runs."""
        capture, ours = session.row(
            "SELECT IS_USED_LOCK(%s), IS_USED_LOCK(%s)",
            capture_lock(self._slot),
            reader_lock(self._slot),
            doing="look at the locks of capture",
        )
        readers = [
            f"{one['User']}@{one['Host']}"
            for one in session.records("SHOW PROCESSLIST", doing="list the server's sessions")
            if str(one["Command"]).startswith("Binlog Dump") and one["Id"] != ours
        ]
        return readers, capture is not None and ours is not None


def _of_engine(engine: str, url: str) -> str:
    if Address.of(url).engine != engine:
        raise UnusableUrl(
            "cannot use URL of a replica", hints=[f"it begins with {engine}://, as the source's"]
        )
    return url


class _Replica:
    """One that was named to us."""

    def __init__(self, url: str, rules: PurgeRules) -> None:
        self._url = url
        self._rules = rules
        self._name = Address.of(url).place
        self._session: Session | None = None

    def ask(self, server: str) -> tuple[NamedReader, bool]:
        """What it still needs of the server, and whether it is connected to it."""
        try:
            rows = self._status()
        except EngineError as error:
            self.close()
            return NamedReader(self._name, None, error.message), False
        ours = [row for row in rows if str(row[self._rules.status_server]) == server]
        if not ours:
            return NamedReader(self._name, None, "it does not replicate from this server"), False
        needs: list[int] = []
        for row in ours:
            try:
                needs.append(offset_of(file_number(str(row[self._rules.status_file])), 0))
            except ValueError:
                return NamedReader(self._name, None, "it does not tell what it has applied"), False
        connected = any(row[self._rules.status_connected] == "Yes" for row in ours)
        return NamedReader(self._name, min(needs)), connected

    def close(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.close()

    def _status(self) -> list[dict[str, Any]]:
        if self._session is None:
            self._session = connect(self._url)
        return self._session.records(self._rules.status, doing="ask the replica how far it is")


def _files(session: Session) -> tuple[HeldFile, ...]:
    files = []
    for name, size, *_ in session.rows("SHOW BINARY LOGS", doing="list the binlog files"):
        try:
            first = offset_of(file_number(str(name)), 0)
        except ValueError as error:
            raise EngineError("binlog has a name that cannot be understood", detail=str(error)) from error
        files.append(HeldFile(str(name), first, first + LOG_FILE_BYTES, int(size)))
    return tuple(files)


def _free_bytes(session: Session, files: Sequence[HeldFile]) -> int | None:
    """Where a full file of the server lies on this machine too, with its size, the server is here."""
    (base,) = session.row("SELECT @@log_bin_basename", doing="read where the binlog is")
    if not base or len(files) < 2:
        return None
    directory = Path(str(base)).parent
    with suppress(OSError):
        if (directory / files[-2].name).stat().st_size == files[-2].size_bytes:
            found = os.statvfs(directory)
            return found.f_bavail * found.f_frsize
    return None
