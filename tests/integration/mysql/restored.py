"""Restores of MariaDB by the command line, and the servers that are started on them."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.integration.mysql.cluster import BinlogCluster, program_settings
from tests.integration.mysql.product import Product


class Restores:
    """Directories beside a product's source, restored from its repository."""

    def __init__(self, product: Product) -> None:
        self.product = product
        self.place = product.cluster.home / "restores"
        self.place.mkdir()
        self._number = 0

    def arguments(self, into: Path, *target: str) -> list[str]:
        """Of `cloudsave restore`."""
        cluster = self.product.cluster
        settings = [f"{name}={value}" for name, value in program_settings(cluster.server).items()]
        given = [word for one in settings for word in ("--set", one)]
        owner = ["--owner", cluster.user.name] if cluster.user.name else []
        return ["restore", "db", "--into", str(into), *owner, *target, *given]

    def new(self) -> Path:
        """A place for one."""
        self._number += 1
        return self.place / str(self._number)

    def restore(self, *target: str, into: Path | None = None, status: int = 0) -> Path:
        """Restore to a target; where the directory is."""
        chosen = into or self.new()
        self.product.run(*self.arguments(chosen, *target), status=status)
        return chosen

    def begin(self, into: Path, *target: str) -> subprocess.Popen[bytes]:
        """Start a restore in the background."""
        return self.product.begin(*self.arguments(into, *target))

    @contextmanager
    def server(self, directory: Path) -> Iterator[BinlogCluster]:
        """A stock server on a restored directory, which is gone afterwards."""
        source = self.product.cluster
        home = directory.with_name(directory.name + ".home")
        home.mkdir(mode=0o755)
        directory.rename(home / "data")
        source.user.own(home)
        conf = {**source.conf, "server_id": "4711", "skip_networking": "1"}
        cluster = BinlogCluster(source.server, home, source.user, conf)
        try:
            cluster.start()
            yield cluster
            cluster.stop()
        finally:
            if cluster.running():
                cluster.crash()
            shutil.rmtree(home)


def tables(cluster: BinlogCluster, schemas: Sequence[str]) -> dict[str, object]:
    """The checksum of each table; all of them must be sound."""
    found: dict[str, object] = {}
    for schema in schemas:
        names = cluster.sql(f"SHOW FULL TABLES FROM {quoted(schema)} WHERE Table_type = 'BASE TABLE'")
        for name, _ in names:
            table = f"{quoted(schema)}.{quoted(name)}"
            (checked,) = cluster.sql(f"CHECK TABLE {table} EXTENDED")
            assert checked[3] == "OK", (table, checked)
            ((_, checksum),) = cluster.sql(f"CHECKSUM TABLE {table} EXTENDED")
            found[table] = checksum
    return found


def quoted(name: str) -> str:
    """A name as SQL has it."""
    return "`" + name.replace("`", "``") + "`"
