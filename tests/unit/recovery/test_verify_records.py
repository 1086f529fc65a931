"""Verification sees one changed bit of whatever object, and nothing in a repository that is as written."""

from __future__ import annotations

import json
import random
import tarfile
from collections.abc import Iterable, Iterator

import pytest
from tests.formats.make_repository_v1 import ARCHIVE, EXPECTED, fill
from tests.unit.repository.samples import IDENTITY, SeededClock

from cloudsave.engines.postgresql.dialect import PostgresDialect
from cloudsave.errors import IntegrityError
from cloudsave.model.finding import Finding, Severity
from cloudsave.recovery.verify import VerifyRequest, has_problem, verify_lineage
from cloudsave.recovery.verify_records import verify_repository
from cloudsave.repository.head import read_head
from cloudsave.repository.keys import Secret, passphrase_slot
from cloudsave.repository.plain import write_plain
from cloudsave.repository.repository import Repository
from cloudsave.store.memory import MemoryStore

SEED = 20261125
PLACES = 24
"""Of a sealed object, so many bytes are changed one after the other; of a plain one all."""
PLAIN = ("cloudsave.json", "keys/", "tombs/", "/identity")


def troubled(findings: Iterable[Finding]) -> bool:
    """Whether anything is wrong but for this: what stands for log in the sample is noise."""
    return has_problem(one for one in findings if "log cannot be replayed" not in one.fact)


SEALED = ("/generations/", "/pins/", "/backups/", "/maps/", "/history", "/holes/", "/logs/", "/packs/")
READ_WHOLE = ("/packs/", "/logs/0000000")
"""Kinds of which a quick look reads the begin and the end only."""
DIALECT = PostgresDialect()


class World:
    """A repository with an object of each kind, in memory."""

    def __init__(self) -> None:
        self.store = MemoryStore()
        created = Repository.create(self.store, passphrase="a passphrase of ours", clock=SeededClock(1))
        self.repository = created.repository
        self.lineage = self.repository.lineage(IDENTITY.lineage)
        fill(self.lineage)
        self.store.put(
            "tombs/0002", [write_plain({"objects": [self.lineage.root + "packs/000000fe-00000000"]})]
        )

    def findings(self, *, read_all: bool) -> list[Finding]:
        """All that verification has to say."""
        try:
            read_head(self.store)
        except IntegrityError as error:
            return [Finding(Severity.PROBLEM, "head", error.message)]
        request = VerifyRequest(read_all=read_all)
        return [*verify_repository(self.repository), *verify_lineage(self.lineage, DIALECT, request)]

    def referred(self) -> set[str]:
        """Packs and maps that some backup needs."""
        manifests = [self.lineage.manifest(one) for one in self.lineage.backup_ids()]
        packs = {f"{self.lineage.root}packs/{name}" for one in manifests for name in one.packs}
        return packs | {f"{self.lineage.root}maps/{name}" for one in manifests for name in one.maps}

    def named(self, part: str) -> list[str]:
        """Names of stored objects of a kind, but for what no backup refers to."""
        referred = self.referred()
        names = [name for name in self.store.objects if part in name]
        return [name for name in names if name in referred or not ("/packs/" in name or "/maps/" in name)]

    def flipped(self, name: str, places: int | None) -> Iterator[int]:
        """Change one bit at some places (None: at all), one after the other; the last is put right again."""
        content, instant = self.store.objects[name]
        chance = random.Random(f"{SEED} {name}")
        step = 1 if places is None else max(1, len(content) // places)
        for at in sorted({*range(0, len(content), step), len(content) - 1}):
            damaged = bytearray(content)
            damaged[at] ^= 1 << chance.randrange(8)
            self.store.objects[name] = (bytes(damaged), instant)
            yield at
        self.store.objects[name] = (content, instant)


@pytest.fixture(scope="module")
def world() -> World:
    return World()


@pytest.mark.parametrize("read_all", [False, True])
def test_what_is_as_it_was_written_has_no_problem(world: World, read_all: bool) -> None:
    """Control for all others."""
    assert not troubled(world.findings(read_all=read_all))


@pytest.mark.parametrize("part", PLAIN)
def test_each_changed_byte_of_a_plain_object_is_found(world: World, part: str) -> None:
    names = world.named(part)
    assert names
    for name in names:
        if name == "tombs/0001":
            continue  # without a checksum, as in the first repositories
        for at in world.flipped(name, None):
            assert troubled([*_of_plain_objects(world)]), f"byte {at} of {name}"
    assert not troubled([*_of_plain_objects(world)])


def _of_plain_objects(world: World) -> Iterator[Finding]:
    """What is looked at without the rest, which takes its time."""
    try:
        read_head(world.store)
    except IntegrityError as error:
        yield Finding(Severity.PROBLEM, "head", error.message)
    yield from verify_repository(world.repository)
    request = VerifyRequest(backup_id=world.lineage.backup_ids()[0])
    yield from verify_lineage(world.lineage, DIALECT, request)


@pytest.mark.parametrize("part", SEALED)
def test_changed_bytes_of_a_sealed_object_are_found_when_all_is_read(world: World, part: str) -> None:
    names = world.named(part)
    assert names
    for name in names:
        for at in world.flipped(name, PLACES):
            findings = world.findings(read_all=True)
            assert troubled(findings), f"byte {at} of {name}"
            assert all(one.hint for one in findings if one.severity is Severity.PROBLEM)


@pytest.mark.parametrize("part", [one for one in SEALED if one not in ("/packs/", "/logs/")])
def test_changed_bytes_of_small_objects_are_found_by_a_quick_look(world: World, part: str) -> None:
    for name in world.named(part):
        for at in world.flipped(name, 3):
            assert troubled(world.findings(read_all=False)), f"byte {at} of {name}"


@pytest.mark.parametrize("part", ["/identity", "/generations/", "/history"])
def test_a_missing_record_is_found(part: str) -> None:
    world = World()
    for name in world.named(part):
        del world.store.objects[name]
    assert troubled(world.findings(read_all=False))
    assert world.repository.lineage_ids() == [IDENTITY.lineage]


def test_a_key_slot_that_was_left_over_is_told_and_no_problem() -> None:
    world = World()
    world.store.put(
        "keys/0000000000000000", [passphrase_slot(bytes(32), "another one", clock=SeededClock(2))]
    )
    findings = world.findings(read_all=False)
    assert not troubled(findings)
    assert [
        one.subject for one in findings if one.severity is Severity.NOTICE and "left over" in one.fact
    ] == ["key slot 0000000000000000"]


def test_pins_that_share_a_generation_are_found() -> None:
    world = World()
    (generation, *_) = (int(name[-8:], 16) for name in world.named("/generations/"))
    fields = {
        "generation": generation,
        "parents": [],
        "adopts": [],
        "created_utc": "2026-01-01T00:00:00+00:00",
    }
    world.lineage.put_record_json("pins/20270101T000000Z-0001", fields)
    assert troubled(world.findings(read_all=False))


def test_a_repository_of_the_first_release_is_sound_and_what_has_no_checksum_is_told() -> None:
    store = MemoryStore()
    with tarfile.open(ARCHIVE) as archive:
        for member in archive:
            content = archive.extractfile(member)
            assert content is not None
            store.put(member.name, [content.read()])
    expected = json.loads(EXPECTED.read_text())
    repository = Repository.open(
        store, secret=Secret(passphrase=expected["passphrase"]), clock=SeededClock(1)
    )
    findings = verify_repository(repository)
    lineage = repository.lineage(expected["lineage"])
    findings += verify_lineage(lineage, DIALECT, VerifyRequest(read_all=True))
    assert not troubled(findings)
    told = {one.subject for one in findings if one.severity is Severity.NOTICE}
    assert told == {"cloudsave.json", "identity", "tomb tombs/0001"}
    # What is said twice is compared all the same.
    content, instant = store.objects[lineage.root + "identity"]
    store.objects[lineage.root + "identity"] = (content.replace(b"postgresql", b"postgresqm"), instant)
    assert troubled(verify_lineage(lineage, DIALECT, VerifyRequest()))
