"""
Object Lock of S3: objects that nobody, whoever holds which credentials, can delete or change for some days.

obstore cannot send a retention with a put, nor set, list or copy versions; boto3 can (decision 0027). Only
stores with `lock_days` come here.

Invariant: the retention is part of the put, so that no object is without one for an instant.
Invariant: mode COMPLIANCE. *In governance mode an administrator's credentials lift it.*
Source: Amazon S3 User Guide, "Using S3 Object Lock".
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import boto3
from botocore.config import Config as BotoConfig
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

from cloudsave.clock import Clock
from cloudsave.errors import (
    ObjectExists,
    ObjectMissing,
    StoreError,
    StorePermission,
    StoreUnavailable,
    StoreUnfit,
)
from cloudsave.store.api import Buffer
from cloudsave.store.names import validate_name
from cloudsave.store.object_store import (
    CONNECT_TIMEOUT_SECONDS,
    REQUEST_TIMEOUT_SECONDS,
    ObstoreStore,
    open_backend,
    s3_endpoint_from_environment,
    store_trouble,
)

MODE = "COMPLIANCE"
THREADS = 16
"""Limit: requests at once."""
TRIES = 5
_MISSING_CODES = frozenset({"NoSuchKey", "NoSuchVersion", "404"})


@dataclass(frozen=True, slots=True)
class Change:
    """What a rewind does to one object, or would do."""

    name: str
    kind: str
    """"brought back" (it was deleted), "put right" (it was overwritten), "left" (it did not exist then)."""


@dataclass(frozen=True, slots=True)
class _Version:
    """One version of an object, or a mark that it was deleted."""

    version_id: str
    modified_utc: datetime
    etag: str
    """Empty: the object was deleted."""
    latest: bool


def open_locking_store(
    bucket: str, *, prefix: str, options: Mapping[str, str], url: str, days: int, clock: Clock
) -> LockingStore:
    """As `open_object_store`, for a bucket of S3 whose objects are to be locked for `days`."""
    return LockingStore(
        open_backend("s3", bucket, prefix=prefix, options=options, url=url),
        url=url,
        bucket=open_locked_bucket(bucket, prefix=prefix, options=options, url=url),
        days=days,
        clock=clock,
    )


def open_locked_bucket(bucket: str, *, prefix: str, options: Mapping[str, str], url: str) -> LockedBucket:
    """The lock and the versions of a bucket; no request is made."""
    endpoint = options.get("endpoint") or s3_endpoint_from_environment()
    return LockedBucket(bucket, prefix=prefix, endpoint=endpoint, region=options.get("region"), url=url)


class LockedBucket:
    """The lock and the versions of one bucket, below a prefix. Thread-safe."""

    def __init__(
        self, bucket: str, *, prefix: str, endpoint: str | None, region: str | None, url: str
    ) -> None:
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        self.url = url
        self._client = _client(endpoint, region, tries=TRIES)
        # A put that the driver repeated in silence could answer "exists" for what the first try had stored.
        self._putting = _client(endpoint, region, tries=1)

    def check(self) -> None:
        """Raises: StoreUnfit where the bucket has no Object Lock."""
        try:
            answer = self._client.get_object_lock_configuration(Bucket=self._bucket)
            if answer["ObjectLockConfiguration"].get("ObjectLockEnabled") == "Enabled":
                return
        except ClientError as error:
            if error.response.get("Error", {}).get("Code") != "ObjectLockConfigurationNotFoundError":
                raise self._translated(error, "look up the Object Lock of", "") from None
        raise StoreUnfit(
            "bucket has no Object Lock, but repository.lock_days is set",
            detail=f"Store: {self.url}.",
            hints=["enable Object Lock (and versions) on the bucket, or take lock_days out"],
        )

    def put(self, name: str, content: bytes, *, until: datetime) -> None:
        """Put if absent, locked until an instant. Raises: ObjectExists, StoreError."""
        with self._errors("store", name):
            self._putting.put_object(
                Bucket=self._bucket,
                Key=self._prefix + name,
                Body=content,
                IfNoneMatch="*",
                ChecksumAlgorithm="SHA256",
                ObjectLockMode=MODE,
                ObjectLockRetainUntilDate=until,
            )

    def renew(self, names: Iterable[str], *, until: datetime) -> None:
        """
        Keep objects locked until an instant; one that is locked for longer stays so. Raises: StoreError.
        """

        def one(name: str) -> None:
            where = {"Bucket": self._bucket, "Key": self._prefix + name}
            try:
                with self._errors("lock", name):
                    self._client.put_object_retention(
                        **where, Retention={"Mode": MODE, "RetainUntilDate": until}
                    )
            except StorePermission:
                # Nobody may shorten a lock; whether that was the reason is seen from the lock itself.
                with self._errors("look up the lock of", name):
                    held = self._client.head_object(**where)
                if held.get("ObjectLockMode") != MODE or held["ObjectLockRetainUntilDate"] < until:
                    raise

        with ThreadPoolExecutor(THREADS, thread_name_prefix="lock") as pool:
            for _ in pool.map(one, names):
                pass

    def rewind(self, to: datetime, *, lock_until: datetime | None, dry_run: bool) -> Iterator[Change]:
        """
        Bring all objects below the prefix back to what they were at an instant, by the store's clock.

        Nothing is deleted: a version that was current then is copied to the top, and locked until
        `lock_until`. What was stored later stays. May be run again. Raises: StoreError.
        """
        for name, versions in self._histories():
            then = next((one for one in versions if one.modified_utc <= to), None)
            now = versions[0]
            if then is None or not then.etag or then.etag == now.etag:
                if now.etag and (then is None or not then.etag):
                    yield Change(name, "left")
                continue
            if not dry_run:
                source = {"Bucket": self._bucket, "Key": self._prefix + name, "VersionId": then.version_id}
                with self._errors("bring back", name):
                    self._client.copy_object(Bucket=self._bucket, Key=self._prefix + name, CopySource=source)
                if lock_until is not None:
                    self.renew([name], until=lock_until)
            yield Change(name, "put right" if now.etag else "brought back")

    def _histories(self) -> Iterator[tuple[str, Sequence[_Version]]]:
        """Each object with its versions, the newest first."""
        current, versions = "", list[_Version]()
        for name, version in self._versions():
            if name != current and versions:
                yield current, _newest_first(versions)
                versions = []
            current = name
            versions.append(version)
        if versions:
            yield current, _newest_first(versions)

    def _versions(self) -> Iterator[tuple[str, _Version]]:
        """All versions and marks of deletion, in the order of names."""
        with self._errors("list the versions of", ""):
            pages = self._client.get_paginator("list_object_versions").paginate(
                Bucket=self._bucket, Prefix=self._prefix
            )
            for page in pages:
                rows = [(row["Key"], _version(row, row["ETag"])) for row in page.get("Versions", ())]
                rows += [(row["Key"], _version(row, "")) for row in page.get("DeleteMarkers", ())]
                for key, version in sorted(rows, key=lambda row: row[0]):
                    yield key[len(self._prefix) :], version

    @contextlib.contextmanager
    def _errors(self, verb: str, name: str) -> Iterator[None]:
        """Translate all that boto3 raises."""
        try:
            yield
        except ClientError as error:
            raise self._translated(error, verb, name) from None
        except NoCredentialsError:
            raise StorePermission(f"cannot {verb} objects: no credentials were found") from None
        except BotoCoreError as error:
            detail = f"{type(error).__name__}. Store: {self.url}."
            raise StoreUnavailable(f"could not {verb} objects: no answer", detail=detail) from None

    def _translated(self, error: ClientError, verb: str, name: str) -> StoreError:
        answer: dict[str, Any] = dict(error.response)
        status = int(answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)) or None
        code = str(answer.get("Error", {}).get("Code", ""))
        what = f'object "{name}"' if name else "the bucket"
        if code == "PreconditionFailed":
            return ObjectExists(f'object "{name}" exists', detail=f"Store: {self.url}.")
        if code in _MISSING_CODES and name:
            return ObjectMissing(f'object "{name}" is missing', detail=f"Store: {self.url}.")
        detail = f"The service answered {status} {code}. Store: {self.url}."
        return store_trouble("", status, code, f"{verb} {what}", detail)


class LockingStore(ObstoreStore):
    """A bucket whose objects are locked for some days from their put on."""

    def __init__(self, backend: Any, *, url: str, bucket: LockedBucket, days: int, clock: Clock) -> None:
        super().__init__(backend, url=url)
        self._bucket = bucket
        self._days = days
        self._clock = clock

    def put(self, name: str, parts: Sequence[Buffer]) -> None:
        """One conditional request that carries the retention."""
        validate_name(name)
        self._bucket.put(name, b"".join(parts), until=self._clock.now() + timedelta(days=self._days))


def _client(endpoint: str | None, region: str | None, *, tries: int) -> Any:
    return boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name=region,
        config=BotoConfig(
            connect_timeout=CONNECT_TIMEOUT_SECONDS,
            read_timeout=REQUEST_TIMEOUT_SECONDS,
            retries={"total_max_attempts": tries, "mode": "standard"},
            max_pool_connections=THREADS,
        ),
    )


def _version(row: dict[str, Any], etag: str) -> _Version:
    return _Version(str(row["VersionId"]), row["LastModified"], etag, bool(row["IsLatest"]))


def _newest_first(versions: Sequence[_Version]) -> list[_Version]:
    """The one that counts comes first: instants are of whole seconds, so the service's word decides."""
    return sorted(versions, key=lambda one: (one.latest, one.modified_utc), reverse=True)
