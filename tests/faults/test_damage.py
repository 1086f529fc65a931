"""
Every kind of stored object, truncated and with flipped bits: found, named, never taken for something else.

The command line answers with exit code 5 (3 from `verify`, which goes on to the end), a code of its own, and
no traceback. A restore that met damage leaves nothing that a server would start from.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cloudsave.errors import IntegrityError
from cloudsave.repository.head import read_head
from cloudsave.store.memory import MemoryStore
from tests.engine_report import note_engine
from tests.faults.product import Product
from tests.faults.protected import Protected, protected
from tests.integration.postgresql.command_line import Answer
from tests.integration.postgresql.fixtures import version_of

SEED = 20261125
TROUBLE = 255
"""What `logs fetch` ends with when it is not the end of the archive."""
HISTORY = b"1\t0/5000000\tno recovery target specified\n"

Change = Callable[[bytes], bytes]


pytestmark = pytest.mark.postgresql_majors("14", "18")


@pytest.fixture(scope="module")
def server(
    postgresql_major: str,
    postgresql_bindirs: dict[str, Path],
    postgresql_folders: tuple[Path, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Protected]:
    folder = tmp_path_factory.mktemp("protected")
    with protected(postgresql_major, postgresql_bindirs, postgresql_folders, folder) as made:
        yield made


@pytest.fixture
def product(server: Protected, tmp_path: Path, request: pytest.FixtureRequest) -> Product:
    """The protected server's repository, a copy that this test may spoil."""
    note_engine(request.node, "postgresql", server.cluster.major, version=version_of(server.cluster.bindir))
    return server.copy(tmp_path)


def truncated(content: bytes) -> bytes:
    """Half of it is gone."""
    return content[: len(content) // 2]


def emptied(content: bytes) -> bytes:
    """Only the name is left."""
    return b""


def flipped_in_the_middle(content: bytes) -> bytes:
    """One bit is another."""
    return flip(content, len(content) // 2)


def flipped_at_the_end(content: bytes) -> bytes:
    """One bit of the last byte is another."""
    return flip(content, len(content) - 1)


def longer(content: bytes) -> bytes:
    """Something was appended."""
    return content + b"more"


def flip(content: bytes, at: int) -> bytes:
    """The content with one bit changed."""
    return content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :]


CHANGES = [truncated, emptied, flipped_in_the_middle, flipped_at_the_end, longer]


def played(name: str) -> pytest.MarkDecorator:
    """The fault that a case plays."""
    return pytest.mark.fault(name, control="test_without_damage_all_is_well")


def damage(product: Product, pattern: str, change: Change) -> list[str]:
    """Change all objects of a kind; their names."""
    paths = [path for path in product.repository.glob(pattern) if path.is_file()]
    assert paths, f"no object is called {pattern}"
    for path in paths:
        path.write_bytes(change(path.read_bytes()))
    return [path.name for path in paths]


def assert_explained(answer: Answer, exit_code: int) -> None:
    """An error of integrity, in our words."""
    answer.expect(exit_code)
    assert answer.error["code"].startswith("CS-6"), answer.stderr
    assert answer.error["message"]
    assert "Traceback" not in answer.stderr


def assert_verify_finds(product: Product, *arguments: str) -> None:
    """Verify tells of a problem, as a finding or as an error."""
    answer = product.answer("verify", *arguments)
    assert answer.exit_code in (3, 5), answer.stdout + answer.stderr
    assert "Traceback" not in answer.stderr
    if answer.exit_code == 3:
        assert not answer.result["sound"]
        problems = [one for found in answer.result["lineages"].values() for one in found]
        assert any(one["severity"] == "problem" for one in problems)
    else:
        assert answer.error["code"].startswith("CS-6")


def test_without_damage_all_is_well(product: Product, tmp_path: Path) -> None:
    """Control: writing objects back as they were changes nothing."""
    damage(product, "**/*", lambda content: content)
    assert product.run("verify", "--read-all")["sound"]
    product.run("restore", "db", "--into", str(tmp_path / "new"))
    product.run("logs", "fetch", "db", log_file_of(product), str(tmp_path / "file"))
    assert (tmp_path / "file").stat().st_size == 16 << 20


def log_file_of(product: Product) -> str:
    """The name of the first log file that is stored."""
    first = min(int(path.name.split("-")[0], 16) for path in product.repository.glob("lineages/*/logs/*/*/*"))
    return f"00000001{0:08X}{first >> 24:08X}"


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(
    "pattern",
    [
        pytest.param("packs/*", marks=played("pack-damaged")),
        pytest.param("maps/*", marks=played("map-damaged")),
        pytest.param("backups/*", marks=played("manifest-damaged")),
    ],
)
def test_damage_to_what_backups_are_made_of_stops_a_restore(
    product: Product, pattern: str, change: Change
) -> None:
    damage(product, f"lineages/*/{pattern}", change)
    assert_verify_finds(product, "--read-all")
    into = product.folder / "new"
    answer = product.answer("restore", "db", "--into", str(into))
    if pattern == "packs/*" and change in (flipped_at_the_end, longer):
        # Frames are read where the map says, and each is authenticated: the bytes are the right ones.
        answer.expect(0)
        return
    assert_explained(answer, 5)
    assert not (into / "global" / "pg_control").exists()


@pytest.mark.parametrize("change", [truncated, emptied, longer])
@pytest.mark.parametrize("pattern", ["packs/*", "maps/*", "backups/*", "logs/*/*/*"])
@pytest.mark.fault("object-size-wrong", control="test_without_damage_all_is_well")
def test_a_wrong_size_is_found_by_a_quick_look(product: Product, pattern: str, change: Change) -> None:
    damage(product, f"lineages/*/{pattern}", change)
    assert_verify_finds(product)


SMALL = [
    "cloudsave.json",
    "keys/*",
    *(f"lineages/*/{one}" for one in ("identity", "generations/*", "pins/*")),
]


@pytest.mark.parametrize("change", [emptied, flipped_in_the_middle])
@pytest.mark.parametrize("pattern", SMALL)
@pytest.mark.fault("small-object-damaged", control="test_without_damage_all_is_well")
def test_damage_to_small_objects_is_found_by_a_quick_look(
    product: Product, pattern: str, change: Change
) -> None:
    damage(product, pattern, change)
    assert_verify_finds(product)


@pytest.mark.parametrize("change", [truncated, flipped_in_the_middle])
@pytest.mark.fault("newest-manifest-damaged", control="test_without_damage_all_is_well")
def test_one_damaged_manifest_stops_nothing_but_its_own_backup(
    server: Protected, product: Product, change: Change
) -> None:
    (newest,) = [
        path for path in product.repository.glob("lineages/*/backups/*") if path.name != server.first_backup
    ]
    newest.write_bytes(change(newest.read_bytes()))
    answer = product.answer("list").expect(5)
    assert [one["backup_id"] for one in answer.result] == [server.first_backup]
    assert answer.error["code"].startswith("CS-6")
    assert_verify_finds(product)
    findings = product.answer("check", "db").expect(3).result["findings"]
    assert [one for one in findings if one["subject"] == "backup" and one["severity"] == "problem"]
    done = product.run("restore", "db", "--into", str(product.folder / "new"))
    assert done["plan"]["backup"] == server.first_backup
    assert any(newest.name in note for note in done["plan"]["notes"])
    product.run("logs", "fetch", "db", log_file_of(product), str(product.folder / "file"))
    into = str(product.folder / "other")
    assert_explained(product.answer("restore", "db", "--backup", newest.name, "--into", into), 5)
    refused = product.answer("backup", "db")
    assert_explained(refused, 5)
    assert any("--full" in hint for hint in refused.error["hints"])
    product.run("backup", "db", "--full")


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(truncated, marks=played("log-object-truncated")),
        pytest.param(emptied, marks=played("log-object-empty")),
        pytest.param(flipped_in_the_middle, marks=played("log-object-bit-flipped")),
        pytest.param(flipped_at_the_end, marks=played("log-object-bit-flipped")),
        longer,
    ],
)
def test_damaged_log_is_no_end_of_the_archive(product: Product, tmp_path: Path, change: Change) -> None:
    wanted = log_file_of(product)
    damage(product, "lineages/*/logs/*/*/*", change)
    assert_verify_finds(product, "--read-all")
    answer = product.answer("logs", "fetch", "db", wanted, str(tmp_path / "file"))
    assert_explained(answer, TROUBLE)
    assert not list(tmp_path.glob("file*"))
    assert not list(tmp_path.glob(".file*"))


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.fault("history-damaged")
def test_a_damaged_history_is_no_missing_history(product: Product, tmp_path: Path, change: Change) -> None:
    file = tmp_path / "00000002.history"
    file.write_bytes(HISTORY)
    product.run("logs", "push", "db", str(file))
    product.run("logs", "fetch", "db", file.name, str(tmp_path / "fetched"))
    assert (tmp_path / "fetched").read_bytes() == HISTORY
    (tmp_path / "fetched").unlink()
    damage(product, "lineages/*/logs/*/history", change)
    assert_verify_finds(product, "--read-all")
    assert_explained(product.answer("logs", "fetch", "db", file.name, str(tmp_path / "fetched")), TROUBLE)
    assert not (tmp_path / "fetched").exists()
    assert_explained(product.answer("restore", "db", "--into", str(tmp_path / "new")), 5)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.fault("key-slot-damaged")
def test_a_damaged_key_slot_is_no_wrong_passphrase_and_another_slot_opens(
    server: Protected, product: Product, change: Change
) -> None:
    slots = list(product.repository.glob("keys/*"))
    (mine,) = [path for path in slots if json.loads(path.read_bytes())["type"] == "argon2id"]
    damage(product, f"keys/{mine.name}", change)
    answer = product.answer("list")
    assert_explained(answer, 5)
    assert answer.error["code"] == "CS-6001"
    assert answer.error["hints"]
    product.configuration.write_text(
        product.configuration.read_text().replace("passphrase_file", "recovery_key_file")
    )
    product.passphrase.write_text(server.recovery_key)
    assert len(product.run("list")) == 2
    damage(product, "keys/*", emptied)
    assert_explained(product.answer("list"), 5)


@pytest.mark.parametrize("change", [truncated, emptied])
@pytest.mark.fault("head-damaged", control="test_without_damage_all_is_well")
def test_a_damaged_head_is_no_missing_repository(product: Product, change: Change) -> None:
    damage(product, "cloudsave.json", change)
    for command in (["list"], ["verify"], ["init"], ["backup", "db"]):
        answer = product.answer(*command)
        if command == ["init"]:
            assert answer.expect(2).error["code"] == "CS-4009"
        else:
            assert_explained(answer, 5)
            assert answer.error["hints"]


def test_no_flipped_bit_of_the_head_leads_to_anything_but_an_integrity_error(product: Product) -> None:
    content = (product.repository / "cloudsave.json").read_bytes()
    refused = 0
    for at in range(len(content)):
        store = MemoryStore()
        store.put("cloudsave.json", [flip(content, at)])
        try:
            read_head(store)
        except IntegrityError:
            refused += 1
    assert refused > len(content) // 4
    store = MemoryStore()
    store.put("cloudsave.json", [content])
    assert read_head(store)["format"] == 1


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.fault("identity-damaged", control="test_without_damage_all_is_well")
def test_a_damaged_identity_is_told_and_the_lineage_still_found_by_its_id(
    product: Product, change: Change
) -> None:
    damage(product, "lineages/*/identity", change)
    assert_verify_finds(product)
    answer = product.answer("restore", "db", "--into", str(product.folder / "new"))
    assert_explained(answer, 5)
    assert not (product.folder / "new").exists()
    (lineage,) = (path.name for path in product.repository.glob("lineages/*"))
    assert any(lineage in hint for hint in answer.error["hints"])
    product.run("restore", lineage, "--into", str(product.folder / "new"))


@pytest.mark.parametrize("pattern", ["packs/*", "maps/*", "backups/*", "identity", "logs/*/*/*"])
@pytest.mark.fault("bits-flipped-anywhere", control="test_without_damage_all_is_well")
def test_bits_flipped_anywhere_never_end_in_a_bug_or_in_success_with_other_bytes(
    product: Product, tmp_path: Path, pattern: str
) -> None:
    chance = random.Random(SEED)
    original = product.objects()
    for number in range(2):
        damage(product, f"lineages/*/{pattern}", lambda one: flip(one, chance.randrange(len(one))))
        answers = [
            product.answer("verify", "--read-all"),
            product.answer("restore", "db", "--into", str(tmp_path / f"new-{number}")),
            product.answer("logs", "fetch", "db", log_file_of(product), str(tmp_path / "file")),
            product.answer("list"),
            product.answer("ranges", "db"),
        ]
        for answer in answers:
            assert "Traceback" not in answer.stderr
            assert "CS-0001" not in answer.stderr, answer.stderr
        assert answers[0].exit_code in (3, 5)
        for name, content in original.items():
            (product.repository / name).write_bytes(content)


@pytest.mark.parametrize("change", [truncated, emptied, flipped_in_the_middle])
@pytest.mark.parametrize("pattern", ["packs/*", "maps/*", "backups/*", "pins/*", "generations/*"])
@pytest.mark.fault("backup-on-damaged-parent", control="test_without_damage_all_is_well")
def test_a_backup_on_top_of_damage_is_sound_or_refused(
    product: Product, pattern: str, change: Change
) -> None:
    """A new backup never builds on damaged objects without a word."""
    damage(product, f"lineages/*/{pattern}", change)
    answer = product.answer("backup", "db", "--full")
    assert "Traceback" not in answer.stderr
    assert answer.exit_code in (0, 5), answer.stderr
    if answer.exit_code == 5:
        assert answer.error["code"].startswith("CS-6")
        return
    backup_id = answer.result["backup_id"]
    target = product.folder / "new"
    done = product.answer("restore", "db", "--backup", backup_id, "--immediate", "--into", str(target))
    assert done.exit_code == 0 or pattern == "backups/*", done.stderr
