"""`cloudsave key`: secrets are added, replaced and removed, and nobody is locked out by mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyrage
import pytest

from cloudsave.clock import SYSTEM_CLOCK
from cloudsave.errors import StorePermission, StoreUnavailable, UsageError, WrongKey
from cloudsave.repository.keys import RecoveryKey, Secret, new_recovery_key
from cloudsave.repository.plain import write_plain
from cloudsave.repository.repository import Repository
from cloudsave.store.faulty import FaultPlan, Faulty
from cloudsave.store.memory import MemoryStore
from tests.faults.product import PASSPHRASE, Product
from tests.unit.repository.samples import SeededClock

NEW = "entirely new words"


@pytest.fixture
def product(tmp_path: Path) -> Product:
    made = Product(tmp_path, "postgresql://u@h/")
    made.initial = made.run("init")  # type: ignore[attr-defined]
    return made


def secret_file(product: Product, name: str, text: str) -> str:
    path = product.folder / name
    path.touch(mode=0o600)
    path.write_text(text)
    return str(path)


def opens(product: Product, *, passphrase: str | None = None, recovery_key: str | None = None) -> int:
    """The exit code of a command that needs the key, with this secret alone."""
    content = product.configuration.read_text()
    named, text = ("passphrase_file", passphrase) if passphrase else ("recovery_key_file", recovery_key)
    path = secret_file(product, "tried", f"{text}\n")
    product.configuration.write_text(
        content.replace(f"passphrase_file = '{product.passphrase}'", f"{named} = '{path}'")
    )
    try:
        return product.answer("key", "list").exit_code
    finally:
        product.configuration.write_text(content)


def recovery_key_in(path: str) -> str:
    return Path(path).read_text().splitlines()[-1]


def test_a_passphrase_is_replaced_and_the_recovery_key_kept(product: Product) -> None:
    slots = {one["type"]: one["slot_id"] for one in product.run("key", "list")}
    before = product.objects()
    new = secret_file(product, "new", NEW)
    told = product.run("key", "rotate", "--passphrase-from", new, "--keep", slots["age"])
    assert told["removed"] == [slots["argon2id"]]
    assert opens(product, passphrase=NEW) == 0
    assert opens(product, passphrase=PASSPHRASE) == 5
    assert opens(product, recovery_key=product.initial["recovery_key"]) == 0  # type: ignore[attr-defined]
    after = product.objects()
    assert {name for name in {*before, *after} if before.get(name) != after.get(name)} == {
        f"keys/{one}" for one in (*told["added"], *told["removed"])
    }


def test_all_secrets_are_replaced_by_those_that_are_named(product: Product) -> None:
    new, written = secret_file(product, "new", NEW), str(product.folder / "recovery")
    other = pyrage.x25519.Identity.generate()
    told = product.run(
        *("key", "rotate", "--passphrase-from", new, "--recovery-key-to", written),
        *("--recipient", str(other.to_public())),
    )
    assert (len(told["added"]), len(told["removed"])) == (3, 2)
    assert opens(product, passphrase=PASSPHRASE) == 5
    assert opens(product, recovery_key=product.initial["recovery_key"]) == 5  # type: ignore[attr-defined]
    assert opens(product, passphrase=NEW) == 0
    assert opens(product, recovery_key=recovery_key_in(written)) == 0
    assert opens(product, recovery_key=str(other)) == 0
    assert Path(written).stat().st_mode & 0o077 == 0


def test_a_lost_passphrase_is_replaced_by_the_recovery_key(product: Product) -> None:
    key = secret_file(product, "key", product.initial["recovery_key"])  # type: ignore[attr-defined]
    content = product.configuration.read_text()
    product.configuration.write_text(
        content.replace(f"passphrase_file = '{product.passphrase}'", f"recovery_key_file = '{key}'")
    )
    product.passphrase.unlink()
    slots = {one["type"]: one["slot_id"] for one in product.run("key", "list")}
    new = secret_file(product, "new", NEW)
    product.run("key", "rotate", "--passphrase-from", new, "--keep", slots["age"])
    product.configuration.write_text(content)
    assert opens(product, passphrase=NEW) == 0


def test_a_new_recovery_key_is_added_and_opens(product: Product) -> None:
    written = str(product.folder / "recovery")
    product.run("key", "add", "--recovery-key-to", written)
    assert opens(product, recovery_key=recovery_key_in(written)) == 0
    assert opens(product, passphrase=PASSPHRASE) == 0
    assert product.answer("key", "add", "--recovery-key-to", written).expect(2)


@pytest.mark.parametrize(
    "arguments",
    [
        ("key", "add"),
        ("key", "rotate"),
        ("key", "rotate", "--passphrase-from", "NEW"),
        ("key", "rotate", "--passphrase-from", "NEW", "--keep", "0" * 16),
        ("key", "remove", "0" * 16),
        ("key", "add", "--recipient", "age1nonsense"),
        ("key", "rotate", "--recipient", "age1nonsense"),
    ],
)
def test_what_would_leave_too_little_or_makes_no_sense_changes_nothing(
    product: Product, arguments: tuple[str, ...]
) -> None:
    new, before = secret_file(product, "new", NEW), product.objects()
    answer = product.answer(*[new if one == "NEW" else one for one in arguments]).expect(2)
    assert answer.error["code"] == "CS-1001"
    assert product.objects() == before


def test_the_slot_of_the_secret_in_use_is_not_removed_by_itself(product: Product) -> None:
    slots = {one["type"]: one["slot_id"] for one in product.run("key", "list")}
    assert product.answer("key", "remove", slots["argon2id"]).expect(2).error["hints"]
    assert product.run("key", "remove", slots["age"], "--dry-run")["dry_run"]
    assert len(product.run("key", "list")) == 2
    product.run("key", "remove", slots["age"])
    assert [one["type"] for one in product.run("key", "list")] == ["argon2id"]


def test_a_dry_run_of_a_rotation_says_what_would_go_and_changes_nothing(product: Product) -> None:
    before, written = product.objects(), product.folder / "recovery"
    told = product.run("key", "rotate", "--recovery-key-to", str(written), "--dry-run")
    assert (len(told["added"]), len(told["removed"])) == (0, 2)
    assert product.objects() == before
    assert not written.exists()


class NeverDeleting(MemoryStore):
    """As with credentials that may put, get and list only."""

    def delete(self, name: str) -> None:
        raise StorePermission(f'cannot delete object "{name}"')


def test_a_store_that_refuses_deletes_says_that_old_secrets_go_on_opening(
    product: Product, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = NeverDeleting()
    for name, content in product.objects().items():
        store.put(name, [content])
    monkeypatch.setattr("cloudsave.assembly.build_store", lambda *_, **__: store)
    written = product.folder / "recovery"
    error = product.answer("key", "rotate", "--recovery-key-to", str(written)).expect(1).error
    assert error["code"] == "CS-4006"
    assert "go on opening" in error["message"]
    for secret in (Secret(passphrase=PASSPHRASE), Secret(recovery_key=recovery_key_in(str(written)))):
        Repository.open(store, secret=secret, clock=SeededClock(1))


OLD_KEY, NEW_KEY = new_recovery_key(), new_recovery_key()


def rotation(repository: Repository) -> None:
    """What `key rotate` does to the store, with secrets that are quick to try."""
    old = [slot.slot_id for slot in repository.key_slots()]
    repository.add_recovery_key(NEW_KEY)
    repository.remove_slots(old)


def test_a_rotation_that_is_stopped_at_any_operation_locks_nobody_out_and_can_be_run_again() -> None:
    stops = 0
    for fail_at in range(1, 100):
        for after in (False, True):
            inner = MemoryStore()
            Repository.create(inner, passphrase=None, recipients=[OLD_KEY.recipient], clock=SYSTEM_CLOCK)
            opened = open_by(inner, OLD_KEY)
            opened.store = Faulty(inner, FaultPlan(fail_at=fail_at, after_effect=after))
            try:
                rotation(opened)
            except StoreUnavailable:
                stops += 1
                opening = next(one for one in (OLD_KEY, NEW_KEY) if can_open(inner, one))
                rotation(open_by(inner, opening))
                assert can_open(inner, NEW_KEY)
                assert not can_open(inner, OLD_KEY)
                continue
            assert stops > 8
            return
    raise AssertionError("a fault was always fired")


def open_by(store: MemoryStore, key: RecoveryKey) -> Repository:
    return Repository.open(store, secret=Secret(recovery_key=key.identity), clock=SYSTEM_CLOCK)


def can_open(store: MemoryStore, key: RecoveryKey) -> bool:
    try:
        open_by(store, key)
    except WrongKey:
        return False
    return True


def test_a_strangers_slot_is_not_taken_for_one_that_is_left() -> None:
    store = MemoryStore()
    repository = Repository.create(store, passphrase=PASSPHRASE, clock=SeededClock(1)).repository
    mine = [slot.slot_id for slot in repository.key_slots()]
    fake: dict[str, Any] = {"format": 1, "key_id": repository.key_id, "type": "age", "wrapped": ""}
    store.put("keys/ffffffffffffffff", [write_plain(fake)])
    with pytest.raises(UsageError, match="what is left"):
        repository.remove_slots(mine, secret=Secret(passphrase=PASSPHRASE))
    assert len(list(store.list("keys/"))) == 3
