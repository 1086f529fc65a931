"""
A writer's side of garbage collection: what it claims before it reuses anything.

Invariant: generation, then pin, then list tombs, then list packs, and only then reuse. Consequence:
whatever the interleaving, a collector sees the pin or the writer sees its tomb. (Exhaustive exploration of
a model, decision 0004; random schedules of this code, decision 0022.)
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass

from cloudsave.errors import GenerationFenced, IntegrityError, ObjectExists, ObjectMissing
from cloudsave.repository.lineage import Lineage
from cloudsave.repository.tombs import Condemned, condemned_in

GENERATION_MAX = 0xFFFFFFFF
GENERATION_TRIES_MAX = 100
_GENERATION = re.compile(r"[0-9a-f]{8}")


@dataclass(frozen=True, slots=True)
class Claim:
    """A writer's turn."""

    generation: int
    adopts: tuple[int, ...]
    """Generations of unfinished backups, whose packs may be taken over."""
    usable: Mapping[str, int]
    """Packs that may be reused, with their sizes."""
    condemned: Condemned


def claim(lineage: Lineage, backup_id: str, *, parent: str) -> Claim:
    """
    Claim a generation and pin what may be reused: packs of `parent` ("": none) and of unfinished backups.

    Raises: GenerationFenced, IntegrityError, StoreError.
    """
    generation = _claim_generation(lineage, backup_id)
    adopts = _unfinished_generations(lineage)
    lineage.put_record_json(
        f"pins/{backup_id}",
        {
            "generation": generation,
            "parents": [parent] if parent else [],
            "adopts": adopts,
            "created_utc": lineage.clock.now().isoformat(timespec="seconds"),
        },
    )
    condemned = condemned_in(lineage)
    prefix = lineage.root + "packs/"
    sizes = {info.name[len(prefix) :]: info.size_bytes for info in lineage.store.list(prefix)}
    usable = {name: size for name, size in sizes.items() if f"packs/{name}" not in condemned.objects}
    return Claim(generation, tuple(adopts), usable, condemned)


def _claim_generation(lineage: Lineage, backup_id: str) -> int:
    prefix = lineage.root + "generations/"
    names = [info.name[len(prefix) :] for info in lineage.store.list(prefix)]
    taken = {int(name, 16) for name in names if _GENERATION.fullmatch(name)}
    # The highest numbers may be a stranger's, who may add objects and wants no more backups.
    last = next((one for one in sorted(taken, reverse=True) if _is_genuine(lineage, one)), 0)
    free = (one for one in range(last + 1, GENERATION_MAX) if one not in taken)
    for generation in itertools.islice(free, GENERATION_TRIES_MAX):
        try:
            lineage.put_record_json(f"generations/{generation:08x}", {"backup": backup_id})
        except ObjectExists:
            continue
        return generation
    raise GenerationFenced("could not claim a writer generation: others are faster", hints=["try again"])


def _is_genuine(lineage: Lineage, generation: int) -> bool:
    """Whether a claim can be opened with our key."""
    try:
        return bool(lineage.get_record_json(f"generations/{generation:08x}"))
    except (IntegrityError, ObjectMissing):
        return False


def _unfinished_generations(lineage: Lineage) -> list[int]:
    """Generations of pins whose backup was neither committed nor revoked."""
    decided = lineage.decided_backup_ids()
    prefix = lineage.root + "pins/"
    pinned = [info.name[len(prefix) :] for info in lineage.store.list(prefix)]
    generations = []
    for backup_id in pinned:
        if backup_id in decided:
            continue
        try:
            generations.append(int(lineage.get_record_json(f"pins/{backup_id}")["generation"]))
        except (IntegrityError, ObjectMissing):
            # Only what that backup had stored is lost to us; a damaged pin still counts for collectors.
            continue
    return generations
