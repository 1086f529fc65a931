"""Fixtures that give tests real MySQL and MariaDB servers of every series; loaded by tests/conftest.py."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from tools import provision_binlog
from tools.provision_binlog import BinlogServer

from tests.engine_report import note_engine, require_engine
from tests.integration.mysql.cluster import BinlogCluster, BinlogClusterFactory
from tests.integration.postgresql.cluster import memory_parent, open_session_folder

SERIES = {
    engine: tuple(one.major for one in provision_binlog.SERIES if one.engine == engine)
    for engine in ("mysql", "mariadb")
}


def pytest_addoption(parser: pytest.Parser) -> None:
    """--mysql=9.7 and --mariadb=11.8 narrow the series; empty: none of the engine."""
    for engine, series in SERIES.items():
        text = f"{engine} series to test with (default: {','.join(series)})"
        parser.addoption(f"--{engine}", default=",".join(series), metavar="SERIES", help=text)


def pytest_configure(config: pytest.Config) -> None:
    """Declare the series that a complete run must exercise."""
    config.addinivalue_line(
        "markers", "engine(*names): of the servers with a binlog, those of these engines alone"
    )
    for engine, major in wanted(config):
        if major not in SERIES[engine]:
            raise pytest.UsageError(f"--{engine}: {major!r} is none of {', '.join(SERIES[engine])}")
        require_engine(config, engine, major, fixture="binlog_series")


def wanted(config: pytest.Config) -> list[tuple[str, str]]:
    """(engine, series) asked for on the command line."""
    return [
        (engine, major) for engine in SERIES for major in config.getoption(f"--{engine}").split(",") if major
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """
    One run per series for each test that uses `binlog_series`, directly or by `binlog_cluster`; where it is
    marked `engine(NAME)`, of that engine alone.
    """
    if "binlog_series" in metafunc.fixturenames:
        only = metafunc.definition.get_closest_marker("engine")
        series = [one for one in wanted(metafunc.config) if only is None or one[0] in only.args]
        ids = ["".join(one) for one in series]
        metafunc.parametrize("binlog_series", series, ids=ids, scope="session")


@pytest.fixture(scope="session")
def binlog_folder() -> Iterator[Path]:
    """The folder below which all servers of this run live; removed at the end."""
    folder = open_session_folder(memory_parent())
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def binlog_clusters(binlog_folder: Path) -> Iterator[BinlogClusterFactory]:
    """Makes servers for one test and takes them down after it, even when it fails."""
    factory = BinlogClusterFactory(binlog_folder)
    yield factory
    factory.close()


@pytest.fixture
def binlog_server(request: pytest.FixtureRequest, binlog_series: tuple[str, str]) -> BinlogServer:
    """The programs of a series. Fails, never skips, when they are absent."""
    found = provision_binlog.listing().get(binlog_series)
    if found is None:
        pytest.fail(f"{' '.join(binlog_series)} is not available; run: python -m tools.provision_binlog")
    note_engine(request.node, *binlog_series, version=found.version)
    return found


@pytest.fixture
def binlog_cluster(binlog_clusters: BinlogClusterFactory, binlog_server: BinlogServer) -> BinlogCluster:
    """A started server with default settings, one run per series."""
    return binlog_clusters.create(binlog_server)
