"""Fixtures that give tests real PostgreSQL servers of every version; loaded by tests/conftest.py."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tools import provision

from tests.engine_report import note_engine, require_engine
from tests.integration.postgresql.cluster import (
    DISK_PARENT,
    Cluster,
    ClusterFactory,
    memory_parent,
    open_session_folder,
)

MAJORS = ("14", "15", "16", "17", "18")
MARKER = "postgresql_majors"


def pytest_addoption(parser: pytest.Parser) -> None:
    """--postgresql=15,18 narrows the versions."""
    text = f"PostgreSQL major versions to test with (default: {','.join(MAJORS)})"
    parser.addoption("--postgresql", default=",".join(MAJORS), metavar="MAJORS", help=text)


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker and the versions that a complete run must exercise."""
    text = f"{MARKER}(*majors): run only on these of the PostgreSQL versions"
    config.addinivalue_line("markers", text)
    for major in wanted_majors(config):
        if major not in MAJORS:
            raise pytest.UsageError(f"--postgresql: {major!r} is none of {', '.join(MAJORS)}")
        require_engine(config, "postgresql", major, fixture="postgresql_major")


def wanted_majors(config: pytest.Config) -> tuple[str, ...]:
    """The versions asked for on the command line."""
    return tuple(config.getoption("--postgresql").split(","))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One run per version for each test that uses `postgresql_major`, directly or by `cluster`."""
    if "postgresql_major" not in metafunc.fixturenames:
        return
    majors = wanted_majors(metafunc.config)
    marker = metafunc.definition.get_closest_marker(MARKER)
    if marker:
        majors = tuple(major for major in majors if major in marker.args)
    metafunc.parametrize("postgresql_major", majors, ids=[f"pg{major}" for major in majors], scope="session")


@pytest.fixture(scope="session")
def postgresql_bindirs(request: pytest.FixtureRequest) -> dict[str, Path]:
    """Directory of the server's programs by major version. Fails, never skips, when one is absent."""
    there = provision.listing()
    absent = [major for major in wanted_majors(request.config) if major not in there]
    if absent:
        pytest.fail(f"PostgreSQL {', '.join(absent)} is not available; run: python tools/provision.py")
    return {major: Path(found.bindir) for major, found in there.items()}


@pytest.fixture(scope="session")
def postgresql_folders() -> Iterator[tuple[Path, Path]]:
    """The folders, in memory and on disk, below which all servers of this run live; removed at the end."""
    folders = (open_session_folder(memory_parent()), open_session_folder(DISK_PARENT))
    yield folders
    for folder in folders:
        shutil.rmtree(folder)


@pytest.fixture
def clusters(
    request: pytest.FixtureRequest,
    postgresql_bindirs: dict[str, Path],
    postgresql_folders: tuple[Path, Path],
) -> Iterator[ClusterFactory]:
    """Makes servers for one test and takes them down after it, even when it fails."""

    def noted(major: str) -> None:
        note_engine(request.node, "postgresql", major, version=version_of(postgresql_bindirs[major]))

    root, disk = postgresql_folders
    factory = ClusterFactory(postgresql_bindirs, root=root, disk=disk, noted=noted)
    yield factory
    troubles = factory.close()
    assert not troubles, troubles


@pytest.fixture
def cluster(clusters: ClusterFactory, postgresql_major: str) -> Cluster:
    """A started server with default settings, one run per version."""
    return clusters.create(postgresql_major)


_VERSIONS: dict[Path, str] = {}


def version_of(bindir: Path) -> str:
    """Full version of the server in a directory, such as 17.11; asked once per run."""
    if bindir not in _VERSIONS:
        said = subprocess.run([bindir / "postgres", "--version"], check=True, capture_output=True, text=True)
        _VERSIONS[bindir] = said.stdout.split()[2]
    return _VERSIONS[bindir]
