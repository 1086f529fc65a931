"""Other shapes of log: compressed page images, log files of other sizes; captured, and replayed to a time."""

from __future__ import annotations

from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.integration.postgresql.cluster import Cluster, ClusterFactory
from tests.integration.postgresql.command_line import SOURCE, CommandLine
from tests.integration.postgresql.oracle import Ledger, LedgerClients, assert_ledger

KEPT = {"wal_keep_size": "1GB"}
COMPRESSED = "compression saved"
"""What pg_waldump says of a page image that is compressed."""


def brought_to_a_time(cluster: Cluster, tmp_path: Path) -> str:
    """
    Capture, back up and restore to a time, all under load, and judge; what pg_waldump says of the log.
    """
    record = tmp_path / "ledger.jsonl"
    with closing(CommandLine(tmp_path, cluster)) as user:
        user.prepare()
        with user.captured():
            begin = cluster.lsn()
            with LedgerClients(lambda: cluster.url, record, clients=2) as clients:
                clients.wait_for(50)
                user.run("backup", SOURCE)
                cluster.psql(
                    "CREATE TABLE wide AS SELECT g, repeat('x', 100) FROM generate_series(1, 9000) g"
                )
                cluster.psql("CHECKPOINT")
                cluster.psql("UPDATE wide SET g = g + 1")  # Page images of what the checkpoint has written.
                clients.wait_for(100)
                instant = datetime.now(UTC)
                clients.wait_for(50)
            end = cluster.switch_wal()
            user.catch_up()
        log = cluster.run("pg_waldump", "-b", "-p", str(cluster.data / "pg_wal"), "-s", begin, "-e", end)
        text = instant.isoformat(timespec="microseconds")
        with user.restored("--time", text) as restored, restored.server.connect() as connection:
            assert_ledger(connection, Ledger.read(record).expected_ids(instant))
            assert restored.server.psql("SELECT count(*), min(g) FROM wide") == "9000|2"
            restored.server.amcheck()
    return log


@pytest.mark.postgresql_majors("14")
def test_small_log_files_with_page_images_by_pglz(
    clusters: ClusterFactory, postgresql_major: str, tmp_path: Path
) -> None:
    cluster = clusters.create(postgresql_major, segment_megabytes=1, conf={**KEPT, "wal_compression": "on"})
    assert COMPRESSED in brought_to_a_time(cluster, tmp_path)


@pytest.mark.postgresql_majors("15")
def test_large_log_files_with_page_images_by_lz4(
    clusters: ClusterFactory, postgresql_major: str, tmp_path: Path
) -> None:
    cluster = clusters.create(postgresql_major, segment_megabytes=64, conf={**KEPT, "wal_compression": "lz4"})
    assert "method: lz4" in brought_to_a_time(cluster, tmp_path)


@pytest.mark.postgresql_majors("18")
def test_small_log_files_with_page_images_by_zstd(
    clusters: ClusterFactory, postgresql_major: str, tmp_path: Path
) -> None:
    cluster = clusters.create(postgresql_major, segment_megabytes=1, conf={**KEPT, "wal_compression": "zstd"})
    assert "method: zstd" in brought_to_a_time(cluster, tmp_path)


@pytest.mark.postgresql_majors("18")
def test_negative_control_a_log_without_compression_is_told_from_one_with_it(
    clusters: ClusterFactory, postgresql_major: str
) -> None:
    cluster = clusters.create(postgresql_major, segment_megabytes=64)
    begin = cluster.lsn()
    cluster.psql("CREATE TABLE t AS SELECT 1 AS x; CHECKPOINT; UPDATE t SET x = 2")
    log = cluster.run(
        "pg_waldump", "-b", "-p", str(cluster.data / "pg_wal"), "-s", begin, "-e", cluster.lsn()
    )
    assert "FPW" in log
    assert COMPRESSED not in log
