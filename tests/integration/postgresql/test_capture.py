"""Log capture from real servers: what is stored are the server's own log files, whatever happens between."""

from __future__ import annotations

import shutil
import statistics
import time
from pathlib import Path

import psycopg
import pytest

from cloudsave.clock import SYSTEM_CLOCK
from cloudsave.engines.postgresql.dialect import PostgresDialect
from cloudsave.engines.postgresql.engine import PostgresEngine
from cloudsave.engines.postgresql.log import PostgresLogSource, format_lsn, parse_lsn
from cloudsave.errors import (
    CaptureRunning,
    ForeignSystem,
    IntegrityError,
    LogConflict,
    LogHole,
    LogNotInArchive,
    LogRemoved,
    SlotLost,
)
from cloudsave.logs.archive import fetch, push
from cloudsave.logs.background import BackgroundCapture, capture_until, durable_up_to
from cloudsave.logs.ledger import unrecorded_gaps
from cloudsave.logs.status import CaptureOptions, CaptureState, CaptureStatus
from cloudsave.model.engine_facts import BranchEnd, LogChunk
from cloudsave.model.ledger import Ledger
from cloudsave.model.position import Position
from cloudsave.repository.lineage import Lineage
from cloudsave.repository.repository import Repository
from cloudsave.store.memory import MemoryStore
from tests.integration.postgresql.cluster import Cluster, ClusterFactory, poll
from tests.same_bytes import assert_same_bytes

DIALECT = PostgresDialect()
FILE = 16 << 20
DURABLE_SECONDS = 60.0
KEEP = {"wal_keep_size": "2GB"}
CONTINUOUS = CaptureOptions(running_patience_seconds=15.0)


def new_lineage(cluster: Cluster) -> Lineage:
    """An empty repository's lineage for a server."""
    created = Repository.create(MemoryStore(), passphrase=None, clock=SYSTEM_CLOCK)
    return created.repository.lineage(f"postgresql-{cluster.system_identifier()}")


def source_of(cluster: Cluster, *, slot: str = "cloudsave", temporary: bool = False) -> PostgresLogSource:
    """The server's log as the product opens it."""
    source = PostgresEngine(cluster.url).log_source(slot=slot, temporary=temporary)
    assert isinstance(source, PostgresLogSource)
    return source


class Watched(BackgroundCapture):
    """Capture with a permanent slot that remembers what it reported."""

    def __init__(self, cluster: Cluster, lineage: Lineage, *, options: CaptureOptions = CONTINUOUS) -> None:
        self.seen: list[CaptureStatus] = []
        super().__init__(
            source_of(cluster), lineage, DIALECT, options, clock=SYSTEM_CLOCK, observer=self.seen.append
        )

    def catch_up(self, cluster: Cluster) -> Position:
        """Wait until all log that the primary has now is durable."""
        position = Position(
            f"{cluster.timeline():08X}", parse_lsn(cluster.psql("SELECT pg_current_wal_flush_lsn()"))
        )
        self.await_durable(position, timeout_seconds=DURABLE_SECONDS)
        return position


def write_log(cluster: Cluster, megabytes: int) -> None:
    """Let the server write so much log."""
    with cluster.connect() as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS bulk (t text)")
        connection.execute("ALTER TABLE bulk ALTER t SET STORAGE EXTERNAL")
        for _ in range(megabytes):
            connection.execute(
                "INSERT INTO bulk SELECT repeat(md5(n::text), 32) FROM generate_series(1, 900) n"
            )


def complete_files(cluster: Cluster, timeline: int) -> list[str]:
    """Names of the log files of a timeline that the server has written to the end."""
    end = parse_lsn(cluster.psql("SELECT pg_current_wal_flush_lsn()"))
    current = DIALECT.log_file_name(f"{timeline:08X}", end, log_file_bytes=FILE)
    names = sorted(path.name for path in (cluster.data / "pg_wal").iterdir())
    return [
        name
        for name in names
        if len(name) == 24 and name.startswith(f"{timeline:08X}") and name[8:] < current[8:]
    ]


def fetched(lineage: Lineage, name: str, folder: Path) -> bytes:
    """A log file from the repository."""
    target = folder / "fetched"
    fetch(lineage, DIALECT, name, target, log_file_bytes=FILE)
    return target.read_bytes()


def assert_same_files(lineage: Lineage, cluster: Cluster, names: list[str], folder: Path) -> None:
    """The repository's files are the server's, byte by byte."""
    assert names
    for name in names:
        assert_same_bytes(fetched(lineage, name, folder), (cluster.data / "pg_wal" / name).read_bytes(), name)


def assert_gapless(lineage: Lineage) -> None:
    """No branch has a hole, recorded or not."""
    ledger = Ledger(lineage.logs())
    assert ledger.branches()
    assert [gap for branch in ledger.branches() for gap in unrecorded_gaps(ledger, [], branch)] == []
    assert lineage.holes() == []


def captured_names(lineage: Lineage, cluster: Cluster, timeline: int) -> list[str]:
    """The server's complete files from where capture began."""
    begin = Ledger(lineage.logs()).ranges(f"{timeline:08X}")[0][0]
    first = DIALECT.log_file_name(f"{timeline:08X}", begin, log_file_bytes=FILE)
    return [name for name in complete_files(cluster, timeline) if name >= first]


@pytest.fixture
def keeping(clusters: ClusterFactory, postgresql_major: str) -> Cluster:
    """A server that keeps its log files, so that they can be compared."""
    return clusters.create(postgresql_major, conf=KEEP)


def test_what_is_stored_are_the_servers_files(keeping: Cluster, tmp_path: Path) -> None:
    lineage = new_lineage(keeping)
    with Watched(keeping, lineage) as capture:
        keeping.pgbench_init(1)
        with keeping.pgbench_run(clients=2):
            write_log(keeping, 20)
            keeping.switch_wal()
            write_log(keeping, 20)
        keeping.switch_wal()
        position = capture.catch_up(keeping)
    assert_gapless(lineage)
    names = captured_names(lineage, keeping, 1)
    assert len(names) >= 3
    assert_same_files(lineage, keeping, names, tmp_path)
    assert capture.seen[-1].state == CaptureState.STOPPED
    # Negative control: the comparison sees a single flipped bit.
    path = keeping.data / "pg_wal" / names[1]
    damaged = bytearray(path.read_bytes())
    damaged[5_000_000] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(AssertionError):
        assert_same_files(lineage, keeping, names, tmp_path)
    assert durable_up_to(lineage, position)
    assert not durable_up_to(lineage, Position(position.branch, position.offset + FILE))


def test_the_commits_of_the_index_are_those_that_the_server_shows(keeping: Cluster) -> None:
    lineage = new_lineage(keeping)
    with Watched(keeping, lineage) as capture:
        begin = keeping.lsn()
        for n in range(30):
            keeping.psql(f"CREATE TABLE t{n} AS SELECT {n} AS x")
        end = keeping.lsn()
        capture.catch_up(keeping)
    dumped = keeping.waldump(start=begin, end=end)
    shown = {
        parse_lsn(line.split("lsn: ")[1].split(",")[0])
        for line in dumped.splitlines()
        if "desc: COMMIT" in line
    }
    assert len(shown) >= 30
    indexed = [commit.offset for segment in lineage.logs() for commit in lineage.log_index(segment).commits]
    assert shown == {offset for offset in indexed if parse_lsn(begin) <= offset < parse_lsn(end)}


def test_the_stream_can_begin_at_any_position(keeping: Cluster) -> None:
    write_log(keeping, 3)
    end = parse_lsn(keeping.psql("SELECT pg_current_wal_flush_lsn()"))
    source = source_of(keeping, slot="anywhere", temporary=True)
    source.connect()
    for start in (end - 100_001, end - 8192 * 3, end - 1):
        received = b""
        for chunk in source.stream(Position("00000001", start)):
            assert isinstance(chunk, LogChunk)
            received += chunk.data
            if start + len(received) >= end:
                break
        name = DIALECT.log_file_name("00000001", start, log_file_bytes=FILE)
        content = (keeping.data / "pg_wal" / name).read_bytes()
        length = min(len(received), FILE - start % FILE)
        assert_same_bytes(received[:length], content[start % FILE : start % FILE + length], name)
    source.close()


@pytest.mark.fault("server-crashes-during-capture")
def test_capture_goes_on_after_the_server_crashed(keeping: Cluster, tmp_path: Path) -> None:
    lineage = new_lineage(keeping)
    keeping.pgbench_init(1)
    with Watched(keeping, lineage) as capture:
        for _ in range(2):
            with keeping.pgbench_run(clients=2):
                write_log(keeping, 4)
                keeping.crash()
            keeping.start()
        write_log(keeping, 10)
        keeping.switch_wal()
        capture.catch_up(keeping)
    assert any(status.last_error for status in capture.seen)
    assert_gapless(lineage)
    assert_same_files(lineage, keeping, captured_names(lineage, keeping, 1), tmp_path)


def test_a_second_run_goes_on_where_the_first_one_ended(keeping: Cluster, tmp_path: Path) -> None:
    lineage = new_lineage(keeping)
    with Watched(keeping, lineage) as capture:
        write_log(keeping, 2)
        capture.catch_up(keeping)
    write_log(keeping, 20)
    with Watched(keeping, lineage) as capture:
        keeping.switch_wal()
        capture.catch_up(keeping)
    assert_gapless(lineage)
    assert_same_files(lineage, keeping, captured_names(lineage, keeping, 1), tmp_path)


def test_the_slot_holds_what_is_not_durable_and_releases_what_is(keeping: Cluster) -> None:
    lineage = new_lineage(keeping)
    with Watched(keeping, lineage) as capture:
        write_log(keeping, 20)
        position = capture.catch_up(keeping)
        held = "SELECT restart_lsn FROM pg_replication_slots WHERE slot_name = 'cloudsave'"
        poll(lambda: parse_lsn(keeping.psql(held)) >= position.offset, "the slot moves up to what is durable")
    durable = Ledger(lineage.logs()).furthest("00000001")
    assert parse_lsn(keeping.psql(held)) <= durable
    write_log(keeping, 2)
    assert parse_lsn(keeping.psql(held)) <= durable


def test_a_promotion_of_the_captured_standby_is_followed(
    clusters: ClusterFactory, postgresql_major: str, tmp_path: Path
) -> None:
    primary = clusters.create(postgresql_major, conf=KEEP)
    standby = primary.make_standby(conf=KEEP)
    lineage = new_lineage(primary)
    with Watched(standby, lineage) as capture:
        write_log(primary, 20)
        end = primary.psql("SELECT pg_current_wal_flush_lsn()")
        poll(
            lambda: standby.psql(f"SELECT pg_last_wal_replay_lsn() >= '{end}'") == "t",
            "the standby has it all",
        )
        primary.stop(immediate=True)
        standby.promote()
        write_log(standby, 20)
        standby.switch_wal()
        capture.catch_up(standby)
    assert_gapless(lineage)
    (point,) = DIALECT.parse_history(lineage.histories()["00000002"])
    ledger = Ledger(lineage.logs())
    path = [("00000001", 0, point.end_offset), ("00000002", point.end_offset, None)]
    begin = ledger.ranges("00000001")[0][0]
    assert ledger.cover(path, begin, None).end == ledger.furthest("00000002")
    assert ledger.ranges("00000002")[0][0] == point.end_offset - point.end_offset % FILE
    assert_same_files(lineage, standby, captured_names(lineage, standby, 2), tmp_path)


@pytest.mark.fault("failover-old-branch-unfinished")
def test_after_a_failover_the_old_branch_is_completed_from_the_new_primary(
    clusters: ClusterFactory, postgresql_major: str, tmp_path: Path
) -> None:
    primary = clusters.create(postgresql_major, conf=KEEP)
    standby = primary.make_standby(conf=KEEP)
    lineage = new_lineage(primary)
    with Watched(primary, lineage) as capture:
        write_log(primary, 2)
        capture.catch_up(primary)
    write_log(primary, 36)  # not captured from the primary: only the standby has it
    end = primary.psql("SELECT pg_current_wal_flush_lsn()")
    poll(lambda: standby.psql(f"SELECT pg_last_wal_replay_lsn() >= '{end}'") == "t", "the standby has it all")
    primary.stop(immediate=True)
    standby.promote()
    write_log(standby, 20)
    standby.switch_wal()
    with Watched(standby, lineage) as capture:
        capture.catch_up(standby)
    assert_gapless(lineage)
    (point,) = DIALECT.parse_history(lineage.histories()["00000002"])
    path = [("00000001", 0, point.end_offset), ("00000002", point.end_offset, None)]
    ledger = Ledger(lineage.logs())
    assert ledger.cover(path, ledger.ranges("00000001")[0][0], None).end == ledger.furthest("00000002")
    assert_same_files(lineage, standby, captured_names(lineage, standby, 1), tmp_path)
    assert_same_files(lineage, standby, captured_names(lineage, standby, 2), tmp_path)


def test_the_end_of_a_branch_is_told_by_the_stream(clusters: ClusterFactory, postgresql_major: str) -> None:
    primary = clusters.create(postgresql_major, conf=KEEP)
    standby = primary.make_standby(conf=KEEP)
    primary.stop(immediate=True)
    standby.promote()
    source = source_of(standby, slot="reader", temporary=True)
    head = source.connect()
    assert head.current.branch == "00000002"
    (point,) = DIALECT.parse_history(source.history("00000002"))
    events = list(source.stream(Position("00000001", point.end_offset - 100)))
    assert events[-1] == BranchEnd("00000001", point.end_offset, "00000002")
    # Exactly at the end there is nothing to stream.
    assert list(source.stream(Position("00000001", point.end_offset))) == [events[-1]]
    source.close()


LIMITED = {"max_slot_wal_keep_size": "16MB", "max_wal_size": "64MB", "min_wal_size": "32MB"}


def lose_slot(cluster: Cluster) -> None:
    """Write until the server has invalidated the slot."""
    status = "SELECT wal_status FROM pg_replication_slots WHERE slot_name = 'cloudsave'"
    for _ in range(40):
        write_log(cluster, 8)
        cluster.psql("SELECT pg_switch_wal()")
        cluster.psql("CHECKPOINT")
        if cluster.psql(status) == "lost":
            return
    pytest.fail("the server did not invalidate the slot")


@pytest.mark.fault("slot-invalidated-by-size", control="test_a_second_run_goes_on_where_the_first_one_ended")
def test_a_lost_slot_becomes_a_recorded_hole_an_alarm_and_a_new_slot(
    clusters: ClusterFactory, postgresql_major: str, tmp_path: Path
) -> None:
    cluster = clusters.create(postgresql_major, conf=LIMITED)
    lineage = new_lineage(cluster)
    with Watched(cluster, lineage) as capture:
        write_log(cluster, 2)
        capture.catch_up(cluster)
    frontier = Ledger(lineage.logs()).furthest("00000001")
    lose_slot(cluster)
    with pytest.raises(SlotLost):
        source_of(cluster).connect()
    with Watched(cluster, lineage) as capture:
        capture.catch_up(cluster)
    (hole,) = lineage.holes()
    assert (hole.branch, hole.first) == ("00000001", frontier)
    assert hole.last % FILE == 0
    assert "removed" in hole.cause
    assert any("lost for good" in status.alarm for status in capture.seen)
    lost = DIALECT.log_file_name("00000001", hole.first, log_file_bytes=FILE)
    with pytest.raises(LogHole):
        fetched(lineage, lost, tmp_path)
    ledger = Ledger(lineage.logs())
    assert unrecorded_gaps(ledger, lineage.holes(), "00000001") == []
    assert unrecorded_gaps(ledger, [], "00000001") == [(hole.first, hole.last)]
    # The log right behind the hole was still there: the hole is not larger than it must be.
    assert not (
        cluster.data / "pg_wal" / DIALECT.log_file_name("00000001", hole.last - 1, log_file_bytes=FILE)
    ).exists()


@pytest.mark.fault("log-removed-uncaptured", control="test_the_stream_can_begin_at_any_position")
def test_removed_log_is_told_as_such(clusters: ClusterFactory, postgresql_major: str) -> None:
    cluster = clusters.create(postgresql_major, conf=LIMITED)
    begin = parse_lsn(cluster.lsn())
    for _ in range(6):
        write_log(cluster, 10)
        cluster.psql("CHECKPOINT")
    source = source_of(cluster, slot="late", temporary=True)
    source.connect()
    with pytest.raises(LogRemoved):
        list(source.stream(Position("00000001", begin)))
    source.close()


def test_a_committed_row_is_durable_in_the_repository_within_seconds(cluster: Cluster) -> None:
    lineage = new_lineage(cluster)
    cluster.psql("CREATE TABLE t (x int)")
    waits = []
    with Watched(cluster, lineage) as capture, cluster.connect() as connection:
        capture.catch_up(cluster)
        for n in range(7):
            connection.execute("INSERT INTO t VALUES (%s)", (n,))
            committed = time.monotonic()
            end = parse_lsn(cluster.psql("SELECT pg_current_wal_flush_lsn()"))
            branch_end = Position("00000001", end)
            poll(lambda at=branch_end: durable_up_to(lineage, at), "the row is durable")  # type: ignore[misc]
            waits.append(time.monotonic() - committed)
    assert statistics.median(waits) < 2.0, waits
    assert max(waits) < 10.0, waits


@pytest.mark.fault("foreign-cluster-captured", control="test_what_is_stored_are_the_servers_files")
def test_another_cluster_is_refused(clusters: ClusterFactory, postgresql_major: str) -> None:
    ours = clusters.create(postgresql_major)
    foreign = clusters.create(postgresql_major, fresh_identity=True)
    lineage = new_lineage(ours)
    with pytest.raises(ForeignSystem):
        Watched(foreign, lineage).start()
    assert lineage.logs() == []


@pytest.mark.fault("captures-two-of-one-slot", control="test_a_second_run_goes_on_where_the_first_one_ended")
def test_two_captures_of_one_slot_are_refused(cluster: Cluster) -> None:
    lineage = new_lineage(cluster)
    with Watched(cluster, lineage):
        second = Watched(cluster, lineage, options=CaptureOptions(running_patience_seconds=0.0))
        with pytest.raises(CaptureRunning):
            second.start()


@pytest.mark.fault("copy-went-on-differently")
def test_a_copy_that_went_on_differently_is_a_conflict(
    clusters: ClusterFactory, postgresql_major: str, tmp_path: Path
) -> None:
    ours = clusters.create(postgresql_major)
    lineage = new_lineage(ours)
    with Watched(ours, lineage) as capture:
        write_log(ours, 1)
        capture.catch_up(ours)
    ours.stop()
    copy = clusters.empty(postgresql_major)
    shutil.copytree(ours.data, copy.data, symlinks=True)
    copy.user.own(copy.data)
    ours.start()
    with Watched(ours, lineage) as capture:
        write_log(ours, 3)
        capture.catch_up(ours)
    before = lineage.logs()
    copy.start()
    copy.psql("CREATE TABLE elsewhere AS SELECT generate_series(1, 100000) AS x")
    write_log(copy, 6)
    with pytest.raises(LogConflict):
        run_to_the_end(Watched(copy, lineage))
    assert lineage.logs() == before


def run_to_the_end(capture: BackgroundCapture) -> None:
    """Start and wait for what ends capture."""
    capture.start()
    capture.await_durable(Position("00000001", 1 << 62), timeout_seconds=DURABLE_SECONDS)


def test_pushed_files_and_captured_log_are_the_same(keeping: Cluster, tmp_path: Path) -> None:
    lineage = new_lineage(keeping)
    with Watched(keeping, lineage) as capture:
        write_log(keeping, 20)
        keeping.switch_wal()
        capture.catch_up(keeping)
    captured = captured_names(lineage, keeping, 1)
    for name in captured:
        assert push(lineage, DIALECT, keeping.data / "pg_wal" / name) == f"{name} is stored already"
    fresh = new_lineage(keeping)
    for name in captured:
        assert push(fresh, DIALECT, keeping.data / "pg_wal" / name) == f"{name} stored"
    assert_same_files(fresh, keeping, captured, tmp_path)
    position = DIALECT.parse_log_file_name(captured[-1], log_file_bytes=FILE)
    assert position is not None
    beyond = DIALECT.log_file_name(position.branch, position.offset + FILE, log_file_bytes=FILE)
    with pytest.raises(LogNotInArchive):
        fetched(fresh, beyond, tmp_path)


@pytest.mark.fault("partial-file-of-ended-branch")
def test_the_partial_last_file_of_an_ended_branch_is_stored_up_to_its_end(
    clusters: ClusterFactory, postgresql_major: str, tmp_path: Path
) -> None:
    archiving = {"archive_mode": "on", "archive_command": "false"}
    primary = clusters.create(postgresql_major)
    standby = primary.make_standby(conf={**KEEP, **archiving})
    lineage = new_lineage(primary)
    with Watched(primary, lineage) as capture:
        write_log(primary, 1)
        end = capture.catch_up(primary)
    poll(
        lambda: standby.psql(f"SELECT pg_last_wal_replay_lsn() >= '{format_lsn(end.offset)}'") == "t",
        "the standby has it all",
    )
    primary.stop(immediate=True)
    standby.promote()
    (partial,) = (standby.data / "pg_wal").glob("*.partial")
    (history,) = (standby.data / "pg_wal").glob("*.history")
    fresh = new_lineage(standby)
    push(fresh, DIALECT, history)
    push(fresh, DIALECT, partial)
    (point,) = DIALECT.parse_history(fresh.histories()["00000002"])
    (segment,) = fresh.logs()
    assert point.end_offset <= segment.last < segment.first + FILE
    content = partial.read_bytes()
    assert_same_bytes(fresh.read_log(segment), content[: segment.last - segment.first], partial.name)
    # Into the captured lineage it fits as well: the same bytes where both have them.
    push(lineage, DIALECT, partial)
    stored = fetched(lineage, partial.name.removesuffix(".partial"), tmp_path)
    length = point.end_offset - segment.first
    assert_same_bytes(stored[:length], content[:length], partial.name)


@pytest.mark.fault("foreign-log-file-pushed", control="test_pushed_files_and_captured_log_are_the_same")
def test_a_file_of_another_cluster_is_refused(clusters: ClusterFactory, postgresql_major: str) -> None:
    ours = clusters.create(postgresql_major)
    foreign = clusters.create(postgresql_major, fresh_identity=True)
    lineage = new_lineage(ours)
    foreign.switch_wal()
    name = complete_files(foreign, 1)[0]
    with pytest.raises(ForeignSystem):
        push(lineage, DIALECT, foreign.data / "pg_wal" / name)
    assert lineage.logs() == []


@pytest.mark.fault("damaged-log-file-pushed", control="test_pushed_files_and_captured_log_are_the_same")
def test_a_damaged_file_is_refused(keeping: Cluster, tmp_path: Path) -> None:
    lineage = new_lineage(keeping)
    write_log(keeping, 18)
    keeping.switch_wal()
    name = complete_files(keeping, 1)[-2]
    content = bytearray((keeping.data / "pg_wal" / name).read_bytes())
    content[9_000_000] ^= 1
    (tmp_path / name).write_bytes(content)
    with pytest.raises(IntegrityError):
        push(lineage, DIALECT, tmp_path / name)
    assert lineage.logs() == []


def test_the_log_of_a_moment_is_captured_without_leaving_a_slot(cluster: Cluster) -> None:
    lineage = new_lineage(cluster)
    source = source_of(cluster, slot="one_off", temporary=True)
    end = parse_lsn(cluster.psql("SELECT pg_current_wal_flush_lsn()"))
    capture_until(
        source,
        lineage,
        DIALECT,
        Position("00000001", end),
        clock=SYSTEM_CLOCK,
        timeout_seconds=DURABLE_SECONDS,
    )
    assert durable_up_to(lineage, Position("00000001", end)), format_lsn(end)
    poll(lambda: cluster.psql("SELECT count(*) FROM pg_replication_slots") == "0", "the slot is gone")


def test_a_url_without_a_database_is_enough(cluster: Cluster) -> None:
    """No database is named like the role, which is what libpq would take."""
    cluster.psql("CREATE ROLE courier LOGIN REPLICATION")
    url = cluster.url.replace("postgres@/postgres", "courier@/")
    with pytest.raises(psycopg.OperationalError, match="does not exist"):
        psycopg.connect(url)
    source = PostgresEngine(url).log_source(slot="cloudsave", temporary=False)
    assert isinstance(source, PostgresLogSource)
    lineage = new_lineage(cluster)
    with BackgroundCapture(source, lineage, DIALECT, CONTINUOUS, clock=SYSTEM_CLOCK) as capture:
        end = parse_lsn(cluster.psql("SELECT pg_current_wal_flush_lsn()"))
        capture.await_durable(Position("00000001", end), timeout_seconds=DURABLE_SECONDS)

        def told() -> bool:
            cluster.psql("SELECT pg_create_restore_point('more')")
            return any(lineage.log_index(one).complete_until_us for one in lineage.logs())

        poll(told, "the server has said up to which instant its log is complete")
    assert source.slot_state() == "idle"
