"""
pgBackRest through faults of docs/reliability.md, with the set-up that its manual describes.

    python -m benchmarks.peer_faults [--postgresql 18]

Archiving by `archive_command`, an encrypted repository in a directory, page checks on. A restore is judged by
what a user sees: the exit codes of the restore and of the server, and then the rows. Outcomes: *refused* (an
error before wrong data is served), *alarmed* (it goes on and says so), *right* (nothing is lost), *silent*
(success is reported, and rows are missing or wrong). What counts for cloudsave stands in the catalogue.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.faults.catalogue import BY_NAME
from tests.integration.postgresql.cluster import Cluster, ClusterFactory, ServerFailed, poll
from tools import provision

from benchmarks.pgbackrest import debian_sid

ROWS = [1, 2, 3, 4]
PASSPHRASE, STANZA = "correct horse battery staple", "faults"
ERROR_LINE = re.compile(r"^.*?(ERROR|WARN|FATAL).*$", re.MULTILINE)
SHOWN = 88
GONE = b"the file is gone"


@dataclass(frozen=True)
class Seen:
    """How a fault ended."""

    outcome: str
    evidence: str


class Site:
    """A server that archives into a repository, with a backup and rows in several log files after it."""

    def __init__(self, factory: ClusterFactory, major: str, program: Path) -> None:
        self.factory = factory
        self.major = major
        self.program = program
        self.cluster = factory.create(major, start=False)
        self.repository = self.cluster.home / "repository"
        self.repository.mkdir()
        factory.user.own(self.cluster.home)
        self.attach(self.cluster, self.repository)
        self.cluster.start()
        self.ran(self.run("stanza-create"))
        self.cluster.psql("CREATE TABLE t AS SELECT 1 AS i")
        self.ran(self.run("backup", "--type=full"))
        for number in ROWS[1:]:
            self.cluster.psql(f"INSERT INTO t VALUES ({number})")
            self.cluster.switch_wal()
        self.ran(self.run("check"))

    def attach(self, cluster: Cluster, repository: Path) -> None:
        """Let a server archive."""
        variables = self._variables(cluster.data, repository, cluster.home, PASSPHRASE)
        words = [f'"{name}={value}"' for name, value in variables.items()]
        command = " ".join(["env", *words, str(self.program), "archive-push", '"%p"'])
        cluster.configure({"archive_mode": "on", "archive_command": command})

    def _variables(self, data: Path, repository: Path, socket: Path, passphrase: str) -> dict[str, str]:
        settings = {
            "STANZA": STANZA,
            "CONFIG": "/dev/null",
            "CMD": str(self.program),
            "REPO1_PATH": str(repository),
            "REPO1_CIPHER_TYPE": "aes-256-cbc",
            "REPO1_CIPHER_PASS": passphrase,
            "REPO1_RETENTION_FULL": "9",
            "PG1_PATH": str(data),
            "PG1_SOCKET_PATH": str(socket),
            "PG1_USER": "postgres",
            "START_FAST": "y",
            "LOG_LEVEL_FILE": "off",
            "LOG_LEVEL_CONSOLE": "warn",
            "LOCK_PATH": str(self.cluster.home / "lock"),
            "SPOOL_PATH": str(self.cluster.home / "spool"),
        }
        return {f"PGBACKREST_{name}": value for name, value in settings.items()}

    def run(
        self,
        *command: str,
        data: Path | None = None,
        repository: Path | None = None,
        socket: Path | None = None,
        passphrase: str = PASSPHRASE,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command of the peer as the server's user."""
        variables = self._variables(
            data or self.cluster.data, repository or self.repository, socket or self.cluster.home, passphrase
        )
        return subprocess.run(
            [str(self.program), *command],
            check=False,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=300,
            cwd="/",
            env={**self.cluster.environment(), **variables},
            **self.cluster.user.process_options(),
        )

    @staticmethod
    def ran(done: subprocess.CompletedProcess[str]) -> None:
        """Raises: SystemExit where a command that must work fails."""
        if done.returncode != 0:
            sys.exit(f"{done.args}: {done.stdout}{done.stderr}")

    def copy(self) -> Path:
        """The repository again, to be spoiled."""
        place = self.factory.folder() / "repository"
        shutil.copytree(self.repository, place)
        self.cluster.user.own(place)
        return place

    def restored(self, repository: Path, *arguments: str, passphrase: str = PASSPHRASE) -> Seen:
        """Restore, start, and compare the rows with all of them."""
        data = self.factory.folder() / "data"
        data.mkdir(mode=0o700)
        self.cluster.user.own(data)
        done = self.run("restore", *arguments, data=data, repository=repository, passphrase=passphrase)
        if done.returncode != 0:
            return Seen("refused", said(done))
        server = self.factory.adopt(self.major, data, start=False)
        server.configure({"archive_mode": "off", "fsync": "off", "recovery_target_action": "promote"})
        variables = self._variables(data, repository, self.cluster.home, passphrase)
        plain = server.environment()
        server.environment = lambda: {**plain, **variables}  # type: ignore[method-assign]
        try:
            server.start()
            # It answers while it still replays, and may yet end with an error.
            opened = "SELECT pg_is_in_recovery()"
            poll(lambda: not server.running() or server.psql(opened) == "f", "the server has opened or ended")
            rows = [int(one) for one in server.psql("SELECT i FROM t ORDER BY i").split()]
            server.stop()
        except ServerFailed as failure:
            return Seen("refused", line_of(str(failure)))
        logged = re.search(r"P00 +ERROR: .*", server.log_path.read_text(errors="replace"))
        where = f"; in the server's log alone: {logged[0]}" if logged else ""
        return Seen("right" if rows == ROWS else "silent", f"rows {rows} of {ROWS}{where}"[:SHOWN])


def line_of(text: str) -> str:
    """The first line that tells of trouble."""
    found = ERROR_LINE.search(text)
    return (found[0] if found else text.strip().splitlines()[-1] if text.strip() else "")[:SHOWN]


def said(done: subprocess.CompletedProcess[str]) -> str:
    """What a command said."""
    return line_of(done.stdout + done.stderr)


# ---- the faults


def spoiled(
    pattern: str, change: Callable[[bytes], bytes], *arguments: str, at: float = 0.5
) -> Callable[[Site], Seen]:
    """Restore after one file of the repository was changed: that one `at` so much of the sorted list."""

    def play(site: Site) -> Seen:
        repository = site.copy()
        files = sorted(path for path in repository.glob(pattern) if path.is_file())
        victim = files[int((len(files) - 1) * at)]
        content = change(victim.read_bytes())
        if content == GONE:
            victim.unlink()
        else:
            victim.write_bytes(content)
        return site.restored(repository, *arguments)

    return play


def all_spoiled(pattern: str, change: Callable[[bytes], bytes]) -> Callable[[Site], Seen]:
    """Restore after all files of a kind were changed."""

    def play(site: Site) -> Seen:
        repository = site.copy()
        for path in [path for path in repository.glob(pattern) if path.is_file()]:
            path.write_bytes(change(path.read_bytes()))
        return site.restored(repository)

    return play


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flipped(content: bytes) -> bytes:
    at = len(content) // 2
    return content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :]


def asked(*arguments: str) -> Callable[[Site], Seen]:
    """A restore to something that is not there: any success is wrong."""

    def play(site: Site) -> Seen:
        seen = site.restored(site.repository, *arguments)
        return Seen("silent", seen.evidence) if seen.outcome == "right" else seen

    return play


def command(outcome_when_told: str, done: subprocess.CompletedProcess[str]) -> Seen:
    """A command that must not succeed without a word."""
    text = said(done)
    if done.returncode != 0:
        return Seen("refused", text)
    return Seen(outcome_when_told if "WARN" in text else "silent", text or "exit code 0, nothing said")


def directory_in_use(site: Site) -> Seen:
    data = site.factory.folder() / "data"
    data.mkdir(mode=0o700)
    (data / "mine").write_text("precious")
    site.cluster.user.own(data)
    return command("alarmed", site.run("restore", data=data))


def corrupt_page(site: Site) -> Seen:
    site.cluster.psql("CREATE TABLE broken AS SELECT generate_series(1, 5000) AS i")
    path = site.cluster.data / site.cluster.psql("SELECT pg_relation_filepath('broken')")
    site.cluster.stop()
    content = path.read_bytes()
    path.write_bytes(content[:13000] + bytes([content[13000] ^ 0x10]) + content[13001:])
    site.cluster.start()
    return command("alarmed", site.run("backup", "--type=full"))


def other_cluster(site: Site) -> Seen:
    other = site.factory.create(site.major, fresh_identity=True, start=False)
    site.attach(other, site.repository)
    other.start()
    return command("alarmed", site.run("backup", data=other.data, socket=other.home))


def pushed(make: Callable[[Site, Path], Path]) -> Callable[[Site], Seen]:
    """A log file is archived that must not be."""

    def play(site: Site) -> Seen:
        folder = site.factory.folder()
        file = make(site, folder)
        site.cluster.user.own(folder)
        return command("alarmed", site.run("archive-push", str(file)))

    return play


def of_other_content(site: Site, folder: Path) -> Path:
    """A valid file under the name of one that is archived already."""
    archived = sorted(path.name[:24] for path in site.repository.glob(LOG))[-1]
    shutil.copy(_current_file(site), folder / archived)
    return folder / archived


def _current_file(site: Site) -> Path:
    site.cluster.psql(
        "DROP TABLE IF EXISTS more; CREATE TABLE more AS SELECT generate_series(1, 200000) AS i"
    )
    return site.cluster.data / "pg_wal" / site.cluster.psql("SELECT pg_walfile_name(pg_current_wal_lsn())")


def damaged(site: Site, folder: Path) -> Path:
    """One bit of a file is another; its header is as it was."""
    source = _current_file(site)
    content = bytearray(source.read_bytes())
    content[4_000_000] ^= 1
    name = source.name[:16] + f"{int(source.name[16:], 16) + 64:08X}"
    (folder / name).write_bytes(content)
    return folder / name


def foreign(site: Site, folder: Path) -> Path:
    other = site.factory.create(site.major, fresh_identity=True)
    source = other.data / "pg_wal" / other.psql("SELECT pg_walfile_name(pg_current_wal_lsn())")
    shutil.copy(source, folder / source.name)
    return folder / source.name


LOG = f"archive/{STANZA}/*/*/*-*"
PLAYED: Sequence[tuple[str, Callable[[Site], Seen]]] = (
    ("log-object-missing", spoiled(LOG, lambda _: GONE)),
    ("log-object-truncated", spoiled(LOG, cut)),
    ("log-object-empty", spoiled(LOG, lambda _: b"")),
    ("log-object-bit-flipped", spoiled(LOG, flipped)),
    ("pack-damaged", all_spoiled(f"backup/{STANZA}/*F/pg_data/**/*", flipped)),
    ("object-size-wrong", all_spoiled(f"backup/{STANZA}/*F/pg_data/**/*", cut)),
    ("manifest-damaged", all_spoiled(f"backup/{STANZA}/*F/backup.manifest*", flipped)),
    ("head-damaged", all_spoiled(f"*/{STANZA}/*.info*", cut)),
    ("wrong-passphrase", lambda site: site.restored(site.repository, passphrase="another one")),
    ("directory-not-empty", directory_in_use),
    ("target-before-first-backup", asked("--type=time", "--target=2001-01-01 00:00:00+00")),
    ("target-after-end", asked("--type=time", "--target=2099-01-01 00:00:00+00")),
    ("target-unknown-transaction", asked("--type=xid", "--target=4000000000")),
    ("target-unknown-name", asked("--type=name", "--target=nosuch")),
    ("target-without-zone", asked("--type=time", "--target=2099-01-01 00:00:00")),
    ("backup-unknown", asked("--set=20200101-000000F")),
    ("log-file-of-other-content-pushed", pushed(of_other_content)),
    ("foreign-log-file-pushed", pushed(foreign)),
    ("damaged-log-file-pushed", pushed(damaged)),
    ("cluster-made-anew", other_cluster),
    ("page-corrupt-in-source", corrupt_page),
)


def program_in(tree: Path, folder: Path) -> Path:
    """The peer of a tree of another distribution, run with the libraries of that tree."""
    libraries = ":".join(f"{tree}/{place}/x86_64-linux-gnu" for place in ("usr/lib", "lib"))
    program = folder / "pgbackrest"
    options = f"--argv0 {program} --library-path {libraries}"
    loader = f"{tree}/lib64/ld-linux-x86-64.so.2 {options} {tree}/usr/bin/pgbackrest"
    program.write_text(f'#!/bin/sh\nunset LD_LIBRARY_PATH\nexec {loader} "$@"\n')
    program.chmod(0o755)
    return program


def main(arguments: list[str]) -> int:
    """Play all faults and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[1])
    parser.add_argument("--postgresql", default="18")
    parser.add_argument("--only", default="")
    chosen = parser.parse_args(arguments)
    bindirs = {major: Path(found.bindir) for major, found in provision.listing().items()}
    tree = debian_sid()
    if tree is None:
        return 1
    folder = Path(tempfile.mkdtemp(prefix="cloudsave-peer-"))
    folder.chmod(0o711)
    factory = ClusterFactory(bindirs, root=folder, disk=folder, noted=lambda _: None)
    factory.user.own(folder)
    try:
        site = Site(factory, chosen.postgresql, program_in(tree, folder))
        control = site.restored(site.copy())
        print(f"control, no fault: {control}")
        if control.outcome != "right":
            return 1
        print(f"{'fault':<34} {'cloudsave':<10} {'pgBackRest':<10} what it said")
        for name, play in PLAYED:
            if chosen.only in name:
                seen = play(site)
                print(
                    f"{name:<34} {BY_NAME[name].outcome:<10} {seen.outcome:<10} {seen.evidence}", flush=True
                )
    finally:
        factory.close()
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
