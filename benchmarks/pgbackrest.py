"""
pgBackRest as a contestant: the distribution's, and the newest one of Debian sid in a directory of its own.

Debian 12 has 2.45, which knows bundles of small files but not block incremental (2.46 and later). The newest
runs by chroot in a tree that debootstrap makes from the mirror that apt is set up with, in a mount namespace
of its own, so that no mount stays behind.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

from tools import provision

from benchmarks.dataset import PORT, Server
from benchmarks.measure import Cost, run, tree_bytes

SID = "sid"
BLOCK_SINCE = (2, 46)
_ENTER = """
set -e
mount --make-rprivate /
mount --bind "$1" "$2$1"
mount --bind /etc/passwd "$2/etc/passwd"
mount --bind /etc/group "$2/etc/group"
shift
exec chroot "$@"
"""
"""Arguments: the directory that is seen inside under its own name, the tree, the command."""


def debian_sid() -> Path | None:
    """A tree of Debian sid with pgBackRest, made when absent; None without root, which chroot needs."""
    if os.geteuid() != 0:
        provision.say("the newest pgBackRest needs root (chroot); only the installed one is measured")
        return None
    with provision.only_one():
        tree = provision.cache_directory() / SID
        if tree.is_dir():
            return tree
        if not shutil.which("debootstrap"):
            provision.apt_install(["debootstrap"])
        mirror = provision.debian_mirror()
        provision.say("making a tree of Debian sid with the newest pgBackRest; this takes a minute")
        new = Path(tempfile.mkdtemp(prefix=f".{SID}-", dir=provision.cache_directory()))
        try:
            command = ["debootstrap", "--variant=minbase", "--force-check-gpg", "--include=pgbackrest"]
            provision.run([*command, SID, str(new), mirror])
            new.chmod(0o755)
            new.rename(tree)
        finally:
            shutil.rmtree(new, ignore_errors=True)
    return tree


class PgBackRest:
    """pgBackRest with the options that its manual recommends; `tree` None: the installed one."""

    def __init__(self, server: Server, work: Path, *, processes: int, tree: Path | None = None) -> None:
        self._server = server
        self._work = work
        self._processes = processes
        self._prefix = [] if tree is None else self._enter(tree)
        self._version = self._read_version()
        self.name = f"pgbackrest {self._version}"
        self.repository = work / f"pgbackrest-{self._version}"
        self.block = tuple(map(int, self._version.split(".")[:2])) >= BLOCK_SINCE
        self.options = (
            f"process-max {processes}, zst level 1, aes-256-cbc, page checks, bundle"
            f"{', block' if self.block else ''}, start-fast, posix repository"
        )

    def _enter(self, tree: Path) -> list[str]:
        shared = self._server.data.parent.parent
        (tree / str(shared).lstrip("/")).mkdir(parents=True, exist_ok=True)
        return ["unshare", "--mount", "sh", "-c", _ENTER, "enter", str(shared), str(tree)]

    def _read_version(self) -> str:
        said = provision.run([*self._prefix, "pgbackrest", "version"])
        return said.split()[-1]

    def version(self) -> str:
        """Its version."""
        return self._version

    def _run(self, command: str, *arguments: str, pg1_path: Path | None = None) -> Cost:
        line = [*self._prefix, "pgbackrest", "--stanza=bench", command, *arguments]
        return run(line, env=self._env(pg1_path or self._server.data))

    def _env(self, pg1_path: Path) -> dict[str, str]:
        settings = {
            "CONFIG": "/dev/null",
            "REPO1_PATH": str(self.repository),
            "REPO1_BUNDLE": "y",
            "REPO1_CIPHER_TYPE": "aes-256-cbc",
            "REPO1_CIPHER_PASS": "benchmark passphrase",
            "COMPRESS_TYPE": "zst",
            "COMPRESS_LEVEL": "1",
            "CHECKSUM_PAGE": "y",
            "PROCESS_MAX": str(self._processes),
            "START_FAST": "y",
            "LOG_LEVEL_FILE": "off",
            "LOCK_PATH": str(self._work / "lock"),
            "SPOOL_PATH": str(self._work / "spool"),
            "PG1_PATH": str(pg1_path),
            "PG1_SOCKET_PATH": str(self._server.data.parent),
            "PG1_PORT": str(PORT),
            "PG1_USER": "postgres",
        }
        if self.block:
            settings["REPO1_BLOCK"] = "y"
        if self._prefix:
            settings["ALLOW_ROOT"] = "y"
        return {f"PGBACKREST_{name}": value for name, value in settings.items()}

    def prepare(self) -> None:
        """A new empty stanza."""
        shutil.rmtree(self.repository, ignore_errors=True)
        self._run("stanza-create")

    def backup(self) -> Cost:
        """A full backup. Its log is neither waited for nor stored, since nothing archives it here."""
        return self._run("backup", "--type=full", "--no-archive-check")

    def backup_again(self) -> Cost:
        """A backup of what has changed; as above without its log."""
        return self._run("backup", "--type=incr", "--no-archive-check")

    def stored_for_backups(self) -> int:
        """Size of the repository, which holds no log."""
        return self.stored_bytes()

    def restore(self, directory: Path) -> Cost:
        """The data directory, ready for replay."""
        return self._run("restore", "--type=immediate", pg1_path=directory)

    def stored_bytes(self) -> int:
        """Size of the repository."""
        return tree_bytes(self.repository)


def contestants(server: Server, work: Path, *, processes: int) -> list[PgBackRest]:
    """The distribution's and the newest, as far as they can be had."""
    found = []
    try:
        provision.ensure_peers()
        found.append(PgBackRest(server, work, processes=processes))
        tree = debian_sid()
        if tree is not None:
            found.append(PgBackRest(server, work, processes=processes, tree=tree))
    except provision.ProvisionError as error:
        sys.exit(f"a peer is not available: {error}")
    return found
