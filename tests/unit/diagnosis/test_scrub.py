"""Reading all of a source for nothing but its damage."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from cloudsave.clock import SYSTEM_CLOCK
from cloudsave.diagnosis.scrub import PAGES_NAMED_MAX, Scrubbed, scrub, scrub_findings
from cloudsave.engines.paced import PacedSource
from cloudsave.errors import EngineError, SourceUnreadable
from cloudsave.model.engine_facts import BackupStart, BackupStop
from cloudsave.model.finding import Severity
from cloudsave.model.item import ContentPiece, CorruptPage, Item, ItemKind, Piece
from cloudsave.model.position import Position
from cloudsave.telemetry import NoProgress

HERE = Position("00000001", 0)


class Unreadable(ContentPiece):
    """A piece on a broken disk."""

    def read_into(self, target: memoryview, *, offset: int) -> int:
        raise SourceUnreadable(f"cannot read {self.item.path!r}", detail="Input/output error.")


class FilesInMemory:
    """A source of files in memory."""

    def __init__(self, pieces: list[Piece], corrupt: tuple[CorruptPage, ...] = (), *, fails: bool = False):
        self._pieces = pieces
        self._corrupt = corrupt
        self._fails = fails
        self.calls: list[str] = []

    def begin(self) -> BackupStart:
        self.calls.append("begin")
        total = sum(piece.length for piece in self._pieces)
        return BackupStart(HERE, "local", total, {}, {}, 0)

    def pieces(self) -> Iterator[Piece]:
        yield from self._pieces
        if self._fails:
            raise EngineError("session lost")

    def finish(self) -> BackupStop:
        self.calls.append("finish")
        return BackupStop(HERE, (), (), self._corrupt)

    def abort(self) -> None:
        self.calls.append("abort")


class Counted(NoProgress):
    """Progress that adds up."""

    def __init__(self) -> None:
        self.total: int | None = None
        self.done = 0
        self._lock = threading.Lock()

    def begin(self, label: str, *, bytes_total: int | None) -> None:
        self.total = bytes_total

    def advance(self, bytes_done: int) -> None:
        with self._lock:
            self.done += bytes_done


def piece(path: str, content: bytes, kind: type[ContentPiece] = ContentPiece) -> ContentPiece:
    """A whole file."""
    return kind(Item(path, ItemKind.FILE, 0o600, len(content)), content)


def run(source: FilesInMemory, progress: NoProgress | None = None) -> Scrubbed:
    """Scrub with two readers."""
    return scrub(
        source, page_checksums=True, readers=2, clock=SYSTEM_CLOCK, progress=progress or NoProgress()
    )


def test_every_byte_is_read_and_counted() -> None:
    source = FilesInMemory([piece(f"f{n}", bytes(n * 300_000)) for n in range(12)])
    progress = Counted()
    result = run(source, progress)
    assert result.bytes_read == progress.done == progress.total == 66 * 300_000
    assert result.files == 12
    assert source.calls == ["begin", "finish", "abort"]
    assert [finding.severity for finding in scrub_findings(result)] == [Severity.OK]


def test_damaged_pages_are_named_up_to_a_limit_and_counted() -> None:
    pages = tuple(CorruptPage(f"base/1/{n % 3}", n, "checksum is wrong") for n in range(PAGES_NAMED_MAX + 5))
    findings = list(scrub_findings(run(FilesInMemory([piece("a", b"x")], pages))))
    assert len(findings) == PAGES_NAMED_MAX + 1
    assert findings[0].fact == "page 0 of base/1/0: checksum is wrong"
    assert findings[-1].fact == "25 damaged pages in 3 files"
    assert {finding.severity for finding in findings} == {Severity.PROBLEM}


def test_a_file_that_cannot_be_read_is_a_finding_and_the_rest_is_read() -> None:
    source = FilesInMemory([piece("bad", bytes(9), Unreadable), piece("good", bytes(10))])
    result = run(source)
    assert result.bytes_read == 10
    (finding,) = scrub_findings(result)
    assert finding.severity is Severity.PROBLEM
    assert "'bad'" in finding.fact


def test_a_source_that_fails_ends_the_scrub_and_is_left() -> None:
    source = FilesInMemory([piece("a", bytes(10))], fails=True)
    with pytest.raises(EngineError, match="session lost"):
        run(source)
    assert source.calls == ["begin", "abort"]


def test_without_checksums_the_limits_of_the_check_are_told() -> None:
    result = scrub(
        FilesInMemory([]), page_checksums=False, readers=1, clock=SYSTEM_CLOCK, progress=NoProgress()
    )
    fine, limits = scrub_findings(result)
    assert "header" in fine.fact
    assert limits.severity is Severity.WARNING


def test_a_paced_source_asks_for_every_byte_before_it_is_read() -> None:
    taken: list[int] = []
    source = PacedSource(FilesInMemory([piece("a", bytes(3 << 20)), piece("b", b"x")]), taken.append)
    result = scrub(source, page_checksums=True, readers=1, clock=SYSTEM_CLOCK, progress=NoProgress())
    assert sum(taken) == result.bytes_read == (3 << 20) + 1
