"""Limits of running commands follow the configuration files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cloudsave.assembly import Limits
from cloudsave.cli.live_limits import take_anew
from cloudsave.clock import Clock
from cloudsave.config.load import load_config
from cloudsave.config.model import Config


class HeldClock(Clock):
    """A clock that moves only when somebody sleeps."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def monotonic(self) -> float:
        return self.seconds

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds


def loader(path: Path, **overrides: int) -> Callable[[], Config]:
    """Loads a file as a command does, with what was said on its command line."""
    return lambda: load_config(path=path, environ={}, overrides=overrides)


def test_changed_rates_and_workers_hold_from_now_on_and_are_told(tmp_path: Path) -> None:
    path = tmp_path / "cloudsave.toml"
    path.write_text('workers = 4\nread_limit_bytes_per_second = "100 kB"\n')
    clock, said = HeldClock(), list[str]()
    limits = Limits(loader(path)(), clock=clock)
    limits.read.take(1_000_000)
    assert clock.seconds > 9
    path.write_text('workers = 1\nrate_limit_bytes_per_second = "1 MB"\n')
    take_anew(limits, loader(path), said.append)
    begun = clock.seconds
    limits.read.take(1_000_000_000)
    assert clock.seconds == begun
    limits.store.take(10_000_000)
    assert clock.seconds > begun + 8
    assert limits.workers() == 1
    assert said == [
        "rate_limit_bytes_per_second is 1000000 from now on",
        "read_limit_bytes_per_second is not limited from now on",
        "workers is 1 from now on",
    ]


def test_what_was_said_on_the_command_line_stays(tmp_path: Path) -> None:
    path = tmp_path / "cloudsave.toml"
    path.write_text("workers = 4\n")
    load, said = loader(path, workers=2), list[str]()
    limits = Limits(load(), clock=HeldClock())
    path.write_text("workers = 1\n")
    take_anew(limits, load, said.append)
    assert (limits.workers(), said) == (2, [])


def test_a_file_that_cannot_be_used_changes_nothing_and_is_told(tmp_path: Path) -> None:
    path = tmp_path / "cloudsave.toml"
    path.write_text("workers = 4\n")
    said: list[str] = []
    limits = Limits(loader(path)(), clock=HeldClock())
    path.write_text("workers = none\n")
    take_anew(limits, loader(path), said.append)
    path.unlink()
    take_anew(limits, loader(path), said.append)
    assert limits.workers() == 4
    assert len(said) == 2
    assert all("limits stay as they are" in sentence for sentence in said)
