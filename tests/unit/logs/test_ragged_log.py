"""Log whose files end before they are full: stored without holes, and nothing else passes for such an end."""

from __future__ import annotations

import pytest

from cloudsave.errors import LogConflict, LogDamaged
from cloudsave.logs.resume import Overlap, Resume
from cloudsave.logs.status import CaptureOptions
from cloudsave.logs.writer import LogWriter, Window, WriterStart
from cloudsave.model.ledger import Ledger
from tests.unit.logs.fakes import FakeIndexer, MemoryArchive

FILE = 1 << 20
WINDOW = 1 << 16


def _start(offset: int) -> WriterStart:
    return WriterStart("1", offset, FakeIndexer(offset), Window())


def test_end_of_a_file_is_padded_up_to_the_next_one() -> None:
    archive = MemoryArchive()
    ends: list[tuple[int, int]] = []
    writer = LogWriter(
        archive,
        _start(0),
        window_size=WINDOW,
        options=CaptureOptions(),
        durable=lambda end, size: ends.append((end, size)),
    )
    writer.append(b"a" * 100, 0.0)
    writer.skip_to(FILE)
    writer.append(b"b" * 50, 0.0)
    writer.cut()
    writer.skip_to(2 * FILE)
    writer.finish()
    assert Ledger(archive.logs()).ranges("1") == ((0, 2 * FILE),)
    assert ends == [(FILE, 100), (FILE + 50, 50), (2 * FILE, 0)]
    stored = [
        (one.first, archive.read_log(one), archive.log_index(one).padding_bytes) for one in archive.logs()
    ]
    assert (0, b"a" * 100, FILE - 100) in stored
    assert (FILE + 50, b"", FILE - 50) in stored


def _resume(log_file_bytes: int | None) -> Resume:
    return Resume(0, Overlap("1", 0, 0, b""), _start(0), log_file_bytes)


def test_only_the_begin_of_the_next_file_may_follow() -> None:
    _resume(FILE).check_skip(100, FILE)
    for end, begin in ((100, FILE + 1), (100, 2 * FILE), (FILE, FILE + 50)):
        with pytest.raises(LogDamaged):
            _resume(FILE).check_skip(end, begin)
    with pytest.raises(LogDamaged):
        _resume(None).check_skip(100, FILE)


def test_server_whose_file_goes_on_where_a_stored_one_ended_is_another() -> None:
    overlap = Overlap("1", 0, FILE, b"x" * 100)
    assert overlap.strip(0, b"x" * 100) == b""
    assert overlap.strip(FILE, b"new") == b"new"
    with pytest.raises(LogConflict, match="longer"):
        overlap.strip(0, b"x" * 101)
    with pytest.raises(LogConflict, match="differs"):
        overlap.strip(50, b"y")
