"""
Check the small objects around backups and log: of a repository the head, key slots and tombs; of a lineage
the identity, generations, pins, holes and histories.

Sealed records authenticate. Plain ones carry a digest; those that the first repositories have do not, and for
them remains what is said twice: the lineage's id, the keys. What stands in one alone decides nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any, TypeVar

from cloudsave.engines.dialect_api import Dialect
from cloudsave.errors import IntegrityError, ObjectMissing
from cloudsave.model.finding import Finding, Severity
from cloudsave.repository.container import Kind
from cloudsave.repository.head import HEAD_FIELDS, REPOSITORY_OBJECT, read_slots
from cloudsave.repository.keys import describe_slot
from cloudsave.repository.lineage import IDENTITY_FIELDS, Lineage
from cloudsave.repository.plain import read_plain
from cloudsave.repository.repository import Repository
from cloudsave.repository.verifications import FOLDER as VERIFICATIONS
from cloudsave.repository.verifications import read_verification
from cloudsave.store.api import ObjectStore

WORKERS = 4
LISTED_MAX = 5
"""Limit: names that one finding gives."""
A = TypeVar("A")
T = TypeVar("T")

_COPY = "restore the object from a copy of the repository"
_TAMPERED = f"was the repository tampered with? {_COPY}"
_HINTS = {
    "generation": _COPY,
    "pin": "a finished backup needs it no more; what an unfinished one has stored will be stored again",
    "hole": "remove the record: capture writes it anew when it finds that log missing",
    "origin": "capture compares servers with it, a restore does not need it: " + _COPY,
    "hold": "the backup stays held: release and hold it again",
    "proof": "the backup does not count as proved: restore it again in a drill",
    "verification": "it does not count as one: verify again",
    "history": f"log of this branch cannot be used without it: {_COPY}",
}
_GENERATION = re.compile(r"[0-9a-f]{8}")
_HOLE = re.compile(r"([0-9a-f]{16})-([0-9a-f]{16})")
_CONDEMNED = re.compile(r"lineages/[^/]+/(packs|maps|backups)/[^/]+")
_HEX_16_BYTES = re.compile(r"[0-9a-f]{32}")


def in_parallel(check: Callable[[A], T], things: Sequence[A]) -> list[T]:
    """The results of `check`, in the order of `things`."""
    with ThreadPoolExecutor(WORKERS) as pool:
        return list(pool.map(check, things))


def problem(subject: str, fact: str, hint: str = _TAMPERED) -> Finding:
    """Something that is wrong."""
    return Finding(Severity.PROBLEM, subject, fact, hint)


# ---- of the repository


def verify_repository(repository: Repository) -> list[Finding]:
    """Check the objects that belong to no lineage. Never raises for damage. Raises: StoreError."""
    store = repository.store
    return [*_head(store), *_key_slots(repository), *_tombs(store)]


def _head(store: ObjectStore) -> Iterator[Finding]:
    content = store.get(REPOSITORY_OBJECT)
    fields, faults = _plain(content, HEAD_FIELDS)
    for name in ("repository_id", "key_id"):
        if not _HEX_16_BYTES.fullmatch(str(fields.get(name))):
            faults.append(f"its {name} is malformed")
    if not _is_instant(fields.get("created_utc")):
        faults.append("its date is malformed")
    yield from _plain_findings(REPOSITORY_OBJECT, content, faults, "id and date")


def _key_slots(repository: Repository) -> Iterator[Finding]:
    slots = read_slots(repository.store)
    usable = 0
    for info, content in slots.items():
        name = info.name.rpartition("/")[2]
        slot = describe_slot(name, content)
        found = read_plain(content)
        if slot.type == "damaged" or found is None or not found.as_written:
            hint = f"{_COPY}, or add the passphrase or recipient again: `cloudsave key add`"
            yield problem(f"key slot {name}", "is damaged: who holds its secret may be locked out", hint)
        elif slot.key_id != repository.key_id:
            fact = "wraps another key and opens nothing: it is left over from an interrupted `cloudsave init`"
            yield Finding(Severity.NOTICE, f"key slot {name}", fact)
        else:
            usable += 1
    if usable:
        yield Finding(Severity.OK, "key slots", f"{usable} of {len(slots)} open the repository")
    else:
        yield problem("key slots", "none is intact", "restore the objects below keys/ from a copy")


def _tombs(store: ObjectStore) -> Iterator[Finding]:
    for info in store.list("tombs/"):
        try:
            content = store.get(info.name)
        except ObjectMissing:
            continue
        fields, faults = _plain(content, ("objects",))
        names = fields.get("objects")
        if not isinstance(names, list) or not all(_CONDEMNED.fullmatch(str(name)) for name in names):
            faults.append("it does not name packs, maps or backups")
        yield from _plain_findings(f"tomb {info.name}", content, faults, "names")


def _plain(content: bytes, known: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The fields of a plain object, and what is wrong with it as such."""
    found = read_plain(content)
    if found is None:
        return {}, ["it is no JSON object"]
    faults = []
    if found.intact is False:
        faults.append("its checksum is wrong")
    elif found.intact is None and set(found.fields) != set(known):
        faults.append("its checksum is missing")
    elif found.intact and not found.as_written:
        faults.append("its bytes are not those that were written")
    return found.fields, faults


def _plain_findings(subject: str, content: bytes, faults: Sequence[str], alone: str) -> Iterator[Finding]:
    """What `faults` come to; `alone`: what nothing else would tell of an object without a checksum."""
    if faults:
        yield problem(subject, f"is damaged: {'; '.join(faults)}")
        return
    found = read_plain(content)
    if found is not None and found.intact is None:
        fact = f"has no checksum, as in the first repositories: a change of {alone} would go unseen"
        yield Finding(Severity.NOTICE, subject, fact)
    else:
        yield Finding(Severity.OK, subject, "its checksum is right")


def _is_instant(value: object) -> bool:
    try:
        return datetime.fromisoformat(str(value)).tzinfo is not None
    except ValueError:
        return False


# ---- of a lineage


def verify_records(lineage: Lineage, dialect: Dialect, names: Iterable[str]) -> list[Finding]:
    """
    Check the sealed records of a lineage; `names` are those of all its objects. Never raises for damage.
    Raises: StoreError.
    """
    return list(_Records(lineage, dialect, sorted(names)).findings())


def verify_identity(lineage: Lineage) -> Iterator[Finding]:
    """The record of whose backups these are."""
    try:
        content = lineage.store.get(lineage.root + "identity")
    except ObjectMissing:
        hint = "the next backup writes it anew; until then only the lineage's id names it"
        yield problem("identity", "is missing", hint)
        return
    fields, faults = _plain(content, IDENTITY_FIELDS)
    if f"{fields.get('engine')}-{fields.get('system_identifier')}" != lineage.id:
        faults.append("it is that of another system")
    if fields.get("public_key") != lineage.keys.public_key().hex():
        faults.append("it names a foreign signing key")
    if not _is_instant(fields.get("first_seen_utc")):
        faults.append("its date is malformed")
    yield from _plain_findings("identity", content, faults, "name and date")


class _Records:
    """The sealed records of one lineage."""

    def __init__(self, lineage: Lineage, dialect: Dialect, names: Sequence[str]) -> None:
        self._lineage = lineage
        self._dialect = dialect
        self._names = names
        self._generations: dict[str, Any] = {}
        """Backup id by generation; None where its record is damaged."""

    def findings(self) -> Iterator[Finding]:
        """What is wrong, and how many were looked at."""
        logs = self._below("logs")
        # Generations come first: pins are compared with them.
        kinds = [
            ("generation", self._below("generations"), self._generation_fault),
            ("pin", self._below("pins"), self._pin_fault),
            ("hole", [name for name in logs if "/holes/" in name], self._hole_fault),
            ("history", [name for name in logs if name.endswith("/history")], self._history_fault),
            ("origin", [name for name in logs if name.endswith("/origin")], self._origin_fault),
            ("hold", self._below("holds"), self._hold_fault),
            ("proof", self._below("proofs"), self._proof_fault),
            ("verification", self._below(VERIFICATIONS), self._verification_fault),
        ]
        for kind, names, fault_of in kinds:
            for name, fault in zip(names, in_parallel(self._guarded(fault_of), names), strict=True):
                if fault:
                    yield problem(f"{kind} {name.partition('/')[2]}", fault, _HINTS[kind])
        yield from self._unclaimed()
        counts = ", ".join(f"{kind} {len(names)}" for kind, names, _ in kinds)
        yield Finding(Severity.OK, "records", f"looked at: {counts}")

    def _below(self, folder: str) -> list[str]:
        return [name for name in self._names if name.startswith(f"{folder}/")]

    def _guarded(self, fault_of: Callable[[str], str]) -> Callable[[str], str]:
        def fault(name: str) -> str:
            try:
                return fault_of(name)
            except IntegrityError as error:
                return f"is damaged: {error.detail or error.message}"
            except ObjectMissing:
                return ""  # removed since it was listed: nothing that is stored for good

        return fault

    def _generation_fault(self, name: str) -> str:
        generation = name.rpartition("/")[2]
        self._generations[generation] = None
        backup_id = self._lineage.get_record_json(name).get("backup")
        self._generations[generation] = backup_id
        if not _GENERATION.fullmatch(generation) or not isinstance(backup_id, str):
            return "does not say whose turn it is"
        return ""

    def _pin_fault(self, name: str) -> str:
        fields = self._lineage.get_record_json(name)
        generation, parents, adopts = (fields.get(key) for key in ("generation", "parents", "adopts"))
        if not isinstance(generation, int) or not isinstance(parents, list) or not isinstance(adopts, list):
            return "does not say what it protects"
        owner = self._generations.get(f"{generation:08x}", "nobody")
        if owner not in (name.rpartition("/")[2], None):
            return f"claims generation {generation:08x}, which belongs to {owner}"
        return ""

    def _hole_fault(self, name: str) -> str:
        match = _HOLE.fullmatch(name.rpartition("/")[2])
        fields = self._lineage.get_record_json(name)
        span = [int(one, 16) for one in match.groups()] if match else []
        if [fields.get("first"), fields.get("last")] != span:
            return "tells of another stretch of log than its name"
        return "" if isinstance(fields.get("cause"), str) else "does not tell the cause"

    def _history_fault(self, name: str) -> str:
        self._dialect.parse_history(self._lineage.get_blob(name, Kind.RECORD))
        return ""

    def _verification_fault(self, name: str) -> str:
        read_verification(self._lineage, name)
        return ""

    def _hold_fault(self, name: str) -> str:
        fields = self._lineage.get_record_json(name)
        told = isinstance(fields.get("reason"), str) and _is_instant(fields.get("since_utc"))
        return "" if told else "does not tell why or since when"

    def _proof_fault(self, name: str) -> str:
        passed = self._lineage.get_record_json(name).get("passed")
        return "" if isinstance(passed, bool) else "does not tell whether the drill passed"

    def _origin_fault(self, name: str) -> str:
        branch = name.split("/")[1]
        claimed = self._lineage.origin(branch)
        if claimed is None:
            return ""
        begin, origin = claimed
        for segment in self._lineage.logs_near(branch, begin):
            if segment.first <= begin < segment.last:
                stored = self._lineage.read_log(segment)[begin - segment.first :]
                common = min(len(stored), len(origin))
                return "" if stored[:common] == origin[:common] else "is not that of the stored log"
        return ""

    def _unclaimed(self) -> Iterator[Finding]:
        """A generation that nobody seems to have claimed would be claimed once more."""
        used = {
            name.rpartition("/")[2].partition("-")[0]
            for name in (*self._below("packs"), *self._below("maps"))
        }
        lost = sorted(used - set(self._generations))
        if lost:
            shown = ", ".join(lost[:LISTED_MAX])
            yield problem(
                "generations", f"records of generations that have packs are missing: {shown}", _COPY
            )
