"""
Real MySQL and MariaDB servers for tests: made from a template, crashed, taken down.

A server runs as an unprivileged user, below a folder of the session, in memory where there is plenty of it.
It listens on a private Unix socket and on nothing else. The account root has no password there.
"""

from __future__ import annotations

import itertools
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pymysql
from tools.provision_binlog import BinlogServer

from tests.integration.postgresql.cluster import (
    COMMAND_TIMEOUT_SECONDS,
    LOG_TAIL_LINES,
    POLL_SECONDS,
    START_TIMEOUT_SECONDS,
    ServerFailed,
    ServerUser,
)

COMMON_CONF: Mapping[str, str] = {
    "server_id": "11",
    "innodb_buffer_pool_size": "32M",
    "innodb_flush_log_at_trx_commit": "1",
    "sync_binlog": "1",
    "log_bin": "binlog",
    "binlog_format": "ROW",
    "max_allowed_packet": "1G",
    "character_set_server": "utf8mb4",
}
ENGINE_CONF: Mapping[str, Mapping[str, str]] = {
    "mysql": {
        "gtid_mode": "ON",
        "enforce_gtid_consistency": "ON",
        "mysqlx": "0",
        "innodb_redo_log_capacity": "64M",
        "performance_schema": "OFF",
    },
    "mariadb": {
        "gtid_strict_mode": "ON",
        "log_slave_updates": "ON",
        "innodb_log_file_size": "32M",
        "binlog_row_metadata": "MINIMAL",
    },
}
_BOOTSTRAP_FILES = ("system_tables.sql", "performance_tables.sql", "system_tables_data.sql")
_NUMBERS = itertools.count(1)


@dataclass
class BinlogCluster:
    """One server: its programs, its data directory and, while it runs, its process."""

    server: BinlogServer
    home: Path
    user: ServerUser
    conf: dict[str, str]
    process: subprocess.Popen[bytes] | None = None

    @property
    def engine(self) -> str:
        """`mysql` or `mariadb`."""
        return self.server.engine

    @property
    def data(self) -> Path:
        """The data directory."""
        return self.home / "data"

    @property
    def socket(self) -> Path:
        """The private socket."""
        return self.home / "s"

    @property
    def url(self) -> str:
        """The source URL, of the account root."""
        return self.url_of("root")

    def url_of(self, account: str) -> str:
        """The source URL of an account."""
        return f"{self.engine}://{account}@localhost?socket={quote(str(self.socket), safe='')}"

    # ---- life cycle

    def start(self) -> None:
        """Start, and wait until connections are accepted. Raises: ServerFailed with the end of the log."""
        if self.running():
            raise ServerFailed("the server is running already")
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                daemon_command(self.server, self.data, self.conf, socket=self.socket),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.home,
                start_new_session=True,
                **self.user.process_options(),
            )
        deadline = time.monotonic() + START_TIMEOUT_SECONDS
        while not self._answers():
            if not self.running():
                raise ServerFailed(f"{self.engine} ended while starting\n{self.log_tail()}")
            if time.monotonic() > deadline:
                raise ServerFailed(f"{self.engine} is not ready\n{self.log_tail()}")
            time.sleep(POLL_SECONDS)

    def stop(self) -> None:
        """Shut down in order."""
        if self.process is None or not self.running():
            return
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(timeout=START_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired as error:
            self.crash()
            raise ServerFailed(f"{self.engine} did not stop\n{self.log_tail()}") from error

    def restart(self) -> None:
        """Stop in order and start again."""
        self.stop()
        self.start()

    def crash(self) -> None:
        """Kill the server at once."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(timeout=START_TIMEOUT_SECONDS)

    def running(self) -> bool:
        """Whether the server process is there."""
        return self.process is not None and self.process.poll() is None

    # ---- talking to it

    def connect(self, **options: Any) -> pymysql.connections.Connection[Any]:
        """A new autocommit session of root; the caller closes it."""
        settings = {"user": "root", "unix_socket": str(self.socket), "autocommit": True} | options
        return pymysql.connect(**settings)

    def sql(self, *statements: str) -> list[tuple[Any, ...]]:
        """Run statements in one session; the rows of the last one. Raises: ServerFailed on any error."""
        rows: Sequence[tuple[Any, ...]] = ()
        try:
            with self.connect() as session, session.cursor() as cursor:
                for statement in statements:
                    cursor.execute(statement)
                    rows = cursor.fetchall()
        except pymysql.Error as error:
            raise ServerFailed(f"{error}\n{statements}\n{self.log_tail()}") from error
        return list(rows)

    def binlogs(self) -> list[Path]:
        """The binlog files, oldest first."""
        base = self.conf["log_bin"]
        return sorted(path for path in self.data.glob(f"{base}.*") if path.suffix[1:].isdigit())

    def run(self, program: str, *arguments: str) -> bytes:
        """Output of one of the server's programs. Raises: ServerFailed."""
        done = subprocess.run(
            [f"{self.server.bindir}/{program}", *arguments],
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            cwd=self.home,
            timeout=COMMAND_TIMEOUT_SECONDS,
        )
        if done.returncode != 0:
            raise ServerFailed(f"{program} exited with {done.returncode}\n{done.stderr.decode()}")
        return done.stdout

    def print_binlog(self, path: Path, *options: str) -> str:
        """What the server's own program prints of a binlog file."""
        program = "mysqlbinlog" if self.engine == "mysql" else "mariadb-binlog"
        arguments = ["--no-defaults", "--verify-binlog-checksum", *options, str(path)]
        return self.run(program, *arguments).decode(errors="replace")

    @property
    def log_path(self) -> Path:
        """The server's log."""
        return self.home / "server.log"

    def log_tail(self) -> str:
        """End of the server's log."""
        if not self.log_path.exists():
            return "(no log)"
        return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:])

    def _answers(self) -> bool:
        try:
            self.connect().close()
        except (pymysql.Error, OSError):
            return False
        return True


@dataclass
class BinlogClusterFactory:
    """Makes servers below one folder and takes all of them down, whatever happened to the test."""

    root: Path
    user: ServerUser = field(default_factory=ServerUser.choose)
    clusters: list[BinlogCluster] = field(default_factory=list)

    def create(
        self, server: BinlogServer, *, conf: Mapping[str, str] | None = None, start: bool = True
    ) -> BinlogCluster:
        """A new server with an identity of its own, started unless told otherwise."""
        number = next(_NUMBERS)
        home = self.root / f"{server.engine}-{number}"
        home.mkdir(mode=0o755)
        shutil.copytree(self._template(server), home / "data")
        (home / "data" / "auto.cnf").unlink(missing_ok=True)
        self.user.own(home)
        own = {"server_id": str(10 + number)}
        settings = {**COMMON_CONF, **ENGINE_CONF[server.engine], **own, **(conf or {})}
        cluster = BinlogCluster(server, home, self.user, settings)
        self.clusters.append(cluster)
        if start:
            cluster.start()
        return cluster

    def close(self) -> None:
        """Kill and remove every server."""
        for cluster in self.clusters:
            if cluster.running():
                cluster.crash()
            shutil.rmtree(cluster.home)
        self.clusters.clear()

    def _template(self, server: BinlogServer) -> Path:
        place = self.root / f"template-{server.engine}-{server.major}"
        if not place.exists():
            place.mkdir(mode=0o700)
            self.user.own(place)
            initialise(server, place, self.user)
        return place


def daemon_command(
    server: BinlogServer,
    data: Path,
    conf: Mapping[str, str],
    *,
    socket: Path | None,
    extra: Sequence[str] = (),
) -> list[str]:
    """The command that starts a server, which knows of no file of the system's."""
    daemon = "mysqld" if server.engine == "mysql" else "mariadbd"
    command = [f"{server.bindir}/{daemon}", "--no-defaults", f"--datadir={data}", f"--tmpdir={data.parent}"]
    command += [f"--{name}={value}" for name, value in program_settings(server).items()]
    if server.engine == "mysql":
        command.append("--secure-file-priv=NULL")
    if socket is not None:
        command += [f"--socket={socket}", "--skip-networking"]
    return [*command, *(f"--{name}={value}" for name, value in conf.items()), *extra]


def program_settings(server: BinlogServer) -> dict[str, str]:
    """What a server must be told of the tree that it was unpacked into."""
    share = _share(server)
    return {
        "basedir": f"{server.tree}/usr",
        "lc-messages-dir": str(share),
        "character-sets-dir": f"{share}/charsets",
        "plugin-dir": f"{server.tree}/usr/lib/mysql/plugin",
    }


def initialise(server: BinlogServer, data: Path, user: ServerUser) -> None:
    """Make a data directory in which root@localhost has no password. Raises: ServerFailed."""
    if server.engine == "mysql":
        command = daemon_command(server, data, {}, socket=None, extra=["--initialize-insecure"])
        script = b""
    else:
        share = _share(server)
        script = b"CREATE DATABASE mysql;\nUSE mysql;\nSET @auth_root_socket = NULL;\n"
        script += b"\n".join((share / f"{share.name}_{name}").read_bytes() for name in _BOOTSTRAP_FILES)
        command = daemon_command(server, data, {}, socket=None, extra=["--bootstrap"])
    done = subprocess.run(
        command, check=False, input=script, capture_output=True, cwd="/", **user.process_options()
    )
    if done.returncode != 0:
        raise ServerFailed(f"{command[0]} exited with {done.returncode}\n{done.stderr.decode()}")


def _share(server: BinlogServer) -> Path:
    """The server's messages and scripts, which MariaDB 10.11 still keeps under the name of MySQL."""
    places = (Path(server.tree) / "usr/share" / name for name in (server.engine, "mysql"))
    return next(place for place in places if (place / "charsets").is_dir())
