"""
Servers and machines that do not let cloudsave work: rights, settings, lost slots, other clusters, full disks.

Each is told with its code, its exit code and the way out; what is stored stays sound, and with the way out
taken the same command succeeds, which is the control.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.faults.product import PASSPHRASE, Product
from tests.integration.postgresql.cluster import Cluster, ClusterFactory, poll
from tests.integration.postgresql.command_line import SOURCE, CommandLine
from tests.integration.postgresql.oracle import Ledger, LedgerClients, assert_ledger

PASSWORD = "geheim99-of-the-database"
SECRET = f"geheim98-of-process-{os.getpid()}"
"""Looked for in the command lines of the whole machine, where other tests run at the same time."""
SMALL_MIB = 2
"""A repository of this size holds no backup of the smallest cluster."""
LARGE_MIB = 200
LEFT_MIB = 2
STATEMENTS_MAX = 10
TARGET_MIB = 20
"""Holds less than the files of the smallest cluster."""


@pytest.fixture
def product(clusters: ClusterFactory, postgresql_major: str, tmp_path: Path) -> Product:
    """A server and an empty repository."""
    made = Product(tmp_path, clusters.create(postgresql_major).url)
    made.run("init")
    return made


def as_role(cluster: Cluster, role: str) -> str:
    """The cluster's URL for another role."""
    return cluster.url.replace("://postgres@", f"://{role}@")


def only(clusters: ClusterFactory) -> Cluster:
    """The one server of a test."""
    (cluster,) = clusters.clusters
    return cluster


def assert_nothing_stored(product: Product) -> None:
    """No backup, and what there is is sound."""
    assert product.run("list") == []
    assert not [name for name in product.objects() if "/backups/" in name]


# ---- rights


@pytest.mark.postgresql_majors("14", "18")
def test_the_rights_that_check_prints_are_enough_for_everything(
    clusters: ClusterFactory, postgresql_major: str, tmp_path: Path
) -> None:
    cluster = clusters.create(postgresql_major)
    line = CommandLine(tmp_path, cluster)
    line.prepare()
    try:
        findings = line.answer("check", SOURCE).expect(3).result["findings"]
        (statements,) = [one["hint"] for one in findings if one["subject"] == "role"]
        for statement in statements.splitlines():
            cluster.psql(statement)
        line.run("source", "remove", SOURCE, "--yes")
        line.run("source", "add", SOURCE, as_role(cluster, "cloudsave"))
        with line.captured():
            kinds = [line.run("backup", SOURCE, "--mode", mode)["method"] for mode in ("local", "remote")]
            line.catch_up()
            findings = line.answer("check", SOURCE).result["findings"]
        assert kinds == ["local", "remote"]
        (role,) = [one for one in findings if one["subject"] == "role"]
        assert role["severity"] == "ok"
        assert not [one for one in findings if one["subject"] == "rights"]
        assert line.run("verify", "--read-all")["sound"]
    finally:
        line.close()


@pytest.mark.postgresql_majors("14", "18")
@pytest.mark.fault("right-missing")
def test_each_missing_right_is_named_with_the_statement_that_gives_it(
    clusters: ClusterFactory, product: Product
) -> None:
    cluster = only(clusters)
    cluster.psql("CREATE ROLE weak LOGIN")
    product.configure(as_role(cluster, "weak"))
    for _ in range(STATEMENTS_MAX):
        answer = product.answer("backup", "db", "--mode", "local")
        if answer.exit_code == 0:
            break
        assert (answer.exit_code, answer.error["code"]) == (1, "CS-2003"), answer.stderr
        assert_nothing_stored(product)
        (hint, *_) = answer.error["hints"]
        statement = hint.partition("as a superuser: ")[2]
        assert statement.startswith(("GRANT ", "ALTER ROLE ")), answer.stderr
        cluster.psql(statement.replace("<role>", "weak"))
    assert answer.exit_code == 0, answer.stderr
    assert product.run("list")


@pytest.mark.postgresql_majors("14", "18")
@pytest.mark.fault("role-may-not-stream")
def test_a_role_that_may_not_stream_can_neither_back_up_remotely_nor_capture(
    clusters: ClusterFactory, product: Product
) -> None:
    cluster = only(clusters)
    cluster.psql("CREATE ROLE weak LOGIN")
    product.configure(as_role(cluster, "weak"))
    for command in (["backup", "db", "--mode", "remote"], ["logs", "capture", "db"]):
        answer = product.answer(*command)
        assert (answer.exit_code, answer.error["code"]) == (1, "CS-2003"), answer.stderr
        assert any("REPLICATION" in hint for hint in answer.error["hints"]), answer.stderr
    assert_nothing_stored(product)
    assert cluster.psql("SELECT count(*) FROM pg_replication_slots") == "0"
    cluster.psql("ALTER ROLE weak REPLICATION")
    product.run("backup", "db", "--mode", "remote")


@pytest.mark.postgresql_majors("14", "18")
@pytest.mark.fault("wrong-password")
def test_a_wrong_password_is_told_and_never_shown(clusters: ClusterFactory, product: Product) -> None:
    cluster = only(clusters)
    cluster.psql(f"CREATE ROLE known LOGIN REPLICATION PASSWORD '{PASSWORD}'")
    hba = cluster.data / "pg_hba.conf"
    hba.write_text(f"local all known scram-sha-256\nlocal replication known scram-sha-256\n{hba.read_text()}")
    cluster.reload()
    product.configure(as_role(cluster, "known"))
    for password in ("geheim99-wrong", ""):
        answer = product.answer("backup", "db", "--mode", "remote", PGPASSWORD=password)
        assert (answer.exit_code, answer.error["code"]) == (1, "CS-2003"), answer.stderr
        assert any("PGPASSWORD" in hint for hint in answer.error["hints"])
        assert "geheim99" not in answer.stderr
    assert_nothing_stored(product)
    product.run("backup", "db", "--mode", "remote", PGPASSWORD=PASSWORD)


# ---- settings


@pytest.mark.postgresql_majors("14", "18")
@pytest.mark.fault("log-too-little")
def test_a_server_that_writes_too_little_log_is_refused(
    clusters: ClusterFactory, postgresql_major: str, tmp_path: Path
) -> None:
    cluster = clusters.create(postgresql_major, conf={"wal_level": "minimal", "max_wal_senders": "0"})
    product = Product(tmp_path, cluster.url)
    product.run("init")
    found = product.answer("check", "db").expect(3).result["findings"]
    assert any(one["subject"] == "wal_level" and one["severity"] == "problem" for one in found)
    for command in (["backup", "db"], ["backup", "db", "--mode", "remote"], ["logs", "capture", "db"]):
        answer = product.answer(*command)
        assert (answer.exit_code, answer.error["code"]) == (1, "CS-2004"), answer.stderr
        assert any("wal_level" in text for text in [answer.error["detail"], *answer.error["hints"]])
        assert answer.error["hints"], answer.stderr
    assert_nothing_stored(product)
    cluster.configure({"wal_level": "replica", "max_wal_senders": "10"})
    cluster.restart()
    product.run("backup", "db")


# ---- a slot that is lost


@pytest.mark.postgresql_majors("18")
def test_a_lost_slot_is_a_hole_that_everybody_is_told_of(clusters: ClusterFactory, tmp_path: Path) -> None:
    cluster = clusters.create(
        "18", conf={"max_slot_wal_keep_size": "16MB", "max_wal_size": "32MB", "min_wal_size": "32MB"}
    )
    line = CommandLine(tmp_path, cluster)
    line.prepare()
    try:
        with line.captured():
            line.run("backup", SOURCE)
            line.catch_up()
        cluster.psql("CREATE TABLE lost (number int)")
        for _ in range(8):
            cluster.psql("INSERT INTO lost SELECT generate_series(1, 1000)")
            cluster.switch_wal()
            cluster.psql("CHECKPOINT")
        assert cluster.psql("SELECT wal_status FROM pg_replication_slots") == "lost"
        capture = line.begin("logs", "capture", SOURCE)
        streams = ("streaming", "hole")
        poll(lambda: any(e["holes"] and e["state"] in streams for e in capture.statuses()), "capture goes on")
        assert any("lost for good" in event["alarm"] for event in capture.statuses())
        (hole,) = line.run("logs", "status", SOURCE, exit_code=3)["holes"]
        across = line.refused(
            "restore", SOURCE, "--into", str(line.place()), "--position", hole["end"], exit_code=4
        )
        assert (across["code"], bool(across["hints"])) == ("CS-5001", True)
        assert across["before"] is not None
        with LedgerClients(lambda: cluster.url, tmp_path / "ledger", clients=1) as clients:
            line.run("backup", SOURCE)
            clients.wait_for(20)
        line.catch_up()
        capture.stop().expect(0)
        with line.restored("--latest") as restored, restored.server.connect() as connection:
            assert_ledger(connection, Ledger.read(tmp_path / "ledger").expected_latest())
    finally:
        line.close()


# ---- another cluster


@pytest.mark.postgresql_majors("14", "18")
@pytest.mark.fault("cluster-made-anew")
def test_another_cluster_under_the_same_name_is_refused(
    clusters: ClusterFactory, product: Product, tmp_path: Path
) -> None:
    mine = only(clusters)
    product.run("backup", "db")
    other = clusters.create(mine.major, fresh_identity=True)
    product.configure(other.url)
    before = product.objects()
    for command in (["backup", "db"], ["logs", "capture", "db"], ["check", "db"]):
        answer = product.answer(*command)
        assert (answer.exit_code, answer.error["code"]) == (5, "CS-2007"), answer.stderr
        assert answer.error["hints"]
    assert product.objects() == before
    assert other.psql("SELECT count(*) FROM pg_replication_slots") == "0"

    other.switch_wal()
    name = "000000010000000000000001"
    shutil.copy(other.data / "pg_wal" / name, tmp_path / name)
    answer = product.answer("logs", "push", "db", str(tmp_path / name))
    assert answer.exit_code == 5, answer.stderr
    assert answer.error["code"].startswith("CS-6") or answer.error["code"] == "CS-2007"
    assert answer.error["hints"], answer.stderr
    assert product.objects() == before

    product.configure(mine.url)
    product.run("backup", "db")


# ---- full disks


@contextmanager
def small_disk(place: Path, *, mib: int) -> Iterator[None]:
    """A file system of its own, as small as wanted. Needs root."""
    place.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={mib}m", "cloudsave-test", str(place)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        pytest.fail(f"a small file system needs the right to mount; run as root: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def enlarge(place: Path, *, mib: int) -> None:
    """Give a small disk more space."""
    subprocess.run(["mount", "-o", f"remount,size={mib}m", place], check=True)


@pytest.mark.postgresql_majors("14", "18")
@pytest.mark.fault("repository-disk-full")
def test_a_backup_into_a_full_repository_fails_and_succeeds_with_more_space(
    clusters: ClusterFactory, postgresql_major: str, tmp_path: Path
) -> None:
    cluster = clusters.create(postgresql_major)
    disk = tmp_path / "disk"
    with small_disk(disk, mib=SMALL_MIB):
        product = Product(tmp_path, cluster.url, store=disk / "repository")
        product.run("init")
        answer = product.answer("backup", "db", CLOUDSAVE_RETRY_DEADLINE_SECONDS="1")
        assert (answer.exit_code, answer.error["code"]) == (1, "CS-4005"), answer.stderr
        assert answer.error["hints"]
        assert_nothing_stored(product)
        enlarge(disk, mib=LARGE_MIB)
        product.run("backup", "db")
        assert product.run("verify", "--read-all")["sound"]
        assert not list((disk / "repository" / ".tmp").iterdir()), "a half-written object is left"


@pytest.mark.postgresql_majors("14", "18")
@pytest.mark.fault("restore-disk-full")
def test_a_restore_onto_a_full_disk_fails_and_goes_on_with_more_space(
    product: Product, tmp_path: Path
) -> None:
    product.run("backup", "db")
    disk = tmp_path / "disk"
    with small_disk(disk, mib=TARGET_MIB):
        into = disk / "new"
        answer = product.answer("restore", "db", "--into", str(into))
        assert (answer.exit_code, answer.error["code"]) == (1, "CS-5004"), answer.stderr
        assert answer.error["hints"]
        assert not into.exists(), "too little space is known before anything is written"
        enlarge(disk, mib=LARGE_MIB)
        # Enough at first; then, while the restore is interrupted, somebody else takes it.
        (pack, *_) = product.repository.glob("lineages/*/packs/*")
        aside = pack.rename(tmp_path / "pack")
        product.answer("restore", "db", "--into", str(into)).expect(1)
        aside.rename(pack)
        filler = disk / "filler"
        filler.write_bytes(bytes(shutil.disk_usage(disk).free - (LEFT_MIB << 20)))
        answer = product.answer("restore", "db", "--into", str(into))
        assert (answer.exit_code, answer.error["code"]) == (1, "CS-5004"), answer.stderr
        assert any("goes on" in hint for hint in answer.error["hints"])
        assert not (into / "global" / "pg_control").exists()
        filler.unlink()
        assert product.run("restore", "db", "--into", str(into))["resumed"]
        assert (into / "global" / "pg_control").exists()


# ---- secrets


@pytest.mark.postgresql_majors("14", "18")
@pytest.mark.fault("secret-shown")
def test_no_secret_is_shown_or_visible_to_other_users(
    clusters: ClusterFactory, postgresql_major: str, tmp_path: Path
) -> None:
    cluster = clusters.create(postgresql_major)
    cluster.psql(f"CREATE ROLE known LOGIN SUPERUSER PASSWORD '{SECRET}'")
    hba = cluster.data / "pg_hba.conf"
    hba.write_text(f"local all known scram-sha-256\nlocal replication known scram-sha-256\n{hba.read_text()}")
    cluster.reload()
    passfile = tmp_path / "pgpass"
    passfile.touch(mode=0o600)
    passfile.write_text(f"*:*:*:known:{SECRET}\n")
    for environment in ({"PGPASSWORD": SECRET}, {"PGPASSFILE": str(passfile)}):
        folder = tmp_path / next(iter(environment))
        folder.mkdir()
        line = CommandLine(folder, cluster, url=as_role(cluster, "known"), environment=environment)
        line.prepare()
        try:
            said = ""
            seen: set[bytes] = set()
            for command in (
                ["--verbose", "check", SOURCE],
                ["--verbose", "backup", SOURCE, "--mode", "local"],
                ["--verbose", "backup", SOURCE, "--mode", "remote"],
                ["--verbose", "backup", "nosuch"],
                ["--verbose", "source", "show", SOURCE],
                ["--verbose", "restore", SOURCE, "--into", str(line.place())],
            ):
                running = line.begin(*command)
                while running.running():
                    seen |= command_lines()
                answer = running.wait()
                assert answer.exit_code in (0, 2, 3), answer.stderr
                said += answer.stdout + answer.stderr
            ours = str(line.config).encode()
            assert any(ours in words and b"backup" in words for words in seen), "no command line was seen"
            for secret in (SECRET, PASSPHRASE):
                assert secret not in said
                assert not any(secret.encode() in words for words in seen)
                stored = [path for path in line.store.rglob("*") if path.is_file()]
                assert not any(secret.encode() in path.read_bytes() for path in stored)
                assert secret not in cluster.log_path.read_text().replace(f"PASSWORD '{secret}'", "")
        finally:
            line.close()


def command_lines() -> set[bytes]:
    """What every user can read of the processes of cloudsave and its children."""
    found = set()
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = place.read_bytes()
        except OSError:
            continue
        if b"cloudsave" in words:
            found.add(words)
    return found
