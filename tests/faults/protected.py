"""A server that was backed up once for a whole module, and copies of its repository to be maltreated."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.faults.product import Product
from tests.integration.postgresql.cluster import Cluster, ClusterFactory


@dataclass
class Protected:
    """A running server and a repository with two backups of it and all log between them."""

    cluster: Cluster
    original: Product
    first_backup: str
    recovery_key: str

    def copy(self, folder: Path) -> Product:
        """The same repository again, in a folder of its own."""
        product = Product(folder, self.cluster.url)
        shutil.copytree(self.original.repository, product.repository)
        return product


@contextmanager
def protected(
    major: str, bindirs: dict[str, Path], folders: tuple[Path, Path], folder: Path
) -> Iterator[Protected]:
    """Start the server, protect it, and take it down at the end."""
    root, disk = folders
    factory = ClusterFactory(bindirs, root=root, disk=disk, noted=lambda major: None)
    try:
        cluster = factory.create(major)
        product = Product(folder, cluster.url)
        recovery_key = product.run("init")["recovery_key"]
        cluster.psql("CREATE TABLE t AS SELECT generate_series(1, 20000) AS number")
        first = product.run("backup", "db")["backup_id"]
        cluster.psql("INSERT INTO t SELECT generate_series(1, 20000)")
        product.run("backup", "db")
        yield Protected(cluster, product, first, recovery_key)
    finally:
        troubles = factory.close()
        assert not troubles, troubles
