"""
A restored directory as a server that only we can reach, while its log is applied: what MySQL and MariaDB do
alike.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pymysql
from pymysql.cursors import DictCursor

from cloudsave.clock import Clock
from cloudsave.engines.apply_api import ApplyLog, ApplyRequest
from cloudsave.engines.binlog.connection import Session, translate
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
from cloudsave.engines.processes import server_user
from cloudsave.errors import RecoveryError

APPLY_WORKERS_MAX = 4
Status = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class WantedFile:
    """
    A log file of which something is wanted: what begins before the place `stop`, or at it if `inclusive`.
    """

    path: Path
    begin: int
    stop: int
    inclusive: bool

    @property
    def is_last(self) -> bool:
        """Whether it is the one in which replay ends."""
        return self.stop != LOG_FILE_BYTES


def wanted_files(log: ApplyLog) -> Iterator[WantedFile]:
    """The files up to the one in which replay ends, in order; those behind it are removed."""
    for name, begin in log.files:
        path = log.directory / name
        if number_of(begin) > number_of(log.stop):
            path.unlink()
        elif number_of(begin) == number_of(log.stop):
            yield WantedFile(path, begin, max(place_of(log.stop), len(MAGIC)), log.inclusive)
        else:
            yield WantedFile(path, begin, LOG_FILE_BYTES, inclusive=False)


@contextmanager
def mapped(path: Path) -> Iterator[memoryview]:
    """The bytes of a log file, which is not read into memory as a whole."""
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        memoryview(content) as view,
    ):
        yield view


class RestoredServer:
    """Order: start, then rows and await_applier, then hand_over; stop at any time."""

    def __init__(self, engine: str, programs: Sequence[str], request: ApplyRequest, clock: Clock) -> None:
        """Raises: ServerToolsMissing."""
        self.request = request
        self.data = request.data_directory
        self.series = parse_release(request.server_version)[:2]
        self.program = find_program(programs, self.series, request.bin_directory)
        self.user = server_user(UNPRIVILEGED_USERS, owner_uid=self.data.stat().st_uid)
        self._engine = engine
        self._clock = clock
        self._others: list[PrivateServer] = []
        self._server: PrivateServer | None = None
        self._session: Session | None = None

    def new_server(self, data: Path) -> PrivateServer:
        """One more server of the same program; it ends when this one is stopped."""
        made = PrivateServer(self._engine, self.program, data, self.user, self._clock)
        self._others.append(made)
        return made

    def start(self, settings: Callable[[Path], Mapping[str, str]]) -> None:
        """
        Start it; `settings`: the engine's own, by the place for what is no data. Raises: ServerDidNotStart.
        """
        self._server = PrivateServer(self._engine, self.program, self.data, self.user, self._clock)
        common = {
            **copied_settings(self.request.base),
            "skip-networking": "",
            "skip-log-bin": "",
            "event-scheduler": "OFF",
            "server-id": random_server_id(self._clock),
            "max-allowed-packet": "1G",
            # Nothing is durable before the shutdown; a restore that is killed begins anew.
            "innodb-flush-log-at-trx-commit": "0",
            "innodb-doublewrite": "OFF",
            "innodb-buffer-pool-size": str(buffer_pool_bytes()),
        }
        statements = account_statements(self._server.password, "localhost", "ALL PRIVILEGES")
        own = settings(self._server.place)
        self._session = self._server.start({**common, **own, **self.request.settings}, statements)

    @property
    def url(self) -> str:
        """Where it can be reached."""
        return self._running().url

    def rows(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        """All rows of a statement. Raises: EngineError."""
        return self._connected().rows(statement, *values, doing="bring the restored server to its state")

    def await_applier(
        self, ask: str, running: str, offset: Callable[[Status], int | None], passed: Callable[[int], None]
    ) -> None:
        """
        Wait until the applier has ended; `ask` is the statement for its status, the column `running` says
        whether it still runs, and `offset` how far it is. Raises: RecoveryError, ServerDidNotStart.
        """
        while True:
            status = self._status(ask)
            for what in ("SQL", "IO"):
                if status[f"Last_{what}_Errno"]:
                    detail = str(status[f"Last_{what}_Error"])
                    raise RecoveryError("restored server could not apply its log", detail=detail)
            if status[running] == "No":
                return
            if (reached := offset(status)) is not None:
                passed(reached)
            self._clock.sleep(POLL_SECONDS)

    def hand_over(self, forget_source: str) -> None:
        """Take back our account and what the statement `forget_source` does, and shut down in order."""
        self.rows(forget_source)
        self.rows(f"DROP USER '{ACCOUNT}'@'localhost'")
        self._connected().close()
        self._running().stop()
        self.stop()

    def stop(self) -> None:
        """Stop all that runs. Never raises."""
        if self._session is not None:
            self._session.close()
        for server in (*self._others, self._server):
            if server is not None:
                server.close()
        self._session = self._server = None
        self._others = []

    def _connected(self) -> Session:
        assert self._session is not None, "start comes first"
        return self._session

    def _running(self) -> PrivateServer:
        assert self._server is not None, "start comes first"
        return self._server

    def _status(self, ask: str) -> Status:
        try:
            with closing(self._connected().connection.cursor(DictCursor)) as cursor:
                cursor.execute(ask)
                found = cursor.fetchone()
                assert found is not None, "a replica was set up"
                return found
        except (pymysql.Error, OSError) as error:
            if not self._running().running():
                raise self._running().failed("go on while it applied its log") from error
            raise translate(error, "ask the restored server for its state") from None
