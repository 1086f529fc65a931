"""
One who may only add objects to the store, and has no key: what is restored stays what was stored.

Each kind of object is added with names that a reader could fall for. A restore goes on, or is refused with
a way out; nothing that was added is ever taken for something of ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from tests.faults.product import Product
from tests.faults.protected import Protected, protected
from tests.integration.postgresql.command_line import stop_server

JUNK = b"CSV1" + bytes([4]) + bytes(300)


@pytest.fixture(scope="module")
def server(
    postgresql_bindirs: dict[str, Path],
    postgresql_folders: tuple[Path, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Protected]:
    folder = tmp_path_factory.mktemp("protected")
    with protected("18", postgresql_bindirs, postgresql_folders, folder) as made:
        yield made


@pytest.fixture
def product(server: Protected, tmp_path: Path) -> Product:
    return server.copy(tmp_path)


def segments(product: Product) -> list[tuple[int, int]]:
    names = [path.name.split("-") for path in product.repository.glob("lineages/*/logs/*/*/*-*-*-*")]
    return sorted((int(one[0], 16), int(one[1], 16)) for one in names)


def log_name(branch: str, first: int, last: int, instants: tuple[int, int] = (0, 0)) -> str:
    numbers = "-".join(f"{one:016x}" for one in (first, last, *instants))
    return f"logs/{branch}/{first >> 28:08x}/{numbers}"


FUTURE = (4_000_000_000_000_000, 4_100_000_000_000_000)
"""Instants of the years 2096 and 2099."""
NEED_A_BRANCH = ("log of an unknown branch", "history of an unknown branch")
"""They could be the newest history: which branch is meant must be said."""
END_UNKNOWN = ("log after the end", "log over the end", *NEED_A_BRANCH)
"""They could be log that is later than all other: "latest" is refused."""
IGNORED = ("a proof",)
"""Names that nothing reads."""


def additions(product: Product) -> dict[str, str]:
    """What is added, by what the attacker hopes for."""
    spans = segments(product)
    first, last = spans[0][0], max(end for _, end in spans)
    return {
        "log in place of all that is stored": log_name("00000001", first, last),
        "log in place of all, with commits of all times": log_name("00000001", first, last, (1, FUTURE[1])),
        "log in place of one object": log_name("00000001", *spans[-1], FUTURE),
        "log after the end": log_name("00000001", last, last + (1 << 24), FUTURE),
        "log over the end": log_name("00000001", first, last + (1 << 24), FUTURE),
        "log before the begin": log_name("00000001", 0, first),
        "log of no year": log_name("00000001", first, last, (1 << 60, 1 << 61)),
        "log of an unknown branch": log_name("00000009", first, last, FUTURE),
        "history of an unknown branch": "logs/00000009/history",
        "origin of an unknown branch": "logs/00000009/origin",
        "a hole": f"logs/00000001/holes/{first:016x}-{last:016x}",
        "a newer backup": "backups/20991231T235959Z-ffff",
        "a pin": "pins/20991231T235959Z-ffff",
        "a generation": "generations/000000ff",
        "a pack": "packs/000000ff-00000000",
        "a proof": "proofs/20991231T235959Z-ffff/1",
        "a verification": "verifications/20991231T235959Z-ffffffff",
    }


def add(product: Product, name: str) -> None:
    """Add junk; nothing that is there is touched."""
    (lineage,) = product.repository.glob("lineages/postgresql-*")
    path = lineage / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as file:
        file.write(JUNK)


def last_instant(product: Product) -> str:
    """The last instant that can be restored."""
    return str(product.run("ranges", "db")["ranges"][-1]["end"])


def test_whatever_is_added_a_restore_to_an_instant_is_planned_as_before(product: Product) -> None:
    instant = last_instant(product)
    before = product.run("restore", "db", "--time", instant, "--dry-run")
    objects = product.objects()
    for what, name in additions(product).items():
        add(product, name)
        branch = ["--branch", "00000001"] if what in NEED_A_BRANCH else []
        if branch:
            refused = product.answer("restore", "db", "--time", instant, "--dry-run")
            assert refused.exit_code in (4, 5), what
            assert any("--branch" in hint for hint in refused.error["hints"])
        plan = product.run("restore", "db", "--time", instant, "--dry-run", *branch)
        assert {key: plan[key] for key in ("backup", "position", "last_commit")} == {
            key: before[key] for key in ("backup", "position", "last_commit")
        }, what
        forget(product, objects)


def forget(product: Product, objects: dict[str, bytes]) -> None:
    """Take away what is not among `objects`."""
    for name in product.objects().keys() - objects.keys():
        (product.repository / name).unlink()


def test_the_latest_state_is_planned_as_before_or_refused_where_it_may_be_later(product: Product) -> None:
    before = product.run("restore", "db", "--dry-run")
    objects = product.objects()
    for what, name in additions(product).items():
        add(product, name)
        answer = product.answer("restore", "db", "--dry-run")
        if what in END_UNKNOWN:
            assert answer.exit_code in (4, 5), what
            assert answer.error["hints"]
        else:
            plan = answer.expect(0).result
            assert (plan["position"], plan["last_commit"]) == (before["position"], before["last_commit"])
        forget(product, objects)


def test_what_was_added_is_told_by_verify_and_breaks_no_command(product: Product) -> None:
    objects = product.objects()
    for what, name in additions(product).items():
        add(product, name)
        for command in (["verify"], ["ranges", "db"], ["list"], ["logs", "status", "db"], ["check", "db"]):
            answer = product.answer(*command)
            assert "CS-0001" not in answer.stderr, (what, command)
            if command == ["verify"] and what not in IGNORED:
                assert answer.exit_code == 3, what
        forget(product, objects)


def test_generations_that_a_stranger_took_do_not_stop_new_backups(product: Product) -> None:
    """The numbers of all future writers could be used up by one object."""
    for name in ("ffffffff", "fffffffe", "00000010", "zz", "0000001g", "00000001-x"):
        add(product, f"generations/{name}")
    first = product.run("backup", "db")["backup_id"]
    second = product.run("backup", "db")["backup_id"]
    assert first != second
    claimed = {path.name for path in product.repository.glob("lineages/*/generations/*")}
    assert {"00000003", "00000004"} <= claimed


def test_with_everything_added_the_database_comes_back_whole(server: Protected, product: Product) -> None:
    instant = last_instant(product)
    for name in additions(product).values():
        add(product, name)
    for number in range(3):
        path = product.repository / "keys" / f"{number:016x}"
        path.write_bytes(JUNK)
    (product.repository / "tombs").mkdir()
    (product.repository / "tombs" / "junk").write_bytes(JUNK)
    (product.repository / "lineages" / "postgresql-1").mkdir()
    (product.repository / "lineages" / "postgresql-1" / "identity").write_bytes(JUNK)
    into = server.cluster.factory.folder(on_disk=True) / "restored"
    arguments = ("--time", instant, "--branch", "00000001", "--bin-dir", str(server.cluster.bindir))
    try:
        told = product.run("restore", "db", "--into", str(into), *arguments, "--start")
        assert rows(server, told["connection_url"]) == "40000"
    finally:
        stop_server(into)


def rows(server: Protected, url: str) -> str:
    """How many rows the restored table has."""
    with psycopg.connect(url) as connection:
        return str(connection.execute("SELECT count(*) FROM t").fetchone()[0])  # type: ignore[index]


def test_a_junk_object_over_the_only_log_is_a_loss_that_is_told(product: Product) -> None:
    """Control: where nothing else holds the log, an object that does not open stops the restore."""
    instant = last_instant(product)
    for path in product.repository.glob("lineages/*/logs/*/*/*-*-*-*"):
        path.write_bytes(JUNK)
    answer = product.answer("restore", "db", "--time", instant, "--dry-run")
    assert answer.expect(5).error["code"] == "CS-6001"
