"""Provisioning says clearly what is wrong with a server, and fetches nothing twice."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tools import provision

FAKE_PROGRAM = """#!/bin/sh
echo "postgres (PostgreSQL) 17.3"
"""


def _server(bindir: Path, *, without: str = "") -> Path:
    """A directory of programs that all claim to be PostgreSQL 17.3."""
    bindir.mkdir(parents=True)
    (bindir.parent / "share" / "extension").mkdir(parents=True)
    (bindir.parent / "share" / "extension" / "amcheck.control").touch()
    for name in (*provision.PROGRAMS_NEEDED, *provision.PROGRAMS_WANTED):
        if name != without:
            (bindir / name).write_text(FAKE_PROGRAM)
            (bindir / name).chmod(0o755)
    return bindir


def test_absent_tools_and_extensions_are_reported(tmp_path: Path) -> None:
    found = provision.inspect("17", _server(tmp_path / "bin", without="pg_amcheck"), "test")
    assert found.version == "17.3"
    assert {"pg_amcheck", "pg_combinebackup", "extension pageinspect"} <= set(found.absent)
    assert "extension amcheck" not in found.absent


def test_server_without_a_needed_program_is_refused(tmp_path: Path) -> None:
    with pytest.raises(provision.ProvisionError, match="lacks initdb"):
        provision.inspect("17", _server(tmp_path / "bin", without="initdb"), "test")


def test_server_of_another_version_is_refused(tmp_path: Path) -> None:
    with pytest.raises(provision.ProvisionError, match=r"holds PostgreSQL 17\.3, wanted 16"):
        provision.inspect("16", _server(tmp_path / "bin"), "test")


def test_program_that_does_not_run_is_reported_with_what_it_said(tmp_path: Path) -> None:
    bindir = _server(tmp_path / "bin")
    (bindir / "initdb").write_text("#!/bin/sh\necho libxml2.so.2: cannot open >&2\nexit 127\n")
    with pytest.raises(provision.ProvisionError, match=r"exited with 127:\s+libxml2.so.2: cannot open"):
        provision.inspect("17", bindir, "test")


def test_second_source_serves_when_the_first_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLOUDSAVE_TEST_CACHE", str(tmp_path))

    def fails(major: str) -> None:
        raise provision.ProvisionError("no route")

    def works(major: str) -> None:
        _server(tmp_path / "postgresql" / major / "bin")
        (tmp_path / "postgresql" / major / "SOURCE").write_text("a test\n")

    monkeypatch.setattr(provision, "SOURCES", (("first", fails),))
    with pytest.raises(provision.ProvisionError, match="first: no route"):
        provision.ensure("17")
    monkeypatch.setattr(provision, "SOURCES", (("first", fails), ("second", works)))
    assert provision.ensure("17").source == "a test"
    monkeypatch.setattr(provision, "SOURCES", ())
    assert provision.ensure("17").source == "a test"
    shutil.rmtree(tmp_path / "postgresql")
    with pytest.raises(provision.ProvisionError, match="17 is not available"):
        provision.ensure("17")
