"""Base backups of a server whose log nobody captures: what lies between them is lost, and each one stands."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from tests.faults.product import Product
from tests.integration.postgresql.cluster import ClusterFactory


@pytest.mark.parametrize("mode", ["local", "remote"])
@pytest.mark.postgresql_majors("14", "18")
@pytest.mark.fault("log-recycled-between-backups", "log-hole-asked-across")
def test_a_backup_after_the_server_recycled_its_log_notes_a_hole_and_stands(
    clusters: ClusterFactory, postgresql_major: str, tmp_path: Path, mode: str
) -> None:
    conf = {"max_wal_size": "64MB", "min_wal_size": "32MB"}
    cluster = clusters.create(postgresql_major, conf=conf)
    product = Product(tmp_path, cluster.url)
    product.run("init")
    first = product.run("backup", "db")["backup_id"]
    cluster.psql("CREATE TABLE t (number int)")
    for _ in range(8):
        cluster.psql("INSERT INTO t SELECT generate_series(1, 1000)")
        cluster.switch_wal()
        cluster.psql("CHECKPOINT")
    second = product.run("backup", "db", "--mode", mode)["backup_id"]
    holes = product.run("logs", "status", "db", exit_code=3)["holes"]
    assert all("removed" in hole["cause"] for hole in holes)
    assert all(one["end"] == other["begin"] for one, other in itertools.pairwise(holes))
    for backup_id in (first, second):
        into = tmp_path / backup_id
        product.run("restore", "db", "--immediate", "--backup", backup_id, "--into", str(into))
    across = product.answer("restore", "db", "--position", holes[0]["end"], "--into", str(tmp_path / "new"))
    assert across.expect(4).error["code"] == "CS-5001"
    assert across.error["before"] is not None
    assert across.error["after"] is not None
    assert not (tmp_path / "new").exists()
