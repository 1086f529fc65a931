"""A real S3 protocol server (moto) in a process of its own, for tests."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

START_SECONDS_MAX = 60.0
STOP_SECONDS_MAX = 20.0

S3_ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "test-access-key",
    "AWS_SECRET_ACCESS_KEY": "test-secret-key",
    "AWS_REGION": "us-east-1",
}
"""What a client of the server needs; it accepts any key."""


@dataclass(frozen=True, slots=True)
class S3Server:
    """A running server."""

    endpoint: str

    def create_bucket(self, name: str, *, lock: bool = False) -> None:
        """Make an empty bucket; `lock`: one with Object Lock and versions."""
        headers = {"x-amz-bucket-object-lock-enabled": "true"} if lock else {}
        request = urllib.request.Request(f"{self.endpoint}/{name}", method="PUT", headers=headers)
        with urllib.request.urlopen(request, timeout=30) as answer:
            assert answer.status == 200

    def url(self, bucket: str, prefix: str = "") -> str:
        """A store URL for `open_store`."""
        return f"s3://{bucket}/{prefix}?endpoint={self.endpoint}&region=us-east-1"


@contextlib.contextmanager
def running_s3_server() -> Iterator[S3Server]:
    """Start a server on a free loopback port and stop it afterwards."""
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory) / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.s3_process"],
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            yield S3Server(_endpoint(process, log))
        finally:
            process.terminate()
            try:
                process.wait(STOP_SECONDS_MAX)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(STOP_SECONDS_MAX)


def _endpoint(process: subprocess.Popen[bytes], log: Path) -> str:
    """Wait until the server has said where it listens."""
    deadline = time.monotonic() + START_SECONDS_MAX
    while time.monotonic() < deadline:
        found = re.search(r"Running on (http://127\.0\.0\.1:\d+)", log.read_text(errors="replace"))
        if found:
            return found[1]
        if process.poll() is not None:
            break
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.05)
    raise AssertionError(f"the S3 server did not start: {log.read_text(errors='replace')}")
