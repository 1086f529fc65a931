"""Sandboxes are gone at the end, however it came."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from cloudsave.recovery.sandbox import PREFIX, sandbox

GONE_SECONDS_MAX = 30.0
ENGINE = "postgresql"


def wait_until_gone(directory: Path) -> None:
    """Poll with a deadline."""
    deadline = time.monotonic() + GONE_SECONDS_MAX
    while directory.exists():
        assert time.monotonic() < deadline, "the sandbox is still there"
        time.sleep(0.02)


def test_a_sandbox_is_private_and_gone_at_the_end(tmp_path: Path) -> None:
    with sandbox(tmp_path / "root", ENGINE) as place:
        assert place.name.startswith(PREFIX)
        assert place.stat().st_mode & 0o777 == 0o700
        (place / "data").mkdir()
        (place / "data/file").write_text("secret")
    assert list((tmp_path / "root").iterdir()) == []
    with pytest.raises(ValueError, match="broken"), sandbox(tmp_path / "root", ENGINE):
        raise ValueError("broken")
    assert list((tmp_path / "root").iterdir()) == []


def test_a_killed_owner_leaves_nothing(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        with sandbox(tmp_path, ENGINE) as place:
            (place / "data").mkdir()
            os.write(writing, str(place).encode())
            signal.pause()
        os._exit(0)
    place = Path(os.read(reading, 4096).decode())
    assert (place / "data").is_dir()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    wait_until_gone(place)


def test_what_a_dead_machine_left_behind_is_removed_and_what_is_in_use_stays(tmp_path: Path) -> None:
    left = tmp_path / f"{PREFIX}left"
    (left / "data").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    with sandbox(tmp_path, ENGINE) as first:
        assert not left.exists()
        with sandbox(tmp_path, ENGINE):
            assert first.is_dir()
        assert first.is_dir()
    assert [one.name for one in tmp_path.iterdir()] == ["other"]
