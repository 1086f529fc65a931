"""
Processes of cloudsave killed at random moments, and stopped by signals, against a real server under load.

One seed decides which command is killed when; CLOUDSAVE_TEST_SEED replays it, CLOUDSAVE_TEST_ROUNDS makes the
run longer or shorter. After each kill the same command is run again and must succeed. In the end no log is
missing, everything stored is sound, and a restore has every commit that was ever acknowledged.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest

from cloudsave.errors import ExitCode
from cloudsave.model.log import instant_from_us
from tests.integration.postgresql.cluster import Cluster, ClusterFactory, poll
from tests.integration.postgresql.command_line import (
    RESTORED_SETTINGS,
    SOURCE,
    Answer,
    CommandLine,
    Running,
    stop_server,
)
from tests.integration.postgresql.oracle import Ledger, LedgerClients, assert_ledger

SEED_DEFAULT = 20261125
ROUNDS_DEFAULT = 50
KINDS = ("backup", "capture", "restore")
SECONDS_AT_FIRST = {"backup": 2.0, "capture": 2.0, "restore": 3.0}
"""How long a run of each kind takes, until runs have been measured."""
BEYOND = 1.15
"""A kill is drawn from the time of a usual run and this much beyond it."""
EARLY_SHARE = 0.2
FULL_SHARE = 0.6
CAPTURED_SHARE = 0.4
MORE_ROUNDS_MAX = 30
"""Limit: rounds that are added until enough of the kills have hit something."""
PAUSE_SECONDS = 0.02
"""Between two commits of one client: a small load, so that the machine is left to what is tested."""
JOURNAL = "cloudsave.restore.json"
SLOW_BYTES_PER_SECOND = "1000000"
SETTINGS = [word for setting in RESTORED_SETTINGS for word in ("--set", setting)]


class SlowClients(LedgerClients):
    """Ledger clients that leave the machine some time."""

    def _commit_one(self, connection: psycopg.Connection[Any], number: int) -> None:
        super()._commit_one(connection, number)
        self._stopping.wait(PAUSE_SECONDS)


@dataclass
class Rounds:
    """Kills of some kinds, one after the other, and what they hit."""

    line: CommandLine
    record: Path
    chance: random.Random
    hit: Counter[str] = field(default_factory=Counter)
    usual_seconds: dict[str, float] = field(default_factory=lambda: dict(SECONDS_AT_FIRST))

    def run(self, kinds: Sequence[str]) -> None:
        """One round of each of `kinds`, which may repeat."""
        for kind in kinds:
            {"backup": self.backup, "capture": self.capture, "restore": self.restore}[kind]()

    def backup(self) -> None:
        """Kill a backup, beside a capture that runs or alone; the next one completes."""
        more = ["--full"] if self.chance.random() < FULL_SHARE else []
        with self.line.captured() if self.chance.random() < CAPTURED_SHARE else nullcontext():
            before = self.stored()
            running = self.kill("backup", "backup", SOURCE, *more)
            self.note("backup", running, self.backup_stage(self.stored() - before))
            done = self.measured("backup", lambda: self.line.run("backup", SOURCE))
        (found,) = [name for name in self.stored() if name.endswith(f"/backups/{done['backup_id']}")]
        assert found not in before

    def backup_stage(self, new: set[str]) -> str:
        """How far a killed backup came, by the objects that it left."""
        kinds = [(part, f"/{part}/") for part in ("backups", "maps", "packs", "generations")]
        return next((name for name, part in kinds if any(part in one for one in new)), "start-up")

    def capture(self) -> None:
        """Kill a capture; the next one goes on where it was."""
        before = self.stored()
        running = self.kill("capture", "logs", "capture", SOURCE)
        new = self.stored() - before
        self.note("capture", running, "streaming" if any("/logs/" in name for name in new) else "start-up")
        begun = os.times().elapsed
        with self.line.captured():
            # Until it streams; at work it is as long again afterwards.
            self.usual_seconds["capture"] = 2 * (os.times().elapsed - begun)

    def restore(self) -> None:
        """Kill a restore; the same command goes on in the same directory."""
        target = self.last_commit() - timedelta(microseconds=1)
        directory = self.line.place()
        command = self.line.restore_command(directory, "--time", target.isoformat(), "--start", *SETTINGS)
        try:
            running = self.kill("restore", *command)
            stage = self.restore_stage(directory)
            self.note("restore", running, stage)
            if running.process.returncode == 0:
                url = running.wait().result["connection_url"]
            elif stage == "over":
                url = opened_server(directory)
            else:
                facts = self.measured("restore", lambda: self.line.run(*command))
                assert facts["resumed"] == (stage != "start-up")
                url = facts["connection_url"]
            with psycopg.connect(url, autocommit=True) as connection:
                assert_ledger(connection, Ledger.read(self.record).expected_ids(target))
        finally:
            discard(directory)

    def last_commit(self) -> datetime:
        """The latest instant to which a restore is possible, by the names of the stored log."""
        names = (path.name.split("-") for path in self.line.store.glob("lineages/*/logs/*/*/*"))
        return instant_from_us(max(int(parts[3], 16) for parts in names if len(parts) == 4))

    def restore_stage(self, directory: Path) -> str:
        """
        How far a killed restore came, by its journal, which goes when the server is open: nothing is left to
        do then, and the same command is refused, since it overwrites nothing.
        """
        try:
            head = json.loads((directory / JOURNAL).read_bytes())
        except FileNotFoundError:
            return "over" if (directory / "PG_VERSION").exists() else "start-up"
        return "replay" if head["recovery_digest"] else "files"

    # ---- the kill

    def kill(self, kind: str, *arguments: str) -> Running:
        """Start a command and kill it at a random moment, unless it has ended by then."""
        running = self.line.begin(*arguments)
        # Half of a short run is the start of the interpreter: most kills come later.
        earliest = 0.0 if self.chance.random() < EARLY_SHARE else 0.4
        moment = self.chance.uniform(earliest, BEYOND) * self.usual_seconds[kind]
        try:
            running.process.wait(timeout=moment)
        except subprocess.TimeoutExpired:
            running.process.kill()
            running.process.wait()
        assert running.process.returncode in (0, -signal.SIGKILL), running.wait()
        return running

    def note(self, kind: str, running: Running, stage: str) -> None:
        """Count what was hit."""
        self.hit[f"{kind}: {'over' if running.process.returncode == 0 else stage}"] += 1

    def measured(self, kind: str, run: Callable[[], Any]) -> Any:
        """Run a command, and remember how long that takes."""
        begun = os.times().elapsed
        done = run()
        self.usual_seconds[kind] = os.times().elapsed - begun
        return done

    def stored(self) -> set[str]:
        """Names of all objects in the repository."""
        return {str(path) for path in self.line.store.rglob("*")}


def opened_server(directory: Path) -> str:
    """How to reach the server that a restore had opened when it was killed; by the server's own file."""
    _, _, _, port, socket, *_ = (directory / "postmaster.pid").read_text().splitlines()
    return f"postgresql://postgres@/postgres?host={socket}&port={port}"


def discard(directory: Path) -> None:
    """End what runs on a restored directory, and remove it."""
    stop_server(directory, immediate=True)
    shutil.rmtree(directory.parent)


@pytest.fixture
def line(clusters: ClusterFactory, postgresql_major: str, tmp_path: Path) -> Iterator[CommandLine]:
    """The command line, and a small database."""
    cluster = clusters.create(postgresql_major)
    cluster.pgbench_init(1)
    line = CommandLine(tmp_path, cluster)
    line.prepare(rpo_seconds=0.2)
    yield line
    line.close()


@pytest.mark.postgresql_majors("18")
def test_commands_killed_at_random_moments_succeed_when_run_again(line: CommandLine, tmp_path: Path) -> None:
    seed = int(os.environ.get("CLOUDSAVE_TEST_SEED", SEED_DEFAULT))
    count = int(os.environ.get("CLOUDSAVE_TEST_ROUNDS", ROUNDS_DEFAULT))
    print(f"CLOUDSAVE_TEST_SEED={seed} CLOUDSAVE_TEST_ROUNDS={count}")
    record = tmp_path / "ledger.jsonl"
    kinds = list(itertools.islice(itertools.cycle(KINDS), count))
    others = [kind for kind in kinds if kind != "restore"]
    random.Random(seed).shuffle(others)
    # Restores need nothing of the server and run beside the others.
    lanes = [
        (Rounds(line, record, random.Random(seed + 1)), [kind for kind in kinds if kind == "restore"]),
        (Rounds(line, record, random.Random(seed + 2)), others),
    ]
    with SlowClients(lambda: line.cluster.url, record, clients=2) as clients:
        with line.captured():
            clients.wait_for(20)
            line.run("backup", SOURCE)
            clients.wait_for(20)
            line.catch_up()
        with ThreadPoolExecutor(len(lanes)) as pool:
            for ended in [pool.submit(rounds.run, kinds) for rounds, kinds in lanes]:
                ended.result()
        # On a machine with much else to do a usual run says little about the next one.
        rounds = lanes[1][0]
        for _ in range(MORE_ROUNDS_MAX):
            if not (lacking := missed(lanes[0][0].hit + rounds.hit)):
                break
            rounds.run(lacking)
        with line.captured():
            clients.stop()
            line.catch_up()
    hit = lanes[0][0].hit + lanes[1][0].hit
    print(json.dumps(dict(sorted(hit.items())), indent=1))
    assert_all_is_there(line, Ledger.read(record))
    assert not missed(hit), hit


def assert_all_is_there(line: CommandLine, ledger: Ledger) -> None:
    """No hole, no damage, no session left on the server, and every acknowledged commit in a restore."""
    status = line.run("logs", "status", SOURCE)
    assert status["holes"] == []
    assert line.run("verify", "--read-all")["sound"]
    assert_server_is_left_alone(line.cluster)
    with line.restored("--latest") as restored, restored.server.connect() as connection:
        assert_ledger(connection, ledger.expected_latest())


def missed(hit: Counter[str]) -> list[str]:
    """
    Negative control: kills that all came too late, or before anything was begun, would prove nothing. The
    kinds of which too few were hit at work; a fifth is enough.
    """
    found = []
    for kind in KINDS:
        stages = {stage: number for stage, number in hit.items() if stage.startswith(f"{kind}: ")}
        idle = stages.get(f"{kind}: over", 0) + stages.get(f"{kind}: start-up", 0)
        if idle > 0.8 * sum(stages.values()):
            found.append(kind)
    return found


# ---- signals that ask


SESSIONS = """
    SELECT coalesce(string_agg(application_name || ' ' || backend_type || ' ' || state, '; '), '')
    FROM pg_stat_activity
    WHERE pid <> pg_backend_pid() AND (application_name LIKE 'cloudsave%' OR backend_type = 'walsender')
"""


def assert_server_is_left_alone(cluster: Cluster) -> None:
    """No session of ours is left, and so no backup mode; no slot is left but the permanent one."""
    poll(lambda: cluster.psql(SESSIONS) == "", "all sessions of cloudsave are gone", timeout_seconds=20)
    slots = cluster.psql("SELECT slot_name, active FROM pg_replication_slots")
    assert slots in ("", f"cloudsave_{SOURCE}|f")


@contextmanager
def slowly(line: CommandLine) -> Iterator[None]:
    """Within the context the store is slow, so that commands take seconds."""
    before = line.config.read_text()
    line.config.write_text(f"rate_limit_bytes_per_second = {SLOW_BYTES_PER_SECOND}\n{before}")
    yield
    line.config.write_text(before)


def interrupted(running: Running, number: int, at_work: Callable[[], bool]) -> Answer:
    """Send a signal when a command is at work; how it ended."""
    poll(lambda: at_work() or not running.running(), f"{running.arguments} is at work")
    assert running.running(), running.wait()
    running.process.send_signal(number)
    return running.wait(timeout_seconds=60)


def assert_cancelled(answer: Answer) -> None:
    """It said in one way that it was cancelled, and nothing else."""
    assert answer.exit_code == ExitCode.CANCELLED, answer
    assert answer.error["code"] == "CS-9001"
    assert "Traceback" not in answer.stderr


def packs_of(line: CommandLine) -> int:
    """Packs in the repository."""
    return sum(1 for path in line.store.glob("lineages/*/packs/*"))


SIGNALS = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])


@SIGNALS
@pytest.mark.parametrize("mode", ["local", "remote"])
@pytest.mark.postgresql_majors("14", "18")
@pytest.mark.fault("backup-killed")
def test_a_backup_that_is_stopped_leaves_server_and_repository_in_order(
    line: CommandLine, number: int, mode: str
) -> None:
    with slowly(line):
        running = line.begin("backup", SOURCE, "--mode", mode, "--workers", "1")
        assert_cancelled(interrupted(running, number, lambda: packs_of(line) > 0))
    assert_server_is_left_alone(line.cluster)
    assert line.run("list") == []
    done = line.run("backup", SOURCE, "--mode", mode)
    assert any("taken over" in note for note in done["notes"])
    assert line.run("verify", "--read-all")["sound"]


@SIGNALS
@pytest.mark.postgresql_majors("18")
def test_a_capture_that_is_stopped_stores_what_it_has(line: CommandLine, number: int, tmp_path: Path) -> None:
    line.run("backup", SOURCE)
    running = line.begin("logs", "capture", SOURCE)
    streams = "streaming"
    with LedgerClients(lambda: line.cluster.url, tmp_path / "ledger.jsonl", clients=2) as clients:
        clients.wait_for(50)
        answer = interrupted(running, number, lambda: any(e["state"] == streams for e in running.statuses()))
        clients.wait_for(1)
    answer.expect(ExitCode.DONE)
    assert running.statuses()[-1]["state"] == "stopped"
    assert_server_is_left_alone(line.cluster)
    with line.captured():
        line.catch_up()
    assert line.run("logs", "status", SOURCE)["holes"] == []


def restore_steps(line: CommandLine, directory: Path) -> Sequence[tuple[str, Callable[[], bool]]]:
    """The moments of a restore at which it is stopped."""

    def replays() -> bool:
        return (directory / "postmaster.pid").exists()

    return [("files", (directory / JOURNAL).exists), ("replay", replays)]


@SIGNALS
@pytest.mark.parametrize("step", [0, 1], ids=["files", "replay"])
@pytest.mark.postgresql_majors("18")
def test_a_restore_that_is_stopped_leaves_no_server_and_goes_on(
    line: CommandLine, number: int, step: int
) -> None:
    with line.captured():
        line.run("backup", SOURCE)
        line.cluster.psql("CREATE TABLE late AS SELECT generate_series(1, 300000) AS number")
        line.catch_up()
    directory = line.place()
    command = line.restore_command(directory, "--start", *SETTINGS)
    try:
        with slowly(line):
            running = line.begin(*command)
            assert_cancelled(interrupted(running, number, restore_steps(line, directory)[step][1]))
        assert not (directory / "postmaster.pid").exists()
        assert (directory / JOURNAL).exists()
        facts = line.run(*command)
        assert facts["resumed"]
        with psycopg.connect(facts["connection_url"], autocommit=True) as connection:
            assert connection.execute("SELECT count(*) FROM late").fetchone() == (300000,)
    finally:
        discard(directory)


@pytest.mark.postgresql_majors("18")
def test_a_restore_to_the_latest_state_goes_on_though_backups_and_log_were_added(line: CommandLine) -> None:
    """What was begun is finished: its files are of one backup, its server has replayed to one place."""
    with line.captured():
        line.run("backup", SOURCE)
        line.cluster.psql("CREATE TABLE early AS SELECT generate_series(1, 300000) AS number")
        line.catch_up()
    for step in (0, 1):
        directory = line.place()
        command = line.restore_command(directory, "--start", *SETTINGS)
        try:
            with slowly(line):
                running = line.begin(*command)
                poll(restore_steps(line, directory)[step][1], "the restore is at work")
                running.process.kill()
                running.process.wait()
            with line.captured():
                line.cluster.psql(f"CREATE TABLE late_{step} (number int)")
                line.run("backup", SOURCE)
                line.catch_up()
            facts = line.run(*command)
            assert facts["resumed"]
            with psycopg.connect(facts["connection_url"], autocommit=True) as connection:
                assert connection.execute("SELECT count(*) FROM early").fetchone() == (300000,)
        finally:
            discard(directory)


MOMENTS = [
    ("promoting", False),
    ("promoting", True),
    ("opened", False),
    ("opened", True),
    ("forgetting", False),
]


@pytest.mark.postgresql_majors("14", "18")
@pytest.mark.fault("restore-killed-at-opening")
def test_a_restore_that_is_killed_around_the_opening_of_its_server_is_finished_when_run_again(
    line: CommandLine,
) -> None:
    """Once opened, the server cannot be led to its target again: it must be taken for what it is."""
    with line.captured():
        line.run("backup", SOURCE)
        line.cluster.psql("CREATE TABLE t AS SELECT generate_series(1, 10) AS number")
        lsn = line.cluster.lsn()
        line.cluster.psql("INSERT INTO t VALUES (11)")
        line.catch_up()
    for moment, crashed in MOMENTS:
        directory = line.place()
        target = ("--position", lsn, "--exclusive")
        command = line.restore_command(directory, *target, "--start", *SETTINGS)
        try:
            killed = line.begin(*command, program=("tests.faults.restore_until_killed", moment)).wait()
            assert killed.exit_code == -signal.SIGKILL, killed
            assert (directory / JOURNAL).exists()
            if crashed:
                stop_server(directory, immediate=True)
            facts = line.run(*command)
            assert facts["resumed"], moment
            assert facts["open"]
            assert not (directory / JOURNAL).exists()
            if moment != "promoting":
                assert facts["branch"] == "00000002", moment
            with psycopg.connect(facts["connection_url"], autocommit=True) as connection:
                assert connection.execute("SELECT max(number) FROM t").fetchone() == (10,)
                assert connection.execute("SHOW archive_mode").fetchone() == ("off",)
                connection.execute("INSERT INTO t VALUES (12)")
        finally:
            discard(directory)
