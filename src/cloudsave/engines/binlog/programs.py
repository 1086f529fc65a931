"""The servers' own programs: where they are, and of which series."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from cloudsave.errors import ServerToolsMissing

UNPRIVILEGED_USERS = ("mysql", "nobody")
"""Who runs a server when cloudsave is root and the data directory says nothing else."""
VERSION_SECONDS_MAX = 20.0
_PLACES = ("/usr/sbin", "/usr/bin", "/usr/local/bin", "/usr/local/sbin", "/usr/libexec")
_RELEASE = re.compile(r"(?:server|Ver|from|Distrib)\s+(\d+)\.(\d+)\.(\d+)")
Release = tuple[int, int, int]


def parse_release(version: str) -> Release:
    """The three numbers of a version such as "10.11.18". Raises: ValueError."""
    first, second, third = version.partition("-")[0].split(".")[:3]
    return int(first), int(second), int(third)


def program_release(program: Path) -> Release | None:
    """What a program says of itself; None where it does not run, or says nothing."""
    try:
        done = subprocess.run(
            [program, "--no-defaults", "--version"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
            timeout=VERSION_SECONDS_MAX,
            cwd="/",
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = _RELEASE.search(done.stdout)
    if found is None or done.returncode != 0:
        return None
    first, second, third = map(int, found.groups())
    return first, second, third


def find_program(names: Sequence[str], series: tuple[int, int], wanted: Path | None = None) -> Path:
    """
    A program by any of its `names`, of the release series of the server: in `wanted`, else on PATH and in the
    usual places. Raises: ServerToolsMissing, with what was found instead.
    """
    seen = []
    for directory in (wanted,) if wanted else _directories():
        for name in names:
            program = directory / name
            if not os.access(program, os.X_OK):
                continue
            release = program_release(program)
            if release is not None and release[:2] == series:
                return program
            version = ".".join(map(str, release)) if release else "of no known version"
            seen.append(f"{program} is {version}")
    text = ".".join(map(str, series))
    raise ServerToolsMissing(
        f"could not find {names[0]} of version {text}",
        detail=f"{'; '.join(dict.fromkeys(seen)) or 'There is none on PATH or in the usual places'}.",
        hints=[f"install the package that has {names[0]} {text}", "is its directory on PATH?"],
    )


def _directories() -> Iterator[Path]:
    path = os.environ.get("PATH", "").split(os.pathsep)
    yield from dict.fromkeys(Path(one) for one in (*path, *_PLACES) if one)
