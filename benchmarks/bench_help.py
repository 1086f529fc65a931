"""
How long `cloudsave --help` takes: the bound is Python itself and the import of click.

Ends with 1 if the median is above the limit.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

RUNS = 21
LIMIT_MS = 150.0
SOURCE = Path(__file__).parents[1] / "src"
CASES = {
    "python, nothing imported": ["-c", "pass"],
    "python, click imported": ["-c", "import click"],
    "cloudsave --help": ["-m", "cloudsave", "--help"],
    "cloudsave source --help": ["-m", "cloudsave", "source", "--help"],
}


def median_ms(arguments: list[str]) -> float:
    """Median wall time of whole processes; the first, which fills caches, does not count."""
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "PYTHONDONTWRITEBYTECODE": ""}
    times = []
    for _ in range(RUNS + 1):
        begin = time.perf_counter()
        subprocess.run([sys.executable, *arguments], env=environment, check=True, stdout=subprocess.DEVNULL)
        times.append((time.perf_counter() - begin) * 1000)
    return statistics.median(times[1:])


def main() -> int:
    """Measure, print, judge."""
    results = {name: median_ms(arguments) for name, arguments in CASES.items()}
    for name, milliseconds in results.items():
        print(f"{name:<28}{milliseconds:8.1f} ms")
    fit = results["cloudsave --help"] <= LIMIT_MS
    print(f"limit {LIMIT_MS:.0f} ms: {'kept' if fit else 'BROKEN'}")
    return 0 if fit else 1


if __name__ == "__main__":
    sys.exit(main())
