"""Our readers of PostgreSQL's formats against the server's own programs, on real files of every version."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from cloudsave.engines.postgresql.format_control import ControlFile, ServerRunState, parse_control
from cloudsave.engines.postgresql.format_page import PAGE_BYTES, PageHeader, block_in_relation, page_lsns
from cloudsave.engines.postgresql.format_wal import (
    EPOCH_US,
    WalIndexer,
    WalWalker,
    format_lsn,
    parse_lsn,
    parse_segment_name,
    segment_name,
)
from cloudsave.errors import ForeignSystem, LogDamaged
from cloudsave.kernels.native import NativeKernels
from cloudsave.kernels.pages import PageStatus, pg_page_check, pg_page_status
from cloudsave.kernels.wal_walk import StopReason, WalkStart
from cloudsave.model.log import us_from_instant
from cloudsave.model.position import Position
from tests.integration.postgresql.cluster import Cluster, ClusterFactory, ServerFailed
from tests.unit.kernels.built import built_kernels

SEGMENT_BYTES = 16 << 20
CONF = {"max_prepared_transactions": "5", "wal_keep_size": "1GB", "autovacuum": "off", "wal_level": "logical"}
_DUMPED = re.compile(r"rmgr: (\S+)\s+len.*?tx:\s+(\d+), lsn: (\S+), prev (\S+), desc: (.*)")
_COMMIT = re.compile(r"COMMIT(?:_PREPARED (\d+):)? (\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{6}) UTC")


@pytest.fixture(params=["native", "twin"])
def kernels(request: pytest.FixtureRequest) -> NativeKernels | None:
    """The compiled kernels, and the Python twins."""
    return built_kernels() if request.param == "native" else None


# ---- control file


def _control(cluster: Cluster) -> ControlFile:
    return parse_control((cluster.data / "global" / "pg_control").read_bytes())


def _controldata(cluster: Cluster) -> dict[str, str]:
    said = cluster.run("pg_controldata", "-D", str(cluster.data))
    return {
        name.strip(): value.strip() for name, _, value in (row.partition(":") for row in said.splitlines())
    }


def _assert_as_controldata(control: ControlFile, said: dict[str, str]) -> None:
    ours = {
        "Database system identifier": str(control.system_identifier),
        "pg_control version number": str(control.control_version),
        "Catalog version number": str(control.catalog_version),
        "Database cluster state": control.state.name.lower().replace("_", " "),
        "pg_control last modified": control.changed.strftime("%a %b %e %H:%M:%S %Y"),
        "Latest checkpoint location": format_lsn(control.checkpoint),
        "Latest checkpoint's REDO location": format_lsn(control.redo),
        "Latest checkpoint's TimeLineID": str(control.timeline),
        "Latest checkpoint's PrevTimeLineID": str(control.previous_timeline),
        "Latest checkpoint's full_page_writes": "on" if control.full_page_writes else "off",
        "Latest checkpoint's NextXID": "{}:{}".format(*divmod(control.next_transaction, 1 << 32)),
        "Time of latest checkpoint": control.checkpoint_time.strftime("%a %b %e %H:%M:%S %Y"),
        "Minimum recovery ending location": format_lsn(control.min_recovery_point),
        "Min recovery ending loc's timeline": str(control.min_recovery_timeline),
        "Backup start location": format_lsn(control.backup_start),
        "Backup end location": format_lsn(control.backup_end),
        "End-of-backup record required": "yes" if control.backup_end_required else "no",
        "wal_level setting": ("minimal", "replica", "logical")[control.wal_level],
        "Database block size": str(control.page_bytes),
        "Blocks per segment of large relation": str(control.relation_file_blocks),
        "WAL block size": str(control.wal_page_bytes),
        "Bytes per WAL segment": str(control.wal_segment_bytes),
        "Data page checksum version": str(control.data_checksum_version),
    }
    assert ours == {name: said[name] for name in ours}


def test_control_file_reads_as_pg_controldata_prints_it(
    clusters: ClusterFactory, postgresql_major: str
) -> None:
    cluster = clusters.create(postgresql_major, conf=CONF)
    running = _control(cluster)
    assert running.state is ServerRunState.IN_PRODUCTION
    assert str(running.system_identifier) == cluster.system_identifier()
    cluster.stop()
    stopped = _control(cluster)
    assert stopped.was_shut_down
    assert stopped.has_page_checksums
    assert stopped.checkpoint > running.checkpoint
    _assert_as_controldata(stopped, _controldata(cluster))


@pytest.mark.postgresql_majors("15", "18")
def test_control_file_of_a_standby_has_a_minimum_recovery_point(
    clusters: ClusterFactory, postgresql_major: str
) -> None:
    primary = clusters.create(postgresql_major, checksums=False)
    standby = primary.make_standby()
    standby.stop()
    control = _control(standby)
    assert control.state is ServerRunState.SHUT_DOWN_IN_RECOVERY
    assert control.min_recovery_point > 0
    assert control.min_recovery_timeline == 1
    assert not control.has_page_checksums
    _assert_as_controldata(control, _controldata(standby))


# ---- pages


def _relation_files(cluster: Cluster) -> Iterator[tuple[Path, int]]:
    """Files that consist of pages, with their segment number."""
    for path in sorted((cluster.data / "base").glob("*/*")):
        found = re.fullmatch(r"\d+(?:_fsm|_vm|_init)?(?:\.(\d+))?", path.name)
        if found and path.stat().st_size:
            yield path, int(found[1] or 0)


def test_every_page_of_a_cluster_passes_and_its_lsn_is_read(
    clusters: ClusterFactory, postgresql_major: str, kernels: NativeKernels | None
) -> None:
    cluster = clusters.create(postgresql_major, conf=CONF)
    cluster.pgbench_init()
    end = parse_lsn(cluster.lsn())
    cluster.stop()
    cluster.verify_checksums()
    checked = 0
    for path, number in _relation_files(cluster):
        content = path.read_bytes()
        lsns = np.empty(len(content) // PAGE_BYTES, np.uint64)
        status = pg_page_status(
            content,
            first_block=block_in_relation(number, 0),
            checksums=True,
            lsn_out=lsns,
            kernels=kernels,
        )
        assert set(status.tolist()) <= {PageStatus.OK, PageStatus.NEW}, path
        assert (lsns == page_lsns(content)).all()
        assert lsns[0] == PageHeader.parse(content).lsn
        assert int(lsns.max()) <= end + SEGMENT_BYTES
        checked += len(status)
    assert checked > 2000


def test_a_flipped_bit_is_found_in_the_block_that_the_server_names(
    clusters: ClusterFactory, postgresql_major: str, kernels: NativeKernels | None
) -> None:
    cluster = clusters.create(postgresql_major)
    cluster.psql("CREATE TABLE t AS SELECT i, repeat('x', 100) FROM generate_series(1, 5000) i")
    path = cluster.data / cluster.psql("SELECT pg_relation_filepath('t')")
    cluster.stop()
    content = bytearray(path.read_bytes())
    blocks = len(content) // PAGE_BYTES
    before = pg_page_status(content, first_block=0, checksums=True, kernels=kernels)
    used = np.flatnonzero(before == PageStatus.OK).tolist()  # since 16 a table grows by several pages at once
    assert len(used) > 80
    chosen = random.Random(1)
    for _ in range(50):
        bit = chosen.randrange(blocks * PAGE_BYTES * 8)
        content[bit // 8] ^= 1 << bit % 8
        status = pg_page_status(content, first_block=0, checksums=True, kernels=kernels)
        assert np.flatnonzero(status % 2).tolist() == [bit // 8 // PAGE_BYTES]
        content[bit // 8] ^= 1 << bit % 8
    content[3 * PAGE_BYTES + 4000] ^= 4
    path.write_bytes(content)
    with pytest.raises(ServerFailed, match=r"block 3\b"):
        cluster.verify_checksums()
    assert pg_page_check(content, first_block=0, checksums=True) == [3]
    assert pg_page_check(content, first_block=0, checksums=False) == []
    assert pg_page_check(content, first_block=1, checksums=True) == used


# ---- WAL


@dataclass(frozen=True)
class Dump:
    """What pg_waldump says of a stretch: begin of every record, and commits as (begin, xid, time)."""

    records: list[int]
    commits: list[tuple[int, int, int]]
    prepared: list[int]
    """Transactions of two phases among the commits."""


def _waldump(cluster: Cluster, *, start: int, end: int, timeline: int = 1) -> Dump:
    records, commits, prepared = [], [], []
    said = cluster.waldump(start=format_lsn(start), end=format_lsn(end), timeline=timeline)
    for row in said.splitlines():
        found = _DUMPED.match(row)
        assert found, row
        records.append(parse_lsn(found[3]))
        commit = _COMMIT.match(found[5]) if found[1] == "Transaction" else None
        if commit:
            instant = datetime.strptime(commit[2], "%Y-%m-%d %H:%M:%S.%f").replace(tzinfo=UTC)
            commits.append((records[-1], int(commit[1] or found[2]), us_from_instant(instant)))
            prepared += [int(commit[1])] if commit[1] else []
    return Dump(records, commits, prepared)


def _log(cluster: Cluster, start: int, end: int, *, timeline: int = 1) -> bytes:
    """The bytes of the log from one LSN to another, from pg_wal."""
    first = start - start % SEGMENT_BYTES
    names = [
        segment_name(timeline, at, segment_bytes=SEGMENT_BYTES) for at in range(first, end, SEGMENT_BYTES)
    ]
    parts = [(cluster.data / "pg_wal" / name).read_bytes() for name in names]
    return b"".join(parts)[start - first : end - first]


def _first_segment(cluster: Cluster) -> int:
    names = [path.name for path in (cluster.data / "pg_wal").iterdir()]
    places = [parse_segment_name(name, segment_bytes=SEGMENT_BYTES) for name in names]
    return min(place[1] for place in places if place)


def _worked_cluster(clusters: ClusterFactory, major: str) -> Cluster:
    """A server with all that a commit can carry in its log, over segments of which two ended early."""
    cluster = clusters.create(major, conf=CONF)
    cluster.psql("CREATE TABLE wide AS SELECT i, repeat('x', 100) FROM generate_series(1, 20000) i")
    with cluster.connect() as connection:
        for number in range(200):
            connection.execute("UPDATE wide SET i = -i WHERE i = %s", (number,))
    cluster.psql("CREATE TABLE gone AS SELECT 1 AS a; CREATE TABLE gone2 AS SELECT 2 AS a")
    cluster.psql("SELECT pg_create_restore_point('before the accident \u00e9')")
    many = " ".join(f"SAVEPOINT s{n}; INSERT INTO gone VALUES ({n});" for n in range(3000))
    with cluster.connect(autocommit=False) as connection:
        connection.execute(
            f"BEGIN; {many} DROP TABLE gone; DROP TABLE gone2; PREPARE TRANSACTION 'two phases'"
        )
    cluster.switch_wal()
    with cluster.connect() as connection:
        connection.execute("COMMIT PREPARED 'two phases'")
        connection.execute("SELECT pg_logical_emit_message(false, 'x', repeat('y', 17000000))")
        connection.execute("CREATE TABLE later AS SELECT 1 AS a")
        connection.execute("SELECT pg_switch_wal()")
        connection.execute("CREATE TABLE latest AS SELECT 1 AS a")
    return cluster


def _feed_in_pieces(walker: WalWalker, log: bytes, seed: int) -> list[tuple[int, int, int, int]]:
    chosen = random.Random(seed)
    commits, at = [], 0
    while at < len(log):
        size = chosen.choice((1, 3, 8, 24, 100, 8192, 70_000, 1_000_000))
        fed = walker.feed(log[at : at + size])
        commits += [(start, end, time, xid) for start, end, time, xid, _ in fed.commits.tolist()]
        at += size
    return commits


def test_walk_finds_the_records_and_commits_that_pg_waldump_prints(
    clusters: ClusterFactory, postgresql_major: str, kernels: NativeKernels | None
) -> None:
    cluster = _worked_cluster(clusters, postgresql_major)
    end = parse_lsn(cluster.lsn())
    start = _first_segment(cluster)
    cluster.psql("CHECKPOINT")
    dump = _waldump(cluster, start=start, end=end)
    system = int(cluster.system_identifier())
    walker = WalWalker(WalkStart(start, SEGMENT_BYTES, system, 1), kernels=kernels)
    fed = walker.feed(_log(cluster, start, end))
    assert walker.record_count == len(dump.records) > 5000
    found = [(start, xid, time + EPOCH_US) for start, _, time, xid, _ in fed.commits.tolist()]
    assert found == dump.commits
    assert len(dump.prepared) == 1
    assert [point.name for point in fed.restore_points] == ["before the accident \u00e9"]
    assert walker.records_end == end
    assert (walker.complete_start, walker.complete_previous) == (dump.records[-1], dump.records[-2])
    assert walker.record_first == dump.records[0]
    assert walker.server_major == int(postgresql_major)
    ends = dict(zip(dump.records, [*dump.records[1:], end], strict=True))
    for begin, behind in zip(fed.commits["start"].tolist(), fed.commits["end"].tolist(), strict=True):
        following = behind if behind % 8192 else behind + (24 if behind % SEGMENT_BYTES else 40)
        assert ends[begin] in (behind, following)


def test_walk_is_the_same_however_the_log_is_cut(
    clusters: ClusterFactory, postgresql_major: str, kernels: NativeKernels | None
) -> None:
    cluster = _worked_cluster(clusters, postgresql_major)
    end, start = parse_lsn(cluster.lsn()), _first_segment(cluster)
    cluster.psql("CHECKPOINT")
    log = _log(cluster, start, end)
    whole = WalWalker(WalkStart(start, SEGMENT_BYTES), kernels=built_kernels())
    expected = [row[:4] for row in whole.feed(log).commits.tolist()]
    walker = WalWalker(WalkStart(start, SEGMENT_BYTES), kernels=kernels)
    assert _feed_in_pieces(walker, log, seed=7) == expected
    assert (walker.records_end, walker.record_count) == (end, whole.record_count)


def test_walk_goes_on_from_any_record_boundary(
    clusters: ClusterFactory, postgresql_major: str, kernels: NativeKernels | None
) -> None:
    cluster = _worked_cluster(clusters, postgresql_major)
    end, start = parse_lsn(cluster.lsn()), _first_segment(cluster)
    cluster.psql("CHECKPOINT")
    dump = _waldump(cluster, start=start, end=end)
    log = _log(cluster, start, end)
    at_page_start = [lsn for lsn in dump.records if lsn % 8192 in (24, 40)]
    assert at_page_start
    chosen = random.Random(3).sample(dump.records, 8) + at_page_start[:3]
    for boundary in [*chosen, *(lsn - lsn % 8192 for lsn in at_page_start[:3])]:
        walker = WalWalker(WalkStart(boundary, SEGMENT_BYTES), kernels=kernels)
        commits = walker.feed(log[boundary - start : boundary - start + 400_000]).commits
        until = walker.records_end or 0
        wanted = [row for row in dump.commits if boundary <= row[0] < until]
        assert [(lsn, xid, time + EPOCH_US) for lsn, _, time, xid, _ in commits.tolist()] == wanted
    continued = [at for at in range(start, end, SEGMENT_BYTES) if log[at - start + 2] & 1]
    assert continued
    walker = WalWalker(WalkStart(continued[-1], SEGMENT_BYTES), kernels=kernels)
    walker.feed(log[continued[-1] - start :])
    assert walker.record_count == len([lsn for lsn in dump.records if lsn > continued[-1]])


def test_walk_of_the_segment_being_written_stops_where_the_log_ends(
    clusters: ClusterFactory, postgresql_major: str, kernels: NativeKernels | None
) -> None:
    cluster = clusters.create(postgresql_major)
    cluster.psql("CREATE TABLE wide AS SELECT i, repeat('x', 100) FROM generate_series(1, 20000) i")
    cluster.stop(immediate=True)
    folder = cluster.data / "pg_wal"
    names = sorted(path.name for path in folder.iterdir() if len(path.name) == 24)
    start = _first_segment(cluster)
    content = b"".join((folder / name).read_bytes() for name in names)
    walker = WalWalker(WalkStart(start, SEGMENT_BYTES), stop_at_invalid=True, kernels=kernels)
    walker.feed(content)
    assert walker.end is not None
    assert walker.end.reason in (StopReason.NO_RECORD, StopReason.ADDRESS, StopReason.PREVIOUS)
    stopped_at = walker.end.position
    strict = WalWalker(WalkStart(start, SEGMENT_BYTES), kernels=kernels)
    with pytest.raises(LogDamaged) as raised:
        strict.feed(content)
    assert raised.value.offset == stopped_at
    cluster.start()
    reached = re.search(r"redo done at (\S+)", cluster.log_path.read_text())
    assert reached
    assert parse_lsn(reached[1]) == walker.complete_start


def test_walk_over_a_record_that_a_crash_left_unfinished(
    clusters: ClusterFactory, postgresql_major: str, kernels: NativeKernels | None
) -> None:
    """The rest of the record is lost with the segments behind it; the server overwrites it."""
    cluster = clusters.create(postgresql_major, conf=CONF)
    cluster.psql("CREATE TABLE before_it AS SELECT 1 AS a")
    start = parse_lsn(cluster.switch_wal()) // SEGMENT_BYTES * SEGMENT_BYTES + SEGMENT_BYTES
    cluster.psql("CREATE TABLE committed AS SELECT 1 AS a")
    cluster.psql(f"SELECT pg_logical_emit_message(true, 'x', repeat('y', {SEGMENT_BYTES + 1000}))")
    cluster.crash()
    for path in (cluster.data / "pg_wal").iterdir():
        place = parse_segment_name(path.name, segment_bytes=SEGMENT_BYTES)
        if place and place[1] > start:
            path.unlink()
    cut_off = WalWalker(WalkStart(start, SEGMENT_BYTES), kernels=kernels)
    cut_off.feed(_log(cluster, start, start + SEGMENT_BYTES))
    unfinished = cut_off.record_last
    assert unfinished
    assert cut_off.records_end == unfinished
    cluster.start()
    cluster.psql("CREATE TABLE after_it AS SELECT 1 AS a")
    end = parse_lsn(cluster.lsn())
    cluster.psql("CHECKPOINT")
    walker = WalWalker(WalkStart(start, SEGMENT_BYTES), kernels=kernels)
    fed = walker.feed(_log(cluster, start, end))
    found = fed.commits["start"].tolist()
    assert walker.records_end == end
    assert any(lsn < unfinished for lsn in found)
    assert any(lsn > start + SEGMENT_BYTES for lsn in found)
    resumed = WalWalker(WalkStart(unfinished, SEGMENT_BYTES), kernels=kernels)
    later = resumed.feed(_log(cluster, unfinished, end)).commits["start"].tolist()
    assert later == [lsn for lsn in found if lsn > unfinished]


@pytest.mark.postgresql_majors("15", "18")
def test_walk_across_a_promotion_tells_the_new_timeline(
    clusters: ClusterFactory, postgresql_major: str, kernels: NativeKernels | None
) -> None:
    primary = clusters.create(postgresql_major, conf=CONF)
    standby = primary.make_standby()
    primary.stop()
    standby.promote()
    standby.psql("CREATE TABLE on_two AS SELECT 1 AS a")
    end = parse_lsn(standby.lsn())
    standby.psql("CHECKPOINT")
    start = end - end % SEGMENT_BYTES
    log = _log(standby, start, end, timeline=2)
    walker = WalWalker(WalkStart(start, SEGMENT_BYTES, timeline_max=2), kernels=kernels)
    fed = walker.feed(log)
    assert [(change.previous_timeline, change.timeline) for change in fed.timeline_changes] == [(1, 2)]
    assert len(fed.commits) >= 1
    assert walker.timeline == 2
    low = WalWalker(WalkStart(start, SEGMENT_BYTES, timeline_max=1), kernels=kernels)
    with pytest.raises(LogDamaged, match="timeline"):
        low.feed(log)


def test_a_mutated_log_never_yields_a_commit_that_is_not_in_it(
    clusters: ClusterFactory, postgresql_major: str, kernels: NativeKernels | None
) -> None:
    cluster = clusters.create(postgresql_major, conf=CONF)
    start = parse_lsn(cluster.lsn())
    for number in range(40):
        cluster.psql(f"CREATE TABLE t{number} AS SELECT 1 AS a")
    end = parse_lsn(cluster.lsn())
    cluster.psql("CHECKPOINT")
    log = bytearray(_log(cluster, start, end))
    true = {row[:4] for row in WalWalker(WalkStart(start, SEGMENT_BYTES)).feed(log).commits.tolist()}
    assert len(true) == 40
    chosen = random.Random(11)
    caught = 0
    for _ in range(150 if kernels else 20):
        bit = chosen.randrange(len(log) * 8)
        log[bit // 8] ^= 1 << bit % 8
        walker = WalWalker(WalkStart(start, SEGMENT_BYTES), stop_at_invalid=True, kernels=kernels)
        found = {row[:4] for row in walker.feed(log).commits.tolist()}
        assert found <= true
        if walker.end is None:
            assert found == true
        else:
            caught += 1
            assert found == {row for row in true if row[1] <= (walker.records_end or 0)}
        log[bit // 8] ^= 1 << bit % 8
    assert caught > 10


def test_indexer_takes_what_each_stretch_holds(clusters: ClusterFactory, postgresql_major: str) -> None:
    cluster = _worked_cluster(clusters, postgresql_major)
    end, start = parse_lsn(cluster.lsn()), _first_segment(cluster)
    cluster.psql("CHECKPOINT")
    dump = _waldump(cluster, start=start, end=end)
    log = _log(cluster, start, end)
    system = cluster.system_identifier()
    indexer = WalIndexer(Position("00000001", start), log_file_bytes=SEGMENT_BYTES, system_identifier=system)
    commits = []
    begins = []
    for at in range(0, len(log), 4 << 20):
        indexer.feed(log[at : at + (4 << 20)])
        index = indexer.take()
        low, high = start + at, min(start + at + (4 << 20), end)
        commits += [(one.offset, one.transaction, one.instant_us) for one in index.commits]
        inside = [lsn for lsn in dump.records if low <= lsn < high]
        assert (index.record_first, index.record_last) == (
            (inside[0], inside[-1]) if inside else (None, None)
        )
        assert index.records_end <= high
        begins += [point.name for point in index.restore_points]
    assert commits == dump.commits
    assert begins == ["before the accident \u00e9"]
    assert index.records_end == end
    foreign = WalIndexer(Position("00000001", start), log_file_bytes=SEGMENT_BYTES, system_identifier="1")
    with pytest.raises(ForeignSystem):
        foreign.feed(log)
