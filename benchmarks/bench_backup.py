"""
Full backup and restore of the same 3 GB cluster, cloudsave and pgBackRest in turns; prints medians and
ratios.

Both compress with zstd level 1, encrypt, check pages, and use the same number of processes or threads that
compute. Bound: with zstd 1 a core packs about 0.7 GB/s of such data, so two cores cannot do better than
about 1.2 GB/s.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from benchmarks import dataset
from benchmarks.measure import Cost, medians, run, tree_bytes

PROCESSES = 2
WORK = dataset.ROOT / "work"
RESULTS = Path(__file__).parent / "results"


def cloudsave(*arguments: str) -> list[str]:
    """Our command line with the benchmark's configuration."""
    return [
        sys.executable,
        "-m",
        "cloudsave",
        "--config",
        str(WORK / "cloudsave.toml"),
        "--no-progress",
        *arguments,
    ]


class Ours:
    """cloudsave, with a repository in a directory."""

    name = "cloudsave"

    def __init__(self, server: dataset.Server) -> None:
        self._server = server
        self._repository = WORK / "cloudsave"

    def prepare(self) -> None:
        """A new empty repository."""
        shutil.rmtree(self._repository, ignore_errors=True)
        passphrase = WORK / "passphrase"
        passphrase.write_text("benchmark passphrase")
        passphrase.chmod(0o600)
        (WORK / "cloudsave.toml").write_text(
            f'workers = {PROCESSES + 1}\n'
            f'[repository]\nurl = "file://{self._repository}"\npassphrase_file = "{passphrase}"\n'
            f'[sources.bench]\nurl = "{self._server.url}"\ncheckpoint = "fast"\n'
        )
        (WORK / "cloudsave.toml").chmod(0o600)
        run(cloudsave("init"))

    def backup(self) -> Cost:
        """A full backup with the log that it needs."""
        return run(cloudsave("backup", "bench", "--full"))

    def restore(self, directory: Path) -> Cost:
        """The data directory, ready for replay."""
        return run(cloudsave("restore", "bench", "--immediate", "--into", str(directory)))

    def stored_bytes(self) -> int:
        """Size of the repository."""
        return tree_bytes(self._repository)


class PgBackRest:
    """pgBackRest, with the options that its manual recommends for small and changing files."""

    name = "pgbackrest"

    def __init__(self, server: dataset.Server) -> None:
        self._server = server
        self._repository = WORK / "pgbackrest"

    def _command(self, *arguments: str) -> list[str]:
        return [shutil.which("pgbackrest") or "pgbackrest", "--stanza=bench", *arguments]

    def _env(self) -> dict[str, str]:
        settings = {
            "CONFIG": "/dev/null",
            "REPO1_PATH": str(self._repository),
            "REPO1_BUNDLE": "y",
            "REPO1_CIPHER_TYPE": "aes-256-cbc",
            "REPO1_CIPHER_PASS": "benchmark passphrase",
            "COMPRESS_TYPE": "zst",
            "COMPRESS_LEVEL": "1",
            "PROCESS_MAX": str(PROCESSES),
            "START_FAST": "y",
            "LOG_LEVEL_FILE": "off",
            "LOCK_PATH": str(WORK / "lock"),
            "SPOOL_PATH": str(WORK / "spool"),
            "PG1_PATH": str(self._server.data),
            "PG1_SOCKET_PATH": str(self._server.data.parent),
            "PG1_PORT": str(dataset.PORT),
            "PG1_USER": "postgres",
        }
        version = os.popen("pgbackrest version").read().split()[-1]  # noqa: S605, S607
        if tuple(map(int, version.split(".")[:2])) >= (2, 46):
            settings["REPO1_BLOCK"] = "y"
        return {f"PGBACKREST_{name}": value for name, value in settings.items()}

    def prepare(self) -> None:
        """A new empty stanza."""
        shutil.rmtree(self._repository, ignore_errors=True)
        run(self._command("stanza-create"), env=self._env())

    def backup(self) -> Cost:
        """A full backup; the log of it is not waited for, since nothing archives it here."""
        return run(self._command("backup", "--type=full", "--no-archive-check"), env=self._env())

    def restore(self, directory: Path) -> Cost:
        """The data directory, ready for replay."""
        env = self._env() | {"PGBACKREST_PG1_PATH": str(directory)}
        return run(self._command("restore", "--type=immediate"), env=env)

    def stored_bytes(self) -> int:
        """Size of the repository."""
        return tree_bytes(self._repository)


def _measure(tools: list[Ours | PgBackRest], rounds: int) -> dict[str, dict[str, list[Cost]]]:
    costs: dict[str, dict[str, list[Cost]]] = {tool.name: {"backup": [], "restore": []} for tool in tools}
    for number in range(rounds + 1):
        for tool in tools:
            tool.prepare()
            backup = tool.backup()
            target = WORK / "restored"
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir(mode=0o700)
            restore = tool.restore(target)
            shutil.rmtree(target)
            os.sync()
            label = "warm-up" if number == 0 else f"round {number}"
            print(
                f"{label:9} {tool.name:11} backup {backup.wall_seconds:6.2f} s restore {restore.wall_seconds:6.2f} s"
            )
            if number:
                costs[tool.name]["backup"].append(backup)
                costs[tool.name]["restore"].append(restore)
    return costs


def main() -> None:
    """Measure and print; the results also go to benchmarks/results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--major", type=int, default=15)
    options = parser.parse_args()
    server = dataset.cluster(options.major)
    WORK.mkdir(parents=True, exist_ok=True)
    tools: list[Ours | PgBackRest] = [Ours(server), PgBackRest(server)]
    costs = _measure(tools, options.rounds)
    result = {
        "data_bytes": tree_bytes(server.data / "base"),
        "stored_bytes": {tool.name: tool.stored_bytes() for tool in tools},
        "costs": {
            name: {what: [asdict(cost) for cost in runs] for what, runs in kinds.items()}
            for name, kinds in costs.items()
        },
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "backup.json").write_text(json.dumps(result, indent=1))
    _print(
        result, {name: {what: medians(runs) for what, runs in kinds.items()} for name, kinds in costs.items()}
    )


def _print(result: dict[str, object], costs: dict[str, dict[str, Cost]]) -> None:
    figures: dict[str, Callable[[Cost], float]] = {
        "wall s": lambda cost: cost.wall_seconds,
        "CPU s": lambda cost: cost.cpu_seconds,
        "peak MB": lambda cost: cost.peak_mb,
    }
    print(f"\ndata {result['data_bytes']} bytes, stored {result['stored_bytes']}")
    print(f"{'':18}{'cloudsave':>11}{'pgbackrest':>12}{'ratio':>8}")
    for what in ("backup", "restore"):
        for figure, of in figures.items():
            ours, theirs = of(costs["cloudsave"][what]), of(costs["pgbackrest"][what])
            print(f"{what:8}{figure:10}{ours:11.2f}{theirs:12.2f}{ours / theirs:8.2f}")


if __name__ == "__main__":
    main()
