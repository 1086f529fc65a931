"""The installed command with a configuration and a repository of its own, for one MySQL or MariaDB server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

from cloudsave.clock import SYSTEM_CLOCK
from cloudsave.engines.binlog.position import number_of
from cloudsave.model.ledger import Ledger, read_extents
from cloudsave.model.log import LogIndex
from cloudsave.repository.keys import Secret
from cloudsave.repository.lineage import Lineage
from cloudsave.repository.repository import Repository
from cloudsave.store.posix import PosixStore
from tests.integration.mysql.cluster import BinlogCluster
from tests.integration.postgresql.cluster import poll

PASSPHRASE = "correct horse battery staple"
TIMEOUT_SECONDS = 120.0
IN_USE_BYTE = 21
CAPTURED_SECONDS_MAX = 60.0


class Product:
    """`close` ends what was started, whatever happened to the test."""

    def __init__(
        self,
        folder: Path,
        cluster: BinlogCluster,
        *,
        url: str = "",
        rpo_seconds: float = 0.2,
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.folder = folder
        self.cluster = cluster
        self.repository = folder / "repository"
        (folder / "passphrase").write_text(PASSPHRASE)
        (folder / "passphrase").chmod(0o600)
        (folder / "cloudsave.toml").touch()
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("CLOUDSAVE_")},
            "CLOUDSAVE_CONFIG": str(folder / "cloudsave.toml"),
            "CLOUDSAVE_PASSPHRASE_FILE": str(folder / "passphrase"),
            "CLOUDSAVE_REPOSITORY_URL": f"file://{self.repository}",
            "PATH": f"{cluster.server.bindir}:{os.environ.get('PATH', '')}",
            **environment,
        }
        self._captures: list[subprocess.Popen[bytes]] = []
        self.run("init")
        self.run("source", "add", "db", url or cluster.url, "--rpo-seconds", str(rpo_seconds))

    def run(self, *arguments: str, status: int = 0) -> str:
        """Run to the end; what it said on stdout. The exit code must be `status`."""
        done = subprocess.run(
            [sys.executable, "-m", "cloudsave", *arguments],
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=self.environment,
            timeout=TIMEOUT_SECONDS,
        )
        assert done.returncode == status, (
            f"{arguments} exited with {done.returncode}\n{done.stdout}{done.stderr}"
        )
        return done.stdout if status in (0, 3) else done.stderr

    def begin(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Start a command in a process group of its own."""
        return subprocess.Popen(
            [sys.executable, "-m", "cloudsave", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=self.environment,
            start_new_session=True,
        )

    def json(self, *arguments: str, status: int = 0) -> Any:
        """The JSON document that a command prints."""
        return json.loads(self.run(*arguments, "--json", status=status))

    def capture(self, *options: str) -> subprocess.Popen[bytes]:
        """Start to capture in the background."""
        with (self.folder / "capture.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "cloudsave", "logs", "capture", "db", *options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.environment,
            )
        self._captures.append(process)
        return process

    def said(self) -> str:
        """What all captures have said."""
        return (self.folder / "capture.log").read_text()

    def stop(self, capture: subprocess.Popen[bytes]) -> None:
        """End a capture in order."""
        capture.send_signal(signal.SIGTERM)
        assert capture.wait(timeout=TIMEOUT_SECONDS) == 0, self.said()

    def close(self) -> None:
        """Kill every capture."""
        for capture in self._captures:
            with suppress(ProcessLookupError):
                capture.kill()
            capture.wait(timeout=TIMEOUT_SECONDS)

    # ---- what is stored

    def lineage(self) -> Lineage:
        """What the repository holds of the server."""
        store = PosixStore(self.repository, clock=SYSTEM_CLOCK)
        repository = Repository.open(store, secret=Secret(passphrase=PASSPHRASE), clock=SYSTEM_CLOCK)
        (only,) = repository.lineage_ids()
        return repository.lineage(only)

    def stored_files(self) -> dict[int, bytes]:
        """The stored log of the only branch, by the number of the binlog file."""
        return stored_files(self.lineage())

    def indexes(self) -> list[LogIndex]:
        """The indexes of the stored stretches, in log order, each byte once."""
        lineage = self.lineage()
        ledger = Ledger(lineage.logs())
        (branch,) = ledger.branches()
        ((first, last),) = ledger.ranges(branch)
        cover = ledger.cover([(branch, 0, None)], first, last)
        return [lineage.log_index(extent.segment) for extent in cover.extents]

    def wait_for(self, marker: bytes) -> None:
        """Return when the marker is in the stored log."""
        poll(
            lambda: self._has_log() and any(marker in log for log in self.stored_files().values()),
            f"{marker!r} is stored; capture said: {self.said()[-2000:]}",
            timeout_seconds=CAPTURED_SECONDS_MAX,
        )

    def _has_log(self) -> bool:
        return any(self.repository.glob("lineages/*/logs/*/*/*"))


def stored_files(lineage: Lineage) -> dict[int, bytes]:
    """The stored log of the only branch, by the number of the binlog file."""
    ledger = Ledger(lineage.logs())
    files: dict[int, bytes] = {}
    for branch in ledger.branches():
        for first, last in ledger.ranges(branch):
            for extent in ledger.cover([(branch, 0, None)], first, last).extents:
                number = number_of(extent.first)
                files[number] = files.get(number, b"") + read_extents(lineage.read_log, [extent])
    return files


def closed_content(path: Path) -> bytes:
    """A binlog file as it is once closed: the flag that says it is open is cleared."""
    content = bytearray(path.read_bytes())
    content[IN_USE_BYTE] &= ~1
    return bytes(content)
