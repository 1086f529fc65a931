"""
Random schedules of the repository's real code: writers, collectors, expiry and holds on one store in memory.

Each actor runs in a greenlet and gives way before every operation of its store; a seed decides who goes on,
who is killed, before or after the effect of an operation, and who is suspended while it commits and puts
its manifest once more. After every step: each manifest that is there finds all that it names, and each held
backup is there.

`Ablation` leaves a step of the protocol out, by a store that lies to one kind of actor: the search must
find what that loses. Run by hand, with as many schedules as wanted: python -m tests.simulation.schedules
1000000
"""

from __future__ import annotations

import functools
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum

import numpy as np
from greenlet import getcurrent, greenlet

from cloudsave.clock import Clock
from cloudsave.errors import CloudsaveError, ObjectExists, ObjectMissing
from cloudsave.kernels.pages import FingerprintKey, fingerprints
from cloudsave.model.item import ItemKind
from cloudsave.model.manifest import FileEntry, Manifest
from cloudsave.repository import lineage as lineage_module
from cloudsave.repository.claim import claim
from cloudsave.repository.collect import CollectRequest, collect
from cloudsave.repository.container import REVOCATION_BYTES, Arena
from cloudsave.repository.crypto import LineageKeys
from cloudsave.repository.expire import remove_backups, sweep_tombs
from cloudsave.repository.file_maps import FileState, MapWriter, Slot
from cloudsave.repository.holds import put_hold
from cloudsave.repository.lineage import Lineage
from cloudsave.repository.packs import PackBuilder, Stretch
from cloudsave.repository.priors import Found, Priors
from cloudsave.store.api import Buffer, ObjectInfo, StoreCapabilities
from tests.unit.repository.samples import (
    BLOCK,
    LINEAGE,
    REPOSITORY_KEY,
    draft_manifest,
    file_item,
    read_backup,
)

FILES = ("base/1", "base/2")
STEPS_MAX = 5000
"""Limit: a schedule that does not end has found an endless loop."""
BEGIN = datetime(2026, 1, 1, tzinfo=UTC)
KILL_SHARE = 0.006
STALL_SHARES = (0.0, 0.1, 1.0)
"""Of the writers, those that put their manifest twice; each schedule has one of them."""
CASTS = (
    ("writer", "collector", "expirer", "holder"),
    ("writer", "collector", "expirer"),
    ("writer", "collector"),
    ("expirer", "holder"),
)
"""Which actors a schedule has."""
GOING_ON = (0.0, 0.7, 0.95, 0.98)
"""How likely an actor goes on before another one does; each schedule has one of them."""
CONTENT_CHECKED_EVERY = 64


class Ablation(StrEnum):
    """What is left out."""

    NOTHING = "the full protocol"
    NO_PIN = "writers put no pin"
    WRITER_IGNORES_TOMBS = "writers do not list tombs"
    ONE_LOOK = "collectors look once"
    NO_TOMB = "collectors put no tomb"
    FOREIGN_TOMBS_GO = "somebody withdraws tombs of others"
    PINS_TIME_OUT = "unfinished backups are given up without taking their names"
    NAMES_STAY_FREE = "expiry does not take the names of what it removes"
    HOLDS_UNSEEN = "expiry does not look at holds again"
    HOLD_IGNORES_TOMBS = "holds do not list tombs"


FOCUS = {
    Ablation.NO_TOMB: 0.9,
    Ablation.NAMES_STAY_FREE: 0.98,
    Ablation.WRITER_IGNORES_TOMBS: 0.9,
}
"""Where it takes three actors to lose something the search is shorter with these alone, at such a pace."""


class Killed(BaseException):
    """The process is gone."""


class Lost(AssertionError):
    """Something that is needed is gone."""


class SteppedClock(Clock):
    """A second later at each call; random bytes by a seed."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self.seconds = 0

    def now(self) -> datetime:
        """The next second."""
        self.seconds += 1
        return BEGIN + timedelta(seconds=self.seconds)

    def random_bytes(self, count: int) -> bytes:
        """By the seed."""
        return self._rng.randbytes(count)


@dataclass
class World:
    """What all actors share."""

    objects: dict[str, tuple[bytes, datetime]]
    references: dict[str, frozenset[str]]
    """By full name of the manifest, what the backup names."""
    contents: dict[str, dict[str, bytes]]
    """By backup id, what was backed up."""
    rng: random.Random
    clock: SteppedClock
    held: set[str] = field(default_factory=set)
    """Manifests, by full name, of which a hold has been promised."""
    trace: list[str] = field(default_factory=list)

    def check(self) -> None:
        """Raises: Lost."""
        for name, references in self.references.items():
            stored = self.objects.get(name)
            if stored is None or len(stored[0]) == REVOCATION_BYTES:
                if name in self.held:
                    raise Lost(f"{name} was held and is gone")
                continue
            for reference in references:
                if reference not in self.objects:
                    raise Lost(f"{name} names {reference}, which is gone")


class ActorStore:
    """The store as one actor sees it. The lies of an ablation are told to actors of the kind they concern."""

    def __init__(self, world: World, kind: str, ablation: Ablation) -> None:
        self._world = world
        self._kind = kind
        self._ablation = ablation
        self._early: dict[str, list[ObjectInfo]] = {}
        self._own: dict[str, tuple[bytes, datetime]] = {}
        self.stalls = False

    @property
    def url(self) -> str:
        """None."""
        return "memory://"

    @property
    def capabilities(self) -> StoreCapabilities:
        """The best."""
        return StoreCapabilities(conditional_put=True, durable_put=True)

    def _pause(self, what: str) -> None:
        me = getcurrent()
        if isinstance(me, Actor):
            me.pause(what)

    def _lies(self, kind: str, ablation: Ablation) -> bool:
        return self._kind == kind and self._ablation is ablation

    def put(self, name: str, parts: Sequence[Buffer]) -> None:
        """Put; a writer that stalls puts its manifest once more, as a client whose answer was lost."""
        content = b"".join(parts)
        self._pause(f"put {name}")
        short = name.removeprefix(f"lineages/{LINEAGE}/").partition("/")[0]
        if short == "pins" and self._lies("writer", Ablation.NO_PIN):
            return
        if short == "tombs" and self._lies("collector", Ablation.NO_TOMB):
            return
        if short == "backups" and self._lies("expirer", Ablation.NAMES_STAY_FREE):
            return
        if short == "backups" and self._lies("collector", Ablation.PINS_TIME_OUT):
            self._own[name] = (content, BEGIN)
            return
        self._place(name, content)
        if short == "backups" and self.stalls:
            for _ in range(self._world.rng.randrange(1, 10)):
                self._pause("stalled")
            try:
                self._place(name, content)
            except ObjectExists:
                if self._world.objects[name][0] != content:
                    raise

    def _place(self, name: str, content: bytes) -> None:
        objects = self._world.objects
        if name in objects:
            raise ObjectExists(f"object {name!r} exists")
        objects[name] = (content, self._world.clock.now())
        self._after()

    def get(self, name: str) -> bytes:
        """Get."""
        self._pause(f"get {name}")
        stored = self._own.get(name) or self._world.objects.get(name)
        if stored is None:
            raise ObjectMissing(f"object {name!r} is missing")
        return stored[0]

    def get_range(self, name: str, *, offset: int, length: int) -> Buffer:
        """Get a part."""
        return memoryview(self.get(name))[offset : offset + length]

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """List, as it is in one moment."""
        self._pause(f"list {prefix}")
        short = prefix.removeprefix(f"lineages/{LINEAGE}/")
        if short == "tombs/" and (
            self._lies("writer", Ablation.WRITER_IGNORES_TOMBS)
            or self._lies("holder", Ablation.HOLD_IGNORES_TOMBS)
        ):
            return iter(())
        if short == "holds/" and self._lies("expirer", Ablation.HOLDS_UNSEEN):
            return iter(())
        if short in ("pins/", "backups/") and self._lies("collector", Ablation.ONE_LOOK):
            self._early.setdefault(short, self._infos(prefix))
        if short in self._early:
            return iter(self._early[short])
        return iter(self._infos(prefix))

    def delete(self, name: str) -> None:
        """Delete."""
        self._pause(f"delete {name}")
        self._world.objects.pop(name, None)
        self._after()

    def _infos(self, prefix: str) -> list[ObjectInfo]:
        both = {**self._world.objects, **self._own}
        names = sorted(name for name in both if name.startswith(prefix))
        return [ObjectInfo(name, len(both[name][0]), both[name][1]) for name in names]

    def _after(self) -> None:
        self._world.check()
        me = getcurrent()
        if isinstance(me, Actor):
            me.maybe_die()


class Actor(greenlet):
    """One process."""

    def __init__(
        self, name: str, work: Callable[[], None], world: World, hub: greenlet, *, mortal: bool
    ) -> None:
        super().__init__(self._run, hub)
        self.name = name
        self.error: CloudsaveError | None = None
        self._work = work
        self._world = world
        self._mortal = mortal

    def _run(self) -> None:
        try:
            self._work()
        except Killed:
            self._world.trace.append(f"{self.name}: killed")
        except CloudsaveError as error:
            self._world.trace.append(f"{self.name}: {error.code} {error.message}")
            self.error = error

    def pause(self, what: str) -> None:
        """Let others go on; what happens next is `what`."""
        assert self.parent is not None
        self.parent.switch()
        self._world.trace.append(f"{self.name}: {what}")
        self.maybe_die()

    def maybe_die(self) -> None:
        """Be killed now and then."""
        if self._mortal and self._world.rng.random() < KILL_SHARE:
            raise Killed


def lineage_for(world: World, kind: str, ablation: Ablation) -> tuple[Lineage, ActorStore]:
    """The lineage as one actor sees it."""
    store = ActorStore(world, kind, ablation)
    return Lineage(store, KEYS, clock=world.clock), store


KEYS = LineageKeys.derive(REPOSITORY_KEY, LINEAGE)
PRINT_KEY = FingerprintKey.from_bytes(KEYS.fingerprint_seed(), page_bytes=BLOCK)


class Writer:
    """A backup of two files of one block each, by the parts of `BackupWriter` that work in one thread."""

    def __init__(self, world: World, backup_id: str, ablation: Ablation, changed: dict[str, bytes]) -> None:
        self._world = world
        self._lineage, self.store = lineage_for(world, "writer", ablation)
        self._id = backup_id
        self._changed = changed
        self._packs = 0

    def run(self) -> None:
        """Choose a parent, claim, store, commit."""
        lineage = self._lineage
        ids = lineage.backup_ids()
        parent = lineage.manifest(ids[-1]) if ids else None
        content = dict(self._world.contents[parent.backup_id]) if parent else {}
        taken = claim(lineage, self._id, parent=parent.backup_id if parent else "")
        priors = Priors(lineage, parent, taken.usable, taken.condemned.objects)
        adopted = {f"{number:08x}" for number in taken.adopts}
        priors.adopt([(n, s) for n, s in sorted(taken.usable.items()) if n.partition("-")[0] in adopted])
        maps = MapWriter(lineage, generation=taken.generation)
        for path in FILES:
            block = self._changed.get(path, content.get(path))
            if block is None:
                block = self._world.rng.randbytes(8) * (BLOCK // 8)
            unchanged = content.get(path) == block
            content[path] = block
            self._store(maps, priors.find(path), taken.generation, path, block, unchanged=unchanged)
        maps.flush()
        manifest = maps.complete(draft_manifest(self._id, parent))
        self._world.contents[self._id] = content
        self._expect(manifest)
        lineage.put_manifest(manifest)

    def _store(
        self, maps: MapWriter, found: Found, generation: int, path: str, block: bytes, *, unchanged: bool
    ) -> None:
        state = FileState(
            file_item(path, BLOCK), found.files, found.named if unchanged else None, size_bytes=BLOCK
        )
        entry = FileEntry(path, ItemKind.FILE, 0o600)
        state.same_as_parent = unchanged
        prints = np.empty(1, np.uint64)
        fingerprints(block, page_bytes=BLOCK, key=PRINT_KEY, out=prints)
        for number, prior in enumerate(found.files):
            of_parent = number == 0 and found.parent_bytes
            same = unchanged if of_parent else bool(prior.printed[0] and prior.fingerprints[0] == prints[0])
            if same and prior.known[0]:
                state.reused.append((number, np.array([0])))
                maps.add_file(state, entry)
                return
        state.parent_map = None
        pack = PackBuilder.open(
            self._lineage.keys,
            f"{generation:08x}-{self._packs:08x}",
            clock=self._world.clock,
            level=1,
            bytes_target=1,
            arena=Arena(),
        )
        self._packs += 1
        frame = pack.add(block, [Stretch(path, 0, 1, 0, prints)], proof=False)
        pack.put(self._lineage.store)
        state.slots.append(Slot(0, 1, pack.name, frame, 0))
        maps.add_file(state, entry)

    def _expect(self, manifest: Manifest) -> None:
        root = self._lineage.root
        names = [
            *(f"{root}packs/{one}" for one in manifest.packs),
            *(f"{root}maps/{one}" for one in manifest.maps),
        ]
        self._world.references[self._lineage.manifest_name(self._id)] = frozenset(names)


def first_world(seed: int) -> World:
    """Two backups, the second built on the first, and one that was killed before it could commit."""
    rng = random.Random(seed)
    world = World({}, {}, {}, rng, SteppedClock(rng))
    Writer(world, "20260101T000001Z-0000", Ablation.NOTHING, {}).run()
    Writer(world, "20260101T000002Z-0000", Ablation.NOTHING, {FILES[0]: bytes([7]) * BLOCK}).run()
    unfinished = Writer(world, "20260101T000003Z-0000", Ablation.NOTHING, {FILES[1]: bytes([9]) * BLOCK})

    def killed_at_commit(name: str, parts: Sequence[Buffer]) -> None:
        if "/backups/" in name:
            raise Killed
        ActorStore.put(unfinished.store, name, parts)

    unfinished.store.put = killed_at_commit  # type: ignore[method-assign]
    try:
        unfinished.run()
    except Killed:
        world.contents.pop("20260101T000003Z-0000")
        world.references.pop(f"lineages/{LINEAGE}/backups/20260101T000003Z-0000")
    return world


FIRST = first_world(0)


class Schedule:
    """One run of some actors."""

    def __init__(self, seed: int, ablation: Ablation = Ablation.NOTHING) -> None:
        rng = random.Random(seed)
        clock = SteppedClock(rng)
        clock.seconds = FIRST.clock.seconds
        self.world = World(dict(FIRST.objects), dict(FIRST.references), dict(FIRST.contents), rng, clock)
        self._ablation = ablation
        self._hub = getcurrent()
        self._seed = seed
        self._cast = rng.choice(CASTS)
        self._stall_share = rng.choice(STALL_SHARES)
        self._going_on = rng.choice(GOING_ON)
        if ablation in FOCUS:
            self._cast, self._going_on = CASTS[1], FOCUS[ablation]
            self._stall_share = float(ablation is Ablation.NAMES_STAY_FREE)

    def run(self) -> World:
        """Play it, and then collect what is left. Raises: Lost."""
        world, rng = self.world, self.world.rng
        kinds = [*self._cast, *rng.choices(self._cast, k=rng.randrange(3))]
        waiting = [self._actor(number, kind) for number, kind in enumerate(kinds)]
        steps = 0
        actor = waiting[0]
        while waiting:
            steps += 1
            if steps > STEPS_MAX:
                raise Lost("the schedule does not end")
            if actor.dead or rng.random() >= self._going_on:
                actor = waiting[rng.randrange(len(waiting))]
            actor.switch()
            if actor.dead:
                waiting.remove(actor)
                if rng.random() < 0.3 and steps < STEPS_MAX // 10:
                    waiting.append(self._actor(steps, rng.choice(self._cast)))
        self._collect_the_rest()
        return world

    def _actor(self, number: int, kind: str) -> Actor:
        rng = self.world.rng
        if self._ablation is Ablation.FOREIGN_TOMBS_GO and rng.random() < 0.3:
            kind = "sweeper"
        work: Callable[[], None] = getattr(self, f"_{kind}")(number)
        return Actor(f"{kind} {number}", work, self.world, self._hub, mortal=True)

    def _writer(self, number: int) -> Callable[[], None]:
        rng = self.world.rng
        changed = {path: rng.randbytes(8) * (BLOCK // 8) for path in FILES if rng.random() < 0.4}
        if rng.random() < 0.3:
            changed[FILES[1]] = bytes([9]) * BLOCK
        writer = Writer(self.world, f"20260102T{number:06d}Z-0000", self._ablation, changed)
        writer.store.stalls = rng.random() < self._stall_share
        return writer.run

    def _collector(self, number: int) -> Callable[[], None]:
        lineage, _ = lineage_for(self.world, "collector", self._ablation)
        grace = timedelta(0) if self.world.rng.random() < 0.5 else timedelta(days=1)
        share = 2.0 if self.world.rng.random() < 0.1 else 0.0  # all packs are to be left, or none
        return lambda: void(collect(lineage, CollectRequest(grace, sparse_share=share)))

    def _expirer(self, number: int) -> Callable[[], None]:
        lineage, _ = lineage_for(self.world, "expirer", self._ablation)
        rng = self.world.rng

        def work() -> None:
            held = {name.rpartition("/")[2] for name in self.world.held}
            ids = [one for one in lineage.backup_ids() if rng.random() < 0.6 and one not in held]
            remove_backups(lineage, ids)
            sweep_tombs(lineage)

        return work

    def _holder(self, number: int) -> Callable[[], None]:
        lineage, _ = lineage_for(self.world, "holder", self._ablation)

        def work() -> None:
            ids = lineage.backup_ids()
            if ids:
                chosen = self.world.rng.choice(ids)
                put_hold(lineage, chosen, "wanted")
                self.world.held.add(lineage.manifest_name(chosen))
                self.world.check()

        return work

    def _sweeper(self, number: int) -> Callable[[], None]:
        _, store = lineage_for(self.world, "sweeper", self._ablation)

        def work() -> None:
            for info in list(store.list("tombs/")):
                store.delete(info.name)

        return work

    def _collect_the_rest(self) -> None:
        """Nobody runs any more: two quiet collections leave what manifests name, and nothing else."""
        if self._ablation is not Ablation.NOTHING:
            return
        world = self.world
        lineage, _ = lineage_for(world, "quiet", Ablation.NOTHING)
        sweep_tombs(lineage)
        for _ in range(2):
            collect(lineage, CollectRequest(timedelta(0)))
        named = {one for name in self._manifests() for one in world.references[name]}
        left = {name for name in world.objects if "/packs/" in name or "/maps/" in name}
        if left != named:
            raise Lost(f"garbage stays, or something is missing: {sorted(left ^ named)}")
        if self._seed % CONTENT_CHECKED_EVERY == 0:
            for backup_id in lineage.backup_ids():
                if read_backup(lineage, lineage.manifest(backup_id)) != world.contents[backup_id]:
                    raise Lost(f"{backup_id} does not read back as it was")

    def _manifests(self) -> list[str]:
        objects = self.world.objects
        return [
            name for name in self.world.references if len(objects.get(name, (b"",))[0]) > REVOCATION_BYTES
        ]


def void(_: object) -> None:
    """A result that nobody needs."""


def search(seeds: range, ablation: Ablation = Ablation.NOTHING) -> tuple[int, str] | None:
    """The first seed whose schedule loses something, and how; None: none does."""
    for seed in seeds:
        schedule = Schedule(seed, ablation)
        try:
            schedule.run()
        except Lost as lost:
            return seed, "\n".join([*schedule.world.trace[-60:], str(lost)])
    return None


def main() -> int:
    """Search as many schedules as the first argument says, from the seed of the second one on."""
    count, first = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1
    # What was opened once opens again: half of the time would be spent on the same first manifests.
    lineage_module.read_frames = functools.lru_cache(4096)(lineage_module.read_frames)
    begun, kinds, steps = time.monotonic(), Counter[str](), 0
    for seed in range(first, first + count):
        schedule = Schedule(seed)
        try:
            world = schedule.run()
        except Lost as lost:
            print("\n".join(schedule.world.trace), f"\nseed {seed}: {lost}", sep="")
            return 1
        steps += len(world.trace)
        kinds.update(
            line.partition(":")[2].strip()[:7] for line in world.trace if ": CS-" in line or "killed" in line
        )
        if (seed - first + 1) % 10_000 == 0:
            print(seed - first + 1, steps, dict(kinds), f"{time.monotonic() - begun:.0f} s", flush=True)
    print(f"{count} schedules, {steps} operations, nothing lost: {dict(kinds)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
