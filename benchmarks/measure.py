"""
Runs commands as whole processes and tells what they cost, as the kernel accounts for it.

A process that outlives its parent is adopted by the benchmark and waited for, so that the CPU seconds of all
processes count, whether or not a tool waits for its own.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
SOURCE = Path(__file__).resolve().parents[1] / "src"
OURS_ENVIRONMENT = {"PYTHONPATH": str(SOURCE), "PYTHONDONTWRITEBYTECODE": ""}
"""
For our own processes: bytecode is kept, as an installation has it, whatever the caller's environment says.
Without it each start compiles all modules anew.
"""
QUIET_SECONDS_MAX = 20
"""Limit: so long is waited for others to be quiet before a run."""
QUIET_SHARE = 0.2
_PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True, slots=True)
class Cost:
    """
    One run. `peak_mb` is the resident size of the largest process; `adopted` counts processes that their
    parent did not wait for; `others_cpu_seconds` is what all else on this machine computed meanwhile, the
    database server included: a run with much of it was disturbed.
    """

    wall_seconds: float
    cpu_seconds: float
    peak_mb: float
    adopted: int = 0
    others_cpu_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, least and greatest of some figures."""

    median: float
    least: float
    greatest: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """Of at least one figure."""
        return Spread(statistics.median(values), min(values), max(values))


FIGURES = ("wall_seconds", "cpu_seconds", "peak_mb")


def run(command: Sequence[str], *, env: Mapping[str, str] | None = None) -> Cost:
    """Run a command to its end with its children; a failing one ends the benchmark and shows its output."""
    _adopt_orphans(wanted=True)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    busy, begin = _busy_cpu_seconds(), time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, **(env or {})}
    )
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    wall = time.perf_counter() - begin
    process.stdout.close()
    peak, adopted = usage.ru_maxrss, 0
    for orphan in _orphans():
        adopted += 1
        peak = max(peak, orphan.ru_maxrss)
    _adopt_orphans(wanted=False)
    if process.returncode:
        said = output.decode(errors="replace")[-3000:]
        sys.exit(f"{' '.join(command)} failed with {process.returncode}:\n{said}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime)
    return Cost(wall, cpu, peak / 1024, adopted, max(0.0, _busy_cpu_seconds() - busy - cpu))


def _busy_cpu_seconds() -> float:
    """What the whole machine has computed since it started: all columns but idle and waiting."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    return sum(int(ticks) for column, ticks in enumerate(fields) if column not in (3, 4)) / os.sysconf(
        "SC_CLK_TCK"
    )


def wait_for_quiet() -> None:
    """Return when the machine was mostly idle for a second, or when that did not come about in time."""
    for _ in range(QUIET_SECONDS_MAX):
        busy = _busy_cpu_seconds()
        time.sleep(1)
        if _busy_cpu_seconds() - busy < QUIET_SHARE * len(os.sched_getaffinity(0)):
            return


def _adopt_orphans(*, wanted: bool) -> None:
    """Only while a run lasts: a server that is started in between must not become our child."""
    if ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, int(wanted), 0, 0, 0):
        sys.exit("could not change who becomes the parent of orphans")


def _orphans() -> list[resource.struct_rusage]:
    """What processes cost that became ours when their parent ended."""
    found = []
    while True:
        try:
            found.append(os.wait4(-1, 0)[2])
        except ChildProcessError:
            return found


def spreads(costs: Sequence[Cost]) -> dict[str, Spread]:
    """Each figure of repeated runs."""
    return {figure: Spread.of([getattr(cost, figure) for cost in costs]) for figure in FIGURES}


def ratios_of_least(ours: Sequence[Cost], theirs: Sequence[Cost]) -> dict[str, float]:
    """Our best run by their best: what others do on the machine can only make a run slower."""
    return {
        figure: round(
            min(getattr(cost, figure) for cost in ours) / min(getattr(cost, figure) for cost in theirs), 3
        )
        for figure in FIGURES
    }


def ratios(ours: Sequence[Cost], theirs: Sequence[Cost]) -> dict[str, Spread]:
    """Ours by theirs within each round, so that what else the machine does weighs on both."""
    return {
        figure: Spread.of(
            [getattr(our, figure) / getattr(their, figure) for our, their in zip(ours, theirs, strict=True)]
        )
        for figure in FIGURES
    }


def tree_bytes(directory: Path) -> int:
    """Bytes of all files below a directory."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def machine() -> dict[str, object]:
    """What it was measured on."""
    info = dict(
        line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    )
    names = {key.strip(): value.strip() for key, value in info.items()}
    return {
        "processor": names.get("model name", platform.machine()),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load": round(os.getloadavg()[0], 2),
        "niceness": os.nice(0),
    }


def plain(spread: Mapping[str, Spread]) -> dict[str, dict[str, float]]:
    """For JSON."""
    return {
        name: {key: round(number, 3) for key, number in asdict(one).items()} for name, one in spread.items()
    }
