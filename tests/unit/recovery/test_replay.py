"""The spool and the script that the server runs, for real: exit codes decide over silent loss."""

from __future__ import annotations

import itertools
import os
import pwd
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cloudsave.model.ledger import Extent
from cloudsave.model.log import LogSegment
from cloudsave.model.position import Position
from cloudsave.recovery import replay as replay_module
from cloudsave.recovery.replay import Feeder, LogFile, ReplayLog, later_fetch_command

FILE_BYTES = 1 << 16


class NamesOnly:
    """Of a dialect, the parsing of names: three groups of 8 hex digits."""

    def parse_log_file_name(self, name: str, *, log_file_bytes: int) -> Position | None:
        found = re.fullmatch(r"([0-9A-F]{8})([0-9A-F]{8})([0-9A-F]{8})", name)
        return Position(found[1], int(found[3], 16) * log_file_bytes) if found else None


def name_of(number: int) -> str:
    """A log file of branch 1."""
    return f"00000001{0:08X}{number:08X}"


def log_of(count: int) -> ReplayLog:
    """Files 2.. of a log that was stored in pieces of three quarters of a file."""
    piece = FILE_BYTES * 3 // 4
    begin, end = 2 * FILE_BYTES, (2 + count) * FILE_BYTES - 100
    cuts = [*range(begin, end, piece), end]
    segments = [LogSegment("00000001", a, b) for a, b in itertools.pairwise(cuts)]
    files = tuple(LogFile(name_of(2 + n), begin + n * FILE_BYTES) for n in range(count))
    return ReplayLog(files, tuple(Extent(one, one.first, one.last) for one in segments), FILE_BYTES)


def log_byte(offset: int) -> int:
    """The byte of the log at an offset."""
    return (offset * 7 + offset // 251) % 255 + 1


def read_segment(segment: LogSegment) -> bytes:
    """The log itself."""
    return bytes(log_byte(offset) for offset in range(segment.first, segment.last))


def server_user() -> dict[str, object]:
    """The user whom the script runs as: an unprivileged one when the tests run as root."""
    if os.geteuid() != 0:
        return {}
    entry = pwd.getpwnam("nobody")
    return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that every user can reach."""
    directory = Path(tempfile.mkdtemp(prefix="it's 100%", dir="/tmp"))
    user = server_user()
    os.chmod(directory, 0o755)
    (directory / "server").mkdir()
    if user:
        os.chown(directory / "server", user["user"], user["group"])  # type: ignore[arg-type]
    yield directory
    shutil.rmtree(directory)


def open_feeder(place: Path, read: Callable[[LogSegment], bytes], *, files: int) -> Feeder:
    """A feeder whose spool belongs to the server's user."""
    dialect: Any = NamesOnly()
    made = Feeder(log_of(files), read, spool=place / "spool", dialect=dialect, check=lambda begin, log: None)
    user: dict[str, Any] = server_user()
    made.open({"00000002": b"1\t0/3000000\n"}, uid=user.get("user", -1), gid=user.get("group", -1))
    return made


@pytest.fixture
def feeder(place: Path) -> Iterator[Feeder]:
    """A feeder of 40 files."""
    made = open_feeder(place, read_segment, files=40)
    yield made
    made.close()


def ask(command: str, name: str, place: Path) -> tuple[int, bytes]:
    """Run a restore command as the server does; its exit code and what it fetched."""
    destination = place / "server" / "RECOVERYXLOG"
    destination.unlink(missing_ok=True)
    code = fetch(command, name, place)
    return code, destination.read_bytes() if destination.exists() else b""


def fetch(command: str, name: str, place: Path) -> int:
    """The same over what lies at the destination."""
    meant = {"%f": name, "%p": "RECOVERYXLOG", "%%": "%"}
    shown = re.sub("%[fp%]", lambda found: meant[found[0]], command)
    done = subprocess.run(
        ["/bin/sh", "-c", shown],
        cwd=place / "server",
        timeout=60,
        check=False,
        capture_output=True,
        **server_user(),  # type: ignore[call-overload]
    )
    return done.returncode


def test_files_come_in_order_and_again_with_exactly_their_bytes(feeder: Feeder, place: Path) -> None:
    for number in [*range(12), 11, 10, 3]:
        code, content = ask(feeder.command(), name_of(2 + number), place)
        begin = (2 + number) * FILE_BYTES
        assert code == 0
        assert content == bytes(log_byte(offset) for offset in range(begin, begin + FILE_BYTES))
    assert feeder.position() == 5 * FILE_BYTES


def test_a_file_is_handed_over_without_a_copy_and_never_written_through_another_one(
    feeder: Feeder, place: Path
) -> None:
    destination = place / "server/RECOVERYXLOG"
    for name in (name_of(2), name_of(3)):
        assert ask(feeder.command(), name, place)[0] == 0
        ready = feeder.spool / "ready" / name
        assert destination.samefile(ready)
        assert ready.stat().st_mode & 0o777 == 0o600
    first = feeder.spool / "ready" / name_of(2)
    before = first.read_bytes()
    # Where there can be no second name, a copy does; what lies at the destination is not written through.
    script = feeder.spool / "fetch"
    script.write_text(script.read_text().replace("ln -f", "false"))
    destination.unlink()
    os.link(first, destination)
    for name in (name_of(3), name_of(4)):
        assert fetch(feeder.command(), name, place) == 0
        assert destination.read_bytes() == (feeder.spool / "ready" / name).read_bytes()
        assert not destination.samefile(feeder.spool / "ready" / name)
    assert first.read_bytes() == before


def test_the_last_file_is_filled_with_zeros(feeder: Feeder, place: Path) -> None:
    code, content = ask(feeder.command(), name_of(41), place)
    assert code == 0
    assert len(content) == FILE_BYTES
    assert content[-100:] == bytes(100)
    assert 0 not in content[:-100]


def test_the_spool_is_bounded(feeder: Feeder, place: Path) -> None:
    for number in range(0, 38, 4):
        assert ask(feeder.command(), name_of(2 + number), place)[0] == 0
    logs = [one for one in (feeder.spool / "ready").iterdir() if not one.name.endswith(".history")]
    assert len(logs) <= replay_module.AHEAD_FILES_MAX + replay_module.KEPT_BEHIND_FILES + 4


def test_absence_is_told_only_where_it_is_proved(feeder: Feeder, place: Path) -> None:
    assert ask(feeder.command(), "00000002.history", place) == (0, b"1\t0/3000000\n")
    assert ask(feeder.command(), "00000003.history", place)[0] == 1
    assert ask(feeder.command(), name_of(42), place)[0] == 1
    assert ask(feeder.command(), name_of(1), place)[0] == 255
    assert isinstance(feeder.error, LookupError)


def test_an_error_of_the_store_stops_the_server(place: Path) -> None:
    def fail(segment: LogSegment) -> bytes:
        raise OSError("the store is gone")

    made = open_feeder(place, fail, files=3)
    try:
        assert ask(made.command(), name_of(2), place)[0] == 255
    finally:
        made.close()


def test_a_feeder_that_is_gone_stops_the_server(
    feeder: Feeder, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = feeder.command()
    feeder.close()
    assert ask(command, name_of(2), place)[0] == 255


def test_a_feeder_that_died_in_the_middle_stops_the_server(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay_module, "DEAD_AFTER_SECONDS", 1)
    made = open_feeder(place, read_segment, files=3)
    made._stop.set()
    made._thread.join()
    try:
        assert ask(made.command(), "00000009.history", place)[0] == 255
    finally:
        made.close()


@pytest.mark.parametrize("name", ["", "../x", "a b", "x;y"])
def test_strange_names_stop_the_server(feeder: Feeder, place: Path, name: str) -> None:
    done = subprocess.run(["/bin/sh", feeder.spool / "fetch", name, "out"], cwd=place, check=False)
    assert done.returncode == 255


def test_the_installed_command_quotes_what_needs_it() -> None:
    command = later_fetch_command(["/opt/100% real/cloudsave", "--config", "/etc/c.toml"], "db")
    assert command == """'/opt/100%% real/cloudsave' --config /etc/c.toml logs fetch db "%f" "%p\""""
