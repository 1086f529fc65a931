"""
Stores from which nothing can be taken away: credentials without delete, and Object Lock.

The drill: somebody has the credentials of the machine that takes backups and those of the operator, and does
all that a service with Object Lock lets him try. Not one locked version may be lost, and after a rewind the
database comes back whole. The service is moto, which refuses what S3 refuses but for one thing: it lets a
lock be shortened, which S3 does for nobody; that is left out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import boto3
import psycopg
import pytest
from botocore.exceptions import ClientError

from cloudsave.errors import StorePermission
from cloudsave.store.api import ObjectStore
from cloudsave.store.posix import PosixStore
from tests.faults.product import Product
from tests.faults.protected import Protected, protected
from tests.integration.postgresql.cluster import poll
from tests.integration.postgresql.command_line import stop_server
from tests.s3_server import S3_ENVIRONMENT, S3Server, running_s3_server

LOCK_DAYS = 30


@pytest.fixture(scope="module")
def server(
    postgresql_bindirs: dict[str, Path],
    postgresql_folders: tuple[Path, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Protected]:
    folder = tmp_path_factory.mktemp("protected")
    with protected("18", postgresql_bindirs, postgresql_folders, folder) as made:
        yield made


# ---- credentials that put, get and list


class AppendOnly(PosixStore):
    """Refuses every delete, as a store does for a role that may put, get and list."""

    def delete(self, name: str) -> None:
        raise StorePermission(f'cannot delete object "{name}": the service refuses it')


def test_backup_capture_and_restore_need_no_right_to_delete(
    server: Protected, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def append_only(url: str, **_: Any) -> ObjectStore:
        return AppendOnly(Path(url))

    monkeypatch.setattr("cloudsave.assembly.open_store", append_only)
    product = Product(tmp_path, server.cluster.url)
    product.run("init")
    product.run("backup", "db")
    server.cluster.psql("CREATE TABLE append_only AS SELECT 1")
    assert product.run("backup", "db")["kind"] == "incremental"
    product.run("key", "add", "--recovery-key-to", str(tmp_path / "recovery"))
    assert product.run("verify", "--read-all")["sound"]
    product.run("list")
    product.run("ranges", "db")
    product.run("restore", "db", "--into", str(tmp_path / "new"))
    slot = product.run("key", "list")[-1]["slot_id"]
    assert product.answer("key", "remove", slot).exit_code in (1, 2), "control: a delete is refused"


# ---- Object Lock


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with pytest.MonkeyPatch.context() as patch, running_s3_server() as server:
        for name, value in S3_ENVIRONMENT.items():
            patch.setenv(name, value)
        yield server


class Site:
    """A repository with two backups in a bucket, and what one with all credentials sees of it."""

    def __init__(self, server: Protected, s3: S3Server, folder: Path, bucket: str, *, lock: bool) -> None:
        self.server = server
        self.bucket = bucket
        self.client = boto3.client("s3", endpoint_url=s3.endpoint, region_name="us-east-1")
        s3.create_bucket(bucket, lock=True)
        self.product = Product(folder, server.cluster.url)
        days = f"lock_days = {LOCK_DAYS}\n" if lock else ""
        self.product.configuration.write_text(
            f"[repository]\nurl = '{s3.url(bucket, 'prod')}'\n{days}"
            f"passphrase_file = '{self.product.passphrase}'\n[sources.db]\nurl = '{server.cluster.url}'\n"
        )
        self.product.run("init")
        self.product.run("backup", "db")

    def versions(self) -> dict[tuple[str, str], str]:
        """All versions of all objects: ETags by key and version."""
        pages = self.client.get_paginator("list_object_versions").paginate(Bucket=self.bucket)
        rows = [row for page in pages for row in page.get("Versions", ())]
        return {(row["Key"], row["VersionId"]): row["ETag"] for row in rows}

    def locked_until(self, part: str) -> dict[str, datetime]:
        """The locks of the objects in whose names `part` is."""
        keys = sorted({key for key, _ in self.versions() if part in key})
        return {
            key: self.client.head_object(Bucket=self.bucket, Key=key)["ObjectLockRetainUntilDate"]
            for key in keys
        }

    def attack(self) -> None:
        """All that one may try who has every credential; what is refused is passed over."""
        before = self.versions()
        for key, version in before:
            here = {"Bucket": self.bucket, "Key": key}
            one = {**here, "VersionId": version}
            last = [] if "packs" in key else [partial(self.client.put_object, **here, Body=b"pay more")]
            for attempt in (
                partial(self.client.delete_object, **one),
                partial(self.client.delete_object, **one, BypassGovernanceRetention=True),
                partial(self.client.put_object, **here, Body=b"encrypted; pay"),
                partial(self.client.delete_object, **here),
                *last,
            ):
                with contextlib.suppress(ClientError):
                    attempt()
        doomed = [{"Key": key, "VersionId": version} for key, version in before]
        for first in range(0, len(doomed), 900):
            batch = {"Objects": doomed[first : first + 900]}
            with contextlib.suppress(ClientError):
                self.client.delete_objects(Bucket=self.bucket, Delete=batch)
        with contextlib.suppress(ClientError):
            self.client.delete_bucket(Bucket=self.bucket)

    def tick(self) -> str:
        """Wait until the second is over in which something was stored last; the instant."""
        pages = self.client.get_paginator("list_object_versions").paginate(Bucket=self.bucket)
        last = max(row["LastModified"] for page in pages for row in page["Versions"])
        poll(lambda: datetime.now(UTC) > last + timedelta(seconds=1.1), "the next second")
        return (last + timedelta(seconds=0.5)).isoformat()


def test_nothing_that_is_locked_is_lost_to_one_with_every_credential(
    server: Protected, s3: S3Server, tmp_path: Path
) -> None:
    site = Site(server, s3, tmp_path, "drill-locked", lock=True)
    rows = server.cluster.psql("SELECT count(*) FROM t")
    before, instant = site.versions(), site.tick()
    site.attack()
    after = site.versions()
    assert {one: after.get(one) for one in before} == before, "a locked version is lost"
    assert site.product.answer("list").exit_code != 0, "control: the attack does harm"

    planned = site.product.run("store", "rewind", "--to", instant, "--dry-run")
    assert len(planned["changes"]) >= len({key for key, _ in before})
    assert site.product.answer("list").exit_code != 0, "control: a dry run changes nothing"
    site.product.run("store", "rewind", "--to", instant)
    assert site.product.run("verify", "--read-all")["sound"]
    assert site.product.run("store", "rewind", "--to", instant)["changes"] == []
    into = server.cluster.factory.folder(on_disk=True) / "restored"
    try:
        arguments = ("--into", str(into), "--start", "--bin-dir", str(server.cluster.bindir))
        told = site.product.run("restore", "db", *arguments)
        with psycopg.connect(told["connection_url"]) as connection:
            assert [(int(rows),)] == connection.execute("SELECT count(*) FROM t").fetchall()
    finally:
        stop_server(into)


def test_without_a_lock_the_same_attack_destroys_everything(
    server: Protected, s3: S3Server, tmp_path: Path
) -> None:
    """Control."""
    site = Site(server, s3, tmp_path, "drill-free", lock=False)
    before = site.versions()
    site.attack()
    assert not before.keys() & site.versions().keys()


def test_a_lock_is_set_by_each_put_and_renewed_for_what_a_new_backup_needs(
    server: Protected, s3: S3Server, tmp_path: Path
) -> None:
    begun = datetime.now(UTC)
    site = Site(server, s3, tmp_path, "renewed", lock=True)
    first = site.locked_until("prod/")
    assert first
    for key, until in first.items():
        assert until >= begun + timedelta(days=LOCK_DAYS) - timedelta(seconds=2), key
    site.tick()
    server.cluster.psql("CREATE TABLE renewed AS SELECT generate_series(1, 1000)")
    assert site.product.run("backup", "db")["kind"] == "incremental"
    later = site.locked_until("prod/")
    needed = [key for key in first if "/packs/" in key or "/keys/" in key or "cloudsave.json" in key]
    assert len(needed) >= 4
    for key in needed:
        assert later[key] > first[key], f"{key} is not locked anew"


def test_a_bucket_that_cannot_lock_is_refused_before_anything_is_stored(
    server: Protected, s3: S3Server, tmp_path: Path
) -> None:
    s3.create_bucket("no-lock")
    product = Product(tmp_path, server.cluster.url)
    product.configuration.write_text(
        f"[repository]\nurl = '{s3.url('no-lock')}'\nlock_days = 3\n"
        f"passphrase_file = '{product.passphrase}'\n"
    )
    error = product.answer("init").expect(1).error
    assert error["code"] == "CS-4007"
    assert "lock_days" in error["message"]
    client = boto3.client("s3", endpoint_url=s3.endpoint, region_name="us-east-1")
    assert client.list_objects_v2(Bucket="no-lock")["KeyCount"] == 0


def test_lock_days_on_a_store_without_locks_is_refused(server: Protected, tmp_path: Path) -> None:
    product = Product(tmp_path, server.cluster.url)
    product.configuration.write_text(
        product.configuration.read_text().replace("[sources", "lock_days = 3\n[sources")
    )
    assert product.answer("init").expect(2).error["code"] == "CS-1007"
    assert not product.repository.exists()
