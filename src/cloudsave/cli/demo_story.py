"""
The demonstration: an embedded PostgreSQL under load is backed up, loses a table, and is brought back to
just before.

Everything is done by the same commands that a user types; this module only plays the server, the load, the
accident and the judge. Nothing is left running, and the directory is removed at the end.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from cloudsave.clock import Clock
from cloudsave.engines.postgresql.embedded import EmbeddedServer
from cloudsave.engines.postgresql.witness import (
    Verdict,
    Witness,
    balances_agree,
    table_exists,
    witnessed_rows,
)
from cloudsave.errors import BackupNotCovered, CloudsaveError, RecoveryMismatch
from cloudsave.model.log import us_from_instant

SCALE = 10
LOAD_CLIENTS = 4
LOAD_SECONDS_MAX = 120
"""Limit: the load ends by itself even if everything else fails."""
QUIET_SECONDS = 3.0
"""Load before the backup, after it and after the accident."""
CAPTURE_START_SECONDS_MAX = 30.0
COMMAND_SECONDS_MAX = 120
LOG_SECONDS_MAX = 30.0
LOST_TABLE = "public.orders"
MAKE_LOST_TABLE = "create table public.orders as select n, md5(n::text) from generate_series(1, 10000) n"

Say = Callable[[str], None]


@dataclass(slots=True)
class Story:
    """One run of the demonstration in `root`. Order: play, then close (always)."""

    root: Path
    clock: Clock
    say: Say
    shown: list[str] = field(default_factory=list)
    _server: EmbeddedServer | None = None
    _witness: Witness | None = None
    _load: subprocess.Popen[bytes] | None = None
    _capture: subprocess.Popen[bytes] | None = None

    @property
    def config(self) -> Path:
        """The configuration file that all commands use."""
        return self.root / "cloudsave.toml"

    @property
    def server(self) -> EmbeddedServer:
        """The source."""
        assert self._server is not None
        return self._server

    @property
    def witness(self) -> Witness:
        """Who remembers the commits."""
        assert self._witness is not None
        return self._witness

    def play(self) -> Facts:
        """The whole story. Raises: what a command reports, RecoveryMismatch where the proof fails."""
        self._raise_curtain()
        self._init()
        self._start_load()
        self._start_capture()
        self.clock.sleep(QUIET_SECONDS)
        self.say("4. A base backup is taken while the load goes on; nothing is frozen:")
        backup_begin = us_from_instant(self.clock.now())
        backup = self._cloudsave("backup", "demo")
        backup_end = us_from_instant(self.clock.now())
        self.say(f"   {_sizes(backup)}")
        self.clock.sleep(QUIET_SECONDS)
        target = self._accident()
        self.clock.sleep(QUIET_SECONDS)
        stall_ms = self.witness.slowest_ms(begin_us=backup_begin, end_us=backup_end)
        usual_ms = self.witness.slowest_ms(begin_us=0, end_us=backup_begin)
        self._await_log(target)
        begin = self.clock.monotonic()
        restore = self._restore(target)
        seconds = self.clock.monotonic() - begin
        written = restore["bytes_written"] / 1e6
        self.say(
            f"   {written:.0f} MB of files written, log replayed to the exact record, the server's state"
        )
        self.say(f"   compared with the plan, then opened: {seconds:.1f} s in all.")
        log = self._cloudsave("logs", "status", "demo")["ranges"]
        self.say(f"   {_log_sizes(log)}")
        verdict = self._judge(target, str(restore["connection_url"]))
        return Facts(backup, restore, target, verdict, stall_ms, usual_ms)

    def close(self) -> None:
        """Stop whatever runs. Never raises."""
        if self._witness is not None:
            self._witness.stop()
        for process in (self._load, self._capture):
            if process is not None and process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.wait()
        if self._server is not None:
            self._server.stop([self.root / "restored", self.server.data])

    # ---- acts
    # -------------------------------------------------------------------------------------------------

    def _raise_curtain(self) -> None:
        self.say("1. A PostgreSQL server starts: nothing of yours is touched.")
        self._server = EmbeddedServer.create(self.root, clock=self.clock)
        self.server.start()
        self.server.run("pgbench", "--initialize", "--quiet", f"--scale={SCALE}", self.server.url)
        self.server.sql(MAKE_LOST_TABLE)
        self.say(f"   PostgreSQL {self.server.version}, pgbench tables at scale {SCALE}.")

    def _init(self) -> None:
        self.say("2. A repository is made, encrypted, and the server becomes a source:")
        passphrase = self.root / "passphrase"
        passphrase.touch(0o600)
        passphrase.write_text(self.clock.random_bytes(16).hex())
        self.config.touch(0o600)
        self.config.write_text(
            f'[repository]\nurl = "file://{self.root / "repository"}"\npassphrase_file = "{passphrase}"\n'
        )
        self._cloudsave("init")
        self._cloudsave("source", "add", "demo", self.server.url)

    def _start_load(self) -> None:
        self._load = self.server.spawn(
            "pgbench",
            f"--client={LOAD_CLIENTS}",
            "--jobs=1",
            f"--time={LOAD_SECONDS_MAX}",
            "--no-vacuum",
            self.server.url,
        )
        self._witness = Witness(self.server.url, self.clock)
        self._witness.start()

    def _start_capture(self) -> None:
        self.say("3. Its log is captured while a load runs:")
        self._show(["logs", "capture", "demo"])
        log = (self.root / "capture.log").open("wb")
        self._capture = subprocess.Popen(
            self._command(["--no-progress", "logs", "capture", "demo"]), stdout=log, stderr=log
        )
        deadline = self.clock.monotonic() + CAPTURE_START_SECONDS_MAX
        while not any((self.root / "repository").glob("lineages/*/logs/*/*/*")):
            if self._capture.poll() is not None or self.clock.monotonic() > deadline:
                raise CloudsaveError(
                    "log capture did not start", detail=(self.root / "capture.log").read_text()[-2000:]
                )
            self.clock.sleep(0.05)

    def _accident(self) -> datetime:
        self.clock.sleep(0.2)
        target = self.clock.now()
        self.clock.sleep(0.2)
        self.say(f"5. At {target.isoformat(timespec='milliseconds')} all is well. Then somebody types:")
        self.say(f"   DROP TABLE {LOST_TABLE};   (and the load goes on)")
        self.server.sql(f"drop table {LOST_TABLE}")
        return target

    def _await_log(self, target: datetime) -> None:
        """The log up to the accident is in the repository; on a machine that is short of power it may lag."""
        deadline = self.clock.monotonic() + LOG_SECONDS_MAX
        while True:
            ranges = self._run("logs", "status", "demo")["ranges"]
            last = max((r["last_commit"] or "" for r in ranges), default="")
            if last and datetime.fromisoformat(last) > target:
                return
            if self.clock.monotonic() > deadline:
                raise BackupNotCovered(
                    "the log did not reach the repository",
                    detail=f"Its last commit there is of {last or 'no time at all'}.",
                )
            self.clock.sleep(0.2)

    def _restore(self, target: datetime) -> dict[str, Any]:
        self.say("6. The database is restored to the moment before, into a new directory:")
        return self._cloudsave(
            "restore",
            "demo",
            "--into",
            str(self.root / "restored"),
            "--time",
            target.isoformat(timespec="microseconds"),
            "--start",
            "--port",
            str(self.server.port + 1),
        )

    def _judge(self, target: datetime, url: str) -> Verdict:
        self.witness.stop()
        verdict = self.witness.judge(witnessed_rows(url), us_from_instant(target))
        faults = []
        if self.witness.error is not None:
            faults.append(f"the witness lost its server: {self.witness.error}")
        if verdict.expected == 0:
            faults.append("the witness saw no commit before the target")
        if not verdict.holds:
            faults.append(f"{verdict.missing} rows are missing and {verdict.unexpected} are too many")
        if not table_exists(url, LOST_TABLE):
            faults.append(f"table {LOST_TABLE} is not there")
        if not balances_agree(url):
            faults.append("pgbench's balances disagree")
        if table_exists(self.server.url, LOST_TABLE):
            faults.append("the accident did not happen, so nothing was proved")
        if faults:
            raise RecoveryMismatch(
                "the restored database is not what it must be", detail="; ".join(faults) + "."
            )
        return verdict

    # ---- commands
    # ---------------------------------------------------------------------------------------------

    def _command(self, arguments: Sequence[str]) -> list[str]:
        return [sys.executable, "-m", "cloudsave", "--config", str(self.config), *arguments]

    def _show(self, arguments: Sequence[str]) -> None:
        self.say("   $ " + shlex.join(["cloudsave", *arguments]).replace(str(self.root), "..."))

    def _cloudsave(self, *arguments: str) -> dict[str, Any]:
        """Show and run one of our own commands as a user would; its JSON."""
        self._show(arguments)
        return self._run(*arguments)

    def _run(self, *arguments: str) -> dict[str, Any]:
        done = subprocess.run(
            self._command(["--json", "--no-progress", *arguments]),
            capture_output=True,
            check=False,
            timeout=COMMAND_SECONDS_MAX,
            env=os.environ | {"COLUMNS": "200"},
        )
        if done.returncode:
            raise CloudsaveError(
                f"the command {arguments[0]!r} failed with exit code {done.returncode}",
                detail=done.stderr.decode(errors="replace")[-4000:],
            )
        return dict(json.loads(done.stdout)) if done.stdout.strip() else {}


@dataclass(frozen=True, slots=True)
class Facts:
    """What the story showed."""

    backup: dict[str, Any]
    restore: dict[str, Any]
    target: datetime
    verdict: Verdict
    stall_ms: float
    """The slowest commit of the load while the backup ran."""
    usual_ms: float
    """The slowest commit before it."""


def _log_sizes(ranges: list[dict[str, Any]]) -> str:
    captured, stored, objects = (
        sum(r[name] for r in ranges) for name in ("bytes", "stored_bytes", "objects")
    )
    ratio, holes = captured / max(stored, 1), len(ranges) - 1
    return f"{captured / 1e6:.0f} MB of log captured in {objects} objects, {ratio:.1f} to 1, holes: {holes}"


def _sizes(backup: dict[str, Any]) -> str:
    statistics = backup["statistics"]
    read, stored, seconds = (statistics[name] for name in ("bytes_read", "bytes_stored", "seconds"))
    rate = read / 1e6 / max(seconds, 0.001)
    ratio = read / max(stored, 1)
    return (
        f"backup {backup['backup_id']} ({backup['method']}): {read / 1e6:.0f} MB read in {seconds:.1f} s "
        f"({rate:.0f} MB/s), {stored / 1e6:.0f} MB stored ({ratio:.1f} to 1), encrypted"
    )
