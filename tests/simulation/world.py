"""
One simulated history: servers, a repository, a clock, and what must hold after each step.

The product's own code plans, backs up, captures and restores; only the engine, the store and the clock are
simulated. It runs step by step in lockstep with its threads, so that a seed replays exactly.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from random import Random

from cloudsave.backup.plan import BackupRequest, plan_backup
from cloudsave.backup.run import BackupContext, run_backup
from cloudsave.clock import Clock
from cloudsave.errors import (
    BackupLogLost,
    CloudsaveError,
    IntegrityError,
    StorePermission,
    StoreUnavailable,
    TargetUnreachable,
)
from cloudsave.logs.background import LISTING_POLL_SECONDS, BackupLogCover
from cloudsave.logs.capture import run_capture
from cloudsave.logs.status import CaptureOptions
from cloudsave.model.engine_facts import SlotState
from cloudsave.model.ledger import Ledger
from cloudsave.model.log import instant_from_us
from cloudsave.model.manifest import Manifest
from cloudsave.model.position import Position
from cloudsave.model.ranges import RecoverableRange
from cloudsave.model.target import Target, TargetKind
from cloudsave.recovery.history import History, IndexReader, read_history
from cloudsave.recovery.plan import RecoveryPlan, plan_recovery
from cloudsave.recovery.reach import Reach
from cloudsave.recovery.readings import SLACK_US
from cloudsave.recovery.replay import replay_log
from cloudsave.repository.crypto import LineageKeys
from cloudsave.repository.lineage import Lineage
from cloudsave.repository.reader import BackupReader
from cloudsave.store.api import ObjectStore
from cloudsave.store.faulty import FaultPlan, Faulty
from cloudsave.store.memory import MemoryStore
from cloudsave.store.retrying import Retrying, RetryLimits
from cloudsave.telemetry import NoProgress
from tests.simulation.engine import (
    COMMIT,
    LOG_FILE_BYTES,
    PAGE_BYTES,
    RECORD_BYTES,
    Backup,
    Dialect,
    Engine,
    Record,
    Server,
    Source,
    State,
    decode,
    state_after,
)

REPOSITORY_KEY = bytes(range(32))
IDENTIFIER, FOREIGN = "4711", "4712"
DIALECT = Dialect()
KEYS = LineageKeys.derive(REPOSITORY_KEY, f"simulated-{IDENTIFIER}")
OPTIONS = CaptureOptions(
    object_age_seconds=1.0, object_bytes_max=LOG_FILE_BYTES, queue_bytes_max=1, running_patience_seconds=0.0
)
"""A queue of one byte: the receiving thread waits until the storing one is done, so that order is fixed."""
SLEEPS_MAX = 80
"""Limit: pauses of one capture, after which it is stopped from outside."""
LOOKS_MAX = 4
"""Captures that a backup waits for; then time runs out for it."""
OPERATIONS_MAX, PUTS_MAX = 40, 8
RANGES_A_CHECK = 1
RESTORES_AT_THE_END = 4
"""So many of the ranges after each step, the newest ones; all at the end, with more restores."""


class Violation(AssertionError):
    """Something was lost, wrong, or said to be done that was not."""


class DeathError(BaseException):
    """The process died at this operation of the store."""


def _away(operation: str) -> BaseException:
    return StoreUnavailable(f"could not {operation}", detail="simulated")


def _refused(operation: str) -> BaseException:
    return StorePermission(f"store refused to {operation}", detail="simulated")


def _dead(operation: str) -> BaseException:
    return DeathError(operation)


class PutPlan(FaultPlan):
    """Counts, and fails, puts alone: few of the operations, and those that matter most."""

    def begin(self, operation: str) -> Callable[[], None]:
        """See `FaultPlan.begin`."""
        return super().begin(operation) if operation.startswith("put ") or self.fired else _nothing


def _nothing() -> None:
    """After an operation that is not counted."""


class SimulatedClock(Clock):
    """Time passes by sleeping alone; `on_sleep` sees each pause of the main thread."""

    def __init__(self, seed: int) -> None:
        self.seconds = 0.0
        self.on_sleep: Callable[[float], None] = lambda seconds: None
        self._random = Random(f"clock {seed}")
        self._main = threading.current_thread()

    def now(self) -> datetime:
        """The start of the simulated time and what has passed."""
        return datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=self.seconds)

    def monotonic(self) -> float:
        """Seconds."""
        return self.seconds

    def sleep(self, seconds: float) -> None:
        """Let time pass, and others work."""
        self.seconds += seconds
        if threading.current_thread() is self._main:
            self.on_sleep(seconds)

    def random_bytes(self, count: int) -> bytes:
        """Of the seed."""
        return self._random.randbytes(count)


@dataclass
class Hurt:
    """What a run suffers from the store."""

    plan: FaultPlan
    retries: bool

    def store(self, inner: ObjectStore, clock: Clock) -> ObjectStore:
        """The store as the run sees it."""
        faulty = Faulty(inner, self.plan)
        limits = RetryLimits(deadline_seconds=3.0)
        return Retrying(faulty, clock=clock, limits=limits) if self.retries else faulty


class World:
    """A history that grows step by step; `story` tells it."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.chance = Random(seed)
        self.clock = SimulatedClock(seed)
        self.objects = MemoryStore(clock=self.clock)
        self.server = Server(Random(f"server {seed}"), IDENTIFIER)
        self.servers = [self.server]
        """All whose log may be stored."""
        self.story: list[str] = []
        self.acknowledged: dict[str, int] = {}
        self.required_from: dict[str, int] = {}
        """Where the stored log of a branch's history began when log of it was first acknowledged."""
        self.backups: list[str] = []
        self.clock_set_back = False
        """A server's clock was set back: an instant may have come twice, so that it may be refused."""
        self._verified: set[str] = set()
        self._known: tuple[int, History] | None = None
        self._indexes = _indexes(self.lineage())
        self.server.write(self.chance.randrange(5, 60))

    def lineage(self, store: ObjectStore | None = None) -> Lineage:
        """The repository's lineage, on the store itself or as a run sees it."""
        return Lineage(store or self.objects, KEYS, clock=self.clock)

    # ---- what the product does

    def hurt(self, *, likely: float = 0.5) -> Hurt:
        """Trouble with the store, or none."""
        chance = self.chance
        kind, operations = chance.choice(((FaultPlan, OPERATIONS_MAX), (PutPlan, PUTS_MAX)))
        plan = kind(
            fail_at=chance.randrange(1, operations) if chance.random() < likely else 0,
            after_effect=chance.random() < 0.5,
            outage=chance.random() < 0.5,
            error=chance.choice((_away, _away, _refused, _dead)),
        )
        return Hurt(plan, retries=chance.random() < 0.5)

    def capture(self, hurt: Hurt, *, server: Server | None = None, patience: int = 1 << 30) -> str:
        """One process that captures, until it is at the end, is stopped or dies; how it ended."""
        server = server or self.server
        stop, sleeps = threading.Event(), [0]
        source = Source(
            server,
            self.clock,
            stop,
            patience=patience,
            acknowledged=lambda one: self._acknowledge(server, one),
        )

        def count(seconds: float) -> None:
            sleeps[0] += 1
            if sleeps[0] > SLEEPS_MAX:
                stop.set()

        with self._sleeping(count):
            return self._ended(
                lambda: run_capture(
                    source,
                    self.lineage(hurt.store(self.objects, self.clock)),
                    DIALECT,
                    OPTIONS,
                    stop=stop,
                    clock=self.clock,
                    observer=lambda status: None,
                )
            )

    def backup(self, hurt: Hurt, *, full: bool) -> str:
        """One process that takes a backup while the server goes on and, when it waits, capture runs."""
        server, looks = self.server, [0]
        store = hurt.store(self.objects, self.clock)
        lineage = self.lineage(store)
        engine = Engine(server, self.clock)

        def look(seconds: float) -> None:
            if seconds != LISTING_POLL_SECONDS:
                return
            looks[0] += 1
            if looks[0] > LOOKS_MAX:
                self.clock.seconds += 10_000.0
            else:
                self.capture(self.hurt(likely=0.2))

        def meanwhile() -> None:
            if self.chance.random() < 0.2:
                server.write(self.chance.randrange(1, 4))
            if self.chance.random() < 0.1:
                server.flush()

        def run() -> None:
            request = BackupRequest("db", full=full, workers=1, prove_all=self.chance.random() < 0.1)
            plan = plan_backup(request, engine.identify(), lineage.backup_ids())
            cover = BackupLogCover(lambda: SlotState.ACTIVE, _no_source, lineage, DIALECT, clock=self.clock)
            context = BackupContext(
                lineage, lambda: Backup(server, meanwhile), cover, DIALECT, self.clock, NoProgress()
            )
            self._committed(run_backup(plan, context))

        with self._sleeping(look):
            return self._ended(run)

    def _committed(self, manifest: Manifest) -> None:
        """A success was told: it must be true at once."""
        self.backups.append(manifest.backup_id)
        if manifest.detection.contradicted:
            raise Violation("the log was said to contradict the pages")
        self.restore(Target(TargetKind.IMMEDIATE, branch=manifest.stop.branch, backup_id=manifest.backup_id))

    def _acknowledge(self, server: Server, position: Position) -> None:
        """The product says that all log before `position` is durable; a server may drop it now."""
        if server not in self.servers:
            raise Violation("log of another server was acknowledged")
        known = self.acknowledged.get(position.branch, 0)
        self.acknowledged[position.branch] = max(known, position.offset)
        reached = Ledger(self.lineage().logs()).frontier(position.branch, max(0, position.offset - 1))
        if reached < position.offset:
            raise Violation(f"acknowledged up to {position}, and the repository ends at {reached}")
        oldest = min(first for first, _ in self._stored_of(server, position.offset))
        self.required_from.setdefault(server.branch, oldest)

    def _stored_of(self, server: Server, end: int) -> Iterator[tuple[int, int]]:
        """What is stored, or recorded as lost, of a server's history before `end`."""
        lineage = self.lineage()
        stretches = [*lineage.logs(), *lineage.holes()]
        for branch, _, last in server.path():
            for one in stretches:
                if one.branch == branch and one.first < min(last, end):
                    yield one.first, min(one.last, last, end)

    def _ended(self, run: Callable[[], None]) -> str:
        """How a process ended. What no fault explains passes through."""
        try:
            run()
        except DeathError as error:
            return f"died at {error}"
        except IntegrityError as error:
            raise Violation(f"an error of integrity without damage: {error}") from error
        except CloudsaveError as error:
            if not (error.retryable or isinstance(error, StorePermission | BackupLogLost)):
                raise
            return f"{type(error).__name__}: {error.message}"
        return "done"

    @contextmanager
    def _sleeping(self, hook: Callable[[float], None]) -> Iterator[None]:
        before, self.clock.on_sleep = self.clock.on_sleep, hook
        try:
            yield
        finally:
            self.clock.on_sleep = before

    # ---- restores

    def plan(self, target: Target, store: ObjectStore | None = None) -> RecoveryPlan:
        """Raises: TargetUnreachable."""
        if store is None:
            return plan_recovery(target, self._history(), self._indexes)
        lineage = self.lineage(store)
        return plan_recovery(target, read_history(lineage, DIALECT), _indexes(lineage))

    def _history(self) -> History:
        """What is stored; read once for each number of objects, as objects are only ever added."""
        if self._known is None or self._known[0] != len(self.objects.objects):
            self._known = (len(self.objects.objects), read_history(self.lineage(), DIALECT))
        return self._known[1]

    def restore(self, target: Target, store: ObjectStore | None = None) -> RecoveryPlan:
        """Plan, restore and compare with the server's own history. Raises: Violation, TargetUnreachable."""
        plan = self.plan(target, store)
        end = self.execute(plan, store)
        if end < plan.backup.stop.offset:
            raise Violation(f"{target}: stopped at {end}, where the backup is not consistent")
        if not plan.stop.replayed_min <= end <= plan.stop.replayed_max:
            raise Violation(f"{target}: replayed to {end}, promised were {plan.stop}")
        return plan

    def execute(self, plan: RecoveryPlan, store: ObjectStore | None = None) -> int:
        """Bring the pages to the target as a server would; the end of the last record replayed."""
        lineage = self.lineage(store)
        manifest = lineage.manifest(plan.backup.backup_id)
        contents = [bytearray(entry.size_bytes) for entry in manifest.files]

        def write(file_index: int, offset: int, data: memoryview) -> None:
            contents[file_index][offset : offset + len(data)] = data

        BackupReader(lineage, manifest).read_all(write, workers=lambda: 1)
        pages = {
            (int(entry.path.rpartition("/")[2]), at // PAGE_BYTES): bytes(content[at : at + PAGE_BYTES])
            for entry, content in zip(manifest.files, contents, strict=True)
            for at in range(0, len(content), PAGE_BYTES)
        }
        replay = replay_log(plan, DIALECT)
        log = b"".join(bytes(replay.compose(file, lineage.read_log)) for file in replay.files)
        end = offset = plan.backup.start.offset
        stop, begin = plan.stop, replay.files[0].begin
        while offset < stop.recovery_end or (stop.inclusive and offset == stop.recovery_end):
            if offset + RECORD_BYTES > stop.log_end:
                break
            record = decode(log[offset - begin : offset - begin + RECORD_BYTES], offset)
            for place in state_after(iter([record])):
                pages[place] = record.page()
            end = offset = record.end
        self._compare(plan, end, pages)
        return end

    def _compare(self, plan: RecoveryPlan, end: int, pages: dict[tuple[int, int], bytes]) -> None:
        expected = {place: one.page() for place, one in self.truth(plan.branch, end).items()}
        found = {place: page for place, page in pages.items() if any(page)}
        if found != expected:
            wrong = sorted(
                place for place in found.keys() | expected.keys() if found.get(place) != expected.get(place)
            )
            raise Violation(
                f"restore of {plan.backup.backup_id} to {plan.branch}:{end} has other pages: {wrong}"
                f" ({plan.target})"
            )

    def truth(self, branch: str, end: int) -> State:
        """The state of a branch at an offset, by the servers that were on it."""
        for server in self.servers:
            if any(step == branch and begin <= end <= last for step, begin, last in server.path()):
                return state_after(one for one in server.records(branch) if one.end <= end)
        raise Violation(f"no server was ever at {branch}:{end}")

    # ---- what must hold

    def check(self, *, thorough: bool = False) -> None:
        """All invariants. Raises: Violation."""
        self._check_stored_log()
        self._check_acknowledged()
        with suppress(TargetUnreachable):
            self._check_latest()
        offered = list(self._offered())
        looked_at = offered if thorough else offered[-RANGES_A_CHECK:]
        for one in looked_at:
            self._check_offered(one, restores=RESTORES_AT_THE_END if thorough else 1)

    def _check_stored_log(self) -> None:
        """Each stored byte is the one that a server of the history wrote there."""
        lineage = self.lineage()
        for segment in lineage.logs():
            name = f"{segment.branch}/{segment.first}-{segment.last}"
            if name in self._verified:
                continue
            found = lineage.read_log(segment)
            theirs = (
                one.read(segment.branch, segment.first, segment.last)
                for one in self.servers
                if any(step == segment.branch and segment.last <= end for step, _, end in one.path())
            )
            if found not in theirs:
                raise Violation(f"stored log {name} is of no server of this history")
            self._verified.add(name)

    def _check_acknowledged(self) -> None:
        """Along each server's history nothing before the acknowledged end is missing but what was removed."""
        gone = max(one.removed_before for one in self.servers)
        for hole in self.lineage().holes():
            if hole.last > gone:
                raise Violation(f"{hole} is recorded, and servers have all log from {gone} on")
        for server in self.servers:
            end = self.acknowledged.get(server.branch, 0)
            have = bytearray(end)
            for first, last in self._stored_of(server, end):
                have[first:last] = b"\x01" * (last - first)
            missing = have.find(0, self.required_from.get(server.branch, end))
            if missing >= 0:
                raise Violation(
                    f"{server.branch}: acknowledged to {end}, missing at {missing} without a record"
                )

    def _check_latest(self) -> None:
        """The latest state is the end of what is stored of the newest branch, and nothing earlier."""
        plan = self.plan(Target(TargetKind.LATEST))
        segments = self._history().segments
        newest = max(one.branch for one in segments)
        stored = max(one.last for one in segments if one.branch == newest)
        if plan.stop.replayed_max < stored - stored % RECORD_BYTES:
            raise Violation(f"latest ends at {plan.stop.replayed_max}; {newest} is stored up to {stored}")

    def _offered(self) -> Iterable[RecoverableRange]:
        """The ranges that are offered, of each branch, oldest first."""
        with suppress(TargetUnreachable):
            history = self._history()
            for branch in sorted({one.branch for one in history.segments}):
                with suppress(TargetUnreachable):
                    target = Target(TargetKind.LATEST, branch=branch)
                    yield from Reach(target, history, self._indexes).ranges()

    def _check_offered(self, offered: RecoverableRange, *, restores: int) -> None:
        """Each moment of a range can be had, to the byte; what lies behind it is refused."""
        chance, branch = self.chance, offered.branch
        first, last = offered.begin.offset, offered.end.offset
        for _ in range(restores):
            offset = chance.choice((first, last, chance.randrange(first, last + 1)))
            position = Position("", max(first, offset - offset % RECORD_BYTES))
            self._get(Target(TargetKind.POSITION, position=position, inclusive=False, branch=branch), offered)
        if offered.end_us:
            self._check_time(branch, chance.randrange(offered.begin_us, offered.end_us + 1), offered)
        beyond = Position("", last + RECORD_BYTES)
        target = Target(TargetKind.POSITION, position=beyond, branch=branch)
        if not self._stored_beyond(branch, last):
            self._must_refuse(target)
            # Later than any clock ever was, those that were set back included.
            latest_us = max(one.instant_us for server in self.servers for one in server.records())
            self._must_refuse(Target(TargetKind.TIME, time=instant_from_us(latest_us + 10**9), branch=branch))

    def _stored_beyond(self, branch: str, offset: int) -> bool:
        return any(one.last > offset + RECORD_BYTES for one in self.lineage().logs())

    def _get(self, target: Target, offered: RecoverableRange) -> RecoveryPlan:
        try:
            return self.restore(target)
        except TargetUnreachable as error:
            raise Violation(f"{target} is offered by {offered} and refused: {error}") from error

    def _must_refuse(self, target: Target) -> None:
        if not self._is_refused(target):
            raise Violation(f"{target} is not stored, and planned: {self.plan(target).describe()}")

    def _is_refused(self, target: Target) -> bool:
        try:
            self.plan(target)
        except TargetUnreachable:
            return True
        return False

    def _check_time(self, branch: str, instant_us: int, offered: RecoverableRange) -> None:
        """Stops before the first commit, in log order, that is later."""
        target = Target(TargetKind.TIME, time=instant_from_us(instant_us), branch=branch)
        try:
            plan = self._get(target, offered)
        except Violation:
            if self.clock_set_back and self._is_refused(target):
                return
            raise
        later = [
            one
            for one in self._records(branch)
            if one.kind == COMMIT and one.offset >= plan.backup.stop.offset and one.instant_us > instant_us
        ]
        self._check_reading(branch, plan, instant_us)
        limit = min((one.offset for one in later), default=1 << 62)
        if plan.stop.recovery_end > limit or (
            plan.stop.recovery_end < limit and plan.first_left_out is not None
        ):
            raise Violation(f"time {instant_us} stops at {plan.stop.recovery_end}, not at {limit}")

    def _check_reading(self, branch: str, plan: RecoveryPlan, instant_us: int) -> None:
        """Where the clock was there more than once, as stored commits show, a time is refused."""
        segments = self._history().segments
        commits = []
        for one in self._records(branch):
            steps = [
                step
                for step, begin, end in plan.path
                if begin <= one.offset and (end is None or one.offset < end)
            ]
            stored = any(s.branch in steps and s.first < one.end <= s.last for s in segments)
            if one.kind == COMMIT and stored:
                commits.append(one)
        begin, end = plan.backup.start.offset, plan.stop.log_end
        before = any(one.offset < begin and one.instant_us > instant_us + SLACK_US for one in commits)
        behind = [one for one in commits if one.offset >= end and one.instant_us <= instant_us - SLACK_US]
        again = behind and any(
            one.offset > behind[-1].offset and one.instant_us > instant_us for one in commits
        )
        if before or again:
            raise Violation(f"time {instant_us} exists twice: {plan.describe()}")

    def _records(self, branch: str) -> list[Record]:
        """All records of a branch's history, as the server has it that went furthest on it."""
        on_it = [one for one in self.servers if any(step == branch for step, _, _ in one.path())]
        return max((one.records(branch) for one in on_it), key=len)


def _indexes(lineage: Lineage) -> IndexReader:
    return IndexReader(lineage, DIALECT, log_file_bytes=LOG_FILE_BYTES)


def _no_source(_: SlotState) -> Source:
    raise AssertionError("the capture that runs is relied upon")
