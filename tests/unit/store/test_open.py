"""URLs of stores: which back end they open, and which are refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cloudsave.clock import SYSTEM_CLOCK
from cloudsave.errors import SecretInline, StoreUnavailable, UnusableUrl, UsageError
from cloudsave.store.memory import MemoryStore
from cloudsave.store.object_store import ObstoreStore
from cloudsave.store.open import open_store
from cloudsave.store.posix import PosixStore


@pytest.mark.parametrize(
    ("url", "kind", "shown"),
    [
        ("/srv/backup", PosixStore, "file:///srv/backup"),
        ("file:///srv/back%20up", PosixStore, "file:///srv/back%20up"),
        ("file://localhost/srv/backup/", PosixStore, "file:///srv/backup"),
        ("memory://", MemoryStore, "memory://"),
        ("s3://bucket", ObstoreStore, "s3://bucket"),
        ("s3://bucket/a/b/", ObstoreStore, "s3://bucket/a/b/"),
        (
            "s3://bucket/a?endpoint=http://127.0.0.1:1&region=eu-central-1",
            ObstoreStore,
            "s3://bucket/a?endpoint=http://127.0.0.1:1&region=eu-central-1",
        ),
        ("az://container/a?account=someone", ObstoreStore, "az://container/a?account=someone"),
    ],
)
def test_url_opens_a_back_end_without_touching_anything(url: str, kind: type, shown: str) -> None:
    store = open_store(url, clock=SYSTEM_CLOCK)

    assert type(store) is kind
    assert store.url == shown
    assert not Path("/srv/backup").exists()


@pytest.mark.parametrize(
    "url",
    [
        "",
        "relative/path",
        "./x",
        "ftp://host/x",
        "http://host/x",
        "file://host/x",
        "file:relative",
        "file:///x?y=z",
        "file:///x%00y",
        "s3://",
        "s3:///prefix",
        "s3://bucket/../other",
        "s3://bucket/a//b",
        "s3://bucket/.hidden",
        "s3://bucket/a b",
        "s3://bucket?unknown=1",
        "s3://bucket?region=",
        "s3://bucket?region=a&region=b",
        "s3://bucket?endpoint=host:9000",
        "s3://bucket?endpoint=http://",
        "s3://bucket/a#b",
        "gs://bucket?region=x",
        "s3://[bad",
    ],
)
def test_url_that_cannot_be_understood_is_refused_with_the_forms_that_can(url: str) -> None:
    with pytest.raises(UnusableUrl) as caught:
        open_store(url, clock=SYSTEM_CLOCK)

    assert caught.value.detail
    assert "s3://BUCKET/PREFIX" in caught.value.hints[0]
    assert isinstance(caught.value, UsageError)


@pytest.mark.parametrize(
    "url",
    [
        "s3://AKIAHUSHHUSH:hush-hush@bucket/x",
        "s3://hush-hush@bucket/x",
        "file://me:hush-hush@localhost/x",
        "ftp://me:hush-hush@host/x",
        "s3://bucket?access_key_id=hush-hush",
        "s3://bucket?secret_access_key=hush-hush",
        "s3://bucket?session_token=hush-hush",
        "s3://bucket?region=x&X-Amz-Signature=hush-hush",
        "az://container?sig=hush-hush",
        "s3://bucket?endpoint=http://me:hush-hush@127.0.0.1:9000",
    ],
)
def test_url_with_credentials_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(SecretInline) as caught:
        open_store(url, clock=SYSTEM_CLOCK)

    assert "hush" not in str(caught.value).lower()
    assert "AWS_ACCESS_KEY_ID" in caught.value.hints[0]


def test_endpoint_is_taken_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")

    with pytest.raises(StoreUnavailable) as caught:
        open_store("s3://bucket/x", clock=SYSTEM_CLOCK).get("a")

    assert "127.0.0.1:1" in caught.value.detail


def test_a_directory_opens_without_loading_the_driver_of_object_stores() -> None:
    script = (
        "import sys; from cloudsave.clock import SYSTEM_CLOCK; from cloudsave.store.open import open_store;"
        "open_store('/srv/backup', clock=SYSTEM_CLOCK); open_store('memory://', clock=SYSTEM_CLOCK);"
        "assert 'obstore' not in sys.modules;"
        "open_store('s3://bucket', clock=SYSTEM_CLOCK); assert 'obstore' in sys.modules"
    )
    subprocess.run(
        [sys.executable, "-c", script],
        check=True,
        env={"PYTHONPATH": str(Path(__file__).parents[3] / "src")},
    )
