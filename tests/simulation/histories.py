"""
What can happen in a simulated history, and how a seed chooses among it.

    python -m tests.simulation.histories --seed 42 --seeds 1000     # stops at the first violation
    python -m tests.simulation.histories --seed 42 --seeds 1 --tell # the story of one
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from random import Random

from cloudsave.errors import CloudsaveError, ForeignSystem, LogConflict
from cloudsave.model.log import instant_from_us
from cloudsave.model.target import Target, TargetKind
from cloudsave.store.faulty import Faulty
from tests.simulation.engine import COMMIT, LOG_FILE_BYTES, RECORD_BYTES, Server
from tests.simulation.world import FOREIGN, DeathError, Violation, World

STEPS_MIN, STEPS_MAX = 5, 13
STEP_SECONDS = 5.0
"""Between two steps: names of backups, which hold the second, are in the order of the steps."""
PER_FILE = LOG_FILE_BYTES // RECORD_BYTES


# ---- steps; each says what happened


def write(world: World) -> str:
    """The server works."""
    count = world.chance.choice((1, 5, 20, 80, 2 * PER_FILE))
    world.server.write(count)
    return f"{count} records"


def capture(world: World) -> str:
    """A capture that suffers, then one that does not: nothing may be left open."""
    first = world.capture(world.hurt(likely=0.8), patience=world.chance.choice((2, 5, 1 << 30)))
    if world.chance.random() < 0.3:
        return first
    return f"{first}; again: {world.capture(world.hurt(likely=0))}"


def backup(world: World) -> str:
    """A backup that suffers or not."""
    return world.backup(world.hurt(likely=0.6), full=world.chance.random() < 0.2)


def sound_backup(world: World) -> str:
    """A backup in peace."""
    return world.backup(world.hurt(likely=0), full=False)


def recycle(world: World) -> str:
    """The server removes what nothing holds."""
    world.server.recycle()
    return f"before {world.server.removed_before}"


def lose_slot(world: World) -> str:
    """The slot is invalidated, or dropped; log is written and removed."""
    server = world.server
    if server.slot is not None and world.chance.random() < 0.5:
        server.slot.lost = True
    else:
        server.slot = None
    server.write(world.chance.choice((0, 10, 3 * PER_FILE)))
    server.recycle()
    return f"removed before {server.removed_before}"


def outage(world: World) -> str:
    """The server is away while somebody tries, and comes back."""
    world.server.away = True
    told = [world.capture(world.hurt(likely=0), patience=3), world.backup(world.hurt(likely=0), full=False)]
    world.server.away = False
    return "; ".join(told)


def _next_branch(world: World) -> str:
    return f"{max(int(one.branch, 16) for one in world.servers) + 1:08X}"


def promote(world: World) -> str:
    """A standby that has everything, or lacks the newest records, takes over."""
    lost = world.chance.choice((0, 0, 0, 1, 7, 40))
    world.server = world.server.promoted(_next_branch(world), lost_records=lost)
    world.servers.append(world.server)
    return f"{world.server.branch} at {world.server.begin}, {lost} records lost"


def stray(world: World) -> str:
    """A primary that was replaced goes on, and is captured."""
    others = [one for one in world.servers if one is not world.server]
    if not others:
        return "there is none"
    other = world.chance.choice(others)
    other.write(world.chance.randrange(1, 30))
    return world.capture(world.hurt(likely=0.3), server=other)


def _rogue(world: World, server: Server, wanted: type[CloudsaveError]) -> str:
    """Capture of a server that must be refused."""
    before = set(world.objects.objects)
    try:
        world.capture(world.hurt(likely=0), server=server)
    except (wanted, Violation) as error:
        cause = error.__cause__ if isinstance(error, Violation) else error
        if isinstance(cause, wanted):
            if any("/logs/" in name and "-" in name for name in set(world.objects.objects) - before):
                raise Violation("log of a foreign server was stored before it was refused") from error
            return f"refused: {cause.message}"
        raise
    raise Violation("a foreign server was captured")


def foreign(world: World) -> str:
    """The URL leads to another cluster."""
    server = Server(Random(f"foreign {world.seed}"), FOREIGN)
    server.write(50)
    return _rogue(world, server, ForeignSystem)


def twin(world: World) -> str:
    """Another standby was promoted to the same number at the same place."""
    server = world.server
    if (
        not server.points
        or server.removed_before > server.begin
        or server.begin >= world.acknowledged.get(server.branch, 0)
    ):
        return "nothing of a branch is stored whose begin is still there"
    logs = {name: list(records) for name, records in server.logs.items()}
    logs[server.branch] = []
    other = Server(
        Random(f"twin {world.seed}"), server.identifier, server.branch, server.points, logs,
        removed_before=server.removed_before, instant_us=server.instant_us,
    )  # fmt: skip
    other.disk = other.state()
    other.write(world.chance.choice((1, 30, 3 * PER_FILE)))
    return _rogue(world, other, LogConflict)


def clock_back(world: World) -> str:
    """The server's clock is set back."""
    seconds = world.chance.choice((1, 60, 3600))
    world.server.instant_us -= seconds * 1_000_000
    world.clock_set_back = True
    return f"{seconds} s"


def restore_in_trouble(world: World) -> str:
    """A restore whose reads fail: it succeeds with the right pages, or says that it failed."""
    store = Faulty(world.objects, world.hurt(likely=0.9).plan)  # No retries: threads would share the clock.
    try:
        world.restore(Target(TargetKind.LATEST), store)
    except (CloudsaveError, DeathError) as error:
        return f"{type(error).__name__}"
    return "done"


STEPS: dict[Callable[[World], str], int] = {
    write: 20, capture: 22, backup: 14, sound_backup: 5, recycle: 10, lose_slot: 3, outage: 3, promote: 6,
    stray: 4, foreign: 2, twin: 3, clock_back: 2, restore_in_trouble: 6,
}  # fmt: skip
"""How often each is chosen."""


# ---- at the end: damage


def damaged(world: World) -> str:
    """One object is altered, shortened or gone: what is restored after that is right, or refused."""
    names = sorted(world.objects.objects)
    if not names:
        return "nothing is stored"
    name = world.chance.choice(names)
    content, at = world.objects.objects[name]
    kind = world.chance.choice(("gone", "cut", "flipped"))
    if kind == "gone" or not content:
        del world.objects.objects[name]
    elif kind == "cut":
        world.objects.objects[name] = (content[: world.chance.randrange(len(content))], at)
    else:
        flipped = bytearray(content)
        flipped[world.chance.randrange(len(content))] ^= 1 << world.chance.randrange(8)
        world.objects.objects[name] = (bytes(flipped), at)
    outcomes = Counter(_tried(world, target) for target in _targets(world))
    return f"{name} {kind}: {dict(outcomes)}"


def _targets(world: World) -> Iterable[Target]:
    commits = [one for server in world.servers for one in server.records() if one.kind == COMMIT]
    yield Target(TargetKind.LATEST)
    yield Target(TargetKind.IMMEDIATE)
    for one in world.chance.sample(commits, min(4, len(commits))):
        yield Target(TargetKind.TIME, time=instant_from_us(one.instant_us))
        yield Target(TargetKind.TRANSACTION, transaction=one.transaction)


def _tried(world: World, target: Target) -> str:
    try:
        world.restore(target, world.objects)
    except CloudsaveError as error:
        return type(error).__name__
    return "right"


# ---- a whole history


def play(seed: int) -> World:
    """The history of a seed. Raises: Violation, with the story so far."""
    world = World(seed)
    step = "begin"
    try:
        for _ in range(world.chance.randrange(STEPS_MIN, STEPS_MAX)):
            (chosen,) = world.chance.choices(list(STEPS), list(STEPS.values()))
            step = chosen.__name__
            world.clock.seconds += STEP_SECONDS
            world.story.append(f"{step}: {chosen(world)}")
            world.check()
        step = "end"
        world.story.append(f"capture: {world.capture(world.hurt(likely=0))}")
        world.check(thorough=True)
        step = "damage"
        world.story.append(f"damaged: {damaged(world)}")
    except BaseException as error:
        told = "\n".join(f"  {line}" for line in world.story)
        raise Violation(f"seed {seed}, {step}: {type(error).__name__}: {error}\n{told}") from error
    return world


def main(arguments: list[str]) -> int:
    """The command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1] if __doc__ else "")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=1000)
    parser.add_argument("--tell", action="store_true")
    chosen = parser.parse_args(arguments)
    steps: Counter[str] = Counter()
    logging.getLogger("cloudsave").setLevel(logging.CRITICAL)
    begun = time.monotonic()
    for seed in range(chosen.seed, chosen.seed + chosen.seeds):
        world = play(seed)
        steps.update(line.partition(":")[0] for line in world.story)
        if chosen.tell:
            print(f"seed {seed}", *world.story, sep="\n  ")
    print(f"{chosen.seeds} histories, {time.monotonic() - begun:.1f} s; {dict(steps)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
