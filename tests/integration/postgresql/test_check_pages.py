"""`cloudsave check --pages` on real servers: damage is named, nothing is stored, a sound server passes."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest

from tests.integration.postgresql.cluster import Cluster
from tests.integration.postgresql.command_line import SOURCE, CommandLine

REMOTE_MAJORS = ("14", "16", "18")
"""Versions that are read by the replication protocol; the others' files are read from the disk."""


def flip(path: Path, offset: int) -> None:
    """Change one bit of a file."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 0x10]))


def stored(user: CommandLine) -> set[str]:
    """Names of all objects of the repository but those that log capture stores meanwhile."""
    captured = {"logs", ".tmp"}
    files = (path for path in user.store.rglob("*") if path.is_file() and captured.isdisjoint(path.parts))
    return {str(path) for path in files}


def pages_of(result: dict[str, Any]) -> list[tuple[str, int]]:
    """The damaged pages that a check has named."""
    return [(page["path"], page["block"]) for page in result["pages"]["corrupt_pages"]]


@pytest.mark.fault("page-corrupt-scrubbed")
def test_a_flipped_byte_is_found_and_a_sound_server_passes(
    cluster: Cluster, postgresql_major: str, tmp_path: Path
) -> None:
    mode = "remote" if postgresql_major in REMOTE_MAJORS else "local"
    cluster.psql("CREATE TABLE t AS SELECT g FROM generate_series(1, 300000) g")
    path = cluster.psql("SELECT pg_relation_filepath('t')")
    with contextlib.closing(CommandLine(tmp_path, cluster)) as user:
        user.prepare()
        with user.captured():
            user.run("backup", SOURCE)
            before = stored(user)
            sound = user.run("check", SOURCE, "--pages", "--mode", mode)
            assert sound["pages"]["method"] == mode
            assert pages_of(sound) == []
            assert sound["pages"]["bytes_read"] > 10 << 20
            cluster.stop()
            flip(cluster.data / path, 700 * 8192 + 5000)
            cluster.start()
            damaged = user.run("check", SOURCE, "--pages", "--mode", mode, exit_code=3)
            assert pages_of(damaged) == [(path, 700)]
            problems = [one["fact"] for one in damaged["findings"] if one["severity"] == "problem"]
            assert problems[-1] == "1 damaged pages in 1 files"
            assert problems[-2].startswith(f"page 700 of {path}: ")
            assert stored(user) == before, "a check stored something"
            user.run("check", SOURCE)  # Without --pages nobody looks.
