"""
The data that backups are measured on: a real PostgreSQL cluster of about 3 GB of relation files.

pgbench at scale 100 (1.5 GB), real text from the documentation and sources found on this machine (about 0.8
GB with repetition), and a table with a random uuid index (0.7 GB): easy, middling and incompressible pages.
The cluster is made once per directory and reused.
"""

from __future__ import annotations

import json
import os
import pwd
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(os.environ.get("CLOUDSAVE_BENCH", "/var/tmp/cloudsave-bench"))
TEXT_BYTES = 720_000_000
UUID_ROWS = 5_000_000
PGBENCH_SCALE = 100
TEXT_SUFFIXES = (".py", ".txt", ".md", ".rst", ".html", ".h", ".c", ".xml")
PORT = 54329


@dataclass(frozen=True, slots=True)
class Server:
    """A running cluster, owned by an unprivileged user."""

    programs: Path
    data: Path
    user: str

    @property
    def url(self) -> str:
        """How to reach it."""
        return f"postgresql://postgres@/postgres?host={self.data.parent}&port={PORT}"

    def run(self, program: str, *arguments: str) -> str:
        """One of the server's own programs, as the server's user."""
        done = subprocess.run(
            [str(self.programs / program), *arguments],
            **_as_user(self.user),
            capture_output=True,
            check=False,
            text=True,
        )
        if done.returncode:
            sys.exit(f"{program} failed: {done.stdout}{done.stderr}")
        return done.stdout

    def sql(self, statement: str) -> str:
        """The output of a statement."""
        return self.run("psql", "-XAtq", "-v", "ON_ERROR_STOP=1", "-c", statement, self.url)

    def start(self) -> bool:
        """Start it if it does not run; whether it had to be started."""
        status = subprocess.run(
            [str(self.programs / "pg_ctl"), "-D", str(self.data), "status"],
            **_as_user(self.user),
            check=False,
            capture_output=True,
        )
        if not status.returncode:
            return False
        log = str(self.data.parent / "server.log")
        self.run("pg_ctl", "-D", str(self.data), "-l", log, "-w", "start")
        return True

    def stop(self) -> None:
        """Stop it."""
        self.run("pg_ctl", "-D", str(self.data), "-m", "fast", "-w", "stop")


def _as_user(user: str) -> dict[str, object]:
    if os.geteuid():
        return {}
    entry = pwd.getpwnam(user)
    return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}


def programs(major: int) -> Path:
    """Where the server programs of that version are, by tools/provision.py."""
    provision = Path(__file__).parent.parent / "tools" / "provision.py"
    listed = json.loads(subprocess.check_output([sys.executable, str(provision), "--list"]))
    entry = listed[str(major)]
    return Path(entry["bindir"] if isinstance(entry, dict) else entry)


def cluster(major: int = 15, *, scale: int = PGBENCH_SCALE, large: bool = True) -> Server:
    """The cluster, made if need be; it runs or not."""
    directory = ROOT / f"pg{major}-{scale}-{'large' if large else 'small'}"
    user = "postgres" if not os.geteuid() else pwd.getpwuid(os.geteuid()).pw_name
    server = Server(programs(major), directory / "data", user)
    if not (directory / "ready").exists():
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True, mode=0o755)
        if not os.geteuid():
            shutil.chown(directory, user)
        _create(server, scale=scale, large=large)
        server.stop()
        (directory / "ready").touch()
    return server


@contextmanager
def running(major: int = 15, *, scale: int = PGBENCH_SCALE, large: bool = True) -> Iterator[Server]:
    """The cluster, started; afterwards it is as it was."""
    server = cluster(major, scale=scale, large=large)
    started = server.start()
    try:
        yield server
    finally:
        if started:
            server.stop()


def _create(server: Server, *, scale: int, large: bool) -> None:
    server.run(
        "initdb", "-D", str(server.data), "-k", "-A", "trust", "-U", "postgres", "-E", "UTF8", "--no-sync"
    )
    settings = {
        "listen_addresses": "",
        "unix_socket_directories": str(server.data.parent),
        "port": PORT,
        "max_wal_size": "8GB",
        "checkpoint_timeout": "30min",
        "shared_buffers": "512MB",
        "maintenance_work_mem": "512MB",
        "autovacuum": "off",
        "wal_level": "replica",
        "max_wal_senders": 10,
    }
    with (server.data / "postgresql.conf").open("a") as file:
        file.writelines(f"{name} = '{value}'\n" for name, value in settings.items())
    server.start()
    server.run("pgbench", "-i", "-q", "-s", str(scale), server.url)
    if large:
        _load_text(server)
        server.sql(
            "create table tokens (id uuid, made timestamptz, note text);"
            "insert into tokens select gen_random_uuid(), now() + n * interval '1 second', 'token ' || n "
            f"from generate_series(1, {UUID_ROWS}) n; create index on tokens (id)"
        )
    server.sql("vacuum freeze analyze")
    server.sql("checkpoint")


def _load_text(server: Server) -> None:
    """Real text, a few kilobytes a row."""
    path = server.data.parent / "text.copy"
    written = 0
    sources = _text_files((Path("/usr/share"), Path("/usr/lib"), Path(sys.prefix)))
    with path.open("w", encoding="utf-8") as out:
        while written < TEXT_BYTES:
            before = written
            for source in sources:
                text = source.read_text("utf-8", errors="ignore").replace("\0", "")
                for begin in range(0, len(text), 1800):
                    out.write(_copy_escaped(text[begin : begin + 1800]) + "\n")
                written += len(text)
                if written >= TEXT_BYTES:
                    break
            if written == before:
                sys.exit("no text found on this machine")
    path.chmod(0o644)
    server.sql(
        "create table texts (body text); alter table texts alter body set storage plain;"
        f"copy texts from '{path}' with (format text)"
    )
    path.unlink()


def _copy_escaped(text: str) -> str:
    """One value of COPY's text format."""
    for plain, escaped in (("\\", "\\\\"), ("\n", "\\n"), ("\t", "\\t"), ("\r", "\\r")):
        text = text.replace(plain, escaped)
    return text


def _text_files(roots: Sequence[Path]) -> list[Path]:
    found = []
    for root in roots:
        found += [p for p in sorted(root.rglob("*")) if p.suffix in TEXT_SUFFIXES and p.is_file()]
    return found


if __name__ == "__main__":
    with running(int(sys.argv[1]) if len(sys.argv) > 1 else 15) as made:
        print(made.data)
        print(made.sql("select pg_size_pretty(sum(pg_database_size(oid))) from pg_database"))
