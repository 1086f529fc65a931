"""cloudsave as a contestant: the command line as a user would run it, with a repository in a directory."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.dataset import Server
from benchmarks.measure import SOURCE, Cost, run, tree_bytes


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
            env={"PYTHONPATH": str(SOURCE)},
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

    def restore(self, directory: Path) -> Cost:
        """The data directory, ready for replay."""
        return self._run("restore", "bench", "--immediate", "--into", str(directory))

    def stored_bytes(self) -> int:
        """Size of the repository."""
        return tree_bytes(self.repository)
