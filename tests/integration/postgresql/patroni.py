"""A real Patroni cluster on loopback: etcd and two nodes, as processes of the servers' user."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.integration.postgresql.cluster import (
    COMMAND_TIMEOUT_SECONDS,
    Cluster,
    ClusterFactory,
    ServerFailed,
    children_of,
    poll,
)

REQUEST_SECONDS = 20.0
READY_SECONDS = 90.0
TTL_SECONDS = 20
"""The least that Patroni allows: so long a dead leader keeps its place."""


class Node:
    """One Patroni with its server."""

    def __init__(self, name: str, cluster: Cluster) -> None:
        self.name = name
        self.cluster = cluster
        cluster.tcp_port = cluster.factory.reserve_port()
        self.rest_port = cluster.factory.reserve_port()
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, etcd_port: int) -> None:
        """Write the configuration and start Patroni, which makes or clones the server."""
        home, port = self.cluster.home, self.cluster.tcp_port
        file = home / "patroni.yml"
        file.write_text(json.dumps(self._configuration(etcd_port, port)))
        (home / "pgpass-folder").mkdir()
        self.cluster.user.own(home)
        self.process = _begin(["patroni", str(file)], home / "patroni.log", self.cluster)

    def _configuration(self, etcd_port: int, port: int | None) -> dict[str, Any]:
        """Patroni's configuration; JSON is YAML."""
        home = self.cluster.home
        parameters = {
            "wal_keep_size": "256MB",
            "fsync": "off",
            "shared_buffers": "16MB",
            "max_connections": 40,
        }
        dcs = {
            "ttl": TTL_SECONDS,
            "loop_wait": 1,
            "retry_timeout": 3,
            "synchronous_mode": True,
            "postgresql": {"use_slots": True, "parameters": parameters},
        }
        rest = f"127.0.0.1:{self.rest_port}"
        return {
            "scope": "tested",
            "name": self.name,
            "restapi": {"listen": rest, "connect_address": rest},
            "etcd3": {"hosts": f"127.0.0.1:{etcd_port}"},
            "bootstrap": {"dcs": dcs, "initdb": ["data-checksums", {"encoding": "UTF8"}, {"locale": "C"}]},
            "postgresql": {
                "listen": f"127.0.0.1:{port}",
                "connect_address": f"127.0.0.1:{port}",
                "data_dir": str(self.cluster.data),
                "bin_dir": str(self.cluster.bindir),
                "pgpass": str(home / "pgpass-folder" / "pgpass"),
                "authentication": {
                    "superuser": {"username": "postgres"},
                    "replication": {"username": "postgres"},
                },
                "parameters": {"unix_socket_directories": str(home)},
                "pg_hba": [
                    "local all all trust",
                    "host all all 127.0.0.1/32 trust",
                    "host replication all 127.0.0.1/32 trust",
                ],
            },
        }

    def ask(self, path: str, *, method: str = "GET", body: dict[str, Any] | None = None) -> Any:
        """What the node's REST API answers. Raises: OSError where it does not."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.rest_port}{path}",
            method=method,
            data=None if body is None else json.dumps(body).encode(),
        )
        with urllib.request.urlopen(request, timeout=REQUEST_SECONDS) as answer:
            text = answer.read().decode()
        return json.loads(text) if text.startswith("{") else text

    def role(self) -> str:
        """ "master", "replica", or "" while it is neither."""
        with suppress(OSError, ValueError):
            state = self.ask("/patroni")
            if state.get("state") == "running":
                return str(state["role"])
        return ""

    def kill(self) -> None:
        """As when the host dies: Patroni and its server are gone at once, and clean up nothing."""
        if self.process is None:
            return
        family = [self.process.pid]
        with suppress(OSError, ValueError, IndexError):
            postmaster = int((self.cluster.data / "postmaster.pid").read_text().splitlines()[0])
            family += [postmaster, *children_of(postmaster)]
        for pid in family:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(COMMAND_TIMEOUT_SECONDS)
        self.process = None

    def log(self) -> str:
        """The end of Patroni's log."""
        return "\n".join((self.cluster.home / "patroni.log").read_text().splitlines()[-30:])


class Patroni:
    """Two nodes and an etcd. As a context it ends all of them, whatever happened."""

    def __init__(self, factory: ClusterFactory, major: str) -> None:
        for program in ("patroni", "etcd"):
            if shutil.which(program) is None:
                raise ServerFailed(f"{program} is not installed; run as root: python tools/provision.py")
        self.nodes = [Node(f"node{number}", factory.empty(major)) for number in (1, 2)]
        self._etcd_port = factory.reserve_port()
        self._etcd: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        try:
            self._start_etcd(self.nodes[0].cluster)
            first, second = self.nodes
            first.start(self._etcd_port)
            self._wait(lambda: first.role() == "master", "the first node leads")
            second.start(self._etcd_port)
            self._wait(lambda: self._has_synchronous_standby(first), "a standby is synchronous")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self.close()

    @property
    def url(self) -> str:
        """Whichever node takes writes."""
        ports = ",".join(str(node.cluster.tcp_port) for node in self.nodes)
        hosts = ",".join("127.0.0.1" for _ in self.nodes)
        return f"postgresql://postgres@/postgres?host={hosts}&port={ports}&target_session_attrs=read-write"

    def leader(self) -> Node:
        """The node that leads now; waits until one does."""
        self._wait(lambda: any(node.role() == "master" for node in self.nodes), "a node leads")
        return next(node for node in self.nodes if node.role() == "master")

    def follower_of(self, leader: Node) -> Node:
        """The other node."""
        return next(node for node in self.nodes if node is not leader)

    def switch_over(self) -> Node:
        """Let the follower take over in order; the new leader, when it has a synchronous standby again."""
        old = self.leader()
        new = self.follower_of(old)
        old.ask("/switchover", method="POST", body={"leader": old.name, "candidate": new.name})
        self._wait(lambda: new.role() == "master", "the candidate leads")
        self._wait(lambda: self._has_synchronous_standby(new), "the old leader follows")
        return new

    def fail_over(self) -> Node:
        """Kill the leader with all its processes; the new leader."""
        old = self.leader()
        new = self.follower_of(old)
        old.kill()
        self._wait(lambda: new.role() == "master", "the follower leads")
        return new

    def configure(self, change: dict[str, Any]) -> None:
        """Change the configuration of the whole cluster."""
        self.leader().ask("/config", method="PATCH", body=change)

    def close(self) -> None:
        """Kill everything."""
        for node in self.nodes:
            node.kill()
        if self._etcd is not None:
            self._etcd.kill()
            self._etcd.wait(COMMAND_TIMEOUT_SECONDS)
            self._etcd = None

    def _start_etcd(self, cluster: Cluster) -> None:
        client, peer = (
            f"http://127.0.0.1:{self._etcd_port}",
            f"http://127.0.0.1:{cluster.factory.reserve_port()}",
        )
        command = ["etcd", "--name", "e", "--data-dir", str(cluster.home / "etcd"), "--unsafe-no-fsync"]
        command += ["--listen-client-urls", client, "--advertise-client-urls", client]
        command += ["--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer]
        command += ["--initial-cluster", f"e={peer}"]
        self._etcd = _begin(command, cluster.home / "etcd.log", cluster)

        def healthy() -> bool:
            try:
                with urllib.request.urlopen(f"{client}/health", timeout=REQUEST_SECONDS) as answer:
                    return bool(json.load(answer)["health"] == "true")
            except (OSError, urllib.error.URLError, ValueError):
                return False

        poll(healthy, "etcd answers", timeout_seconds=READY_SECONDS)

    def _has_synchronous_standby(self, node: Node) -> bool:
        """Whether Patroni knows the other node as the standby that has all: none else may take over."""
        with suppress(OSError):  # HTTP 503 where it is not.
            self.follower_of(node).ask("/sync")
            return node.role() == "master"
        return False

    def _wait(self, condition: Any, what: str) -> None:
        try:
            poll(condition, what, timeout_seconds=READY_SECONDS)
        except ServerFailed as error:
            logs = "\n".join(f"--- {node.name}\n{node.log()}" for node in self.nodes if node.process)
            raise ServerFailed(f"{error}\n{logs}") from None


def _begin(command: list[str], log: Path, cluster: Cluster) -> subprocess.Popen[bytes]:
    """A process of the servers' user, its output in a file."""
    environment = {key: value for key, value in cluster.environment().items() if not key.startswith("PYTHON")}
    with log.open("wb") as file:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            cwd=cluster.home,
            start_new_session=True,
            env=environment,
            **cluster.user.process_options(),
        )
