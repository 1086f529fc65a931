"""
S3, Google Cloud Storage and Azure Blob Storage by obstore.

Invariant: obstore never retries by itself. A put that it repeated in silence could answer "exists" for an
object that the first, unclear try had stored; only `retrying.py` knows how to tell.
Invariant: nothing of an error but the status, the service's code and message, and an address without its
query reaches our messages: a query may hold a signature.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, Final

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import AzureStore, GCSStore, S3Store

from cloudsave.errors import (
    IntegrityError,
    ObjectExists,
    ObjectMissing,
    StoreError,
    StoreFull,
    StorePermission,
    StoreUnavailable,
    StoreUnfit,
    UnusableUrl,
)
from cloudsave.store.api import Buffer, ObjectInfo, StoreCapabilities
from cloudsave.store.names import readable_size, validate_name, validate_prefix, validate_range

CONNECT_TIMEOUT_SECONDS = 10
REQUEST_TIMEOUT_SECONDS = 300
"""Limit: one request with its body; a 32 MiB object at 1 Mbit/s fits."""
LIST_PAGE_OBJECTS = 1000

S3_ENDPOINT_VARIABLES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")

_NO_RETRIES: Final = {"max_retries": 0, "retry_timeout": timedelta(0)}
_STATUS = re.compile(r"status code: (\d{3})\b")
_SERVICE_CODE = re.compile(r"<Code>([A-Za-z0-9.]{1,100})</Code>|\"code\":\s*\"([A-Za-z0-9.]{1,100})\"")
_SERVICE_MESSAGE = re.compile(r"<Message>([^<]{1,300})</Message>|\"message\":\s*\"([^\"]{1,300})\"")
_QUERY = re.compile(r"\?\S*")
_NO_BUCKET_CODES = frozenset({"NoSuchBucket", "ContainerNotFound", "ContainerBeingDeleted"})
_EXISTS_CODES = frozenset({"BlobAlreadyExists", "PreconditionFailed", "conditionNotMet"})
_FULL_CODES = frozenset({"QuotaExceeded", "XMinioStorageFull", "InsufficientCapacity", "EntityTooLarge"})
_PERMISSION_CODES = frozenset({"AccessDenied", "ExpiredToken", "InvalidAccessKeyId", "SignatureDoesNotMatch"})
_PASSING_CODES = frozenset({"RequestTimeout", "SlowDown", "OperationAborted", "ConditionalRequestConflict"})
_PASSING_STATUS = frozenset({408, 409, 425, 429})
_CREDENTIAL_SERVICES = (
    "http://169.254.",
    "http://metadata.google.internal",
    "/latest/api/token in ",
    "/latest/meta-data/iam/",
)
"""What the address of a request tells when it was not to the store but to the machine's own cloud."""
_TRANSPORT_TEXTS = ("HTTP error", "error sending request", "response body error", "timed out")
_CERTIFICATE_TEXTS = ("InvalidCertificate", "invalid peer certificate", "certificate verify failed")


def open_object_store(
    scheme: str, bucket: str, *, prefix: str, options: Mapping[str, str], url: str
) -> ObstoreStore:
    """
    Connect lazily to a bucket; no request is made.

    Args:
        scheme: "s3", "gs" or "az".
        prefix: Without slashes at its ends; may be empty.
        options: `endpoint`, `region` (s3), `account` (az); credentials come from the environment only.
        url: For messages; without secrets.
    """
    return ObstoreStore(open_backend(scheme, bucket, prefix=prefix, options=options, url=url), url=url)


def open_backend(
    scheme: str, bucket: str, *, prefix: str, options: Mapping[str, str], url: str
) -> S3Store | GCSStore | AzureStore:
    """The driver's object for a bucket; arguments as above. Raises: UnusableUrl."""
    endpoint = options.get("endpoint") or (s3_endpoint_from_environment() if scheme == "s3" else None)
    arguments: dict[str, Any] = {
        "prefix": prefix or None,
        "retry_config": _NO_RETRIES,
        "client_options": {
            "connect_timeout": timedelta(seconds=CONNECT_TIMEOUT_SECONDS),
            "timeout": timedelta(seconds=REQUEST_TIMEOUT_SECONDS),
            "allow_http": endpoint is not None and endpoint.startswith("http://"),
        },
    }
    try:
        return _backend(scheme, bucket, endpoint, options, arguments)
    except (BaseError, ValueError, OSError) as error:
        raise UnusableUrl(
            "cannot use store URL",
            detail=f"{_first_line(error)} ({url})",
            hints=["is the bucket's name right, and are the provider's environment variables well-formed?"],
        ) from None


def _backend(
    scheme: str, bucket: str, endpoint: str | None, options: Mapping[str, str], arguments: dict[str, Any]
) -> S3Store | GCSStore | AzureStore:
    if scheme == "s3":
        config: dict[str, Any] = {"conditional_put": "etag", "disable_bulk_delete": True}
        # TLS protects the body; without it the signature of the payload is the only end-to-end check.
        config["unsigned_payload"] = endpoint is None or endpoint.startswith("https://")
        if endpoint is not None:
            config["endpoint"] = endpoint
        if "region" in options:
            config["region"] = options["region"]
        return S3Store(bucket, config=config, **arguments)  # type: ignore[arg-type]
    if scheme == "gs":
        return GCSStore(bucket, config={"base_url": endpoint} if endpoint else None, **arguments)
    azure = {"endpoint": endpoint, "account_name": options.get("account")}
    chosen = {key: value for key, value in azure.items() if value is not None}
    return AzureStore(bucket, config=chosen, **arguments)  # type: ignore[arg-type]


def s3_endpoint_from_environment() -> str | None:
    """The endpoint that the environment names, as other clients of S3 read it."""
    return next((os.environ[name] for name in S3_ENDPOINT_VARIABLES if os.environ.get(name)), None)


class ObstoreStore:
    """Objects in one bucket, below one prefix."""

    def __init__(self, backend: S3Store | GCSStore | AzureStore, *, url: str) -> None:
        self._backend = backend
        self._url = url

    def __repr__(self) -> str:
        return f"ObstoreStore({self._url!r})"

    @property
    def url(self) -> str:
        """The URL that it was opened by."""
        return self._url

    @property
    def capabilities(self) -> StoreCapabilities:
        """What the three services promise; an imitation may not: `cloudsave store validate` finds out."""
        return StoreCapabilities(conditional_put=True, durable_put=True, distant=True)

    def put(self, name: str, parts: Sequence[Buffer]) -> None:
        """
        One conditional request; a multipart upload could replace an object. The driver gets a copy: it may
        still send a request that we have given up, when the caller uses its memory again.
        """
        validate_name(name)
        with self._errors("store", name):
            obstore.put(self._backend, name, b"".join(parts), mode="create", use_multipart=False)

    def get(self, name: str) -> bytes:
        """One request; the length is checked against what the service says the object has."""
        validate_name(name)
        with self._errors("read", name):
            result = obstore.get(self._backend, name)
            size_bytes = readable_size(name, result.meta["size"])
            content = bytes(result.bytes())
        return bytes(_of_length(content, name, size_bytes))

    def get_range(self, name: str, *, offset: int, length: int) -> Buffer:
        """One request; a view of the driver's memory."""
        validate_name(name)
        validate_range(offset=offset, length=length)
        with self._errors("read", name):
            if length == 0:
                size_bytes = obstore.head(self._backend, name)["size"]
                return _of_length(b"", name, 0 if offset <= size_bytes else offset - size_bytes)
            content = memoryview(obstore.get_range(self._backend, name, start=offset, length=length))
        return _of_length(content, name, length)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Page by page. Raises StoreUnfit where the service does not list in name order."""
        validate_prefix(prefix)
        return self._listed(prefix)

    def delete(self, name: str) -> None:
        """One request."""
        validate_name(name)
        with contextlib.suppress(ObjectMissing), self._errors("delete", name):
            obstore.delete(self._backend, name)

    def _listed(self, prefix: str) -> Iterator[ObjectInfo]:
        last = ""
        with self._errors("list", prefix):
            pages = iter(obstore.list(self._backend, prefix or None, chunk_size=LIST_PAGE_OBJECTS))
        while True:
            with self._errors("list", prefix):
                page = next(pages, None)
            if page is None:
                return
            for meta in page:
                if meta["path"] <= last:
                    raise StoreUnfit(
                        f"cannot use listing of {self._url}: names are not in order",
                        detail=f'"{meta["path"]}" came after "{last}".',
                        hints=["use a bucket type that lists in name order (not a directory bucket)"],
                    )
                last = meta["path"]
                yield ObjectInfo(last, meta["size"], meta["last_modified"])

    @contextlib.contextmanager
    def _errors(self, verb: str, name: str) -> Iterator[None]:
        """Translate all that obstore raises."""
        try:
            yield
        except (BaseError, OSError, ValueError) as error:
            # The original would bring the address with its query into tracebacks.
            raise _store_error(error, verb=verb, name=name, url=self._url) from None


def _of_length(content: Buffer, name: str, length: int) -> Buffer:
    if len(content) != length:
        raise IntegrityError(
            f'object "{name}" is too short',
            detail=f"{len(content)} bytes were received; {length} were expected.",
        )
    return content


def _store_error(error: Exception, *, verb: str, name: str, url: str) -> StoreError | IntegrityError:
    """
    The status decides where there is one, since obstore gives one class to different troubles.

    Source: object_store src/client/retry.rs RetryError::error. It takes any 409 for "exists", but S3 sends
    409 also when a concurrent request made the outcome unclear (ConditionalRequestConflict).
    """
    text = str(error)
    status = int(found[1]) if (found := _STATUS.search(text)) else None
    code = _first_group(_SERVICE_CODE, text)
    what = f'object "{name}"' if name else "objects"
    detail = _detail(text, status, code, url)
    if any(sign in text for sign in _CREDENTIAL_SERVICES):
        return StorePermission(
            f"cannot {verb} {what}: no credentials were found",
            detail=detail,
            hints=[
                "set the provider's environment variables, such as AWS_ACCESS_KEY_ID",
                "or give this machine a role that may use the bucket",
            ],
        )
    if code in _NO_BUCKET_CODES or (status == 404 and "bucket does not exist" in text):
        return StoreError(
            f"cannot {verb} {what}: the bucket does not exist",
            detail=detail,
            hints=["create the bucket first; are its name, region and endpoint right?"],
        )
    if isinstance(error, AlreadyExistsError) and (status != 409 or code in _EXISTS_CODES):
        return ObjectExists(f'object "{name}" exists', detail=f"Store: {url}.")
    if status == 404 or (status is None and isinstance(error, FileNotFoundError)):
        return ObjectMissing(f'object "{name}" is missing', detail=f"Store: {url}.")
    if status == 416:
        return IntegrityError(f'object "{name}" is too short', detail=detail)
    return store_trouble(text, status, code, f"{verb} {what}", detail)


def store_trouble(text: str, status: int | None, code: str, action: str, detail: str) -> StoreError:
    """The error for a request that failed for a reason outside of the object."""
    if code in _PERMISSION_CODES or status in (401, 403):
        return StorePermission(
            f"cannot {action}: the service refuses it",
            detail=detail,
            hints=["do the credentials in the environment belong to a role with this right on the bucket?"],
        )
    if code in _FULL_CODES or status == 507:
        return StoreFull(f"could not {action}: the store is full", detail=detail)
    if status == 501:
        return StoreUnfit(f"cannot {action}: the service lacks what a repository needs", detail=detail)
    if code in _PASSING_CODES or status in _PASSING_STATUS or (status is not None and status >= 500):
        return StoreUnavailable(f"could not {action}: the service is busy or broken", detail=detail)
    if any(sign in text for sign in _CERTIFICATE_TEXTS):
        return StoreError(
            f"cannot {action}: the service's certificate is not trusted",
            detail=detail,
            hints=["is the endpoint right, and is its certificate authority known to this machine?"],
        )
    if status is None and any(sign in text for sign in _TRANSPORT_TEXTS):
        return StoreUnavailable(f"could not {action}: no answer from the service", detail=detail)
    hints = ["is the region right?"] if "redirect" in text or status in (301, 307) else []
    return StoreError(f"could not {action}", detail=detail, hints=hints)


def _detail(text: str, status: int | None, code: str, url: str) -> str:
    """One sentence without anything that could hold a secret."""
    if status is None:
        return f"{_QUERY.sub('', _shortened(text))} Store: {url}."
    message = _first_group(_SERVICE_MESSAGE, text)
    answer = " ".join(part for part in (str(status), code, message.rstrip(".")) if part)
    return f"The service answered {answer}. Store: {url}."


def _first_group(pattern: re.Pattern[str], text: str) -> str:
    found = pattern.search(text)
    return next((group for group in found.groups() if group), "") if found else ""


def _first_line(error: Exception) -> str:
    return _QUERY.sub("", _shortened(str(error)))


def _shortened(text: str) -> str:
    """The first line: what follows is a dump of the driver's internals."""
    return text.split("\n", 1)[0][:300].rstrip(".") + "."
