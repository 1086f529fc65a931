"""
One who may change the store, and has no key: objects swapped, replayed, renamed, taken from elsewhere.

Unlike damage by chance, each object here is intact: we wrote it, for another name, time or repository.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.product import Product
from tests.faults.protected import Protected, protected

SEALED = ["packs/*", "maps/*", "backups/*", "logs/*/*/*-*-*-*", "generations/*", "pins/*"]
RESTORED_FROM = SEALED[:4]
"""Kinds that a restore reads."""

Tampering = Callable[[list[Path], Product], None]


@pytest.fixture(scope="module")
def server(
    postgresql_bindirs: dict[str, Path],
    postgresql_folders: tuple[Path, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Protected]:
    folder = tmp_path_factory.mktemp("protected")
    with protected("18", postgresql_bindirs, postgresql_folders, folder) as made:
        yield made


@pytest.fixture(scope="module")
def elsewhere(server: Protected, tmp_path_factory: pytest.TempPathFactory) -> Product:
    """Another repository of the very same server: the same lineage, other keys."""
    product = Product(tmp_path_factory.mktemp("elsewhere"), server.cluster.url)
    product.run("init")
    product.run("backup", "db")
    product.run("backup", "db")
    return product


@pytest.fixture
def product(server: Protected, tmp_path: Path) -> Product:
    return server.copy(tmp_path)


def objects(product: Product, pattern: str) -> list[Path]:
    found = sorted(path for path in product.repository.glob(f"lineages/*/{pattern}") if path.is_file())
    assert len(found) >= 2, f"there are not two objects like {pattern}"
    return found


def rewrite(path: Path, content: bytes) -> None:
    path.chmod(0o600)
    path.write_bytes(content)


def swapped(paths: list[Path], _: Product) -> None:
    """Each has the content of the next."""
    contents = [path.read_bytes() for path in paths]
    for path, content in zip(paths, [*contents[1:], contents[0]], strict=True):
        rewrite(path, content)


def replayed(paths: list[Path], _: Product) -> None:
    """The oldest takes the place of all: an old manifest in place of the new, old log for new."""
    content = paths[0].read_bytes()
    for path in paths[1:]:
        rewrite(path, content)


def renamed(paths: list[Path], _: Product) -> None:
    """The last one stands under a name that looks as good."""
    last = paths[-1]
    name = last.name
    at = max(index for index, letter in enumerate(name) if letter.isdigit())
    other = name[:at] + str((int(name[at]) + 1) % 10) + name[at + 1 :]
    last.rename(last.with_name(other))


def from_elsewhere(paths: list[Path], other: Product) -> None:
    """Each is one that another repository holds of the same kind, of the same server."""
    for path in paths:
        kind = path.relative_to(path.parents[0]).name
        candidates = sorted(other.repository.glob(f"lineages/*/{path.parent.name}/*")) or sorted(
            other.repository.glob("lineages/*/logs/*/*/*-*-*-*")
        )
        assert candidates, kind
        rewrite(path, candidates[-1].read_bytes())


TAMPERINGS = [swapped, replayed, renamed, from_elsewhere]


def test_the_untouched_repository_is_sound(product: Product) -> None:
    """Control."""
    assert product.run("verify", "--read-all")["sound"]
    product.run("restore", "db", "--into", str(product.folder / "new"))


@pytest.mark.parametrize("tamper", TAMPERINGS, ids=lambda one: one.__name__)
@pytest.mark.parametrize("pattern", SEALED)
def test_intact_objects_in_a_wrong_place_are_found(
    product: Product, elsewhere: Product, pattern: str, tamper: Tampering
) -> None:
    tamper(objects(product, pattern), elsewhere)
    answer = product.answer("verify", "--read-all")
    assert answer.exit_code in (3, 5), answer.stdout
    assert "CS-0001" not in answer.stderr
    if pattern not in RESTORED_FROM or (pattern, tamper) == ("logs/*/*/*-*-*-*", renamed):
        return
    into = product.folder / "new"
    restored = product.answer("restore", "db", "--into", str(into))
    assert "CS-0001" not in restored.stderr
    if (pattern, tamper) in (("backups/*", renamed), ("backups/*", replayed)):
        # The oldest manifest is where it was: a restore begins there, and says so.
        assert restored.expect(0).result["plan"]["notes"]
        return
    if pattern == "logs/*/*/*-*-*-*" and restored.exit_code == 0:
        # Without --start no log is read but its index; the server that replays it gets none of it.
        segment = product.answer("logs", "fetch", "db", first_file(product), str(product.folder / "file"))
        assert segment.exit_code == 255
        return
    # What was renamed is missing under the name that the manifest has for it.
    assert restored.exit_code in ((1, 4, 5) if tamper is renamed else (4, 5)), restored.stdout
    if restored.exit_code == 1:
        assert restored.error["code"] == "CS-4003"
    assert not (into / "global" / "pg_control").exists()


def first_file(product: Product) -> str:
    """The name of the first log file that is stored."""
    first = min(int(path.name.split("-")[0], 16) for path in objects(product, "logs/*/*/*-*-*-*"))
    return f"00000001{0:08X}{first >> 24:08X}"


def test_a_manifest_of_before_does_not_pass_for_the_newest(server: Protected, product: Product) -> None:
    """Rolled back: the newest backup's name holds the manifest of the first."""
    oldest, newest = objects(product, "backups/*")
    rewrite(newest, oldest.read_bytes())
    answer = product.answer("restore", "db", "--backup", newest.name, "--into", str(product.folder / "new"))
    assert answer.expect(5).error["code"] == "CS-6001"
    assert product.answer("list").exit_code == 5


def test_keys_of_another_repository_open_nothing(product: Product, elsewhere: Product) -> None:
    """The head and all slots are those of another repository, whose passphrase is the same."""
    for path in product.repository.glob("keys/*"):
        path.unlink()
    for path in elsewhere.repository.glob("keys/*"):
        (product.repository / "keys" / path.name).write_bytes(path.read_bytes())
    assert product.answer("list").expect(5).error["code"] == "CS-6001"
    rewrite(product.repository / "cloudsave.json", (elsewhere.repository / "cloudsave.json").read_bytes())
    answer = product.answer("list")
    assert answer.exit_code == 5
    assert answer.error["code"] == "CS-6001"
    assert product.answer("backup", "db").expect(5).error["code"] == "CS-6001"
