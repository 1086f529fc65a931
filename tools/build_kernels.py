"""
Compiles the C files of src/cloudsave/kernels where there is a C compiler: by hand, or as hatchling's hook.

A wheel with the library is bound to the platform; without a compiler a pure wheel is built, which works by
the Python twins. Needs nothing but the standard library.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # run by hand by a Python without hatchling
    BuildHookInterface = object  # type: ignore[assignment, misc]

PROJECT = Path(__file__).resolve().parent.parent
FOLDER = Path("src/cloudsave/kernels")
SOURCES = (FOLDER / "kernels.c", FOLDER / "wal_facts.c", FOLDER / "binlog.c")
LIBRARY = FOLDER / "libcloudsave_kernels.so"
COMPILERS = ("cc", "gcc", "clang")
OPTIONS = ("-O3", "-fPIC", "-shared", "-std=gnu11", "-fvisibility=hidden", "-Wall", "-Wextra")
COMPILE_TIMEOUT_SECONDS = 300


class NotBuilt(Exception):
    """Why there are no compiled kernels."""


def compiler() -> list[str]:
    """$CC, or the first compiler on the path. Raises: NotBuilt."""
    if os.environ.get("CC"):
        return shlex.split(os.environ["CC"])
    for name in COMPILERS:
        if shutil.which(name):
            return [name]
    raise NotBuilt(f"no C compiler: neither $CC nor any of {', '.join(COMPILERS)}")


def build(library: Path, *, extra_options: Sequence[str] = ()) -> Path:
    """Compile the kernels to `library`, which is replaced only when done. Raises: NotBuilt."""
    command = compiler()
    with tempfile.TemporaryDirectory(prefix=".build-", dir=library.parent) as folder:
        fresh = Path(folder) / library.name
        command += [*OPTIONS, *extra_options, "-o", str(fresh), *(str(PROJECT / one) for one in SOURCES)]
        try:
            done = subprocess.run(
                command, check=False, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_SECONDS
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise NotBuilt(f"could not run {command[0]}: {error}") from error
        if done.returncode != 0:
            raise NotBuilt(f"{shlex.join(command)} exited with {done.returncode}:\n{done.stderr.strip()}")
        fresh.replace(library)
    return library


def build_or_say() -> bool:
    """Compile into the source tree; says on stderr what came of it. A failure leaves no old library."""
    library = PROJECT / LIBRARY
    try:
        build(library)
    except NotBuilt as reason:
        library.unlink(missing_ok=True)
        print(
            f"cloudsave: kernels were not compiled; the slower Python twins will serve. {reason}",
            file=sys.stderr,
        )
        return False
    print(f"cloudsave: compiled {LIBRARY}", file=sys.stderr)
    return True


class KernelsBuildHook(BuildHookInterface):  # type: ignore[misc]
    """Hatchling calls this for each wheel, editable ones too."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add the library to a wheel and bind its tag to the platform; else leave the wheel pure."""
        del version
        if self.target_name != "wheel" or not build_or_say():
            return
        build_data["artifacts"].append(f"/{LIBRARY}")
        build_data["pure_python"] = False
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{platform}"


if __name__ == "__main__":
    sys.exit(0 if build_or_say() else 1)
