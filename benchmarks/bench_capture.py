"""
How fast log is captured: MB per second of wall clock and of our CPU, with index, seal and fdatasync.

Goal: 200 MB of log per second of CPU (the parts of it, each measured alone on one core: receive about
1500 MB/s, walk and index 1000 to 2300, zstd level 1 of log 500 to 900, proof of what is written about 1500,
AES-256-GCM and BLAKE3 above 2500; together 150 to 300 MB/s).
A server writes its log beforehand, so that capture is never waiting for it. The bytes are compared with the
server's files at the end: a fast copy of the wrong bytes counts nothing.

    python benchmarks/bench_capture.py [--postgresql 18] [--megabytes 1024] [--json]
"""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.integration.postgresql.cluster import Cluster

from benchmarks import own_server
from cloudsave.clock import SYSTEM_CLOCK
from cloudsave.engines.postgresql.dialect import PostgresDialect
from cloudsave.engines.postgresql.engine import PostgresEngine
from cloudsave.engines.postgresql.log import parse_lsn
from cloudsave.logs.archive import fetch
from cloudsave.logs.background import BackgroundCapture
from cloudsave.logs.status import CaptureOptions
from cloudsave.model.ledger import Ledger
from cloudsave.model.position import Position
from cloudsave.repository.lineage import Lineage
from cloudsave.repository.repository import Repository
from cloudsave.store.posix import PosixStore

BRANCH = "00000001"
FILE_BYTES = 16 << 20
CONF = {"wal_keep_size": "16GB", "max_wal_size": "16GB", "checkpoint_timeout": "1h", "autovacuum": "off"}
COMPARED_EVERY = 8
"""Of the captured files, so many are passed for each that is compared with the server's."""


def write_log(cluster: Cluster, megabytes: int) -> None:
    """pgbench's tables, then its transactions (full page images, updates, commits), until there is enough."""
    begin = parse_lsn(cluster.lsn())
    cluster.pgbench_init(max(1, megabytes // 30))
    while parse_lsn(cluster.lsn()) - begin < megabytes << 20:
        cluster.run("pgbench", "-n", "-c", "4", "-t", "5000")
    cluster.switch_wal()


def compare(lineage: Lineage, cluster: Cluster, first: int, last: int, folder: Path) -> int:
    """Number of files found equal. Raises: AssertionError."""
    dialect = PostgresDialect()
    offsets = range(first, last - last % FILE_BYTES, FILE_BYTES * COMPARED_EVERY)
    for offset in offsets:
        name = dialect.log_file_name(BRANCH, offset, log_file_bytes=FILE_BYTES)
        fetch(lineage, dialect, name, folder / "file", log_file_bytes=FILE_BYTES)
        assert (folder / "file").read_bytes() == (cluster.data / "pg_wal" / name).read_bytes(), name
    return len(offsets)


def measure(cluster: Cluster, folder: Path, megabytes: int) -> dict[str, float | int | str]:
    """One run on a server that has no log of ours yet."""
    store = PosixStore(folder / "repository")
    created = Repository.create(store, passphrase=None, clock=SYSTEM_CLOCK)
    engine = PostgresEngine(cluster.url)
    lineage = created.repository.lineage(engine.identify().lineage)
    source = engine.log_source(slot="bench", temporary=False)
    source.connect()
    source.close()
    write_log(cluster, megabytes)
    end = parse_lsn(cluster.psql("SELECT pg_current_wal_flush_lsn()"))
    wall, cpu = time.perf_counter(), time.process_time()
    source = engine.log_source(slot="bench", temporary=False)
    capture = BackgroundCapture(source, lineage, PostgresDialect(), CaptureOptions(), clock=SYSTEM_CLOCK)
    capture.start()
    capture.await_durable(Position(BRANCH, end), timeout_seconds=3600)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    capture.stop()
    segments = lineage.logs()
    ((first, last),) = Ledger(segments).ranges(BRANCH)
    captured = end - first
    return {
        "postgresql": cluster.major,
        "megabytes": round(captured / 1e6),
        "stored_megabytes": round(sum(segment.size_bytes for segment in segments) / 1e6),
        "objects": len(segments),
        "commits_indexed": sum(len(lineage.log_index(segment).commits) for segment in segments),
        "wall_seconds": round(wall, 2),
        "cpu_seconds": round(cpu, 2),
        "megabytes_per_wall_second": round(captured / 1e6 / wall),
        "megabytes_per_cpu_second": round(captured / 1e6 / cpu),
        "resident_megabytes_max": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "files_compared": compare(lineage, cluster, first, last, folder),
    }


def main() -> int:
    """Run and print."""
    return own_server.run(__doc__, measure, CONF)


if __name__ == "__main__":
    sys.exit(main())
