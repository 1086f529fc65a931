"""
How fast binlogs are captured: MB per second of wall clock and of our CPU, with the check of each event,
index, seal and fdatasync.

Goal: 150 MB of log per second of CPU. A server writes its log beforehand, in small transactions, so that
capture is never waiting for it. The bytes are compared with the server's files at the end.

    python benchmarks/bench_binlog_capture.py [--engine mysql] [--megabytes 300] [--rounds 3]
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.integration.mysql.cluster import BinlogCluster, BinlogClusterFactory
from tests.integration.mysql.product import closed_content, stored_files
from tools import provision_binlog

from benchmarks.measure import RESULTS, machine, wait_for_quiet
from cloudsave.clock import SYSTEM_CLOCK
from cloudsave.engines.binlog.engine import BinlogEngine
from cloudsave.engines.binlog.position import number_of
from cloudsave.engines.registry import open_engine
from cloudsave.logs.background import BackgroundCapture
from cloudsave.logs.status import CaptureOptions
from cloudsave.model.position import Position
from cloudsave.repository.lineage import Lineage
from cloudsave.repository.repository import Repository
from cloudsave.store.posix import PosixStore

CONF = {"sync_binlog": "0", "innodb_flush_log_at_trx_commit": "2", "max_binlog_size": "128M"}
SERIES = {"mariadb": "11.8", "mysql": "9.7"}
AT_ONCE = 20_000
WORK = """
CREATE PROCEDURE d.work (IN number INT)
BEGIN
  DECLARE chosen INT;
  WHILE number > 0 DO
    START TRANSACTION;
    INSERT INTO d.t (n, x)
    VALUES (number, CONCAT(SHA2(RAND(), 512), SHA2(RAND(), 512), SHA2(RAND(), 512)));
    SET chosen = 1 + FLOOR(RAND() * LAST_INSERT_ID());
    UPDATE d.t SET n = n + 1 WHERE id = chosen;
    COMMIT;
    SET number = number - 1;
  END WHILE;
END
"""


def prepare(cluster: BinlogCluster) -> None:
    """What `write_log` needs."""
    table = "CREATE TABLE d.t (id INT PRIMARY KEY AUTO_INCREMENT, n INT, x VARCHAR(1000))"
    cluster.sql("CREATE DATABASE d", table, WORK)


def write_log(cluster: BinlogCluster, megabytes: int) -> None:
    """Small transactions, an insert and an update each, until there is enough, in files of their own."""
    cluster.sql("FLUSH BINARY LOGS")
    before = {path: path.stat().st_size for path in cluster.binlogs()}
    written = 0
    while written < megabytes * 1_000_000:
        cluster.sql(f"CALL d.work({AT_ONCE})")
        written = sum(path.stat().st_size for path in cluster.binlogs()) - sum(before.values())
    cluster.sql("FLUSH BINARY LOGS")


def newer(cluster: BinlogCluster, begin: int) -> list[Path]:
    """The binlog files after the one that holds `begin`."""
    return [path for path in cluster.binlogs() if int(path.suffix[1:]) > number_of(begin)]


def compare(lineage: Lineage, closed: list[Path]) -> int:
    """Number of files found equal. Raises: AssertionError."""
    stored = stored_files(lineage)
    for path in closed:
        assert stored[int(path.suffix[1:])] == closed_content(path), path
    return len(closed)


def capture(engine: BinlogEngine, lineage: Lineage, end: Position) -> None:
    """Capture what there is, from where the capture before has ended, if there was one."""
    source = engine.log_source(slot="bench", temporary=False)
    running = BackgroundCapture(source, lineage, engine.dialect, CaptureOptions(), clock=SYSTEM_CLOCK)
    running.start()
    running.await_durable(end, timeout_seconds=3600)
    running.stop()


def measure(cluster: BinlogCluster, folder: Path, megabytes: int) -> dict[str, object]:
    """One capture of log that is there already, into a new repository."""
    store = PosixStore(folder / "repository", clock=SYSTEM_CLOCK)
    created = Repository.create(store, passphrase=None, clock=SYSTEM_CLOCK)
    engine = open_engine(cluster.url)
    assert isinstance(engine, BinlogEngine)
    identity, begin = engine.identify(), engine.moment().log_end
    lineage = created.repository.lineage(identity.lineage)
    capture(engine, lineage, Position(identity.branch, begin))
    write_log(cluster, megabytes)
    end = engine.moment().log_end
    wait_for_quiet()
    wall, cpu = time.perf_counter(), time.process_time()
    capture(engine, lineage, Position(identity.branch, end))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    segments = lineage.logs()
    log_bytes = sum(path.stat().st_size for path in newer(cluster, begin))
    return {
        "megabytes": round(log_bytes / 1e6),
        "stored_megabytes": round(sum(segment.size_bytes for segment in segments) / 1e6),
        "commits_indexed": sum(len(lineage.log_index(segment).commits) for segment in segments),
        "wall_seconds": round(wall, 2),
        "cpu_seconds": round(cpu, 2),
        "megabytes_per_wall_second": round(log_bytes / 1e6 / wall),
        "megabytes_per_cpu_second": round(log_bytes / 1e6 / cpu),
        "resident_megabytes_max": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "files_compared": compare(lineage, newer(cluster, begin)[:-1]),
    }


def main() -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engine", choices=sorted(SERIES), action="append")
    parser.add_argument("--megabytes", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    found: dict[str, object] = {"machine": machine()}
    with tempfile.TemporaryDirectory(prefix="cloudsave-bench-") as name:
        Path(name).chmod(0o1777)
        factory = BinlogClusterFactory(Path(name))
        try:
            for engine in options.engine or sorted(SERIES):
                server = provision_binlog.listing()[(engine, SERIES[engine])]
                cluster = factory.create(server, conf=CONF)
                prepare(cluster)
                rounds = []
                for number in range(options.rounds):
                    folder = Path(name) / f"repository-{engine}-{number}"
                    folder.mkdir()
                    rounds.append(measure(cluster, folder, options.megabytes))
                    print(f"{engine} {server.version} {rounds[-1]}", flush=True)
                found[f"{engine} {server.version}"] = rounds
                cluster.stop()
        finally:
            factory.close()
    (RESULTS / "binlog-capture.json").write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
