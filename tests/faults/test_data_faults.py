"""
Files, disks and clocks that fail or change under a server while it is backed up: each test plays its story
without the fault as well, or with the cure, and sees the opposite.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from cloudsave.clock import SYSTEM_CLOCK
from cloudsave.engines.api import BackupSource
from cloudsave.engines.postgresql.engine import PostgresEngine
from cloudsave.engines.postgresql.target import PostgresTarget
from cloudsave.errors import EngineError, ServerToolsMissing, TargetUnreachable
from cloudsave.model.engine_facts import BackupStart, BackupStop
from cloudsave.model.item import Piece
from cloudsave.model.position import Position
from cloudsave.model.target import Target, TargetKind
from cloudsave.recovery.bring_up import BringUpContext, BringUpOptions, bring_up
from cloudsave.telemetry import NoProgress
from tests.faults.test_bad_server import enlarge, small_disk
from tests.faults.test_log_faults import KEPT_LOG, captured, protected_table, rows
from tests.integration.postgresql.backups import started, take_backup
from tests.integration.postgresql.cluster import Cluster, ClusterFactory, ServerFailed
from tests.integration.postgresql.command_line import SOURCE, CommandLine
from tests.integration.postgresql.recoveries import DIALECT

pytestmark = pytest.mark.postgresql_majors("14", "18")

MODES = pytest.mark.parametrize("mode", ["local", "remote"])
LOG_DISK_MIB, LARGER_MIB = 100, 400
FULL_ROUNDS_MAX = 40


class Disturbed:
    """A backup during which something happens, after the first piece has been given out."""

    def __init__(self, source: BackupSource, act: Callable[[], object]) -> None:
        self._source = source
        self._act = act
        self.begin: Callable[[], BackupStart] = source.begin
        self.finish: Callable[[], BackupStop] = source.finish
        self.abort: Callable[[], None] = source.abort

    def pieces(self) -> Iterator[Piece]:
        """All pieces."""
        for number, piece in enumerate(self._source.pieces()):
            if number == 1:
                self._act()
            yield piece


def source_of(cluster: Cluster, mode: str) -> BackupSource:
    """A backup by the engine alone."""
    return PostgresEngine(cluster.url).backup_source(mode=mode, fast=True, label="disturbed")


@MODES
@pytest.mark.fault("files-change-size-during-backup")
def test_files_that_shrink_and_grow_while_they_are_read_are_right_after_replay(
    clusters: ClusterFactory, postgresql_major: str, mode: str
) -> None:
    cluster = clusters.create(postgresql_major, conf=KEPT_LOG)
    cluster.psql("CREATE TABLE shrinks AS SELECT generate_series(1, 50000) AS i")
    cluster.psql("CREATE TABLE grows AS SELECT generate_series(1, 10) AS i")

    def change() -> None:
        cluster.psql("DELETE FROM shrinks WHERE i > 100")
        cluster.psql("VACUUM shrinks")
        cluster.psql("INSERT INTO grows SELECT generate_series(11, 50000)")
        cluster.psql("CHECKPOINT")

    taken = take_backup(Disturbed(source_of(cluster, mode), change), cluster)
    restored = started(taken, cluster)
    sums = "SELECT (SELECT sum(i) FROM shrinks), (SELECT sum(i) FROM grows)"
    assert restored.psql(sums) == cluster.psql(sums) == "5050|1250025000"
    restored.amcheck()
    # Control: the same check sees a file that was not read as it was.
    path = restored.psql("SELECT pg_relation_filepath('grows')")
    restored.stop()
    os.truncate(restored.data / path, 8192)
    restored.start()
    with pytest.raises((AssertionError, ServerFailed)):
        assert restored.psql(sums) == "5050|1250025000"


@MODES
@pytest.mark.fault("server-crashes-during-backup")
def test_a_server_that_crashes_during_its_backup_leaves_no_backup(
    clusters: ClusterFactory, postgresql_major: str, mode: str
) -> None:
    cluster = clusters.create(postgresql_major)
    source = Disturbed(source_of(cluster, mode), cluster.crash)
    with pytest.raises(EngineError):
        take_backup(source, cluster)
    source.abort()
    cluster.start()
    assert take_backup(source_of(cluster, mode), cluster).stop.corrupt_pages == ()


# ---- disks


@pytest.fixture(scope="module")
def failing_calls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that makes reads fail and clocks go wrong, for LD_PRELOAD; it needs a C compiler."""
    library = tmp_path_factory.mktemp("preloaded") / "failing_calls.so"
    code = Path(__file__).with_name("failing_calls.c")
    compiler = shutil.which("cc") or pytest.fail("needs a C compiler")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, code, "-ldl"], check=True)
    library.parent.chmod(0o755)
    return library


@pytest.mark.fault("source-disk-read-error")
def test_a_file_that_cannot_be_read_fails_the_backup_by_name(
    clusters: ClusterFactory, postgresql_major: str, failing_calls: Path, tmp_path: Path
) -> None:
    cluster = clusters.create(postgresql_major)
    cluster.psql("CREATE TABLE t AS SELECT generate_series(1, 50000) AS i")
    path = cluster.psql("SELECT pg_relation_filepath('t')")
    environment = {"LD_PRELOAD": str(failing_calls), "FAILING_PATH": path}
    line = CommandLine(tmp_path, cluster, environment=environment)
    line.prepare()
    try:
        error = line.refused("backup", SOURCE, "--mode", "local", exit_code=1)
        assert error["code"] == "CS-2012"
        assert path in error["message"] + error["detail"]
        assert line.run("list") == []
        cluster.psql("VACUUM FULL t")  # Written anew, to another file.
        line.run("backup", SOURCE, "--mode", "local")
    finally:
        line.close()


@pytest.mark.fault("source-disk-full")
def test_a_source_whose_log_disk_is_full_loses_nothing_that_it_acknowledged(
    clusters: ClusterFactory, postgresql_major: str
) -> None:
    """Nobody captures and the slot holds all log, until the server stops; with more space all is captured."""
    cluster = clusters.create(
        postgresql_major, conf={"max_wal_size": "32MB", "min_wal_size": "32MB"}, start=False
    )
    disk = cluster.home / "log"
    with small_disk(disk, mib=LOG_DISK_MIB):
        shutil.move(cluster.data / "pg_wal", disk / "pg_wal")
        (cluster.data / "pg_wal").symlink_to(disk / "pg_wal")
        cluster.user.own(disk)
        cluster.start()
        protected = protected_table(cluster)
        acknowledged = [1, 2, *rows_until_full(cluster)]
        if cluster.running():  # Some give up at once; others try again and again.
            cluster.crash()
        enlarge(disk, mib=LARGER_MIB)
        cluster.start()
        with captured(protected) as capture:
            cluster.psql("INSERT INTO t VALUES (1000)")
        assert capture.alarms() == set()
        assert protected.lineage.holes() == []
        found = rows(protected)
        assert set(acknowledged) | {1000} <= set(found)
        # What was under way when the disk was full was not acknowledged: it may be there.
        assert len(found) <= len(acknowledged) + 2
        cluster.stop(immediate=True)


def rows_until_full(cluster: Cluster) -> Iterator[int]:
    """Write rows and log files until the server gives up; the rows that it acknowledged."""
    for number in range(3, FULL_ROUNDS_MAX):
        try:
            cluster.psql(f"INSERT INTO t VALUES ({number})")
            yield number
            cluster.switch_wal()
        except ServerFailed:
            return
    pytest.fail("the disk was never full")


# ---- clocks


@pytest.mark.fault("source-clock-set-back")
def test_a_clock_that_is_set_back_leaves_out_nothing_and_brings_nothing_of_later(
    clusters: ClusterFactory, postgresql_major: str, failing_calls: Path
) -> None:
    cluster = clusters.create(postgresql_major, start=False)
    offset, library = cluster.home / "offset", cluster.home / failing_calls.name
    offset.write_text("0")
    shutil.copy(failing_calls, library)
    cluster.user.own(cluster.home)
    plain = cluster.environment()
    preloaded = {"LD_PRELOAD": str(library), "CLOCK_OFFSET_FILE": str(offset)}
    cluster.environment = lambda: {**plain, **preloaded}  # type: ignore[method-assign]
    cluster.start()
    cluster.environment = lambda: plain  # type: ignore[method-assign]
    protected = protected_table(cluster)
    with captured(protected):
        cluster.psql("INSERT INTO t VALUES (3)")
        amid = datetime.now(UTC)
        cluster.psql("INSERT INTO t VALUES (4)")
        offset.write_text("-3600")
        cluster.psql("INSERT INTO t VALUES (5)")
        shown = float(cluster.psql("SELECT extract(epoch FROM clock_timestamp())"))
        assert datetime.now(UTC).timestamp() - shown > 3000, "the clock was not set back"
    assert rows(protected, Target(TargetKind.TIME, time=amid)) == [1, 2, 3]
    with captured(protected):
        offset.write_text("0")
        cluster.psql("INSERT INTO t VALUES (6)")
    with pytest.raises(TargetUnreachable, match="more than once") as caught:
        protected.plan(Target(TargetKind.TIME, time=amid))
    first, last = (hint.split()[1].rstrip(":") for hint in caught.value.hints)
    for text, inclusive, wanted in ((first, False, [1, 2, 3]), (last, True, [1, 2, 3, 4, 5])):
        position = Position("", DIALECT.parse_position(text, branch=""))
        assert rows(protected, Target(TargetKind.POSITION, position=position, inclusive=inclusive)) == wanted
    assert rows(protected) == [1, 2, 3, 4, 5, 6]


# ---- the programs of the server


@pytest.mark.fault("server-programs-missing", "server-programs-of-another-version")
def test_a_restore_that_cannot_start_a_server_says_which_programs_it_needs(
    clusters: ClusterFactory, postgresql_major: str, tmp_path: Path
) -> None:
    cluster = clusters.create(postgresql_major)
    protected = protected_table(cluster)
    plan = protected.plan(Target(TargetKind.LATEST))
    directory = protected.restore_files(plan)
    other = next(path for major, path in cluster.factory.bindirs.items() if major != postgresql_major)
    for programs in (tmp_path, other):
        context = BringUpContext(protected.lineage, DIALECT, PostgresTarget(), SYSTEM_CLOCK, NoProgress())
        options = BringUpOptions(bin_directory=programs, look=False, settings={}, later_command="false")
        with pytest.raises(ServerToolsMissing) as caught:
            bring_up(plan, directory, context, options)
        assert caught.value.hints
    assert rows(protected) == [1, 2]
