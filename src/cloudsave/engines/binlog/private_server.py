"""
A server of our own making: it ends with us, listens where nobody else can connect, and is talked to
by one account with a password of this run.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

import pymysql

from cloudsave.clock import Clock
from cloudsave.engines.binlog.connection import Session
from cloudsave.engines.processes import ServerUser
from cloudsave.errors import ServerDidNotStart

ACCOUNT = "cloudsave_restore"
START_SECONDS_MAX = 3600.0
"""Limit: recovery of what a base backup holds may take long."""
STOP_SECONDS_MAX = 3600.0
POLL_SECONDS = 0.05
LOG_TAIL_LINES = 12
BUFFER_POOL_BYTES_MAX = 1 << 30
_SET_PARENT_DEATH_SIGNAL = 1
_libc = ctypes.CDLL(None)


def die_with_parent() -> None:
    """For a child: the kernel kills it when we end, however that is."""
    _libc.prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)


class PrivateServer:
    """One server. Order: start, connect..., stop; `close` removes what it needed beside its data."""

    def __init__(self, engine: str, program: Path, data: Path, user: ServerUser | None, clock: Clock) -> None:
        self._engine = engine
        self._program = program
        self._data = data
        self._user = user
        self._clock = clock
        self._process: subprocess.Popen[bytes] | None = None
        self.password = clock.random_bytes(24).hex() + "-aA1"
        self.place = Path(tempfile.mkdtemp(prefix="cloudsave-"))
        """Its socket, its log and whatever else it writes that is not data."""
        self.own(self.place)

    def own(self, path: Path) -> None:
        """Give a path to the server's user."""
        if self._user is not None:
            os.chown(path, self._user.uid, self._user.gid)

    @property
    def socket(self) -> Path:
        """Its private socket."""
        return self.place / "s"

    @property
    def url(self) -> str:
        """How to reach it; the password is in an option file that nobody else can read."""
        own, socket = (quote(str(path), safe="") for path in (self._option_file, self.socket))
        return f"{self._engine}://{ACCOUNT}@localhost?socket={socket}&defaults-file={own}"

    @property
    def _option_file(self) -> Path:
        return self.place / "client.cnf"

    def start(self, settings: Mapping[str, str], statements: Sequence[str]) -> Session:
        """
        Start it with `settings`, and run `statements`, one a line, before anybody connects; the session of
        our account. Raises: ServerDidNotStart.
        """
        self._option_file.touch(mode=0o600)
        self._option_file.write_text(
            f"[client]\nuser={ACCOUNT}\npassword={self.password}\nsocket={self.socket}\n"
        )
        script = self.place / "init.sql"
        script.touch(mode=0o600)
        script.write_text("".join(f"{one};\n" for one in statements))
        self.own(script)
        command = [
            str(self._program),
            "--no-defaults",
            f"--datadir={self._data}",
            f"--socket={self.socket}",
            f"--pid-file={self.place / 'pid'}",
            f"--tmpdir={self.place}",
            f"--init-file={script}",
            *(f"--{name}={value}" if value else f"--{name}" for name, value in settings.items()),
        ]
        log = (self.place / "log").open("ab")
        with log:
            self.own(self.place / "log")
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                start_new_session=True,
                preexec_fn=die_with_parent,  # noqa: PLW1509 - one call that allocates nothing
                **(self._user.process_arguments() if self._user else {}),  # type: ignore[call-overload]
            )
        deadline = self._clock.monotonic() + START_SECONDS_MAX
        while (session := self._connect()) is None:
            if not self.running():
                raise self.failed("start")
            if self._clock.monotonic() > deadline:
                raise self.failed("start in time")
            self._clock.sleep(POLL_SECONDS)
        script.unlink()
        return session

    def _connect(self) -> Session | None:
        try:
            connection = pymysql.connect(
                unix_socket=str(self.socket),
                user=ACCOUNT,
                password=self.password,
                autocommit=True,
                ssl_disabled=True,
            )
        except (pymysql.Error, OSError):
            return None
        return Session(connection)

    def running(self) -> bool:
        """Whether its process is there."""
        return self._process is not None and self._process.poll() is None

    def stop(self) -> None:
        """Shut it down in order. Raises: ServerDidNotStart where it does not end well."""
        process = self._process
        if process is None:
            return
        process.send_signal(signal.SIGTERM)
        try:
            status = process.wait(timeout=STOP_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            raise self.failed("shut down in time") from None
        if status != 0:
            raise self.failed(f"shut down in order (it ended with {status})")
        self._process = None

    def close(self) -> None:
        """Kill it if it runs. Never raises."""
        process, self._process = self._process, None
        if process is not None and process.poll() is None:
            process.kill()
            process.wait()
        shutil.rmtree(self.place, ignore_errors=True)

    def failed(self, to_do: str) -> ServerDidNotStart:
        """The error for a server that did not do something, with the end of its log."""
        try:
            lines = (self.place / "log").read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
        except OSError:
            lines = []
        return ServerDidNotStart(
            f"restored server did not {to_do}", detail="\n".join(lines) or "It wrote no log."
        )


def free_port() -> int:
    """A port of this host that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def account_statements(password: str, host: str, rights: str) -> list[str]:
    """What makes our account, unseen by any binlog."""
    return [
        "SET sql_log_bin = 0",
        f"DROP USER IF EXISTS '{ACCOUNT}'@'{host}'",
        f"CREATE USER '{ACCOUNT}'@'{host}' IDENTIFIED BY '{password}'",
        f"GRANT {rights} ON *.* TO '{ACCOUNT}'@'{host}' WITH GRANT OPTION",
    ]


def random_server_id(clock: Clock) -> str:
    """Of a server that nobody else has."""
    return str(0x40000000 | int.from_bytes(clock.random_bytes(3), "little"))


def buffer_pool_bytes() -> int:
    """For a server that has the machine for itself while it replays, but not all of its memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(BUFFER_POOL_BYTES_MAX, memory // 4) >> 20 << 20
