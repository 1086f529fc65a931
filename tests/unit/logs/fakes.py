"""A source, a dialect and a clock that a test can steer, and an archive in memory that a test can break."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cloudsave.clock import Clock
from cloudsave.errors import CloudsaveError, EngineUnavailable, LogConflict, LogRemoved
from cloudsave.model.engine_facts import BranchEnd, LogChunk, LogHead
from cloudsave.model.history import BranchPoint
from cloudsave.model.identity import Role, SourceIdentity
from cloudsave.model.log import LogHole, LogIndex, LogSegment
from cloudsave.model.position import Position

LOG_FILE_BYTES = 32768
RECORD_BYTES = 64
CHUNK_BYTES = 3000

IDENTITY = SourceIdentity(
    engine="fake",
    system_identifier="77",
    version="1.0",
    major=1,
    branch="1",
    role=Role.PRIMARY,
    data_directory="",
    page_bytes=8192,
    log_file_bytes=LOG_FILE_BYTES,
    page_checksums=True,
)


class Killed(BaseException):
    """The process dies here: nothing of ours may handle it."""


class FakeClock(Clock):
    """Time passes only by sleeping."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def now(self) -> datetime:
        return datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=self.seconds)

    def monotonic(self) -> float:
        return self.seconds

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds

    def random_bytes(self, count: int) -> bytes:
        return b"\x80" * count


class FakeIndexer:
    """Records are RECORD_BYTES long, at multiples of that."""

    def __init__(self, start: int) -> None:
        self.first = self.end = start

    def feed(self, data: bytes | memoryview) -> None:
        self.end += len(data)

    def take(self) -> LogIndex:
        first = -(-self.first // RECORD_BYTES) * RECORD_BYTES
        last = (self.end - 1) // RECORD_BYTES * RECORD_BYTES
        begins = first < self.end
        self.first = self.end
        return LogIndex(
            record_first=first if begins else None,
            record_last=last if begins else None,
            records_end=self.end // RECORD_BYTES * RECORD_BYTES,
        )


class FakeDialect:
    """Histories are lines "branch offset"; log files are called "branch-number"."""

    name = "fake"
    instants_at_commit = True

    def parse_position(self, text: str, *, branch: str) -> int:
        return int(text)

    def format_position(self, position: Position) -> str:
        return str(position.offset)

    def parse_history(self, content: bytes) -> tuple[BranchPoint, ...]:
        rows = (line.split() for line in content.decode().splitlines())
        return tuple(BranchPoint(branch, int(offset)) for branch, offset in rows)

    def first_branch(self, system_identifier: str) -> str:
        return "1"

    def transaction_text(self, log: memoryview) -> str:
        return ""

    def parse_transaction(self, text: str) -> int:
        return int(text)

    def indexer(self, start: Position, *, log_file_bytes: int, system_identifier: str) -> FakeIndexer:
        assert start.offset % RECORD_BYTES == 0
        return FakeIndexer(start.offset)

    def log_file_name(self, branch: str, offset: int, *, log_file_bytes: int) -> str:
        return f"{branch}-{offset // log_file_bytes}"

    def parse_log_file_name(self, name: str, *, log_file_bytes: int) -> Position | None:
        branch, _, number = name.partition("-")
        return Position(branch, int(number) * log_file_bytes) if number.isdigit() else None

    def check_replay(
        self, log: bytes | bytearray, *, until: int, log_file_bytes: int, directory: Path
    ) -> None:
        pass


def log_bytes(seed: str, first: int, last: int) -> bytes:
    """The log that a server whose history has this seed wrote."""
    blocks = range(first // 32, -(-last // 32))
    data = b"".join(hashlib.sha256(f"{seed}/{block}".encode()).digest() for block in blocks)
    begin = first - first // 32 * 32
    return data[begin : begin + last - first]


@dataclass
class FakeServer:
    """A cluster: its branches, what it still has of them, and what its slot holds."""

    branch: str = "1"
    end: int = 0
    points: tuple[BranchPoint, ...] = ()
    removed_before: int = 0
    slot_offset: int | None = None
    seeds: dict[str, str] = field(default_factory=dict)
    identity: SourceIdentity = IDENTITY

    def read(self, branch: str, first: int, last: int) -> bytes:
        """Log of a branch; before its begin it is the parent's."""
        data = b""
        for point in self.points:
            if point.end_offset > first:
                until = min(point.end_offset, last)
                data += log_bytes(self.seeds.get(point.branch, point.branch), first, until)
                first = until
            if point.branch == branch:
                break
        if first < last:
            data += log_bytes(self.seeds.get(branch, branch), first, last)
        return data

    def end_of(self, branch: str) -> int:
        """Where a branch ends on this server."""
        ends = [point.end_offset for point in self.points if point.branch == branch]
        return ends[0] if ends else self.end

    def next_of(self, branch: str) -> str | None:
        """The branch that follows."""
        names = [point.branch for point in self.points] + [self.branch]
        number = names.index(branch)
        return names[number + 1] if number + 1 < len(names) else None

    def promote(self, branch: str) -> None:
        """Go on with a new branch from here; a server writes that at once."""
        self.points = (*self.points, BranchPoint(self.branch, self.end))
        self.branch = branch
        self.end += RECORD_BYTES

    def history(self, branch: str) -> bytes:
        """The history file."""
        names = [point.branch for point in self.points] + [self.branch]
        points = self.points[: names.index(branch)]
        return "".join(f"{point.branch} {point.end_offset}\n" for point in points).encode()


Step = Callable[[], bool]
"""Called when all log was streamed; True: done, go to the next step."""


class FakeSource:
    """A LogSource over a FakeServer. When all log is sent it works through `script`; then it stops."""

    def __init__(self, server: FakeServer, clock: FakeClock, stop: threading.Event) -> None:
        self.server = server
        self.clock = clock
        self.stop = stop
        self.script: Iterator[Step] = iter(())
        self.connect_errors: list[CloudsaveError] = []
        self.connects = 0
        self.streamed_from: list[Position] = []
        self.acknowledged: list[Position] = []
        self.replaced_slots = 0
        self._step: Step | None = None
        self._recycles = False

    def connect(self) -> LogHead:
        self.connects += 1
        if self.connect_errors:
            raise self.connect_errors.pop(0)
        created = self.server.slot_offset is None
        if self.server.slot_offset is None:
            self.server.slot_offset = self.server.end
        return LogHead(
            identity=replace(self.server.identity, branch=self.server.branch),
            current=Position(self.server.branch, self.server.end),
            slot_offset=self.server.slot_offset,
            slot_created=created,
        )

    def stream(self, start: Position) -> Generator[LogChunk | BranchEnd, None, None]:
        self.streamed_from.append(start)
        if start.offset < self.server.removed_before:
            raise LogRemoved("the server has removed log that is needed", detail="fake")
        offset = start.offset
        deadline = time.monotonic() + 20
        while True:
            end = self.server.end_of(start.branch)
            if offset < end:
                last = min(end, offset + CHUNK_BYTES)
                yield self._chunk(start.branch, offset, last)
                offset = last
            elif (following := self.server.next_of(start.branch)) is not None:
                yield BranchEnd(start.branch, end, following)
                return
            else:
                assert time.monotonic() < deadline, "the script got stuck"
                self._work_off()
                self.clock.seconds += 0.3
                yield self._chunk(start.branch, offset, offset)

    def _chunk(self, branch: str, first: int, last: int) -> LogChunk:
        complete_us = int(self.clock.seconds * 1e6) if last >= self.server.end else 0
        return LogChunk(branch, first, self.server.read(branch, first, last), self.server.end, complete_us)

    def _work_off(self) -> None:
        if self._step is None:
            self._step = next(self.script, None)
            if self._step is None:
                self.stop.set()
                return
        if self._step():
            self._step = None

    def history(self, branch: str) -> bytes:
        return self.server.history(branch)

    def acknowledge(self, position: Position) -> None:
        self.acknowledged.append(position)
        self.server.slot_offset = position.offset

    def replace_slot(self) -> None:
        self.replaced_slots += 1
        self.server.slot_offset = None

    def close(self) -> None:
        return


class MemoryArchive:
    """What capture needs of a lineage, in memory; `before_put` and `after_put` may raise."""

    def __init__(self) -> None:
        self.id = IDENTITY.lineage
        self.objects: dict[LogSegment, tuple[bytes, LogIndex]] = {}
        self.stored_histories: dict[str, bytes] = {}
        self.stored_holes: list[LogHole] = []
        self.stored_origins: dict[Position, bytes] = {}
        self.order: list[str] = []
        self.before_put: Callable[[LogSegment], None] = lambda _: None
        self.after_put: Callable[[LogSegment], None] = lambda _: None

    def put_log(self, segment: LogSegment, parts: Sequence[bytes], index: LogIndex) -> None:
        data = b"".join(parts)
        assert len(data) == segment.last - segment.first - index.padding_bytes
        self.before_put(segment)
        if segment in self.objects and self.objects[segment][0] != data:
            raise LogConflict("log differs")
        self.objects[segment] = (data, index)
        self.order.append(f"log {segment.branch}")
        self.after_put(segment)

    def logs(self) -> list[LogSegment]:
        return sorted(self.objects, key=lambda one: (one.branch, one.first, -one.last))

    def log_index(self, segment: LogSegment) -> LogIndex:
        return self.objects[segment][1]

    def read_log(self, segment: LogSegment) -> bytes:
        return self.objects[segment][0]

    def put_history(self, branch: str, content: bytes) -> None:
        if self.stored_histories.setdefault(branch, content) != content:
            raise LogConflict("history differs")
        self.order.append(f"history {branch}")

    def histories(self) -> dict[str, bytes]:
        return dict(self.stored_histories)

    def claim_origin(self, begin: Position, origin: bytes) -> None:
        claimed = self.stored_origins.setdefault(begin, origin)
        common = min(len(claimed), len(origin))
        if claimed[:common] != origin[:common]:
            raise LogConflict("branch begins otherwise")
        self.order.append(f"origin {begin.branch}")

    def put_hole(self, hole: LogHole) -> None:
        if hole not in self.stored_holes:
            self.stored_holes.append(hole)

    def holes(self) -> list[LogHole]:
        return list(self.stored_holes)

    def stored_bytes(self, branch: str) -> dict[int, int]:
        """Byte by offset; asserts that objects which overlap agree."""
        found: dict[int, int] = {}
        for segment, (data, _) in self.objects.items():
            if segment.branch == branch:
                for number, byte in enumerate(data):
                    assert found.setdefault(segment.first + number, byte) == byte
        return found

    def end(self, branch: str) -> int:
        """The end of the last stored byte."""
        return max((one.last for one in list(self.objects) if one.branch == branch), default=0)


def unavailable() -> EngineUnavailable:
    """A connection loss."""
    return EngineUnavailable("could not reach the server", detail="fake")
