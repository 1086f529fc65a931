"""
How fast log is searched for what transactions did: MB of log per second, by `find` with two threads.

Goal: 1 GB of log in 5 s. The bound: a byte is read, authenticated and decrypted (above 2000 MB/s a core),
decompressed (zstd, 600 to 1000 MB/s a core) and passed over (above 1500 MB/s), so that two cores can do 800
to 1300 MB/s; what takes longer is to put transactions together, a hundred thousand rows for each object.
The log is that of pgbench, with a table deleted from, emptied and dropped in the middle; that all is found is
checked, or the figure counts nothing. The commits alone come from the index.

    python benchmarks/bench_find.py [--postgresql 18] [--megabytes 1024] [--json]
"""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.integration.postgresql.cluster import Cluster
from tests.integration.postgresql.recoveries import DIALECT, Protected

from benchmarks import own_server
from benchmarks.bench_capture import CONF
from cloudsave.engines.postgresql.log import parse_lsn
from cloudsave.engines.registry import log_search
from cloudsave.model.found import DESTRUCTIVE, ChangeKind, SearchQuery
from cloudsave.recovery.find import LAST_US, Filters, FindContext, SearchResult, find
from cloudsave.recovery.history import IndexReader, read_history
from cloudsave.store.posix import PosixStore
from cloudsave.telemetry import NoProgress

FILE_BYTES = 16 << 20
ACCIDENTS = (
    "CREATE TABLE victim AS SELECT n FROM generate_series(1, 20000) n",
    "DELETE FROM victim",
    "TRUNCATE victim",
    "DROP TABLE victim",
)
FOUND = {ChangeKind.DELETE, ChangeKind.TRUNCATE, ChangeKind.DROP}


def write_log(cluster: Cluster, megabytes: int) -> None:
    """
    pgbench's tables, then its transactions until there is enough, behind a checkpoint each 20,000, so that
    much of it are page images as in the log of a busy server; the accidents when the half of it is there.
    """
    begin = parse_lsn(cluster.lsn())
    cluster.pgbench_init(max(1, megabytes // 30))
    done = False
    while (written := parse_lsn(cluster.lsn()) - begin) < megabytes << 20:
        if not done and written > megabytes << 19:
            for statement in ACCIDENTS:
                cluster.psql(statement)
            done = True
        cluster.psql("CHECKPOINT")
        cluster.run("pgbench", "-n", "-c", "4", "-t", "5000")
    cluster.switch_wal()


def timed(context: FindContext, query: SearchQuery) -> tuple[SearchResult, float, float]:
    """A search, with its seconds of wall clock and of CPU."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = find(query, None, Filters(), context)
    return result, time.perf_counter() - wall, time.process_time() - cpu


def measure(cluster: Cluster, folder: Path, megabytes: int) -> dict[str, float | int | str]:
    """One run on a server that has no log of ours yet."""
    protected = Protected.begin(cluster, PosixStore(folder / "repository"))
    with protected.captured() as capture:
        protected.back_up()
        write_log(cluster, megabytes)
        protected.catch_up(capture)
    history = read_history(protected.lineage, DIALECT)
    version = history.backups[-1].server_version

    def context() -> FindContext:
        return FindContext(
            lineage=protected.lineage,
            search=log_search("postgresql", server_version=version, log_file_bytes=FILE_BYTES),
            history=history,
            indexes=IndexReader(protected.lineage, DIALECT, log_file_bytes=FILE_BYTES),
            progress=NoProgress(),
            workers=2,
        )

    result, wall, cpu = timed(context(), SearchQuery(0, LAST_US, DESTRUCTIVE, 1000))
    found = {change.kind for hit in result.hits for change in hit.found.changes}
    if not found >= FOUND or not result.whole:
        raise AssertionError(f"found only {sorted(found)}; {result.shortcomings}")
    commits, commit_wall, _ = timed(context(), SearchQuery(0, LAST_US, frozenset({ChangeKind.COMMIT})))
    middle = result.hits[len(result.hits) // 2].found
    one = SearchQuery(0, LAST_US, frozenset(ChangeKind), 1, middle.transaction)
    single, single_wall, _ = timed(context(), one)
    return {
        "postgresql": cluster.major,
        "megabytes": round(result.log_bytes / 1e6),
        "stored_megabytes": round(sum(one.size_bytes for one in history.segments) / 1e6),
        "wall_seconds": round(wall, 2),
        "cpu_seconds": round(cpu, 2),
        "megabytes_per_second": round(result.log_bytes / 1e6 / wall),
        "hits": len(result.hits),
        "commits_listed": len(commits.hits),
        "commits_wall_seconds": round(commit_wall, 2),
        "one_transaction_wall_seconds": round(single_wall, 2),
        "one_transaction_hits": len(single.hits),
        "resident_megabytes_max": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def main() -> int:
    """Run and print."""
    return own_server.run(__doc__, measure, CONF)


if __name__ == "__main__":
    sys.exit(main())
