"""
Tombs: plain objects that name what is about to be deleted, so that nobody builds on it meanwhile.

Invariant: a tomb is deleted only by who put it, when what it names is gone, or by anybody once that is so.
Consequence: a collector may be suspended for any time between its last look and its first deletion; a writer
still sees that it must not reuse what will be deleted then.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from cloudsave.errors import IntegrityError, ObjectMissing
from cloudsave.model.log import LogSegment
from cloudsave.repository.lineage import Lineage
from cloudsave.repository.plain import read_plain, write_plain

TOMB_OBJECTS_MAX = 10_000
"""Limit: objects that one tomb names (about 1 MB)."""
TOMBS = "tombs/"
LogSpan = tuple[str, int, int]
"""(branch, first, last): all log objects within [first, last)."""


@dataclass(frozen=True, slots=True)
class Tomb:
    """What one tomb names of one lineage; names of objects are relative to the lineage."""

    name: str
    objects: frozenset[str]
    log: tuple[LogSpan, ...]
    foreign: bool
    """Whether it names anything of another lineage."""

    def names_log(self, segment: LogSegment) -> bool:
        """Whether a stretch of log is one of those that it names."""
        return any(
            branch == segment.branch and first <= segment.first and segment.last <= last
            for branch, first, last in self.log
        )


@dataclass(frozen=True, slots=True)
class Condemned:
    """What all tombs together name of one lineage."""

    objects: frozenset[str]
    log: tuple[LogSpan, ...] = ()

    def touches_log(self, branch: str, first: int, last: int) -> bool:
        """Whether any log of [first, last) may vanish."""
        return any(name == branch and begin < last and end > first for name, begin, end in self.log)


def put_tombs(lineage: Lineage, objects: Sequence[str], log: Sequence[LogSpan] = ()) -> list[str]:
    """Put tombs for objects (names relative to the lineage) and log; the names of the tombs."""
    names = []
    rows = [[lineage.id, *span] for span in log]
    for begin in range(0, max(len(objects), 1), TOMB_OBJECTS_MAX):
        part = objects[begin : begin + TOMB_OBJECTS_MAX]
        fields: dict[str, Any] = {"objects": [lineage.root + name for name in part]}
        if rows:
            fields["log"], rows = rows, []
        name = f"{TOMBS}{lineage.clock.random_bytes(8).hex()}"
        lineage.store.put(name, [write_plain(fields)])
        names.append(name)
    return names


def tombs_of(lineage: Lineage) -> Iterator[Tomb]:
    """
    All tombs; one that is gone by now was withdrawn, or what it named is gone. Raises: IntegrityError for a
    damaged one: nothing can be reused safely then.
    """
    for info in lineage.store.list(TOMBS):
        try:
            content = lineage.store.get(info.name)
        except ObjectMissing:
            continue
        yield _parse(lineage, info.name, content)


def condemned_in(lineage: Lineage) -> Condemned:
    """What all tombs name of the lineage. Raises: IntegrityError."""
    tombs = list(tombs_of(lineage))
    objects = frozenset(name for tomb in tombs for name in tomb.objects)
    return Condemned(objects, tuple(span for tomb in tombs for span in tomb.log))


def _parse(lineage: Lineage, tomb_name: str, content: bytes) -> Tomb:
    try:
        found = read_plain(content)
        if found is None or found.intact is False:
            raise ValueError("its digest is wrong, or it is no JSON object")
        names = [str(name) for name in found.fields["objects"]]
        spans = [
            (str(row[0]), (str(row[1]), int(row[2]), int(row[3]))) for row in found.fields.get("log", [])
        ]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise IntegrityError(
            f"tomb {tomb_name!r} is damaged",
            detail="It does not say what is about to be deleted, so nothing can be reused safely.",
            hints=["delete the tomb when no garbage collection runs"],
        ) from error
    root = lineage.root
    return Tomb(
        tomb_name,
        frozenset(name[len(root) :] for name in names if name.startswith(root)),
        tuple(span for owner, span in spans if owner == lineage.id),
        foreign=not all(name.startswith(root) for name in names)
        or any(owner != lineage.id for owner, _ in spans),
    )
