"""
Over a network, as the documented account with a password: by the servers' own ways to log in, with TLS that
is verified, and without.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from tools.provision_binlog import BinlogServer

from tests.integration.mysql.certificates import make_certificates
from tests.integration.mysql.cluster import BinlogCluster, BinlogClusterFactory
from tests.integration.mysql.product import Product
from tests.integration.mysql.restored import Restores
from tests.integration.postgresql.cluster import reserved_port

HOST = "127.0.0.1"
PASSWORD = "p'a\"ss w\\ord#1"
GRANTS: Mapping[str, tuple[str, ...]] = {
    "mysql": ("REPLICATION SLAVE, REPLICATION CLIENT", "BACKUP_ADMIN, SELECT"),
    "mariadb": ("REPLICATION SLAVE, BINLOG MONITOR", "RELOAD, PROCESS, LOCK TABLES"),
}
"""As the guide has them."""
EXTENSIONS: Mapping[str, str] = {
    "mysql": "INSTALL PLUGIN clone SONAME 'mysql_clone.so'",
    "mariadb": "INSTALL SONAME 'auth_ed25519'",
}
LOGINS: Mapping[str, tuple[str, ...]] = {
    "mysql": ("caching_sha2_password",),
    "mariadb": ("mysql_native_password", "ed25519"),
}
"""Base backups use the first: mariadb-backup, which was only unpacked, does not find the others."""


@dataclass
class Network:
    """A server that listens on a port, and its certificates."""

    cluster: BinlogCluster
    port: int
    files: dict[str, Path]

    def url(self, account: str, **parameters: object) -> str:
        query = "&".join(f"{name.replace('_', '-')}={value}" for name, value in parameters.items())
        return f"{self.cluster.engine}://{account}@{HOST}:{self.port}?{query}".rstrip("?")


def listening(
    clusters: BinlogClusterFactory, server: BinlogServer, tmp_path: Path, port: socket.socket, *, tls: bool
) -> Network:
    """A server with one account for each way to log in, called like it."""
    files = make_certificates(clusters.root / tmp_path.name, host=HOST)
    number = int(port.getsockname()[1])
    conf = {"skip_networking": "0", "bind_address": HOST, "port": str(number)}
    if tls:
        conf |= {
            "require_secure_transport": "ON",
            **{f"ssl_{name}": str(files[name]) for name in ("ca", "cert", "key")},
        }
    elif server.engine == "mysql":
        conf |= {"tls_version": ""}
    else:
        conf |= {"skip_ssl": ""}
    cluster = clusters.create(server, conf=conf)
    cluster.sql(EXTENSIONS[server.engine])
    literal = PASSWORD.replace("\\", "\\\\").replace("'", "''")
    for login in LOGINS[server.engine]:
        secret = f"BY '{literal}'" if server.engine == "mysql" else f"USING PASSWORD('{literal}')"
        word = "WITH" if server.engine == "mysql" else "VIA"
        cluster.sql(
            f"CREATE USER {login}@'%' IDENTIFIED {word} {login} {secret}",
            *(f"GRANT {rights} ON *.* TO {login}@'%'" for rights in GRANTS[server.engine]),
        )
    return Network(cluster, number, files)


@pytest.fixture
def network(
    binlog_clusters: BinlogClusterFactory, binlog_server: BinlogServer, tmp_path: Path
) -> Iterator[Network]:
    with reserved_port() as port:
        yield listening(binlog_clusters, binlog_server, tmp_path, port, tls=True)


@pytest.fixture
def products(tmp_path: Path) -> Iterator[list[Product]]:
    made: list[Product] = []
    yield made
    for one in made:
        one.close()


def product_of(network: Network, folder: Path, url: str, products: list[Product]) -> Product:
    folder.mkdir()
    made = Product(folder, network.cluster, url=url, environment={"MYSQL_PWD": PASSWORD})
    products.append(made)
    return made


def test_backup_capture_and_restore_by_the_documented_account_over_verified_tls(
    network: Network, tmp_path: Path, products: list[Product]
) -> None:
    cluster = network.cluster
    url = network.url(LOGINS[cluster.engine][0], ssl_mode="VERIFY_IDENTITY", ssl_ca=network.files["ca"])
    product = product_of(network, tmp_path / "product", url, products)
    capture = product.capture()
    cluster.sql("CREATE DATABASE d", "CREATE TABLE d.t (x TEXT)", "INSERT INTO d.t VALUES ('one')")
    product.run("backup", "db")
    cluster.sql("INSERT INTO d.t VALUES ('two')")
    product.wait_for(b"two")
    product.stop(capture)
    restores = Restores(product)
    with restores.server(restores.restore()) as restored:
        assert [row[0] for row in restored.sql("SELECT x FROM d.t")] == ["one", "two"]


@pytest.mark.fault("binlog-server-of-another-authority")
def test_a_certificate_of_another_authority_is_refused(
    network: Network, tmp_path: Path, products: list[Product]
) -> None:
    """Control: that of its own is taken."""
    login = LOGINS[network.cluster.engine][0]
    other = network.url(login, ssl_ca=network.files["other"])
    said = product_of(network, tmp_path / "other", other, products).run("backup", "db", status=1)
    assert "certificate verify failed" in said
    own = network.url(login, ssl_ca=network.files["ca"])
    product_of(network, tmp_path / "own", own, products).run("backup", "db")


def test_tls_is_used_unasked_where_the_server_insists(
    network: Network, tmp_path: Path, products: list[Product]
) -> None:
    login = LOGINS[network.cluster.engine][0]
    product_of(network, tmp_path / "unasked", network.url(login), products).run("backup", "db")
    plain = network.url(login, ssl_mode="DISABLED")
    said = product_of(network, tmp_path / "plain", plain, products).run("backup", "db", status=1)
    assert "secure" in said or "Access denied" in said  # MariaDB 10.11 says no more than that


@pytest.mark.fault("binlog-tls-not-there")
def test_without_tls_each_way_to_log_in_works_and_tls_that_is_asked_for_is_refused(
    binlog_clusters: BinlogClusterFactory,
    binlog_server: BinlogServer,
    tmp_path: Path,
    products: list[Product],
) -> None:
    with reserved_port() as port:
        network = listening(binlog_clusters, binlog_server, tmp_path, port, tls=False)
        for login in LOGINS[binlog_server.engine]:
            product = product_of(network, tmp_path / login, network.url(login), products)
            capture = product.capture()
            network.cluster.sql(f"CREATE DATABASE by_{login}")
            product.wait_for(f"by_{login}".encode())
            product.stop(capture)
        product_of(network, tmp_path / "backup", network.url(LOGINS[binlog_server.engine][0]), products).run(
            "backup", "db"
        )
        wanted = network.url(LOGINS[binlog_server.engine][0], ssl_mode="REQUIRED")
        said = product_of(network, tmp_path / "wanted", wanted, products).run("backup", "db", status=1)
        assert "SSL is required" in said


@pytest.mark.fault("binlog-wrong-password")
def test_a_wrong_password_is_told_as_such(network: Network, tmp_path: Path, products: list[Product]) -> None:
    login = LOGINS[network.cluster.engine][0]
    product = product_of(network, tmp_path / "product", network.url(login), products)
    product.environment["MYSQL_PWD"] = "mistaken"
    said = product.run("backup", "db", status=1)
    assert "Access denied" in said
    assert "mistaken" not in said
