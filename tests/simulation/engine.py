"""
A database engine in memory that keeps the promises of `cloudsave.engines.api`: a log of records with check
sums, data files that lag behind it, slots that hold log, branches.

Everything is a function of the log: a record changes one page as a whole, commits, or marks a point by name.
So the state at any offset of any branch is known by replay from nothing, and a restore can be compared with
it page by page. One thread; a seed decides all.
"""

from __future__ import annotations

import struct
import threading
import zlib
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random

import numpy as np

from cloudsave.clock import Clock
from cloudsave.errors import EngineUnavailable, IntegrityError, LogDamaged, LogRemoved, SlotLost
from cloudsave.model.changes import CHANGE_BLOCK, CHANGE_TYPE, LogChanges, StorageKey, sorted_changes
from cloudsave.model.engine_facts import BackupStart, BackupStop, BranchEnd, LogChunk, LogHead, SlotState
from cloudsave.model.finding import Finding
from cloudsave.model.history import BranchPoint
from cloudsave.model.identity import Role, SourceIdentity
from cloudsave.model.item import ContentPiece, Item, ItemKind, Piece
from cloudsave.model.log import Commit, LogIndex, RestorePoint
from cloudsave.model.position import Position

PAGE_BYTES = 8192
LOG_FILE_BYTES = 8192
CHUNK_BYTES_MAX = 3000
RECORD = struct.Struct("<4sBBHQIqIB31s")
"""Magic, kind, file, block, offset, transaction, instant, salt, nothing, nothing; then the check sum."""
RECORD_BYTES = RECORD.size + 4
MAGIC = b"SIML"
CHANGE, COMMIT, POINT = 1, 2, 3
FILES, BLOCKS = 3, 5
FIRST_BRANCH = "00000001"
IDLE_KEEPALIVES_MAX = 12
KEEPALIVE_SECONDS = 0.4

State = dict[tuple[int, int], "Record"]
"""The last record that changed each page."""


@dataclass(frozen=True, slots=True)
class Record:
    """One record. `salt` tells apart what two servers write at the same place."""

    kind: int
    file: int
    block: int
    offset: int
    transaction: int
    instant_us: int
    salt: int

    @property
    def end(self) -> int:
        """Where the next one begins."""
        return self.offset + RECORD_BYTES

    def encoded(self) -> bytes:
        """As it stands in the log."""
        body = RECORD.pack(
            MAGIC, self.kind, self.file, self.block, self.offset, self.transaction, self.instant_us,
            self.salt, 0, b"",
        )  # fmt: skip
        return body + zlib.crc32(body).to_bytes(4, "little")

    def page(self) -> bytes:
        """The page that it leaves: its end, and bytes that nothing else has."""
        seed = struct.pack("<QIIHH", self.end, self.transaction, self.salt, self.file, self.block)
        return self.end.to_bytes(8, "little") + (seed * (PAGE_BYTES // len(seed) + 1))[: PAGE_BYTES - 8]


def decode(data: bytes, offset: int) -> Record:
    """The record at `offset` of the log. Raises: LogDamaged."""
    body = data[:-4]
    magic, kind, file, block, at, transaction, instant_us, salt, _, _ = RECORD.unpack(body)
    if magic != MAGIC or at != offset or zlib.crc32(body).to_bytes(4, "little") != data[-4:]:
        raise LogDamaged("no record", detail="simulated", offset=offset)
    return Record(kind, file, block, at, transaction, instant_us, salt)


def page_position(page: bytes) -> int:
    """Where the record ended that last changed a page."""
    return int.from_bytes(page[:8], "little")


# ---- the log -----------------------------------------------------------------------------------------------


class Indexer:
    """`LogIndexer` over the simulated log."""

    def __init__(self, start: int) -> None:
        self._begun = start % RECORD_BYTES == 0
        self._at = start if self._begun else start - start % RECORD_BYTES + RECORD_BYTES
        self._skip = self._at - start
        self._end = start
        self._taken = start
        self._rest = b""
        self._records: list[Record] = []

    def feed(self, data: bytes) -> None:
        """See `LogIndexer.feed`."""
        self._end += len(data)
        skipped = min(self._skip, len(data))
        self._skip -= skipped
        self._rest += data[skipped:]
        while len(self._rest) >= RECORD_BYTES:
            self._records.append(decode(self._rest[:RECORD_BYTES], self._at))
            self._rest = self._rest[RECORD_BYTES:]
            self._at += RECORD_BYTES

    def take(self) -> LogIndex:
        """See `LogIndexer.take`."""
        records, self._records = self._records, []
        first = -(-self._taken // RECORD_BYTES) * RECORD_BYTES
        last = (self._end - 1) // RECORD_BYTES * RECORD_BYTES
        begins = first < self._end
        seen_from = records[0].offset if records else self._at
        rows = [(1, 1, one.file, one.block, CHANGE_BLOCK) for one in records if one.kind == CHANGE]
        changed = sorted_changes(np.array(rows, CHANGE_TYPE))
        self._taken = self._end
        return LogIndex(
            commits=tuple(  # type: ignore[arg-type]
                Commit(one.offset, one.end, one.instant_us, one.transaction)
                for one in records
                if one.kind == COMMIT
            ),
            restore_points=tuple(
                RestorePoint(one.offset, one.end, one.instant_us, f"point-{one.transaction}")
                for one in records
                if one.kind == POINT
            ),
            record_first=first if begins else None,
            record_last=last if begins else None,
            records_end=self._at,
            changes=LogChanges(seen_from, changed),
        )


class Dialect:
    """`Dialect` of the simulated engine: histories are lines "branch offset"."""

    name = "simulated"
    instants_at_commit = True

    def parse_position(self, text: str, *, branch: str) -> int:
        """See `Dialect.parse_position`."""
        return int(text)

    def format_position(self, position: Position) -> str:
        """See `Dialect.format_position`."""
        return str(position.offset)

    def parse_history(self, content: bytes) -> tuple[BranchPoint, ...]:
        """See `Dialect.parse_history`."""
        rows = [line.split() for line in content.decode().splitlines()]
        if not rows or any(len(row) != 2 for row in rows):
            raise IntegrityError("history is malformed")
        return tuple(BranchPoint(branch, int(offset)) for branch, offset in rows)

    def first_branch(self, system_identifier: str) -> str:
        """See `Dialect.first_branch`."""
        return FIRST_BRANCH

    def transaction_text(self, log: memoryview) -> str:
        """See `Dialect.transaction_text`."""
        return ""

    def parse_transaction(self, text: str) -> int:
        """See `Dialect.parse_transaction`."""
        return int(text)

    def indexer(self, start: Position, *, log_file_bytes: int, system_identifier: str) -> Indexer:
        """See `Dialect.indexer`."""
        return Indexer(start.offset)

    def log_file_name(self, branch: str, offset: int, *, log_file_bytes: int) -> str:
        """See `Dialect.log_file_name`."""
        return f"{branch}{offset // log_file_bytes:016X}"

    def parse_log_file_name(self, name: str, *, log_file_bytes: int) -> Position | None:
        """See `Dialect.parse_log_file_name`."""
        return Position(name[:8], int(name[8:], 16) * log_file_bytes) if len(name) == 24 else None

    def check_replay(
        self, log: bytes | bytearray, *, until: int, log_file_bytes: int, directory: Path
    ) -> None:
        """Nothing outside of the data files is ever written."""


# ---- the server --------------------------------------------------------------------------------------------


@dataclass
class Slot:
    """What holds log for capture."""

    offset: int
    lost: bool = False


@dataclass
class Server:
    """
    One server: its history, its log, its pages in memory and on its disk.

    `points` are the ends of its branch's ancestors. `logs` holds the records that were written on each branch
    of the history, from the branch's begin on.
    """

    chance: Random
    identifier: str
    branch: str = FIRST_BRANCH
    points: tuple[BranchPoint, ...] = ()
    logs: dict[str, list[Record]] = field(default_factory=lambda: {FIRST_BRANCH: []})
    disk: State = field(default_factory=dict)
    removed_before: int = 0
    slot: Slot | None = None
    away: bool = False
    instant_us: int = 1_700_000_000_000_000
    transactions: int = 0

    # ---- its log

    @property
    def begin(self) -> int:
        """Where its branch begins."""
        return self.points[-1].end_offset if self.points else 0

    @property
    def end(self) -> int:
        """The end of its log."""
        records = self.logs[self.branch]
        return records[-1].end if records else self.begin

    def path(self) -> list[tuple[str, int, int]]:
        """(branch, begin, end) of its history, oldest first."""
        steps, begin = [], 0
        for point in self.points:
            steps.append((point.branch, begin, point.end_offset))
            begin = point.end_offset
        return [*steps, (self.branch, begin, self.end)]

    def records(self, branch: str | None = None) -> list[Record]:
        """All records of its history up to the end of `branch`."""
        found: list[Record] = []
        for step, _, end in self.path():
            own = self.logs[step]
            found += own if step == self.branch else [one for one in own if one.end <= end]
            if step == branch:
                break
        return found

    def read(self, branch: str, first: int, last: int) -> bytes:
        """The bytes of its log as a file of `branch` holds them: before its begin they are the parent's."""
        wanted = self.records(branch)[first // RECORD_BYTES : -(-last // RECORD_BYTES)]
        data = b"".join(one.encoded() for one in wanted)
        begin = first % RECORD_BYTES
        return data[begin : begin + last - first]

    def state(self, end: int | None = None) -> State:
        """The pages after all records that end at `end` at the latest."""
        return state_after(one for one in self.records() if end is None or one.end <= end)

    def write(self, count: int) -> None:
        """Some transactions' worth of records."""
        for _ in range(count):
            self.instant_us += self.chance.randrange(1, 2_000_000)
            kind = self.chance.choices((CHANGE, COMMIT, POINT), (6, 3, 1))[0]
            self.transactions += kind != CHANGE
            self._append(kind)

    def _append(self, kind: int) -> None:
        file, block = self.chance.randrange(FILES), self.chance.randrange(BLOCKS)
        place = (file, block) if kind == CHANGE else (0, 0)
        salt = self.chance.getrandbits(32)
        record = Record(kind, *place, self.end, self.transactions, self.instant_us, salt)
        self.logs[self.branch].append(record)
        if kind == CHANGE and self.chance.random() < 0.3:
            self.disk[place] = record

    def flush(self) -> None:
        """A checkpoint: the disk has everything."""
        self.disk = self.state()

    # ---- what happens to it

    def promoted(self, branch: str, *, lost_records: int = 0) -> Server:
        """A standby of it that takes over, without the last records; this one stays as it is."""
        kept = max(self.begin // RECORD_BYTES + 1, self.end // RECORD_BYTES - lost_records) * RECORD_BYTES
        end = min(kept, self.end)
        logs = {name: list(records) for name, records in self.logs.items()}
        logs[branch] = []
        other = replace(
            self, branch=branch, points=(*self.points, BranchPoint(self.branch, end)), logs=logs, slot=None
        )
        other.disk = other.state()
        other._append(COMMIT)
        return other

    def recycle(self) -> None:
        """Remove the log files that nothing holds."""
        held = self.end if self.slot is None or self.slot.lost else min(self.slot.offset, self.end)
        self.removed_before = max(self.removed_before, held - held % LOG_FILE_BYTES)

    def identity(self) -> SourceIdentity:
        """Who it is."""
        return SourceIdentity(
            engine="simulated",
            system_identifier=self.identifier,
            version="1.0",
            major=1,
            branch=self.branch,
            role=Role.PRIMARY,
            data_directory="",
            page_bytes=PAGE_BYTES,
            log_file_bytes=LOG_FILE_BYTES,
            page_checksums=True,
        )

    def history(self) -> bytes:
        """Its history file."""
        return "".join(f"{one.branch} {one.end_offset}\n" for one in self.points).encode()


def state_after(records: Iterator[Record]) -> State:
    """The pages that records leave."""
    return {(one.file, one.block): one for one in records if one.kind == CHANGE}


# ---- the seam ----------------------------------------------------------------------------------------------


class Source:
    """`LogSource`. It ends the capture when all log is acknowledged, or when `patience` chunks were sent."""

    def __init__(
        self, server: Server, clock: Clock, stop: threading.Event, *, patience: int,
        acknowledged: Callable[[Position], None],
    ) -> None:  # fmt: skip
        self._server = server
        self._clock = clock
        self._stop = stop
        self._patience = patience
        self._acknowledged = acknowledged
        self._idle = 0
        self._durable = Position("", 0)

    def connect(self) -> LogHead:
        """See `LogSource.connect`."""
        server = self._server
        if server.away:
            self._patience -= 1
            if self._patience <= 0:
                self._stop.set()
            raise EngineUnavailable("could not connect", detail="simulated")
        if server.slot is not None and server.slot.lost:
            raise SlotLost("slot is lost", detail="simulated")
        created = server.slot is None
        if server.slot is None:
            server.slot = Slot(server.end)
        return LogHead(server.identity(), Position(server.branch, server.end), server.slot.offset, created)

    def stream(self, start: Position) -> Generator[LogChunk | BranchEnd, None, None]:
        """See `LogSource.stream`."""
        server, offset = self._server, start.offset
        ends = {step: end for step, _, end in server.path()}
        while True:
            end = server.end if start.branch == server.branch else ends[start.branch]
            if offset < server.removed_before and offset < end:
                raise LogRemoved("the server has removed log that is needed", detail="simulated")
            if offset < end:
                last = min(end, offset + server.chance.randrange(1, CHUNK_BYTES_MAX))
                yield self._chunk(start.branch, offset, last)
                offset = last
            elif start.branch != server.branch:
                names = [step for step, _, _ in server.path()]
                yield BranchEnd(start.branch, end, names[names.index(start.branch) + 1])
                return
            else:
                self._wait(start.branch, end)
                yield self._chunk(start.branch, offset, offset)

    def _chunk(self, branch: str, first: int, last: int) -> LogChunk:
        server = self._server
        self._patience -= first < last
        if self._patience <= 0:
            self._stop.set()
        complete_us = server.instant_us if branch == server.branch and last == server.end else 0
        return LogChunk(branch, first, server.read(branch, first, last), server.end, complete_us)

    def _wait(self, branch: str, end: int) -> None:
        self._clock.sleep(KEEPALIVE_SECONDS)
        self._idle += 1
        done = self._durable.branch == branch and self._durable.offset >= end
        if done or self._idle >= IDLE_KEEPALIVES_MAX:
            self._stop.set()

    def history(self, branch: str) -> bytes:
        """See `LogSource.history`."""
        names = [step for step, _, _ in self._server.path()]
        points = self._server.points[: names.index(branch)]
        return "".join(f"{one.branch} {one.end_offset}\n" for one in points).encode()

    def acknowledge(self, position: Position) -> None:
        """See `LogSource.acknowledge`."""
        self._durable = position
        self._acknowledged(position)
        slot = self._server.slot
        if slot is not None and position.branch == self._server.branch:
            slot.offset = max(slot.offset, position.offset)

    def replace_slot(self) -> None:
        """See `LogSource.replace_slot`."""
        self._server.slot = None

    def close(self) -> None:
        """See `LogSource.close`."""


class Backup:
    """`BackupSource`: fuzzy pages between two positions of the log. `meanwhile` lets the server go on."""

    def __init__(self, server: Server, meanwhile: Callable[[], None]) -> None:
        self._server = server
        self._meanwhile = meanwhile

    def begin(self) -> BackupStart:
        """See `BackupSource.begin`."""
        server = self._server
        if server.away:
            raise EngineUnavailable("could not connect", detail="simulated")
        server.flush()
        return BackupStart(
            position=Position(server.branch, server.end),
            method="local",
            bytes_expected=FILES * BLOCKS * PAGE_BYTES,
            tablespaces={},
            settings={},
            clock_us=server.instant_us,
            block_position=page_position,
        )

    def pieces(self) -> Iterator[Piece]:
        """
        See `BackupSource.pieces`. A file is read page by page as it is given out, not by the thread that
        takes it, so that how far the server has got is the same in every run.
        """
        for number in range(FILES):
            content = b"".join(self._pages(number))
            item = Item(
                f"data/{number}",
                ItemKind.FILE,
                0o600,
                size_bytes=len(content),
                page_bytes=PAGE_BYTES,
                storage=StorageKey((1, 1, number), 0),
            )
            yield ContentPiece(item, content)

    def _pages(self, number: int) -> Iterator[bytes]:
        blocks = [block + 1 for file, block in self._server.disk if file == number]
        for block in range(max(blocks, default=0)):
            self._meanwhile()
            record = self._server.disk.get((number, block))
            yield record.page() if record else bytes(PAGE_BYTES)

    def finish(self) -> BackupStop:
        """See `BackupSource.finish`: what is on the disk lies before its stop."""
        if self._server.away:
            raise EngineUnavailable("could not finish", detail="simulated")
        self._server.write(1)
        directory = Item("data", ItemKind.DIRECTORY, 0o700)
        return BackupStop(Position(self._server.branch, self._server.end), (directory,), (), ())

    def abort(self) -> None:
        """See `BackupSource.abort`."""


class Engine:
    """`Engine` over one server."""

    def __init__(self, server: Server, clock: Clock) -> None:
        self._server = server
        self._clock = clock
        self.dialect = Dialect()

    def identify(self) -> SourceIdentity:
        """See `Engine.identify`."""
        if self._server.away:
            raise EngineUnavailable("could not connect", detail="simulated")
        return self._server.identity()

    def findings(self) -> Sequence[Finding]:
        """None."""
        return ()

    def slot_state(self, slot: str) -> SlotState:
        """See `Engine.slot_state`."""
        return SlotState.ABSENT if self._server.slot is None else SlotState.IDLE
