"""
Base backups and restores of real servers through an S3 server that misbehaves, each in one way.

Where the trouble can be waited out the command succeeds, and everything that it stored is read and proved
afterwards; where not, it is refused with its code, nothing is committed, and without the trouble the same
command succeeds, which is the control. Each test demands that the trouble struck.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engine_report import note_engine
from tests.faults import bad_s3
from tests.faults.bad_s3 import Proxy, Trouble
from tests.faults.product import Product
from tests.integration.postgresql.cluster import Cluster, ClusterFactory
from tests.integration.postgresql.fixtures import version_of
from tests.s3_server import S3_ENVIRONMENT, S3Server, running_s3_server

pytestmark = pytest.mark.postgresql_majors("14", "18")

PATIENCE_SECONDS = "60"
IMPATIENCE_SECONDS = "0.5"
_NUMBERS = itertools.count(1)


class OnS3(Product):
    """A product whose repository is in a bucket behind a proxy."""

    def __init__(self, folder: Path, url: str, proxy: Proxy, bucket: str) -> None:
        self.proxy = proxy
        super().__init__(
            folder, url, address=f"s3://{bucket}/house?endpoint={proxy.endpoint}&region=us-east-1"
        )

    def environment(self, **more: str) -> dict[str, str]:
        """With credentials, and patience."""
        wanted = {"CLOUDSAVE_RETRY_DEADLINE_SECONDS": PATIENCE_SECONDS, **S3_ENVIRONMENT, **more}
        return super().environment(**wanted)


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    """One server for all tests of the module."""
    with running_s3_server() as server:
        yield server


@pytest.fixture(scope="module")
def source(
    postgresql_major: str, postgresql_bindirs: dict[str, Path], postgresql_folders: tuple[Path, Path]
) -> Iterator[Cluster]:
    """A server that the tests only read."""
    root, disk = postgresql_folders
    factory = ClusterFactory(postgresql_bindirs, root=root, disk=disk, noted=lambda major: None)
    try:
        cluster = factory.create(postgresql_major)
        cluster.psql("CREATE TABLE t AS SELECT generate_series(1, 20000) AS number")
        yield cluster
    finally:
        troubles = factory.close()
        assert not troubles, troubles


@pytest.fixture
def product(source: Cluster, s3: S3Server, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[OnS3]:
    """A source and an empty repository in a bucket of its own."""
    note_engine(request.node, "postgresql", source.major, version=version_of(source.bindir))
    bucket = f"faults{next(_NUMBERS)}"
    s3.create_bucket(bucket)
    with bad_s3.bad_way_to(s3.endpoint) as proxy:
        made = OnS3(tmp_path, source.url, proxy, bucket)
        made.run("init")
        yield made


def played(name: str, *values: Any) -> Any:
    """A case of a parametrisation, and its fault."""
    return pytest.param(*values, marks=pytest.mark.fault(name), id=name)


def assert_sound(product: OnS3) -> None:
    """Everything stored is what it must be, and can be restored."""
    assert product.run("verify", "--read-all")["sound"]
    product.run("restore", "db", "--into", str(product.folder / f"new-{next(_NUMBERS)}"))


Made = Callable[[], Trouble]


@pytest.mark.parametrize(
    "made",
    [
        played("store-answers-500", lambda: bad_s3.sometimes(bad_s3.answers(500, "InternalError"), every=6)),
        played("store-slows-down", lambda: bad_s3.sometimes(bad_s3.answers(503, "SlowDown"), every=6)),
        played("store-hangs-up", lambda: bad_s3.sometimes(bad_s3.hangs_up, every=6)),
        played(
            "store-put-answer-lost",
            lambda: bad_s3.only("PUT", bad_s3.sometimes(bad_s3.loses_answer, every=2)),
        ),
        played("store-dribbles", lambda: bad_s3.sometimes(bad_s3.dribbles, every=4)),
        played("store-body-cut", lambda: bad_s3.only("GET", bad_s3.sometimes(bad_s3.cuts_body, every=2))),
    ],
)
def test_trouble_that_passes_is_waited_out(product: OnS3, made: Made) -> None:
    with product.proxy.suffering(made()):
        product.run("backup", "db")
        product.run("restore", "db", "--into", str(product.folder / "amid"))
        assert product.proxy.fired > 0
    assert len(product.run("list")) == 1
    assert_sound(product)


@pytest.mark.parametrize(
    ("made", "code"),
    [
        played("store-network-cut", lambda: bad_s3.since("/packs/", bad_s3.hangs_up), "CS-4002"),
        played(
            "store-credentials-expire",
            lambda: bad_s3.since("/packs/", bad_s3.answers(400, "ExpiredToken")),
            "CS-4006",
        ),
        played("store-clock-skew", lambda: bad_s3.answers(403, "RequestTimeTooSkewed"), "CS-4006"),
        played("store-read-only", lambda: bad_s3.only("PUT", bad_s3.answers(403, "AccessDenied")), "CS-4006"),
        played(
            "store-quota-full", lambda: bad_s3.only("PUT", bad_s3.answers(507, "QuotaExceeded")), "CS-4005"
        ),
        played("store-bucket-gone", lambda: bad_s3.answers(404, "NoSuchBucket"), "CS-4001"),
        played("store-shows-web-page", lambda: bad_s3.shows_a_web_page, ""),
    ],
)
def test_trouble_that_stays_is_told_and_nothing_is_committed(product: OnS3, made: Made, code: str) -> None:
    with product.proxy.suffering(made()):
        answer = product.answer("backup", "db", CLOUDSAVE_RETRY_DEADLINE_SECONDS=IMPATIENCE_SECONDS)
        assert product.proxy.fired > 0
    assert answer.exit_code in (1, 5), answer.stdout + answer.stderr
    assert answer.error["code"].startswith(code or "CS-"), answer.stderr
    assert answer.error["code"] != "CS-0001", answer.stderr
    assert "Traceback" not in answer.stderr
    assert product.run("list") == []
    product.run("backup", "db")
    assert product.run("verify", "--read-all")["sound"]


@pytest.mark.parametrize(
    ("made", "code"),
    [
        played("store-wrong-bytes", lambda: bad_s3.only("GET", bad_s3.flips_bit), "CS-6"),
        played("store-ignores-ranges", lambda: bad_s3.only("GET", bad_s3.ignores_ranges), "CS-"),
    ],
)
def test_what_is_not_the_stored_bytes_is_never_restored(product: OnS3, made: Made, code: str) -> None:
    product.run("backup", "db")
    into = product.folder / "new"
    with product.proxy.suffering(made()):
        answer = product.answer("restore", "db", "--into", str(into))
        assert product.proxy.fired > 0
    assert answer.exit_code in (1, 5), answer.stdout
    assert answer.error["code"].startswith(code), answer.stderr
    assert answer.error["code"] != "CS-0001", answer.stderr
    assert not (into / "global" / "pg_control").exists()
    assert_sound(product)


@pytest.mark.fault("store-put-unconditional")
def test_a_store_that_overwrites_is_refused_at_the_begin(product: OnS3) -> None:
    """The control is the repository of the fixture, made the same way without the trouble."""
    product.address = product.address.replace("/house", "/other")
    product.configure(product.url)
    with product.proxy.suffering(bad_s3.only("PUT", bad_s3.overwrites)):
        assert product.answer("init").expect(1).error["code"] == "CS-4007"


@pytest.mark.fault("store-listing-lags")
def test_a_store_whose_listing_lags_is_found_and_no_wrong_state_is_restored(product: OnS3) -> None:
    with product.proxy.suffering(bad_s3.lags_behind()):
        assert product.answer("store", "validate").exit_code == 3
        assert product.proxy.fired > 0
    assert product.answer("store", "validate").exit_code == 0
    product.run("backup", "db")
    assert_sound(product)
