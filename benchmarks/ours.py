"""cloudsave as a contestant: the command line as a user would run it, with a repository in a directory."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.dataset import Server
from benchmarks.measure import OURS_ENVIRONMENT, SOURCE, Cost, run, tree_bytes

CAPTURE_SECONDS_MAX = 60.0


class Ours:
    """cloudsave, encrypted, zstd level 1, pages checked, the log of the backup stored with it."""

    name = "cloudsave"

    def __init__(self, server: Server, work: Path, *, workers: int) -> None:
        self._server = server
        self._work = work
        self._workers = workers
        self.repository = work / "cloudsave"
        self.options = f"{workers} worker threads, level 1, AES-256-GCM, page checks, file:// repository"

    def _run(self, *arguments: str) -> Cost:
        config = str(self._work / "cloudsave.toml")
        return run(
            [sys.executable, "-m", "cloudsave", "--config", config, "--no-progress", *arguments],
            env=OURS_ENVIRONMENT,
        )

    def version(self) -> str:
        """The version with the commit."""
        command = ["git", "-C", str(SOURCE), "describe", "--always", "--dirty", "--match=v*"]
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        return f"commit {commit or 'unknown'}"

    def prepare(self) -> None:
        """A new empty repository."""
        shutil.rmtree(self.repository, ignore_errors=True)
        passphrase = self._work / "passphrase"
        passphrase.write_text("benchmark passphrase")
        passphrase.chmod(0o600)
        config = self._work / "cloudsave.toml"
        config.write_text(
            f"workers = {self._workers}\ncompression_level = 1\n"
            f'[repository]\nurl = "file://{self.repository}"\npassphrase_file = "{passphrase}"\n'
            f'[sources.bench]\nurl = "{self._server.url}"\ncheckpoint = "fast"\nmode = "local"\n'
        )
        config.chmod(0o600)
        self._run("init")

    def backup(self) -> Cost:
        """A full backup with the log that it needs."""
        return self._run("backup", "bench", "--full")

    def backup_again(self) -> Cost:
        """A backup that finds all or most pages stored already."""
        return self._run("backup", "bench")

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """
        Capture of the log, as a user would run it all the time. A process that is not our child: the
        benchmark waits for all of its children.
        """
        config = str(self._work / "cloudsave.toml")
        command = [
            sys.executable,
            "-m",
            "cloudsave",
            "--config",
            config,
            "--quiet",
            "logs",
            "capture",
            "bench",
        ]
        shell = ["sh", "-c", '"$@" >"$0" 2>&1 & echo $!', str(self._work / "capture.log"), *command]
        env = {**os.environ, **OURS_ENVIRONMENT}
        pid = int(subprocess.run(shell, check=True, capture_output=True, env=env).stdout)
        try:
            self._wait_for_capture()
            yield
        finally:
            os.kill(pid, signal.SIGTERM)
            deadline = time.monotonic() + CAPTURE_SECONDS_MAX
            while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
                time.sleep(0.1)

    def _wait_for_capture(self) -> None:
        deadline = time.monotonic() + CAPTURE_SECONDS_MAX
        active = "select count(*) from pg_stat_replication where application_name like 'cloudsave%'"
        while self._server.sql(active).strip() == "0":
            if time.monotonic() > deadline:
                sys.exit(f"capture did not start: {(self._work / 'capture.log').read_text()}")
            time.sleep(0.1)

    def restore(self, directory: Path, backup_id: str | None = None, *, delta: bool = False) -> Cost:
        """The data directory, ready for replay; with `delta` over what is there."""
        chosen = ["--backup", backup_id] if backup_id else []
        chosen += ["--delta"] if delta else []
        return self._run("restore", "bench", "--immediate", "--into", str(directory), *chosen)

    def backup_ids(self) -> list[str]:
        """All backups, oldest first."""
        return sorted(path.name for path in self.repository.glob("lineages/*/backups/*"))

    def stored_bytes(self) -> int:
        """Size of the repository."""
        return tree_bytes(self.repository)

    def stored_by(self, kind: str) -> int:
        """Size of the objects of one kind: packs, maps, backups, logs."""
        return sum(tree_bytes(path) for path in self.repository.glob(f"lineages/*/{kind}"))

    def stored_for_backups(self) -> int:
        """Size of the repository without the log, which the peers are not made to store either."""
        return self.stored_bytes() - self.stored_by("logs")
