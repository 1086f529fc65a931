"""
Backups that read only what the log names, held against a comparison of every page with the data directory.
"""

from __future__ import annotations

import re
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from cloudsave.backup.changes import PROVED_SHARE, PROVED_STRETCH_BLOCKS
from cloudsave.clock import SYSTEM_CLOCK
from cloudsave.engines.postgresql.exclusions import storage_of
from cloudsave.engines.postgresql.format_page import page_lsns
from cloudsave.engines.postgresql.log import parse_lsn
from cloudsave.kernels.pages import PG_PAGE_BYTES
from cloudsave.model.changes import CHANGE_BLOCK, ChangedBlocks, StorageKey
from cloudsave.model.item import ItemKind
from cloudsave.model.log import LogSegment
from cloudsave.model.manifest import Manifest, Rung
from cloudsave.recovery.restore import RestoreRequest, restore_files
from cloudsave.repository.log_objects import log_object_name
from cloudsave.repository.reader import BackupReader
from tests.integration.postgresql.cluster import Cluster, ClusterFactory, poll
from tests.integration.postgresql.recoveries import Protected
from tests.integration.postgresql.shaking import CONF, TABLESPACES, Shaker

_BLOCK_REFERENCE = re.compile(r"blkref #\d+: rel (\d+)/(\d+)/(\d+) (?:fork (\w+) )?blk (\d+)")


@contextmanager
def files_of(protected: Protected, manifest: Manifest) -> Iterator[Path]:
    """The files of a backup, restored."""
    directory = protected.cluster.factory.folder() / f"files-{manifest.backup_id}"
    spaces = {oid: f"{directory}-{oid}" for oid in manifest.tablespaces}
    restore_files(BackupReader(protected.lineage, manifest), RestoreRequest(directory, tablespaces=spaces))
    yield directory
    for place in (directory, *spaces.values()):
        shutil.rmtree(place, ignore_errors=True)


def stale_pages(protected: Protected, manifest: Manifest, cluster: Cluster) -> list[str]:
    """
    Pages of main forks that differ from those in the data directory of a quiet server, but for changes that
    came after the backup's start and, in a cluster without checksums, hint bits.
    """
    found = []
    with files_of(protected, manifest) as directory:
        for entry in manifest.files:
            there, here = directory / entry.path, cluster.data / entry.path
            if entry.kind != ItemKind.FILE or storage_of(entry.path) is None or not here.exists():
                continue
            stored, present = there.read_bytes(), here.read_bytes()
            if len(stored) > len(present):
                found.append(f"{entry.path} is longer by {len(stored) - len(present)}")
            for block in range(len(stored) // PG_PAGE_BYTES):
                span = slice(block * PG_PAGE_BYTES, (block + 1) * PG_PAGE_BYTES)
                if stored[span] == present[span]:
                    continue
                (before,), (after,) = page_lsns(stored[span]), page_lsns(present[span])
                hints = before == after and not manifest.page_checksums
                if not hints and after <= manifest.start.offset:
                    found.append(f"{entry.path} block {block}: LSN {before:x} stored, {after:x} present")
    return found


def shaken(clusters: ClusterFactory, major: str, *, checksums: bool, seed: int) -> tuple[Protected, Shaker]:
    cluster = clusters.create(major, checksums=checksums, conf=CONF, tablespaces=TABLESPACES)
    shaker = Shaker(cluster, seed)
    shaker.prepare()
    return Protected.begin(cluster), shaker


def await_next_second(before: Manifest) -> None:
    """Names of backups order by seconds: of two of one second, either may be the parent of the next."""
    poll(lambda: f"{SYSTEM_CLOCK.now():%Y%m%dT%H%M%SZ}" > before.backup_id[:16], "another second has begun")


def assert_by_log(manifest: Manifest) -> None:
    assert (manifest.detection.rung, manifest.detection.reason) == (Rung.LOG, "")
    assert not manifest.detection.contradicted


@pytest.mark.parametrize("checksums", [True, False], ids=["checksums", "hints"])
def test_a_backup_by_the_log_is_as_the_data_directory(
    clusters: ClusterFactory, postgresql_major: str, checksums: bool
) -> None:
    protected, shaker = shaken(clusters, postgresql_major, checksums=checksums, seed=int(postgresql_major))
    cluster = shaker.cluster
    with protected.captured():
        first = protected.back_up(mode="local")
        assert first.detection.rung is Rung.FULL
        shaker.everything()
    cluster.crash()
    cluster.start()
    with protected.captured():
        for steps in (1, 4, 10):
            shaker.shake(steps)
            manifest = protected.back_up(mode="local")
            assert_by_log(manifest)
            assert manifest.detection.bytes_unread > 300 * PG_PAGE_BYTES
            assert stale_pages(protected, manifest, cluster) == [], shaker.done
        proved = protected.back_up(mode="local", prove_all=True)
        assert_by_log(proved)
        assert proved.detection.bytes_unread == 0
    with files_of(protected, proved) as directory:
        assert (directory / "PG_VERSION").read_text().strip() == postgresql_major


def test_the_blocks_of_the_log_are_those_that_pg_waldump_names(
    clusters: ClusterFactory, postgresql_major: str
) -> None:
    cluster = clusters.create(postgresql_major, conf={"wal_keep_size": "1GB"})
    protected = Protected.begin(cluster)
    with protected.captured() as capture:
        begin = cluster.switch_wal()
        cluster.pgbench_init()
        cluster.run("pgbench", "-n", "-c", "2", "-t", "300")
        for statement in ("VACUUM", "CREATE INDEX ON pgbench_accounts USING hash (bid)", "CHECKPOINT"):
            cluster.psql(statement)
        cluster.psql("UPDATE pgbench_accounts SET filler = repeat('x', 80)")
        end = cluster.lsn()
        protected.catch_up(capture)
    said = cluster.waldump(start=begin, end=end)
    wanted = {
        (int(space), int(database), int(relation), int(block))
        for space, database, relation, fork, block in _BLOCK_REFERENCE.findall(said)
        if fork in ("", "main")
    }
    first = parse_lsn(begin)  # In the log file that ended; the next one is the first after it.
    found = {
        tuple(row[:4])
        for segment in protected.lineage.logs()
        if segment.first >= first
        for row in changes_in(protected, segment)
        if row[4] == CHANGE_BLOCK
    }
    assert len(wanted) > 2000
    assert wanted - found == set()
    assert len(found - wanted) < len(wanted) / 100, "more than what came before and after the stretch"


def changes_in(protected: Protected, segment: LogSegment) -> list[tuple[int, ...]]:
    changes = protected.lineage.log_index(segment).changes
    assert changes is not None
    return [tuple(row) for row in changes.rows.tolist()]


def test_log_without_notes_of_changes_is_read_itself(cluster: Cluster) -> None:
    """As older releases stored it, and as pushed files have records that begin in the file before."""
    protected = Protected.begin(cluster)
    with protected.captured() as capture:
        cluster.pgbench_init()
        protected.back_up(mode="local")
        cluster.run("pgbench", "-n", "-t", "200")
        protected.catch_up(capture)
        for segment in protected.lineage.logs():
            rewrite_index(protected, segment)
        manifest = protected.back_up(mode="local")
        assert_by_log(manifest)
        assert stale_pages(protected, manifest, cluster) == []
        assert manifest.detection.bytes_unread > 1000 * PG_PAGE_BYTES


def rewrite_index(protected: Protected, segment: LogSegment) -> None:
    """Store a stretch anew without notes of changes."""
    index, log = protected.lineage.log_index(segment), protected.lineage.read_log(segment)
    del protected.objects[log_object_name(protected.lineage.id, segment)]
    protected.lineage.put_log(segment, [log], replace(index, changes=None))


@pytest.mark.postgresql_majors("14", "18")
@pytest.mark.fault("database-away-and-back")
def test_a_database_that_was_away_and_came_back_is_read_as_a_whole(
    clusters: ClusterFactory, postgresql_major: str
) -> None:
    """While it was away its blocks had other names; the move itself copies files without naming any."""
    cluster = clusters.create(postgresql_major, conf=CONF, tablespaces=TABLESPACES)
    protected = Protected.begin(cluster)
    cluster.psql("CREATE DATABASE roving")
    cluster.psql(
        "CREATE TABLE t AS SELECT n, repeat('x', 500) s FROM generate_series(1, 9000) n", dbname="roving"
    )
    with protected.captured():
        protected.back_up(mode="local")
        cluster.psql("ALTER DATABASE roving SET TABLESPACE apart")
        cluster.psql("UPDATE t SET s = 'y' WHERE n % 100 = 0", dbname="roving")
        cluster.psql("ALTER DATABASE roving SET TABLESPACE pg_default")
        manifest = protected.back_up(mode="local")
        assert_by_log(manifest)
        assert stale_pages(protected, manifest, cluster) == []
        assert len(manifest.detection.whole_files) > 50


def test_a_promoted_server_is_backed_up_by_the_log_of_both_timelines(cluster: Cluster) -> None:
    protected = Protected.begin(cluster)
    with protected.captured() as capture:
        cluster.pgbench_init()
        protected.back_up(mode="local")
        standby = cluster.make_standby()
        cluster.run("pgbench", "-n", "-t", "200")
        protected.catch_up(capture)
        follow(standby, cluster)
    cluster.stop()
    standby.promote()
    successor = protected.succeeded_by(standby)
    with successor.captured():
        standby.run("pgbench", "-n", "-t", "100")
        manifest = successor.back_up(mode="local", prove_all=True)
        assert_by_log(manifest)
        standby.run("pgbench", "-n", "-t", "100")
        manifest = successor.back_up(mode="local")
        assert_by_log(manifest)
        assert manifest.start.branch == "00000002"
        assert manifest.detection.bytes_unread > 1000 * PG_PAGE_BYTES
        assert stale_pages(successor, manifest, standby) == []


def test_a_parent_with_pages_from_after_the_promotion_is_compared(cluster: Cluster) -> None:
    protected = Protected.begin(cluster)
    with protected.captured() as capture:
        cluster.pgbench_init()
        standby = cluster.make_standby()
        protected.catch_up(capture)
        follow(standby, cluster)
        standby.promote()
        cluster.run("pgbench", "-n", "-t", "200")
        protected.back_up(mode="local")
    cluster.stop()
    successor = protected.succeeded_by(standby)
    with successor.captured():
        standby.run("pgbench", "-n", "-t", "100")
        manifest = successor.back_up(mode="local")
        assert manifest.detection.rung is Rung.COMPARE
        assert "off the history" in manifest.detection.reason
        assert stale_pages(successor, manifest, standby) == []


def follow(standby: Cluster, primary: Cluster) -> None:
    wanted = primary.psql("SELECT pg_current_wal_flush_lsn()")
    replayed = f"SELECT pg_last_wal_replay_lsn() >= '{wanted}'::pg_lsn"
    poll(lambda: standby.psql(replayed) == "t", "the standby has replayed")


@pytest.mark.postgresql_majors("15", "18")
def test_where_the_log_does_not_suffice_pages_are_compared_which_the_manifest_says(
    cluster: Cluster,
) -> None:
    protected = Protected.begin(cluster)
    with protected.captured() as capture:
        cluster.pgbench_init()
        protected.back_up(mode="local")
        remote = protected.back_up(mode="remote")
        assert (remote.detection.rung, remote.detection.reason) == (
            Rung.COMPARE,
            "the server sends all files as a whole",
        )
        cluster.run("pgbench", "-n", "-t", "50")
        protected.catch_up(capture)
        hole = next(one for one in protected.lineage.logs() if one.last > remote.start.offset)
        for segment in protected.lineage.logs():
            if segment.first < hole.last and hole.first < segment.last:
                del protected.objects[log_object_name(protected.lineage.id, segment)]
        compared = protected.back_up(mode="local")
        assert compared.detection.rung is Rung.COMPARE
        assert "is not stored" in compared.detection.reason
        assert stale_pages(protected, compared, cluster) == []
        by_log = protected.back_up(mode="local")
        assert_by_log(by_log)
    minimal = {"wal_level": "minimal", "max_wal_senders": "0"}
    cluster.psql("SELECT pg_drop_replication_slot('cloudsave')")
    cluster.configure({**minimal, "wal_keep_size": "1GB"})
    cluster.restart()
    cluster.psql("BEGIN; CREATE TABLE unseen AS SELECT generate_series(1, 9000) n; COMMIT")
    cluster.configure({"wal_level": "replica", "max_wal_senders": "10"})
    cluster.restart()
    await_next_second(by_log)
    for number in range(2):  # Well away from these records: stored stretches are judged as a whole.
        cluster.psql(f"CREATE TABLE seen_{number} (n int)")
        cluster.switch_wal()
    with protected.captured():
        after = protected.back_up(mode="local")
    assert after.detection.rung is Rung.COMPARE
    assert stale_pages(protected, after, cluster) == []
    await_next_second(after)
    cluster.stop()
    cluster.run("pg_checksums", "--disable", "-D", str(cluster.data))
    cluster.start()
    with protected.captured():
        assert_by_log(protected.back_up(mode="local"))
        cluster.stop()
    cluster.run("pg_checksums", "--enable", "-D", str(cluster.data))
    cluster.start()
    with protected.captured():
        enabled = protected.back_up(mode="local")
    assert (enabled.detection.rung, enabled.detection.reason) == (
        Rung.COMPARE,
        "page checksums were switched on since the parent",
    )


@pytest.mark.postgresql_majors("14", "18")
@pytest.mark.fault("change-unknown-to-log")
def test_a_change_that_the_log_does_not_know_is_found_by_the_proof(
    clusters: ClusterFactory, postgresql_major: str
) -> None:
    """Negative control: a page is changed behind the server's back, so that only reading it can tell."""
    cluster = clusters.create(postgresql_major, checksums=False, conf=CONF)
    protected = Protected.begin(cluster)
    with protected.captured():
        cluster.pgbench_init()
        protected.back_up(mode="local")
    name = cluster.psql("SELECT pg_relation_filepath('pgbench_accounts')")
    # In a stretch that the next backup, the second of this lineage, does not prove.
    stretch = next(n for n in range(2) if (zlib.crc32(name.encode()) + 2 + n) % PROVED_SHARE)
    page = stretch * PROVED_STRETCH_BLOCKS + 300
    cluster.stop()
    with (cluster.data / name).open("r+b") as file:
        file.seek(page * PG_PAGE_BYTES + 4)
        low = int.from_bytes(file.read(4), "little")
        file.seek(page * PG_PAGE_BYTES + 4)
        file.write((low - 8).to_bytes(4, "little"))
    cluster.start()
    with protected.captured():
        unaware = protected.back_up(mode="local")
        assert_by_log(unaware)
        assert stale_pages(protected, unaware, cluster) != []
        manifest = protected.back_up(mode="local", prove_all=True)
        assert manifest.detection.contradicted
        assert manifest.detection.rung is Rung.COMPARE
        assert any("ALARM" in note and f"page {page} " in note for note in manifest.notes)
        assert stale_pages(protected, manifest, cluster) == []


_SUMMARIES = """
SELECT c.reltablespace::bigint, c.reldatabase::bigint, c.relfilenode::bigint, c.relblocknumber,
       c.is_limit_block
FROM pg_available_wal_summaries() s, pg_wal_summary_contents(s.tli, s.start_lsn, s.end_lsn) c
WHERE c.relforknumber = 0 AND s.start_lsn >= %s::pg_lsn AND s.end_lsn <= %s::pg_lsn
"""


@pytest.mark.postgresql_majors("17", "18")
def test_the_log_names_all_that_the_servers_own_summaries_name(
    clusters: ClusterFactory, postgresql_major: str
) -> None:
    conf = {**CONF, "summarize_wal": "on"}
    cluster = clusters.create(postgresql_major, conf=conf, tablespaces=TABLESPACES)
    shaker = Shaker(cluster, seed=3)
    shaker.prepare()
    protected = Protected.begin(cluster)
    with protected.captured() as capture:
        begin = cluster.switch_wal()
        cluster.psql("CHECKPOINT")
        shaker.everything()
        cluster.psql("CHECKPOINT")
        end = cluster.psql("SELECT redo_lsn FROM pg_control_checkpoint()")
        summarized = f"SELECT summarized_lsn >= '{end}'::pg_lsn FROM pg_get_wal_summarizer_state()"
        poll(lambda: cluster.psql(summarized) == "t", "the log is summarized")
        protected.catch_up(capture)
    with cluster.connect() as connection:
        rows = connection.execute(_SUMMARIES, (begin, end)).fetchall()
    changed = ChangedBlocks()
    for segment in protected.lineage.logs():
        changes = protected.lineage.log_index(segment).changes
        assert changes is not None
        changed.add(changes.rows)
    assert not changed.everything
    assert len([row for row in rows if not row[4]]) > 500
    unknown = [row for row in rows if row[2] and changed.unchanged(StorageKey(row[:3], row[3]), 1)[0]]
    assert unknown == [], shaker.done
    made = [row for row in rows if not row[2]]
    assert made, "a database was made or dropped"
    assert not any(changed.unchanged(StorageKey((row[0], row[1], 4711), 0), 1)[0] for row in made)
    untouched = StorageKey((1663, 1, 4711), 0)
    assert changed.unchanged(untouched, 1)[0], "the comparison can fail"


def gone_since(protected: Protected) -> None:
    """The server removes all log but the newest, which nobody has captured."""
    cluster = protected.cluster
    cluster.psql("SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots")
    for _ in range(3):
        cluster.psql("SELECT txid_current()")
        cluster.switch_wal()
        cluster.psql("CHECKPOINT")


def summarizing(clusters: ClusterFactory, major: str, *, seed: int) -> tuple[Protected, Shaker]:
    conf = {**CONF, "summarize_wal": "on", "min_wal_size": "32MB"}
    cluster = clusters.create(major, conf=conf, tablespaces=TABLESPACES)
    shaker = Shaker(cluster, seed)
    shaker.prepare()
    return Protected.begin(cluster), shaker


@pytest.mark.postgresql_majors("17", "18")
def test_where_nobody_captured_the_log_the_servers_summaries_tell(
    clusters: ClusterFactory, postgresql_major: str
) -> None:
    protected, shaker = summarizing(clusters, postgresql_major, seed=5)
    cluster = shaker.cluster
    with protected.captured():
        protected.back_up(mode="local")
    for prove_all in (False, True):
        shaker.everything()
        gone_since(protected)
        with protected.captured():
            manifest = protected.back_up(mode="local", prove_all=prove_all)
        assert manifest.detection.rung is Rung.SUMMARIES, manifest.detection
        assert "is not stored" in manifest.detection.reason
        assert not manifest.detection.contradicted
        assert (manifest.detection.bytes_unread > 300 * PG_PAGE_BYTES) is not prove_all
        assert stale_pages(protected, manifest, cluster) == [], shaker.done


@pytest.mark.postgresql_majors("17", "18")
def test_summaries_that_leave_something_out_are_not_believed(
    clusters: ClusterFactory, postgresql_major: str
) -> None:
    protected, shaker = summarizing(clusters, postgresql_major, seed=6)
    cluster = shaker.cluster
    with protected.captured():
        protected.back_up(mode="local")
    shaker.shake(3)
    gone_since(protected)
    newest = cluster.psql("SELECT max(start_lsn) FROM pg_available_wal_summaries()")
    summarized = f"SELECT summarized_lsn > '{newest}'::pg_lsn FROM pg_get_wal_summarizer_state()"
    poll(lambda: cluster.psql(summarized) == "t", "the log is summarized")
    files = sorted((cluster.data / "pg_wal" / "summaries").glob("*.summary"))
    files[-2].unlink()
    with protected.captured():
        manifest = protected.back_up(mode="local")
        assert manifest.detection.rung is Rung.COMPARE
        assert "is not stored" in manifest.detection.reason
        assert "has no summary" in manifest.detection.reason
        assert stale_pages(protected, manifest, cluster) == []


@pytest.mark.postgresql_majors("18")
def test_summaries_that_may_be_from_before_a_promotion_are_not_believed(
    clusters: ClusterFactory, postgresql_major: str
) -> None:
    protected, shaker = summarizing(clusters, postgresql_major, seed=7)
    standby = shaker.cluster.make_standby(conf={"summarize_wal": "on", "min_wal_size": "32MB"})
    with protected.captured():
        protected.back_up(mode="local")
    follow(standby, shaker.cluster)
    shaker.cluster.stop()
    standby.promote()
    successor = protected.succeeded_by(standby)
    reasons = []
    for _ in range(3):
        Shaker(standby, 8).shake(1)
        gone_since(successor)
        with successor.captured():
            manifest = successor.back_up(mode="local")
        assert stale_pages(successor, manifest, standby) == []
        reasons.append((manifest.detection.rung, manifest.detection.reason))
    assert reasons[0][0] is Rung.COMPARE, reasons
    assert reasons[2][0] is Rung.SUMMARIES, reasons
