"""How answers of a service, and the lack of them, become our errors. The service is a real HTTP server."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from cloudsave.clock import SYSTEM_CLOCK
from cloudsave.errors import (
    CloudsaveError,
    IntegrityError,
    ObjectExists,
    ObjectMissing,
    StoreError,
    StoreFull,
    StorePermission,
    StoreUnavailable,
    StoreUnfit,
)
from cloudsave.store.api import ObjectStore
from cloudsave.store.open import open_store

SECRET = "test-secret-key"


@dataclass
class Script:
    """What the server answers to everything, and what it was asked."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    missing_bytes: int = 0
    hang_up: bool = False
    requests: list[tuple[str, str, dict[str, str], bytes]] = field(default_factory=list)


class _Handler(BaseHTTPRequestHandler):
    def _answer(self) -> None:
        script: Script = self.server.script  # type: ignore[attr-defined]
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        headers = {key.lower(): value for key, value in self.headers.items()}
        script.requests.append((self.command, self.path, headers, body))
        if script.hang_up:
            self.close_connection = True
            return
        self.send_response(script.status)
        self.send_header("content-length", str(len(script.body) + script.missing_bytes))
        for key, value in script.headers.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(script.body)
        self.close_connection = self.close_connection or script.missing_bytes > 0

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _answer  # noqa: N815 - named by http.server

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - named by http.server
        """Say nothing."""


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Script, ObjectStore]]:
    """A scripted service and a store on it."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test-access-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    script = Script()
    server.script = script  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        url = f"s3://bucket/prefix?endpoint=http://127.0.0.1:{server.server_port}"
        yield script, open_store(url, clock=SYSTEM_CLOCK)
    finally:
        server.shutdown()
        server.server_close()
        thread.join(30)


def _xml(code: str, message: str = "Something is as it is.") -> bytes:
    return f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>{message}</Message></Error>'.encode()


OPERATIONS: dict[str, Callable[[ObjectStore], object]] = {
    "put": lambda store: store.put("a", [b"x"]),
    "get": lambda store: store.get("a"),
    "get_range": lambda store: store.get_range("a", offset=0, length=1),
    "list": lambda store: list(store.list("")),
    "delete": lambda store: store.delete("a"),
}
ALL = tuple(OPERATIONS)


@pytest.mark.parametrize(
    ("status", "code", "operations", "error"),
    [
        (400, "ExpiredToken", ALL, StorePermission),
        (400, "RequestTimeout", ALL, StoreUnavailable),
        (400, "InvalidRequest", ALL, StoreError),
        (401, "Unknown", ALL, StorePermission),
        (403, "AccessDenied", ALL, StorePermission),
        (404, "NoSuchBucket", ALL, StoreError),
        (404, "NoSuchKey", ("get", "get_range"), ObjectMissing),
        (409, "ConditionalRequestConflict", ALL, StoreUnavailable),
        (409, "OperationAborted", ALL, StoreUnavailable),
        (409, "BlobAlreadyExists", ("put",), ObjectExists),
        (412, "PreconditionFailed", ("put",), ObjectExists),
        (416, "InvalidRange", ("get_range",), IntegrityError),
        (429, "TooManyRequests", ALL, StoreUnavailable),
        (500, "InternalError", ALL, StoreUnavailable),
        (501, "NotImplemented", ALL, StoreUnfit),
        (503, "SlowDown", ALL, StoreUnavailable),
        (503, "QuotaExceeded", ("put",), StoreFull),
        (507, "XMinioStorageFull", ALL, StoreFull),
        (301, "PermanentRedirect", ALL, StoreError),
    ],
)
def test_an_answer_becomes_the_right_error(
    service: tuple[Script, ObjectStore],
    status: int,
    code: str,
    operations: tuple[str, ...],
    error: type[CloudsaveError],
) -> None:
    script, store = service
    script.status, script.body = status, _xml(code)

    for operation in operations:
        with pytest.raises(error) as caught:
            OPERATIONS[operation](store)
        assert type(caught.value) is error, operation
        _assert_presentable(caught.value)
        assert caught.value.__cause__ is None
    assert len(script.requests) == len(operations), "the driver retried by itself"


def _assert_presentable(error: CloudsaveError) -> None:
    text = str(error)
    assert SECRET not in text
    assert "Signature" not in text
    assert "RetryError" not in text
    assert "\n" not in error.message
    assert len(error.detail) < 600


def test_the_service_s_own_words_are_told(service: tuple[Script, ObjectStore]) -> None:
    script, store = service
    script.status, script.body = 403, _xml("AccessDenied", "User bob may not.")

    with pytest.raises(StorePermission) as caught:
        store.put("a", [b"x"])

    assert "403 AccessDenied User bob may not." in caught.value.detail


def test_a_connection_that_breaks_may_be_tried_again(service: tuple[Script, ObjectStore]) -> None:
    script, store = service
    script.hang_up = True

    for operation in ALL:
        with pytest.raises(StoreUnavailable) as caught:
            OPERATIONS[operation](store)
        _assert_presentable(caught.value)
    assert len(script.requests) == len(ALL), "the driver retried by itself"


def test_a_body_that_breaks_off_is_never_taken_for_the_object(service: tuple[Script, ObjectStore]) -> None:
    script, store = service
    script.body, script.missing_bytes = b"half", 4
    script.headers = {"ETag": '"x"', "Last-Modified": "Wed, 21 Oct 2026 07:28:00 GMT"}

    with pytest.raises(StoreUnavailable):
        store.get("a")


def test_a_server_that_ignores_ranges_is_not_believed(service: tuple[Script, ObjectStore]) -> None:
    script, store = service
    script.body = b"0123456789"
    script.headers = {"ETag": '"x"', "Last-Modified": "Wed, 21 Oct 2026 07:28:00 GMT"}

    with pytest.raises(StoreError):
        store.get_range("a", offset=2, length=3)


def test_no_listener_may_be_tried_again() -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.server_close()
    store = open_store(f"s3://bucket?endpoint=http://127.0.0.1:{server.server_port}", clock=SYSTEM_CLOCK)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "test-access-key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        store = open_store(store.url, clock=SYSTEM_CLOCK)
    for operation in ALL:
        with pytest.raises(StoreUnavailable):
            OPERATIONS[operation](store)


def test_put_is_one_conditional_request_below_the_prefix(service: tuple[Script, ObjectStore]) -> None:
    script, store = service
    script.headers = {"ETag": '"x"'}

    store.put("packs/1", [b"x" * 6_000_000, bytearray(b"y") * 6_000_000])

    assert len(script.requests) == 1
    method, path, headers, body = script.requests[0]
    assert (method, path) == ("PUT", "/bucket/prefix/packs/1")
    assert headers["if-none-match"] == "*"
    assert len(body) == 12_000_000
    # Without TLS the payload is part of the signature.
    assert len(headers["x-amz-content-sha256"]) == 64


def test_a_listing_out_of_order_is_refused(service: tuple[Script, ObjectStore]) -> None:
    script, store = service
    entries = "".join(
        f"<Contents><Key>prefix/{name}</Key><LastModified>2026-11-21T00:00:00.000Z</LastModified>"
        f'<ETag>"x"</ETag><Size>1</Size></Contents>'
        for name in ("a", "c", "b")
    )
    script.body = f"<ListBucketResult><IsTruncated>false</IsTruncated>{entries}</ListBucketResult>".encode()

    listing = store.list("")

    assert [next(listing).name, next(listing).name] == ["a", "c"]
    with pytest.raises(StoreUnfit):
        next(listing)


def test_gs_creates_only_where_no_generation_exists(
    service: tuple[Script, ObjectStore], monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    script, store = service
    endpoint = store.url.partition("endpoint=")[2]
    key = {
        "gcs_base_url": endpoint,
        "disable_oauth": True,
        "client_email": "",
        "private_key": "",
        "private_key_id": "",
    }
    path = tmp_path / "key.json"
    path.write_text(json.dumps(key))
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT", str(path))
    script.headers = {"ETag": '"x"'}
    google = open_store(f"gs://bucket/prefix?endpoint={endpoint}", clock=SYSTEM_CLOCK)

    google.put("a", [b"x"])
    script.status, script.body = 412, b'{"error": {"code": 412, "message": "conditionNotMet"}}'
    with pytest.raises(ObjectExists):
        google.put("a", [b"x"])

    assert script.requests[0][2]["x-goog-if-generation-match"] == "0"


def test_az_creates_only_where_nothing_exists(
    service: tuple[Script, ObjectStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    script, store = service
    endpoint = store.url.partition("endpoint=")[2]
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "aGVsbG8=")
    azure = open_store(f"az://container/prefix?account=me&endpoint={endpoint}", clock=SYSTEM_CLOCK)
    script.headers = {"ETag": '"x"'}

    azure.put("a", [b"x"])
    script.status, script.body = 409, _xml("BlobAlreadyExists")
    with pytest.raises(ObjectExists):
        azure.put("a", [b"x"])

    assert script.requests[0][2]["if-none-match"] == "*"


def test_a_signature_in_an_address_is_not_told(
    service: tuple[Script, ObjectStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    script, store = service
    endpoint = store.url.partition("endpoint=")[2]
    monkeypatch.setenv("AZURE_STORAGE_SAS_KEY", "sv=2023-01-01&sig=hush-hush")
    azure = open_store(f"az://container/prefix?account=me&endpoint={endpoint}", clock=SYSTEM_CLOCK)

    for script.hang_up in (False, True):
        script.status, script.body = 400, _xml("InvalidQueryParameterValue")
        for operation in ALL:
            with pytest.raises(StoreError) as caught:
                OPERATIONS[operation](azure)
            assert "hush" not in str(caught.value)
    assert any("hush-hush" in path for _, path, _, _ in script.requests)


def test_missing_credentials_are_said_at_once(
    service: tuple[Script, ObjectStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    script, store = service
    endpoint = store.url.partition("endpoint=")[2]
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", endpoint)
    keyless = open_store(store.url, clock=SYSTEM_CLOCK)
    script.status = 503

    with pytest.raises(StorePermission) as caught:
        keyless.put("a", [b"x"])

    assert "no credentials" in caught.value.message
    assert "AWS_ACCESS_KEY_ID" in caught.value.hints[0]
