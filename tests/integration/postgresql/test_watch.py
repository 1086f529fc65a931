"""A running capture is watched: canaries, metrics, alarms of a silent archiver, webhooks, heartbeats."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import signal
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from cloudsave.engines.postgresql.watch import PostgresWatch
from cloudsave.errors import EngineError
from tests.integration.postgresql.cluster import Cluster, ClusterFactory, poll
from tests.integration.postgresql.command_line import SOURCE, CommandLine, Running
from tests.integration.postgresql.oracle import lsn_number

ALARM_SECONDS_MAX = 60.0
"""The promise: a silent archiver is alarmed within this."""
SECRET = "a key of the receiver"


# ---- the canary


def test_a_role_without_any_right_can_commit_a_canary(cluster: Cluster) -> None:
    cluster.psql("CREATE ROLE plain LOGIN")
    cluster.psql("CREATE TABLE untouched AS SELECT 1")
    before = cluster.psql("SELECT pg_current_wal_flush_lsn()")
    watch = PostgresWatch(cluster.url.replace("postgres@", "plain@"))
    try:
        first, second = watch.beat(), watch.beat()
        assert first is not None
        assert second is not None
        assert lsn_number(before) < first < second
        assert lsn_number(cluster.psql("SELECT pg_current_wal_flush_lsn()")) >= second
        assert watch.retained_bytes("nobody") is None
        cluster.psql("SELECT pg_create_physical_replication_slot('held', true)")
        cluster.psql("CREATE TABLE more AS SELECT generate_series(1, 10000)")
        assert (watch.retained_bytes("held") or 0) > 100_000
        cluster.psql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'plain'")
        poll(lambda: _beats(watch), "the watch connects anew")
    finally:
        watch.close()


def _beats(watch: PostgresWatch) -> bool:
    try:
        return watch.beat() is not None
    except EngineError:
        return False


# ---- a capture that is watched


class Receiver:
    """A web server that keeps what it was sent."""

    def __init__(self) -> None:
        self.posts: list[tuple[dict[str, str], bytes]] = []
        self.gets: list[float] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                length = int(self.headers["Content-Length"])
                receiver.posts.append((dict(self.headers), self.rfile.read(length)))
                self._answer()

            def do_GET(self) -> None:
                receiver.gets.append(time.monotonic())
                self._answer()

            def _answer(self) -> None:
                self.send_response(204)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                """Say nothing."""

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def notices(self) -> list[dict[str, Any]]:
        """What webhooks told."""
        return [json.loads(body) for _, body in self.posts]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    thread = threading.Thread(target=made.server.serve_forever, daemon=True)
    thread.start()
    yield made
    made.server.shutdown()
    thread.join()
    made.server.server_close()


@contextmanager
def watched(cluster: Cluster, folder: Path, receiver: Receiver) -> Iterator[tuple[CommandLine, Running, str]]:
    """A capture with metrics and notices, streaming; its command line, process and metrics address."""
    line = CommandLine(folder, cluster)
    try:
        line.prepare()
        secret = folder / "secret"
        secret.touch(mode=0o600)
        secret.write_text(SECRET)
        with line.config.open("a") as file:
            file.write(
                f'[notify]\nwebhook_url = "{receiver.url}/hook"\nwebhook_key_file = "{secret}"\n'
                f'heartbeat_url = "{receiver.url}/beat"\nheartbeat_seconds = 1\n'
            )
        yield line, *serving(line, folder)
    finally:
        line.close()


def serving(line: CommandLine, folder: Path) -> tuple[Running, str]:
    """A capture that serves metrics, and where."""
    text = str(folder / "cloudsave.prom")
    running = line.begin("logs", "capture", SOURCE, "--metrics", "127.0.0.1:0", "--metrics-file", text)
    served: list[str] = []

    def told() -> bool:
        served[:] = [one["text"] for one in running.events() if one.get("event") == "metrics"]
        return bool(served) or not running.running()

    poll(told, "metrics are served")
    assert served, running.wait()
    found = re.search(r"http://127\.0\.0\.1:\d+/metrics", served[0])
    assert found, served
    return running, found[0]


def metrics(address: str) -> dict[str, float]:
    """The values of this source by name; states as `name/state`."""
    with urllib.request.urlopen(address, timeout=10) as answer:
        text = answer.read().decode()
    found = {}
    for name, labels, value in re.findall(r"^(\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
        state = re.search(r'state="(\w+)"', labels)
        found[f"{name}/{state[1]}" if state else name] = float(value)
    return found


@pytest.mark.postgresql_majors("14", "18")
def test_a_silent_archiver_is_alarmed_within_a_minute(
    clusters: ClusterFactory, postgresql_major: str, tmp_path: Path, receiver: Receiver
) -> None:
    cluster = clusters.create(postgresql_major)
    with watched(cluster, tmp_path, receiver) as (_, running, address):
        poll(lambda: metrics(address).get("cloudsave_rpo_seconds", 99) < 10, "a canary is durable")
        poll(lambda: "cloudsave_slot_retained_bytes" in metrics(address), "the slot is seen")
        seen = metrics(address)
        assert seen["cloudsave_alarm"] == 0
        assert seen["cloudsave_capture_state/streaming"] == 1
        assert seen["cloudsave_slot_retained_bytes"] >= 0
        assert seen["cloudsave_repository_free_bytes"] > 1 << 20
        assert "cloudsave_last_backup_timestamp_seconds" not in seen
        poll(lambda: len(receiver.gets) >= 2, "heartbeats arrive")
        assert receiver.notices() == []
        assert "cloudsave_rpo_seconds" in (tmp_path / "cloudsave.prom").read_text()

        sender = int(cluster.psql("SELECT pid FROM pg_stat_replication"))
        os.kill(sender, signal.SIGSTOP)
        try:
            begun = time.monotonic()
            poll(
                lambda: any(one["event"] == "alarm" for one in receiver.notices()),
                "the alarm arrives",
                timeout_seconds=ALARM_SECONDS_MAX,
            )
            taken = time.monotonic() - begun
            assert taken <= ALARM_SECONDS_MAX
            print(f"alarmed after {taken:.1f} s")
            seen = metrics(address)
            assert seen["cloudsave_alarm"] == 1
            assert seen["cloudsave_rpo_seconds"] > 1
            told = [event for event in running.events() if event.get("event") == "alarm"]
            assert "durable" in told[0]["text"]
            beats = len(receiver.gets)
        finally:
            os.kill(sender, signal.SIGCONT)
        poll(lambda: receiver.notices()[-1]["event"] == "cleared", "the alarm is cleared")
        poll(lambda: len(receiver.gets) > beats, "heartbeats go on")
        assert_signed(receiver.posts[0])
        assert receiver.notices()[0]["source"] == SOURCE
        assert running.stop().exit_code == 0
        assert SECRET not in (tmp_path / "command-1" / "stderr").read_text()


@pytest.mark.postgresql_majors("14", "18")
def test_what_was_verified_is_told_by_check_and_metrics(
    clusters: ClusterFactory, postgresql_major: str, tmp_path: Path, receiver: Receiver
) -> None:
    cluster = clusters.create(postgresql_major)
    with watched(cluster, tmp_path, receiver) as (line, running, address):
        backup_id = line.run("backup", SOURCE)["backup_id"]
        nobody = "nobody has recorded that what is stored is sound"
        assert told_by_check(line, exit_code=0) == ("notice", nobody)
        assert not [name for name in metrics(address) if "verify" in name]
        refused = line.refused("verify", "--record", backup_id, exit_code=2)
        assert "single backup" in refused["message"]
        line.run("verify", SOURCE, "--record")
        before = time.time()
        severity, fact = told_by_check(line, exit_code=0)
        assert (severity, "sizes and indexes" in fact) == ("ok", True)
        (pack, *_) = sorted(line.store.glob("lineages/*/packs/*"), key=lambda one: -one.stat().st_size)
        content = bytearray(pack.read_bytes())
        content[len(content) // 2] ^= 1
        pack.write_bytes(content)
        line.run("verify", SOURCE, "--read-all", exit_code=3)
        assert told_by_check(line, exit_code=0)[0] == "ok", "it was not to be recorded"
        line.run("verify", SOURCE, "--read-all", "--record", exit_code=3)
        assert told_by_check(line, exit_code=3)[0] == "problem"

        running.stop()
        _, again = serving(line, tmp_path)
        poll(lambda: metrics(again).get("cloudsave_verify_failed") == 1, "the failure is told")
        assert abs(metrics(again)["cloudsave_last_verify_timestamp_seconds"] - before) < 60


def told_by_check(line: CommandLine, *, exit_code: int) -> tuple[str, str]:
    """What `check` says of verifications."""
    findings = line.run("check", SOURCE, exit_code=exit_code)["findings"]
    ((severity, fact),) = [
        (one["severity"], one["fact"]) for one in findings if one["subject"] == "verification"
    ]
    return severity, fact


def assert_signed(post: tuple[dict[str, str], bytes]) -> None:
    """As a receiver would check it."""
    headers, body = post
    fields = dict(one.split("=") for one in headers["Cloudsave-Signature"].split(","))
    made = hmac.new(SECRET.encode(), f"{fields['t']}.".encode() + body, hashlib.sha256).hexdigest()
    assert hmac.compare_digest(made, fields["v1"])
    assert abs(int(fields["t"]) - time.time()) < 300


@pytest.mark.postgresql_majors("18")
def test_a_capture_that_is_dead_is_seen_by_the_age_of_what_is_stored(
    clusters: ClusterFactory, postgresql_major: str, tmp_path: Path, receiver: Receiver
) -> None:
    cluster = clusters.create(postgresql_major)
    with watched(cluster, tmp_path, receiver) as (line, running, address):
        poll(lambda: metrics(address).get("cloudsave_rpo_seconds", 99) < 10, "a canary is durable")
        told = line.run("logs", "status", SOURCE, "--max-age", "60")
        assert told["age_seconds"] < 60
        assert line.answer("logs", "status", SOURCE, "--max-age", "0.001").exit_code == 3
        running.process.kill()
        running.process.wait()
        poll(
            lambda: line.answer("logs", "status", SOURCE, "--max-age", "20").exit_code == 3,
            "the archiver's silence is found",
            timeout_seconds=ALARM_SECONDS_MAX,
        )
        beats = len(receiver.gets)
        assert beats > 0
