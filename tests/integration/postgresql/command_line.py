"""
The real command line, `python -m cloudsave`, as processes of their own against real servers.

Nothing of the product is imported: what is tested is what a user can type. Whatever was started, a capture, a
backup, a restored server, is ended by `close`, even where the test failed.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.integration.postgresql.cluster import (
    PORT_OF_SOCKET,
    Cluster,
    ServerFailed,
    poll,
)
from tests.integration.postgresql.oracle import lsn_number

ROOT = Path(__file__).parents[3]
PROGRAM = ("cloudsave",)
"""The module that is run, and its first arguments."""
COMMAND_SECONDS_MAX = 180.0
STOP_SECONDS_MAX = 60.0
SHOWN_CHARACTERS_MAX = 4000
SOURCE = "db"
PASSPHRASE = "correct horse battery staple"
RESTORED_SETTINGS = ("fsync=off", "shared_buffers=32MB", "max_wal_size=1GB")


class CommandFailed(AssertionError):
    """A command did not end as the test needs; carries what it said."""


@dataclass(frozen=True)
class Answer:
    """How a command ended and what it said."""

    arguments: tuple[str, ...]
    exit_code: int
    stdout: str
    stderr: str

    @property
    def result(self) -> Any:
        """The JSON document on stdout; None where the command printed nothing."""
        return json.loads(self.stdout) if self.stdout.strip() else None

    @property
    def error(self) -> dict[str, Any]:
        """The JSON error on stderr."""
        found = json.loads(self.stderr.splitlines()[-1])["error"]
        assert isinstance(found, dict)
        return found

    def expect(self, exit_code: int) -> Answer:
        """This answer. Raises: CommandFailed when the command ended in another way."""
        if self.exit_code != exit_code:
            said = f"{self.stdout[-SHOWN_CHARACTERS_MAX:]}\n{self.stderr[-SHOWN_CHARACTERS_MAX:]}"
            wanted = f"exited with {self.exit_code}, not {exit_code}"
            raise CommandFailed(f"cloudsave {' '.join(self.arguments)} {wanted}\n{said}")
        return self


class Running:
    """A command in the background; its output goes to files, so that no pipe can fill."""

    def __init__(
        self, command: Sequence[str], arguments: Sequence[str], folder: Path, **options: Any
    ) -> None:
        self.arguments = tuple(arguments)
        self._out = folder / "stdout"
        self._err = folder / "stderr"
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                [*command, *arguments], stdin=subprocess.DEVNULL, stdout=out, stderr=err, **options
            )

    def running(self) -> bool:
        """False when it ended."""
        return self.process.poll() is None

    def events(self) -> list[dict[str, Any]]:
        """The JSON documents that it has printed so far, one a line."""
        lines = self._out.read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def statuses(self) -> list[dict[str, Any]]:
        """Those of a capture that say how it is; alarms and notices have an `event`."""
        return [event for event in self.events() if "event" not in event]

    def wait(self, *, timeout_seconds: float = COMMAND_SECONDS_MAX) -> Answer:
        """How it ended. Raises: subprocess.TimeoutExpired."""
        exit_code = self.process.wait(timeout=timeout_seconds)
        return Answer(self.arguments, exit_code, self._out.read_text(), self._err.read_text())

    def stop(self) -> Answer:
        """Ask it to end (SIGTERM) and wait; killed when it does not."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.wait(timeout_seconds=STOP_SECONDS_MAX)
        finally:
            if self.running():
                self.process.kill()
                self.process.wait()


@dataclass(frozen=True)
class RestoredServer:
    """
    A server that `restore --start` left running.

    `server` talks to it: its home is the private directory of the socket. It is no child of ours: `stop` ends
    it, and the methods of Cluster that start and stop do not apply.
    """

    facts: dict[str, Any]
    server: Cluster

    def stop(self) -> None:
        """Shut down with a checkpoint; the data directory stays."""
        stop_server(self.server.data)


def stop_server(data: Path, *, immediate: bool = False) -> None:
    """End the server that runs on a data directory, if any; killed when it does not end."""
    pid_file = data / "postmaster.pid"
    try:
        pid = int(pid_file.read_text().splitlines()[0])
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, IndexError):
        return
    if b"postgres" not in command:
        return
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGQUIT if immediate else signal.SIGINT)
    try:
        poll(lambda: not _alive(pid), "the restored server ends", timeout_seconds=STOP_SECONDS_MAX)
    finally:
        if _alive(pid):
            os.kill(pid, signal.SIGKILL)


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


class CommandLine:
    """
    One user with a configuration file, a repository and one source.

    Args:
        folder: For the configuration and what commands print; the caller's.
        cluster: The source; its factory makes the folders for the repository and for restores.
        repository: URL of the repository; None: a directory that goes away with the test.
        url: URL of the source; None: the cluster's socket.
        environment: Further variables of all commands.
    Order: `prepare`, then anything, then `close`, always.
    """

    def __init__(
        self,
        folder: Path,
        cluster: Cluster,
        *,
        repository: str | None = None,
        url: str | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.cluster = cluster
        self.url = url or cluster.url
        self.config = folder / "cloudsave.toml"
        self.store = cluster.factory.folder(on_disk=True) / "repository"
        self.repository = repository or f"file://{self.store}"
        self._folder = folder
        self._environment = dict(environment or {})
        self._background: list[Running] = []
        self._restored: dict[Path, Path | None] = {}
        self._number = 0

    # ---- commands

    def prepare(self, *, rpo_seconds: float | None = None, spool: Path | None = None) -> None:
        """Write the configuration, make the repository, add the source."""
        passphrase = self._folder / "passphrase"
        passphrase.touch(mode=0o600)
        passphrase.write_text(PASSPHRASE)
        self.config.touch(mode=0o600)
        spool_line = f'spool_directory = "{spool}"\n' if spool else ""
        self.config.write_text(
            f'{spool_line}[repository]\nurl = "{self.repository}"\npassphrase_file = "{passphrase}"\n'
            f'[postgresql]\nbin_directory = "{self.cluster.bindir}"\n'
        )
        self.run("init")
        rpo = [] if rpo_seconds is None else ["--rpo-seconds", str(rpo_seconds)]
        self.run("source", "add", SOURCE, self.url, *rpo)

    def run(self, *arguments: str, exit_code: int = 0) -> Any:
        """Run a command that must end with `exit_code`; its JSON result. Raises: CommandFailed."""
        return self.answer(*arguments).expect(exit_code).result

    def refused(self, *arguments: str, exit_code: int) -> dict[str, Any]:
        """Run a command that must be refused; the error. Raises: CommandFailed."""
        answer = self.answer(*arguments).expect(exit_code)
        assert not answer.stdout.strip(), f"a refused command printed a result: {answer.stdout}"
        return answer.error

    def answer(self, *arguments: str) -> Answer:
        """Run a command to its end."""
        done = subprocess.run(
            [*self._command(), *arguments],
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMMAND_SECONDS_MAX,
            env=self._variables(),
        )
        return Answer(arguments, done.returncode, done.stdout, done.stderr)

    def begin(self, *arguments: str, program: Sequence[str] = PROGRAM) -> Running:
        """Start a command in the background, by `program`; `close` ends it at the latest."""
        self._number += 1
        folder = self._folder / f"command-{self._number}"
        folder.mkdir()
        running = Running(self._command(program), arguments, folder, env=self._variables())
        self._background.append(running)
        return running

    @contextmanager
    def captured(self) -> Iterator[Running]:
        """Capture of the log as a process; at the end it is stopped and must say that all went well."""
        capture = self.begin("logs", "capture", SOURCE)
        streaming = "the capture receives log"
        poll(lambda: not capture.running() or _streams(capture), streaming)
        if not capture.running():
            capture.wait().expect(0)
        yield capture
        capture.stop().expect(0)

    def catch_up(self, cluster: Cluster | None = None) -> None:
        """Wait until all log that the server has flushed by now is durable, as `logs status` says."""
        server = cluster or self.cluster
        branch = f"{server.timeline():08X}"
        wanted = server.psql("SELECT pg_current_wal_flush_lsn()")
        released = f"SELECT count(*) FROM pg_replication_slots WHERE restart_lsn >= '{wanted}'"
        poll(lambda: server.psql(released) == "1", f"the slot releases the log up to {wanted}")

        def durable() -> bool:
            answer = self.answer("logs", "status", SOURCE)
            if answer.exit_code not in (0, 2, 3):  # 2: nothing is stored yet, 3: a hole
                answer.expect(0)
            ranges = answer.result["ranges"] if answer.stdout.strip() else []
            ends = [lsn_number(one["end"]) for one in ranges if one["branch"] == branch]
            return max(ends, default=0) >= lsn_number(wanted)

        poll(durable, f"log up to {wanted} on branch {branch} is durable")

    # ---- restores

    def restore_command(self, into: Path, *target: str) -> list[str]:
        """Arguments of a restore."""
        return ["restore", SOURCE, "--into", str(into), *target]

    def place(self) -> Path:
        """An absent directory to restore into, in a folder of its own."""
        return self.cluster.factory.folder(on_disk=True) / "restored"

    @contextmanager
    def restored(self, *target: str) -> Iterator[RestoredServer]:
        """Restore and start; at the end the server is stopped and its files are removed."""
        directory = self.place()
        self._restored[directory] = None
        settings = [word for setting in RESTORED_SETTINGS for word in ("--set", setting)]
        try:
            facts = self.run(*self.restore_command(directory, *target, "--start", *settings))
            yield RestoredServer(facts, self._server_of(directory, facts))
            stop_server(directory)
        finally:
            self._discard(directory)

    def _server_of(self, directory: Path, facts: Mapping[str, Any]) -> Cluster:
        url = str(facts["connection_url"])
        home = Path(url.partition("host=")[2].partition("&")[0])
        if f"port={PORT_OF_SOCKET}" not in url:
            raise ServerFailed(f"the restored server has another port: {url}")
        self._restored[directory] = home
        source = self.cluster
        return Cluster(source.major, source.bindir, home, directory, source.user, source.factory)

    def _discard(self, directory: Path) -> None:
        """Stop what still runs there, and remove the files and the private directory of the socket."""
        stop_server(directory, immediate=True)
        home = self._restored.pop(directory)
        if home is not None:
            shutil.rmtree(home, ignore_errors=True)
        shutil.rmtree(directory.parent, ignore_errors=True)

    # ---- the end

    def close(self) -> None:
        """End all that still runs."""
        for running in self._background:
            if running.running():
                running.stop()
        for directory in list(self._restored):
            self._discard(directory)

    # ---- private

    def _command(self, program: Sequence[str] = PROGRAM) -> list[str]:
        return [sys.executable, "-m", *program, "--config", str(self.config), "--json", "--no-progress"]

    def _variables(self) -> dict[str, str]:
        """Nothing of the caller's settings of ours or of libpq leaks in."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("CLOUDSAVE_", "PG", "AWS_"))
        }
        own = {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "HOME": str(self._folder), "TZ": "UTC"}
        return {**kept, **own, **self._environment}


def _streams(capture: Running) -> bool:
    return any(event["state"] == "streaming" for event in capture.statuses())
