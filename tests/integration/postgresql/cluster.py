"""
Real PostgreSQL servers for tests: made in under a second from a template, crashed, promoted, taken down.

A server runs as this user, or as `postgres` or `nobody` when the tests run as root, which PostgreSQL refuses.
Every directory lives below a folder of the session, in memory (/dev/shm) where there is plenty of it, since
a thousand small files cost 50 ms there and a second on some disks; `on_disk` servers live in /tmp. Not in a
home directory: unix socket paths must stay short, and root's home cannot be read by the server. Durability is
off (`fsync=off`): a killed process loses nothing by that.
"""

from __future__ import annotations

import itertools
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import psycopg

DISK_PARENT = Path("/tmp")
SESSION_PREFIX = "cloudsave-pg-"
PORT_OF_SOCKET = 5432
START_TIMEOUT_SECONDS = 60.0
COMMAND_TIMEOUT_SECONDS = 300.0
POLL_SECONDS = 0.02
LOG_TAIL_LINES = 40
MEMORY_WANTED_BYTES = 8 << 30

DEFAULT_CONF: Mapping[str, str] = {
    "fsync": "off",
    "wal_level": "replica",
    "max_wal_senders": "10",
    "max_replication_slots": "10",
    "max_connections": "60",
    "shared_buffers": "16MB",
    "max_wal_size": "256MB",
    "log_line_prefix": "%m [%p] %q%a ",
    "timezone": "UTC",
}
STATUS_LINE = 7
"""Line of postmaster.pid, from 0, that says `ready` or `standby` (src/include/utils/pidfile.h)."""


class ServerFailed(AssertionError):
    """A server or one of its programs did not do what the test needs; carries the end of the log."""


@dataclass(frozen=True)
class ServerUser:
    """The unprivileged user that servers run as. `name` is None when the tests are unprivileged."""

    name: str | None

    @classmethod
    def choose(cls) -> ServerUser:
        """This user, or the first unprivileged one that exists when the tests run as root."""
        if os.geteuid() != 0:
            return cls(None)
        for name in ("postgres", "nobody"):
            with suppress(KeyError):
                pwd.getpwnam(name)
                return cls(name)
        raise ServerFailed("running as root and neither user postgres nor nobody exists")

    def process_options(self) -> dict[str, Any]:
        """Arguments for subprocess that start a program as this user."""
        if self.name is None:
            return {}
        return {"user": self.name, "group": pwd.getpwnam(self.name).pw_gid, "extra_groups": []}

    def own(self, path: Path) -> None:
        """Give a path and all below it to this user. Links are not followed."""
        if self.name is None:
            return
        entry = pwd.getpwnam(self.name)
        for folder, folders, files in os.walk(path):
            for name in (".", *folders, *files):
                os.lchown(os.path.join(folder, name), entry.pw_uid, entry.pw_gid)


def poll(condition: Callable[[], bool], what: str, *, timeout_seconds: float = START_TIMEOUT_SECONDS) -> None:
    """Wait until a condition holds. Raises: ServerFailed after the deadline."""
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        if time.monotonic() > deadline:
            raise ServerFailed(f"waited {timeout_seconds:.0f} s in vain: {what}")
        time.sleep(POLL_SECONDS)


class Pgbench:
    """A pgbench load in the background. Leaving the context stops it."""

    def __init__(self, process: subprocess.Popen[bytes], output: Path) -> None:
        self.process = process
        self.output = output

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self.stop()

    def running(self) -> bool:
        """False when it ended, by itself or because the server went away."""
        return self.process.poll() is None

    def stop(self) -> str:
        """End the load and give back what it printed: a progress line per second, then its summary if any."""
        if self.running():
            self.process.terminate()
        self.process.wait(timeout=COMMAND_TIMEOUT_SECONDS)
        return self.output.read_text()


@dataclass
class Cluster:
    """
    One server: its programs, its data directory and, while it runs, its process.

    `home` holds the data directory, the socket, the tablespaces and `server.log`. A data directory elsewhere
    (a restored one) is taken over by ClusterFactory.adopt.
    """

    major: str
    bindir: Path
    home: Path
    data: Path
    user: ServerUser
    factory: ClusterFactory = field(repr=False)
    tcp_port: int | None = None
    process: subprocess.Popen[bytes] | None = None

    # ---- life cycle

    def start(self, *, wait: bool = True, timeout_seconds: float = START_TIMEOUT_SECONDS) -> None:
        """Start, and wait until connections are accepted. Raises: ServerFailed with the end of the log."""
        if self.running():
            raise ServerFailed("the server is running already")
        options = {
            "unix_socket_directories": str(self.home),
            "unix_socket_permissions": "0777",
            "port": str(self.tcp_port or PORT_OF_SOCKET),
            "listen_addresses": "127.0.0.1" if self.tcp_port else "",
            "logging_collector": "off",
            "log_destination": "stderr",
        }
        command = [self.bin("postgres"), "-D", str(self.data)]
        for name, value in options.items():
            command += ["-c", f"{name}={value}"]
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.home,
                start_new_session=True,
                env=self.environment(),
                **self.user.process_options(),
            )
        if wait:
            self.wait_until_ready(timeout_seconds=timeout_seconds)

    def wait_until_ready(self, *, timeout_seconds: float = START_TIMEOUT_SECONDS) -> None:
        """Return when connections are accepted. Raises: ServerFailed when the server ends or is too slow."""
        deadline = time.monotonic() + timeout_seconds
        while self._status() != "ready":
            if not self.running():
                raise ServerFailed(f"PostgreSQL {self.major} ended while starting\n{self.log_tail()}")
            if time.monotonic() > deadline:
                raise ServerFailed(f"PostgreSQL {self.major} is not ready\n{self.log_tail()}")
            time.sleep(POLL_SECONDS)

    def stop(self, *, immediate: bool = False) -> None:
        """Shut down fast (with a checkpoint), or `immediate`ly (recovery will run at the next start)."""
        if not self.running():
            return
        process = self._process()
        process.send_signal(signal.SIGQUIT if immediate else signal.SIGINT)
        try:
            process.wait(timeout=START_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired as error:
            self.crash()
            raise ServerFailed(f"PostgreSQL {self.major} did not stop\n{self.log_tail()}") from error

    def restart(self) -> None:
        """Stop fast and start again."""
        self.stop()
        self.start()

    def crash(self) -> None:
        """Kill the postmaster and all its children at once, as a power failure of the process would."""
        process = self._process()
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGSTOP)
        family = [process.pid, *children_of(process.pid)]
        for pid in family:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait(timeout=START_TIMEOUT_SECONDS)
        poll(lambda: not any(_alive(pid) for pid in family), "killed server processes are gone")

    def running(self) -> bool:
        """Whether the postmaster is there."""
        return self.process is not None and self.process.poll() is None

    def promote(self) -> None:
        """Make a standby, or a paused recovery, a primary on a new timeline."""
        self.run("pg_ctl", "promote", "-w", "-D", str(self.data))
        poll(lambda: self.psql("SELECT pg_is_in_recovery()") == "f", "the standby is promoted")

    def make_standby(self, *, conf: Mapping[str, str] | None = None, start: bool = True) -> Cluster:
        """A streaming standby of this server, made by pg_basebackup; tablespaces are relocated beside it."""
        standby = self.factory.empty(self.major, on_disk=self.home.parent == self.factory.disk)
        tablespaces = self.psql("SELECT pg_tablespace_location(oid) FROM pg_tablespace").split()
        mapping = []
        for place in tablespaces:
            target = standby.home / "tablespaces" / Path(place).name
            target.parent.mkdir(exist_ok=True)
            self.user.own(target.parent)
            mapping.append(f"--tablespace-mapping={place}={target}")
        arguments = ["-D", str(standby.data), "--checkpoint=fast", "--wal-method=stream", "-R", *mapping]
        self.run("pg_basebackup", *arguments)
        standby.configure(conf or {})
        if start:
            standby.start()
        return standby

    def configure(self, conf: Mapping[str, str]) -> None:
        """Append settings to postgresql.conf; they hold after a reload or a restart, as the setting wants."""
        with (self.data / "postgresql.conf").open("a") as file:
            for name, value in conf.items():
                quoted = value.replace("'", "''")
                file.write(f"{name} = '{quoted}'\n")

    def reload(self) -> None:
        """Let the server read its configuration again."""
        self.psql("SELECT pg_reload_conf()")

    # ---- talking to it

    @property
    def url(self) -> str:
        """URL over the private unix socket."""
        port = self.tcp_port or PORT_OF_SOCKET
        return f"postgresql://postgres@/postgres?host={quote(str(self.home), safe='')}&port={port}"

    @property
    def tcp_url(self) -> str:
        """URL over loopback TCP; the cluster must have been created with tcp=True."""
        if self.tcp_port is None:
            raise ServerFailed("this cluster does not listen on TCP; create it with tcp=True")
        return f"postgresql://postgres@127.0.0.1:{self.tcp_port}/postgres"

    def connect(self, *, autocommit: bool = True, dbname: str = "postgres") -> psycopg.Connection[Any]:
        """A new connection; the caller closes it."""
        return psycopg.connect(self.url, autocommit=autocommit, dbname=dbname)

    def psql(self, sql: str, *, dbname: str = "postgres") -> str:
        """
        Run SQL; the rows as `psql -XAtq -c` prints them, fields separated by `|`.

        A session of its own, in this process: a program for each of the thousands of calls would take as long
        as many a test. Raises: ServerFailed on any error.
        """
        try:
            with self.connect(dbname=dbname) as connection, connection.cursor() as cursor:
                cursor.execute(sql.encode())
                lines = [line for _ in _results(cursor) for line in _printed(cursor.pgresult)]
        except psycopg.Error as error:
            raise ServerFailed(f"{error}\n{sql}\n{self.log_tail()}") from error
        return "\n".join(lines).strip()

    def bin(self, program: str) -> str:
        """Path of one of this version's programs."""
        return str(self.bindir / program)

    def run(self, program: str, *arguments: str, check: bool = True) -> str:
        """Run one of the server's programs as its user against it; its output. Raises: ServerFailed."""
        done = subprocess.run(
            [self.bin(program), *arguments],
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            cwd=self.home,
            env=self.environment(),
            timeout=COMMAND_TIMEOUT_SECONDS,
            **self.user.process_options(),
        )
        if check and done.returncode != 0:
            said = f"{done.stdout}{done.stderr}"
            raise ServerFailed(f"{program} exited with {done.returncode}\n{said}\n{self.log_tail()}")
        return str(done.stdout)

    def environment(self) -> dict[str, str]:
        """Environment of the server and its programs; nothing of the caller's libpq settings leaks in."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
        port = str(self.tcp_port or PORT_OF_SOCKET)
        own = {"PGHOST": str(self.home), "PGPORT": port, "PGUSER": "postgres", "PGDATABASE": "postgres"}
        libraries = self.bindir.parent / "lib"
        if (libraries / "libpq.so.5").exists():
            own["LD_LIBRARY_PATH"] = str(libraries)  # its WAL receiver would load the system's older libpq
        return {**kept, **own, "HOME": str(self.home), "LC_ALL": "C", "TZ": "UTC"}

    # ---- load and looking inside

    def pgbench_init(self, scale: int = 1, *, extra: Sequence[str] = ()) -> None:
        """Create pgbench's tables with scale x 100,000 accounts."""
        self.run("pgbench", "-i", "-q", "-s", str(scale), *extra)

    def pgbench_run(
        self, *, clients: int = 2, seconds: int = 600, rate: int | None = None, extra: Sequence[str] = ()
    ) -> Pgbench:
        """Start a pgbench load in the background; `rate` bounds transactions per second."""
        output = self.home / f"pgbench-{next(_NUMBERS)}.log"
        command = [self.bin("pgbench"), "-n", "-c", str(clients), "-T", str(seconds), "-P", "1", *extra]
        if rate is not None:
            command += ["--rate", str(rate)]
        with output.open("wb") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.home,
                env=self.environment(),
                **self.user.process_options(),
            )
        load = Pgbench(process, output)
        self.factory.loads.append(load)
        return load

    def lsn(self) -> str:
        """Current insert position of a primary."""
        return self.psql("SELECT pg_current_wal_insert_lsn()")

    def switch_wal(self) -> str:
        """End the current WAL segment; the position where it ended."""
        return self.psql("SELECT pg_switch_wal()")

    def timeline(self) -> int:
        """Timeline that a primary writes to."""
        return int(self.psql("SELECT pg_walfile_name(pg_current_wal_lsn())")[:8], 16)

    def system_identifier(self) -> str:
        """System identifier of the running server."""
        return self.psql("SELECT system_identifier FROM pg_control_system()")

    def waldump(self, *, start: str, end: str, timeline: int = 1, pgwal: Path | None = None) -> str:
        """pg_waldump of a stretch of log, from the data directory or another folder of segments."""
        place = str(pgwal or self.data / "pg_wal")
        return self.run("pg_waldump", "-p", place, "-t", str(timeline), "-s", start, "-e", end)

    def amcheck(self) -> None:
        """Check all heaps and indexes of all databases. Raises: ServerFailed with what pg_amcheck found."""
        self.run("pg_amcheck", "--all", "--install-missing", "--heapallindexed")

    def verify_checksums(self) -> None:
        """Check every page of the stopped server. Raises: ServerFailed with what pg_checksums found."""
        self.run("pg_checksums", "--check", "-D", str(self.data))

    @property
    def log_path(self) -> Path:
        """The server's log."""
        return self.home / "server.log"

    def log_tail(self) -> str:
        """End of the server's log."""
        if not self.log_path.exists():
            return "(no log)"
        return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:])

    # ---- private

    def _process(self) -> subprocess.Popen[bytes]:
        if self.process is None:
            raise ServerFailed("the server was never started")
        return self.process

    def _status(self) -> str:
        """Status word of our own postmaster; empty when the file is absent, half-written or a stale one."""
        try:
            lines = (self.data / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return ""
        if len(lines) <= STATUS_LINE or lines[0] != str(self._process().pid):
            return ""
        return lines[STATUS_LINE].strip()


class ClusterFactory:
    """
    Makes servers below one folder and takes all of them down, whatever happened to the test.

    Args:
        bindirs: Programs by major version.
        root: The session's folder, which also holds the templates.
        disk: The session's folder on a disk; may be the same.
        noted: Called with the major version of each new cluster.
    """

    def __init__(
        self, bindirs: Mapping[str, Path], *, root: Path, disk: Path, noted: Callable[[str], None]
    ) -> None:
        self.bindirs = bindirs
        self.root = root
        self.disk = disk
        self.noted = noted
        self.user = ServerUser.choose()
        self.clusters: list[Cluster] = []
        self.loads: list[Pgbench] = []
        self.folders: list[Path] = []
        self.ports: list[socket.socket] = []

    def create(
        self,
        major: str,
        *,
        checksums: bool = True,
        segment_megabytes: int = 16,
        conf: Mapping[str, str] | None = None,
        tablespaces: Iterable[str] = (),
        tcp: bool = False,
        fresh_identity: bool = False,
        on_disk: bool = False,
        start: bool = True,
    ) -> Cluster:
        """
        A new server, started unless told otherwise.

        Args:
            segment_megabytes: Size of a log file.
            tablespaces: Names; each gets a folder below the cluster's home. They need `start`.
            fresh_identity: Run initdb, so that the system identifier is not the template's.
            on_disk: Keep it off the memory; for databases above a few hundred megabytes.
        """
        cluster = self.empty(major, on_disk=on_disk)
        if fresh_identity:
            self._initdb(cluster.data, major, checksums=checksums, segment_megabytes=segment_megabytes)
        else:
            template = self._template(major, checksums=checksums, segment_megabytes=segment_megabytes)
            self._as_user(["cp", "-a", "--reflink=auto", str(template), str(cluster.data)])
        cluster.configure({**DEFAULT_CONF, **(conf or {})})
        if tcp:
            cluster.tcp_port = self.reserve_port()
        if start:
            cluster.start()
        for name in tablespaces:
            place = cluster.home / "tablespaces" / name
            place.mkdir(parents=True)
            self.user.own(place.parent)
            cluster.psql(f"CREATE TABLESPACE {name} LOCATION '{place}'")
        return cluster

    def adopt(self, major: str, data: Path, *, start: bool = True) -> Cluster:
        """Take over a data directory made elsewhere, such as a restored one, with a socket of its own."""
        cluster = self.empty(major)
        cluster.data = data
        self.user.own(data)
        for link in (data / "pg_tblspc").iterdir():
            self.user.own(link.resolve())
        if start:
            cluster.start()
        return cluster

    def folder(self, *, on_disk: bool = False) -> Path:
        """An empty folder of the servers' user, such as one to restore into; removed after the test."""
        place = (self.disk if on_disk else self.root) / f"folder-{next(_NUMBERS)}"
        place.mkdir(mode=0o700)
        self.user.own(place)
        self.folders.append(place)
        return place

    def reserve_port(self) -> int:
        """A TCP port for a server of this test alone, until the clean-up."""
        self.ports.append(reserved_port())
        return int(self.ports[-1].getsockname()[1])

    def empty(self, major: str, *, on_disk: bool = False) -> Cluster:
        """A cluster without a data directory yet, known to the clean-up."""
        home = (self.disk if on_disk else self.root) / f"{major}-{next(_NUMBERS)}"
        home.mkdir(mode=0o700)
        self.user.own(home)
        cluster = Cluster(major, self.bindirs[major], home, home / "data", self.user, self)
        self.clusters.append(cluster)
        self.noted(major)
        return cluster

    def close(self) -> list[str]:
        """Stop and remove every cluster and load; what could not be stopped in order, as text."""
        troubles = []
        for load in self.loads:
            load.stop()
        for cluster in reversed(self.clusters):
            try:
                if cluster.running():
                    cluster.crash()
            except (ServerFailed, subprocess.TimeoutExpired, OSError) as error:
                troubles.append(f"{cluster.home}: {error}")
            shutil.rmtree(cluster.home)
        for folder in self.folders:
            shutil.rmtree(folder, ignore_errors=True)
        for port in self.ports:
            port.close()
        self.ports.clear()
        self.folders.clear()
        self.clusters.clear()
        self.loads.clear()
        return troubles

    def _template(self, major: str, *, checksums: bool, segment_megabytes: int) -> Path:
        pages = "checksums" if checksums else "plain"
        place = self.root / f"template-{major}-{pages}-{segment_megabytes}"
        if not place.exists():
            place.mkdir(mode=0o700)
            self.user.own(place)
            self._initdb(place, major, checksums=checksums, segment_megabytes=segment_megabytes)
        return place

    def _initdb(self, data: Path, major: str, *, checksums: bool, segment_megabytes: int) -> None:
        initdb = str(self.bindirs[major] / "initdb")
        command = [initdb, "-D", str(data), "-U", "postgres", "-A", "trust", "-N"]
        command += ["--locale=C", "--encoding=UTF8", f"--wal-segsize={segment_megabytes}"]
        if checksums:
            command.append("--data-checksums")
        elif int(major) >= 18:
            command.append("--no-data-checksums")
        self._as_user(command)

    def _as_user(self, command: Sequence[str]) -> None:
        options = self.user.process_options()
        done = subprocess.run(command, check=False, capture_output=True, text=True, cwd="/", **options)
        if done.returncode != 0:
            raise ServerFailed(f"{command[0]} exited with {done.returncode}\n{done.stdout}{done.stderr}")


# ---- rows as psql prints them ------------------------------------------------------------------------------


def _results(cursor: psycopg.Cursor[Any]) -> Iterator[psycopg.Cursor[Any]]:
    """The cursor at the result of each statement."""
    yield cursor
    while cursor.nextset():
        yield cursor


def _printed(result: psycopg.pq.abc.PGresult | None) -> list[str]:
    """A line for each row, of the text that the server sent."""
    assert result is not None
    return [
        "|".join((result.get_value(row, column) or b"").decode() for column in range(result.nfields))
        for row in range(result.ntuples)
    ]


# ---- the session's folder ----------------------------------------------------------------------------------


def memory_parent() -> Path:
    """Where small servers live: in memory when there is plenty, else /tmp."""
    memory = Path("/dev/shm")
    available = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    plenty = available is not None and int(available[1]) * 1024 >= MEMORY_WANTED_BYTES
    if plenty and memory.is_dir() and shutil.disk_usage(memory).free >= MEMORY_WANTED_BYTES:
        return memory
    return DISK_PARENT


def open_session_folder(parent: Path) -> Path:
    """A new folder for this process; what a killed test run left behind is ended and removed first."""
    for left in parent.glob(f"{SESSION_PREFIX}*"):
        _remove_if_abandoned(left)
    folder = Path(tempfile.mkdtemp(prefix=SESSION_PREFIX, dir=parent))
    folder.chmod(0o711)
    (folder / "owner").write_text(_identity_of(os.getpid()))
    ServerUser.choose().own(folder)
    return folder


def _remove_if_abandoned(folder: Path) -> None:
    try:
        owner = (folder / "owner").read_text()
        mine = folder.stat().st_uid == os.geteuid() or os.geteuid() == 0
    except OSError:
        return
    if not mine or not owner:  # not yet written: another process opens it at this moment
        return
    if _identity_of(int(owner.split()[0])) == owner:
        return
    for pid in [int(name) for name in os.listdir("/proc") if name.isdigit()]:
        with suppress(OSError):
            if os.fsencode(folder) + b"/" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)


def _identity_of(pid: int) -> str:
    """Process id and start time, which together are never reused; empty when there is no such process."""
    fields = _stat_of(pid)
    return f"{pid} {fields[19]}" if fields else ""


def _stat_of(pid: int) -> list[str]:
    """Fields of /proc/PID/stat after the name, state first; empty when there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def children_of(parent: int) -> list[int]:
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    return [pid for pid in pids if _stat_of(pid)[1:2] == [str(parent)]]


def _alive(pid: int) -> bool:
    return _stat_of(pid)[:1] not in ([], ["Z"])


def reserved_port() -> socket.socket:
    """
    A TCP port that nobody else is given until this socket is closed; a server can listen on it all the same.

    Tests run beside each other, and a port that is merely free is given to the next one that asks. Linux lets
    two sockets have one address when both say SO_REUSEADDR, as PostgreSQL's do, and at most one listens.
    """
    reservation = socket.socket()
    reservation.bind(("127.0.0.1", 0))
    reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return reservation


_NUMBERS = itertools.count(1)
