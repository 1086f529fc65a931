"""The S3 server that the contracts of stores run against."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.s3_server import S3_ENVIRONMENT, S3Server, running_s3_server


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """One server for the whole run, with a bucket; the environment holds credentials for it."""
    with pytest.MonkeyPatch.context() as patch, running_s3_server() as server:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        for name, value in S3_ENVIRONMENT.items():
            patch.setenv(name, value)
        server.create_bucket("contract")
        server.create_bucket("contract-locked", lock=True)
        yield server
