"""Key slots: what opens them, and that a damaged one is told from a wrong secret."""

from __future__ import annotations

import base64
import json
import threading
from typing import Any

import pyrage
import pytest
from blake3 import blake3

from cloudsave.errors import IntegrityError, UsageError, WrongKey
from cloudsave.repository.keys import (
    Secret,
    key_id,
    new_recovery_key,
    open_slots,
    passphrase_slot,
    recipient_slot,
)
from cloudsave.repository.repository import Repository
from cloudsave.store.memory import MemoryStore
from tests.unit.repository.samples import REPOSITORY_KEY, SeededClock

PASSPHRASE = "correct horse battery"
KEY_ID = key_id(REPOSITORY_KEY)
CLOCK = SeededClock(1)
SLOT = passphrase_slot(REPOSITORY_KEY, PASSPHRASE, clock=CLOCK)


def resealed(slot: bytes, **changes: Any) -> bytes:
    """A slot with other fields and a checksum that is right again."""
    fields = {**json.loads(slot), **changes}
    fields.pop("blake3")
    fields["blake3"] = blake3(json.dumps(fields, sort_keys=True).encode()).hexdigest()
    return json.dumps(fields).encode()


def test_a_passphrase_opens_its_slot() -> None:
    assert open_slots([SLOT], KEY_ID, Secret(passphrase=PASSPHRASE)) == REPOSITORY_KEY


def test_a_recovery_key_opens_its_slot() -> None:
    recovery = new_recovery_key()
    slots = [SLOT, recipient_slot(REPOSITORY_KEY, recovery.recipient)]
    assert open_slots(slots, KEY_ID, Secret(recovery_key=recovery.identity + "\n")) == REPOSITORY_KEY


def test_the_age_program_could_open_a_recovery_slot() -> None:
    """The slot holds a plain age file whose content is the raw key."""
    recovery = new_recovery_key()
    wrapped = base64.b64decode(json.loads(recipient_slot(REPOSITORY_KEY, recovery.recipient))["wrapped"])
    assert wrapped.startswith(b"age-encryption.org/v1\n")
    identity = pyrage.x25519.Identity.from_str(recovery.identity)
    assert pyrage.decrypt(wrapped, [identity]) == REPOSITORY_KEY


@pytest.mark.parametrize("passphrase", [PASSPHRASE + " ", PASSPHRASE.upper(), "x"])
def test_a_wrong_passphrase_is_a_wrong_key(passphrase: str) -> None:
    with pytest.raises(WrongKey, match="passphrase does not open"):
        open_slots([SLOT], KEY_ID, Secret(passphrase=passphrase))


def test_a_foreign_recovery_key_is_a_wrong_key() -> None:
    slots = [recipient_slot(REPOSITORY_KEY, new_recovery_key().recipient)]
    with pytest.raises(WrongKey, match="recovery key does not open"):
        open_slots(slots, KEY_ID, Secret(recovery_key=new_recovery_key().identity))


def test_each_flipped_bit_of_a_slot_is_found_without_trying_the_passphrase() -> None:
    for place in range(len(SLOT)):
        for bit in range(8):
            damaged = bytearray(SLOT)
            damaged[place] ^= 1 << bit
            with pytest.raises(IntegrityError) as caught:
                open_slots([bytes(damaged)], KEY_ID, Secret(passphrase=PASSPHRASE))
            assert not isinstance(caught.value, WrongKey)


def test_each_truncation_of_a_slot_is_found() -> None:
    for length in range(len(SLOT)):
        with pytest.raises(IntegrityError) as caught:
            open_slots([SLOT[:length]], KEY_ID, Secret(passphrase=PASSPHRASE))
        assert not isinstance(caught.value, WrongKey)


def test_a_damaged_passphrase_slot_is_not_called_a_wrong_passphrase_though_others_are_intact() -> None:
    other = recipient_slot(REPOSITORY_KEY, new_recovery_key().recipient)
    with pytest.raises(IntegrityError, match="no intact key slot") as caught:
        open_slots([SLOT[:-9], other], KEY_ID, Secret(passphrase=PASSPHRASE))
    assert not isinstance(caught.value, WrongKey)


def test_one_intact_slot_is_enough() -> None:
    second = passphrase_slot(REPOSITORY_KEY, PASSPHRASE, clock=CLOCK)
    assert open_slots([SLOT[:-9], b"", second], KEY_ID, Secret(passphrase=PASSPHRASE)) == REPOSITORY_KEY


def test_slots_of_another_key_are_passed_over() -> None:
    left_over = passphrase_slot(bytes(32), PASSPHRASE, clock=CLOCK)
    assert open_slots([left_over, SLOT], KEY_ID, Secret(passphrase=PASSPHRASE)) == REPOSITORY_KEY
    with pytest.raises(IntegrityError, match="no intact key slot"):
        open_slots([left_over], KEY_ID, Secret(passphrase=PASSPHRASE))


def test_a_slot_that_wraps_another_key_than_it_says_is_refused() -> None:
    swapped = resealed(passphrase_slot(bytes(32), PASSPHRASE, clock=CLOCK), key_id=KEY_ID)
    with pytest.raises(IntegrityError, match="another key"):
        open_slots([swapped], KEY_ID, Secret(passphrase=PASSPHRASE))


@pytest.mark.parametrize(
    "changes",
    [
        {"memory_kib": 1 << 40},
        {"iterations": 1 << 30},
        {"lanes": 1 << 20},
        {"lanes": 0},
        {"memory_kib": "64"},
        {"salt": "?"},
        {"nonce": None},
        {"type": None},
    ],
)
def test_a_hostile_slot_is_refused_without_much_work(changes: dict[str, Any]) -> None:
    with pytest.raises(IntegrityError):
        open_slots([resealed(SLOT, **changes)], KEY_ID, Secret(passphrase=PASSPHRASE))


@pytest.mark.parametrize(
    "changes", [{"memory_kib": 1 << 40}, {"lanes": 0}, {"salt": "?"}, {"nonce": None}, {"wrapped": "AAAA"}]
)
def test_a_slot_that_a_stranger_added_locks_nobody_out(changes: dict[str, Any]) -> None:
    """Whatever it holds, and whichever is tried first."""
    hostile = resealed(SLOT, **changes)
    for slots in ([hostile, SLOT], [SLOT, hostile]):
        assert open_slots(slots, KEY_ID, Secret(passphrase=PASSPHRASE)) == REPOSITORY_KEY
    with pytest.raises(WrongKey, match="passphrase does not open"):
        open_slots([hostile, SLOT], KEY_ID, Secret(passphrase="another passphrase"))


def test_a_recipients_slot_that_a_stranger_made_of_his_own_key_is_passed_over() -> None:
    """The recipient is public: anybody can wrap another key for it under this key's name."""
    recovery = new_recovery_key()
    hostile = resealed(recipient_slot(bytes(32), recovery.recipient), key_id=KEY_ID)
    secret = Secret(recovery_key=recovery.identity)
    for slots in ([hostile, recipient_slot(REPOSITORY_KEY, recovery.recipient)],) * 2:
        assert open_slots(slots, KEY_ID, secret) == REPOSITORY_KEY
        slots.reverse()
    with pytest.raises(IntegrityError, match="another key"):
        open_slots([hostile], KEY_ID, secret)


def test_a_slot_that_is_no_object_is_damaged() -> None:
    for content in (b"[]", b"null", b"3", b"{}", b"\xff"):
        with pytest.raises(IntegrityError, match="no intact key slot"):
            open_slots([content], KEY_ID, Secret(passphrase=PASSPHRASE))


@pytest.mark.parametrize("passphrase", ["", "1234567"])
def test_a_short_passphrase_is_refused(passphrase: str) -> None:
    with pytest.raises(UsageError, match="too short"):
        passphrase_slot(REPOSITORY_KEY, passphrase, clock=CLOCK)


def test_what_is_no_recipient_or_recovery_key_is_refused() -> None:
    with pytest.raises(UsageError, match="recipient"):
        recipient_slot(REPOSITORY_KEY, "ssh-ed25519 AAAA")
    slot = recipient_slot(REPOSITORY_KEY, new_recovery_key().recipient)
    with pytest.raises(UsageError, match="recovery key cannot be read"):
        open_slots([slot], KEY_ID, Secret(recovery_key="AGE-SECRET-KEY-1XYZ"))


def test_secrets_are_not_shown() -> None:
    recovery = new_recovery_key()
    shown = (
        repr(recovery) + repr(Secret(passphrase=PASSPHRASE)) + repr(Secret(recovery_key=recovery.identity))
    )
    assert PASSPHRASE not in shown
    assert recovery.identity not in shown


def test_a_repository_opens_with_every_secret_that_was_added() -> None:
    store = MemoryStore()
    created = Repository.create(store, passphrase=PASSPHRASE, clock=CLOCK)
    second = new_recovery_key()
    created.repository.add_passphrase("another passphrase")
    created.repository.add_recipient(second.recipient)
    secrets = [
        Secret(passphrase=PASSPHRASE),
        Secret(passphrase="another passphrase"),
        Secret(recovery_key=created.recovery_key.identity),
        Secret(recovery_key=second.identity),
    ]
    keys = {
        Repository.open(store, secret=s, clock=CLOCK).lineage("postgresql-1").keys.lineage_key
        for s in secrets
    }
    assert len(keys) == 1
    with pytest.raises(WrongKey, match="no passphrase"):
        Repository.open(store, secret=Secret(), clock=CLOCK)


def test_several_threads_may_open_slots_at_once() -> None:
    opened: list[bytes] = []

    def work() -> None:
        opened.append(open_slots([SLOT], KEY_ID, Secret(passphrase=PASSPHRASE)))

    threads = [threading.Thread(target=work, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert opened == [REPOSITORY_KEY] * 4
