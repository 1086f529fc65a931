"""
Makes real MySQL and MariaDB servers available to the tests, outside the system: packages of Debian, unpacked
with all that they load and run by their own dynamic loader. No root, no service, nothing installed.

apt works in a directory of its own, with an empty list of installed packages, so that it fetches the whole
closure from the mirror that the system's apt is set up with, and checks its signatures.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from tools.provision import ProvisionError, cache_directory, debian_mirror, only_one, run, say

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_CONFIGURATION = """
Dir::State "{place}/state";
Dir::State::status "{place}/status";
Dir::Cache "{place}/cache";
Dir::Etc::sourcelist "{place}/sources.list";
Dir::Etc::sourceparts "-";
APT::Install-Recommends "false";
APT::Sandbox::User "";
"""
_PROGRAM = """#!/bin/sh
root={tree}
libraries=$root/usr/lib/x86_64-linux-gnu:$root/usr/lib/x86_64-linux-gnu/private:$root/lib/x86_64-linux-gnu
exec "$root{loader}" --library-path "$libraries" "$root{program}" "$@"
"""
_LOADERS = ("/usr/lib64/ld-linux-x86-64.so.2", "/lib64/ld-linux-x86-64.so.2")


@dataclass(frozen=True)
class Series:
    """One series of one engine, and where Debian has it."""

    engine: str
    major: str
    suite: str
    packages: tuple[str, ...]
    programs: tuple[str, ...]


_MARIADB_PACKAGES = ("mariadb-server-core", "mariadb-client-core", "mariadb-server", "mariadb-backup")
_MARIADB_PROGRAMS = (
    "sbin/mariadbd",
    "bin/mariadb",
    "bin/mariadb-backup",
    "bin/mariadb-binlog",
    "bin/mariadb-dump",
)
_MYSQL_PACKAGES = ("mysql-server-core", "mysql-client-core", "mysql-client")
_MYSQL_PROGRAMS = ("sbin/mysqld", "bin/mysql", "bin/mysqlbinlog", "bin/mysqldump")
SERIES = (
    Series("mariadb", "10.11", "bookworm", _MARIADB_PACKAGES, _MARIADB_PROGRAMS),
    Series("mariadb", "11.8", "sid", _MARIADB_PACKAGES, _MARIADB_PROGRAMS),
    Series("mysql", "9.7", "sid", _MYSQL_PACKAGES, _MYSQL_PROGRAMS),
)


@dataclass(frozen=True)
class BinlogServer:
    """An unpacked server. Programs stand in `bindir`, the files that they need below `tree`."""

    engine: str
    major: str
    version: str
    tree: str
    bindir: str


def installed(series: Series) -> BinlogServer | None:
    """The server of a series that is there already, or None. Raises: ProvisionError."""
    tree = cache_directory() / series.engine / series.major
    if not tree.is_dir():
        return None
    daemon = tree / "bin" / Path(series.programs[0]).name
    said = run([str(daemon), "--no-defaults", f"--basedir={tree}/usr", "--version"])
    version = said.partition("Ver ")[2].split("-")[0].split()[0]
    if version.rpartition(".")[0] != series.major:
        raise ProvisionError(
            f"{tree} holds {series.engine} {version}, wanted {series.major}: Debian {series.suite} has moved"
            " on; name the new series in tools/provision_binlog.py"
        )
    return BinlogServer(series.engine, series.major, version, str(tree), str(tree / "bin"))


def ensure(series: Series) -> BinlogServer:
    """The server of a series, fetched when absent. Raises: ProvisionError."""
    tree = cache_directory() / series.engine / series.major
    if tree.is_dir():
        _write_programs(tree, tree, series.programs)
    present = installed(series)
    if present is None:
        _fetch(series)
        present = installed(series)
    if present is None:
        raise ProvisionError(f"{series.engine} {series.major} was fetched but is not there")
    return present


@lru_cache(maxsize=1)
def listing() -> dict[tuple[str, str], BinlogServer]:
    """What is there now, by engine and series; fetches nothing."""
    found = {(series.engine, series.major): installed(series) for series in SERIES}
    return {key: server for key, server in found.items() if server}


def _fetch(series: Series) -> None:
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        raise ProvisionError(f"{series.engine} {series.major} comes as Debian packages; there is no apt-get")
    place = cache_directory() / series.engine
    place.mkdir(parents=True, exist_ok=True)
    place.chmod(0o755)
    say(f"fetching {series.engine} {series.major} from Debian {series.suite}; this takes a minute")
    with tempfile.TemporaryDirectory(prefix=f".{series.major}-", dir=place) as name:
        work = Path(name)
        tree = work / "tree"
        tree.mkdir()
        tree.chmod(0o755)
        for package in _packages(work / "apt", series):
            run(["dpkg-deb", "--extract", str(package), str(tree)])
        _write_programs(tree, place / series.major, series.programs)
        tree.rename(place / series.major)


def _packages(place: Path, series: Series) -> list[Path]:
    """The packages of a series and all that they need, as files."""
    for folder in ("state/lists/partial", "cache/archives/partial"):
        (place / folder).mkdir(parents=True)
    (place / "status").touch()
    source = f"deb [signed-by={KEYRING}] {debian_mirror()} {series.suite} main\n"
    (place / "sources.list").write_text(source)
    configuration = place / "apt.conf"
    configuration.write_text(_CONFIGURATION.format(place=place))
    apt = ["apt-get", "-q", "-y", "-c", str(configuration)]
    run([*apt, "update"])
    run([*apt, "install", "--download-only", *series.packages])
    return sorted((place / "cache" / "archives").glob("*.deb"))


def _write_programs(tree: Path, final: Path, programs: Sequence[str]) -> None:
    """Scripts that start the programs with the libraries of the tree, as it will be called."""
    (loader,) = [name for name in _LOADERS if (tree / name.lstrip("/")).is_file()][:1]
    (tree / "bin").mkdir(exist_ok=True)
    for program in programs:
        if not (tree / "usr" / program).is_file():
            raise ProvisionError(f"the packages hold no {program}")
        script = tree / "bin" / Path(program).name
        script.write_text(_PROGRAM.format(tree=final, loader=loader, program=f"/usr/{program}"))
        script.chmod(0o755)


def main() -> int:
    """Fetch what is absent. Exit code: 0 all is there, 1 something is not."""
    try:
        with only_one():
            for series in SERIES:
                found = ensure(series)
                say(f"{found.engine} {found.version} in {found.bindir}")
    except ProvisionError as error:
        print(f"provision: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
