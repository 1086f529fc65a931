"""
The repository key and the slots that wrap it.

A slot is the plain JSON object `keys/<id>`: either the key encrypted under a passphrase (Argon2id, then
AES-256-GCM), or an age file for one X25519 recipient (the recovery key's, or any other), which the standard
`age` program opens as well. Each slot names the key that it wraps, so that slots left over by an interrupted
`init` are never used.

Source: RFC 9106 (Argon2, second recommended option), age-encryption.org/v1.
"""

from __future__ import annotations

import base64
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import pyrage
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

from cloudsave.clock import Clock
from cloudsave.errors import IntegrityError, UsageError, WrongKey
from cloudsave.repository.crypto import KEY_BYTES, derive_key
from cloudsave.repository.plain import read_plain, write_plain

ARGON2_MEMORY_KIB = 64 << 10
ARGON2_ITERATIONS = 3
ARGON2_LANES = 4
ARGON2_MEMORY_KIB_MAX = 4 << 20
"""Limit: a hostile slot cannot ask for more memory than this."""
ARGON2_ITERATIONS_MAX = 64
ARGON2_LANES_MAX = 64
PASSPHRASE_CHARS_MIN = 8
SLOT_BYTES_MAX = 64 << 10
"""Limit: a larger object below keys/ is no slot."""
_AGE_BEGIN = b"age-encryption.org/v1\n"
_ASSOCIATED = b"cloudsave v1 key slot"
_DERIVING = threading.Lock()
"""OpenSSL's Argon2 (seen in 4.0) is for one thread at a time: of two one fails, or both wait for ever."""


@dataclass(frozen=True, slots=True)
class Secret:
    """What the user gives to open a repository: a passphrase or an age identity (recovery key)."""

    passphrase: str | None = None
    recovery_key: str | None = None

    def __repr__(self) -> str:
        return "Secret(...)"


@dataclass(frozen=True, slots=True)
class RecoveryKey:
    """A new age X25519 identity: `identity` is the secret, `recipient` the public part."""

    identity: str
    recipient: str

    def __repr__(self) -> str:
        return f"RecoveryKey(recipient={self.recipient!r})"


@dataclass(frozen=True, slots=True)
class KeySlot:
    """One slot as a listing shows it."""

    slot_id: str
    type: str
    """"argon2id", "age" or "damaged"."""
    recipient: str
    key_id: str = ""
    """Of the key that it wraps."""
    stored_utc: datetime | None = None
    """When it was stored, by the store's clock."""


def describe_slot(slot_id: str, content: bytes, *, stored_utc: datetime | None = None) -> KeySlot:
    """What a slot is for."""
    slot = _decode_slot(content)
    if slot is None:
        return KeySlot(slot_id, "damaged", "", stored_utc=stored_utc)
    recipient, wrapped = str(slot.get("recipient", "")), str(slot.get("key_id", ""))
    return KeySlot(slot_id, str(slot["type"]), recipient, wrapped, stored_utc)


def new_recovery_key() -> RecoveryKey:
    """A fresh recovery key."""
    identity = pyrage.x25519.Identity.generate()
    return RecoveryKey(str(identity), str(identity.to_public()))


def key_id(repository_key: bytes) -> str:
    """A public name for the repository key, which tells nothing about it."""
    return derive_key(repository_key, salt=b"", info="cloudsave v1 key id").hex()[:32]


def passphrase_slot(repository_key: bytes, passphrase: str, *, clock: Clock) -> bytes:
    """A slot that a passphrase opens. Raises: UsageError for one too short to protect anything."""
    if len(passphrase) < PASSPHRASE_CHARS_MIN:
        raise UsageError(
            "passphrase is too short",
            detail=f"It has {len(passphrase)} characters; at least {PASSPHRASE_CHARS_MIN} are needed.",
            hints=["use several random words"],
        )
    salt, nonce = clock.random_bytes(16), clock.random_bytes(12)
    parameters = {
        "memory_kib": ARGON2_MEMORY_KIB,
        "iterations": ARGON2_ITERATIONS,
        "lanes": ARGON2_LANES,
    }
    wrapping = _argon2(passphrase, salt, parameters)
    slot = {
        "type": "argon2id",
        **parameters,
        "salt": _text(salt),
        "nonce": _text(nonce),
        "wrapped": _text(AESGCM(wrapping).encrypt(nonce, repository_key, _ASSOCIATED)),
    }
    return _encode_slot(slot, repository_key)


def recipient_slot(repository_key: bytes, recipient: str) -> bytes:
    """A slot that the owner of an age recipient opens. Raises: UsageError."""
    try:
        parsed = pyrage.x25519.Recipient.from_str(recipient)
    except pyrage.RecipientError as error:
        raise UsageError(
            "recipient is not an age X25519 recipient",
            detail=f"{recipient[:12]!r}... cannot be parsed.",
            hints=["a recipient begins with age1; make one with age-keygen"],
        ) from error
    wrapped = pyrage.encrypt(repository_key, [parsed])
    return _encode_slot({"type": "age", "recipient": recipient, "wrapped": _text(wrapped)}, repository_key)


def open_slots(slots: Sequence[bytes], wanted_key_id: str, secret: Secret) -> bytes:
    """
    The repository key, from the first slot that `secret` opens.

    Invariant: a slot that a stranger added stops nobody, whatever is in it. *Who may only add objects could
    otherwise lock everybody out.*
    Raises: WrongKey where no intact slot opens; IntegrityError where none is intact (and well-formed), or
    the opened key is another one.
    """
    parsed = [slot for slot in map(_decode_slot, slots) if slot is not None]
    mine = [slot for slot in parsed if slot.get("key_id") == wanted_key_id]
    if not mine:
        raise IntegrityError(
            "repository has no intact key slot",
            detail=f"{len(slots)} slots were found, {len(parsed)} undamaged, none for this repository's key.",
            hints=["restore the objects below keys/ from a copy of the repository"],
        )
    foreign = False
    for slot in sorted(mine, key=_work):
        key = _try_slot(slot, secret)
        if key is not None and key_id(key) == wanted_key_id:
            return key
        foreign = foreign or key is not None
    if foreign:
        raise IntegrityError("key slot wraps another key than it says", hints=["was keys/ tampered with?"])
    raise _nothing_opens(mine, secret, damaged=len(slots) - len(parsed))


def _work(slot: dict[str, Any]) -> int:
    """What trying a slot costs, so that those which a stranger made dear come last."""
    return int(slot["memory_kib"] * slot["iterations"]) if slot["type"] == "argon2id" else 0


def _nothing_opens(mine: Sequence[dict[str, Any]], secret: Secret, *, damaged: int) -> IntegrityError:
    """Whether the secret is wrong, or the slot that it would have opened is damaged."""
    kind, slot_type = ("recovery key", "age") if secret.recovery_key else ("passphrase", "argon2id")
    tried = sum(slot["type"] == slot_type for slot in mine)
    if damaged and not tried:
        return IntegrityError(
            f"no intact key slot is one for a {kind}",
            detail=f"{damaged} of the objects below keys/ cannot be read.",
            hints=["restore them from a copy of the repository", "use another passphrase or recovery key"],
        )
    also = f" {damaged} more slots are damaged." if damaged else ""
    return WrongKey(
        f"{kind} does not open this repository",
        detail=f"None of {tried} intact key slots for a {kind} opens with it.{also}",
        hints=["is it that of another repository?", "the recovery key and every passphrase open it"],
    )


def _try_slot(slot: dict[str, Any], secret: Secret) -> bytes | None:
    if slot["type"] == "argon2id" and secret.passphrase is not None:
        return _try_passphrase(slot, secret.passphrase)
    if slot["type"] == "age" and secret.recovery_key is not None:
        return _try_age(slot, secret.recovery_key)
    return None


def _try_passphrase(slot: dict[str, Any], passphrase: str) -> bytes | None:
    wrapping = _argon2(passphrase, _bytes(slot["salt"]), slot)
    try:
        return AESGCM(wrapping).decrypt(_bytes(slot["nonce"]), _bytes(slot["wrapped"]), _ASSOCIATED)
    except InvalidTag:
        return None


def _try_age(slot: dict[str, Any], recovery_key: str) -> bytes | None:
    try:
        identity = pyrage.x25519.Identity.from_str(recovery_key.strip())
    except pyrage.IdentityError as error:
        raise UsageError(
            "recovery key cannot be read",
            detail="It is not an age X25519 identity.",
            hints=["it begins with AGE-SECRET-KEY-1"],
        ) from error
    try:
        return bytes(pyrage.decrypt(_bytes(slot["wrapped"]), [identity]))
    except pyrage.DecryptError:
        return None


def _argon2(passphrase: str, salt: bytes, parameters: dict[str, Any]) -> bytes:
    derivation = Argon2id(
        salt=salt,
        length=KEY_BYTES,
        iterations=parameters["iterations"],
        lanes=parameters["lanes"],
        memory_cost=parameters["memory_kib"],
    )
    with _DERIVING:
        return derivation.derive(passphrase.encode())


def _encode_slot(slot: dict[str, Any], repository_key: bytes) -> bytes:
    return write_plain({"format": 1, "key_id": key_id(repository_key), **slot})


def _decode_slot(content: bytes) -> dict[str, Any] | None:
    """The slot, or None where it is damaged, malformed or asks for too much: another slot may do."""
    if len(content) > SLOT_BYTES_MAX:
        return None
    found = read_plain(content)
    return found.fields if found is not None and found.intact and _is_well_formed(found.fields) else None


def _is_well_formed(slot: dict[str, Any]) -> bool:
    """Whether all fields of the slot's type are there and within limits, so that it can be tried."""
    try:
        if slot["type"] == "age":
            return _bytes(slot["wrapped"]).startswith(_AGE_BEGIN)
        lanes = slot["lanes"]
        return (
            slot["type"] == "argon2id"
            and _within(lanes, 1, ARGON2_LANES_MAX)
            and _within(slot["iterations"], 1, ARGON2_ITERATIONS_MAX)
            and _within(slot["memory_kib"], 8 * lanes, ARGON2_MEMORY_KIB_MAX)
            and [len(_bytes(slot[name])) for name in ("salt", "nonce", "wrapped")] == [16, 12, 48]
        )
    except (KeyError, TypeError, ValueError):
        return False


def _within(value: object, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high


def _text(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _bytes(text: str) -> bytes:
    return base64.b64decode(text, validate=True)
