"""
The head of a repository, and the way from it to the repository's key.

Nothing here needs more than a store and the libraries of keys: deriving a key takes long, and goes on in a
thread while all else that a command needs is still being imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cloudsave.errors import FormatUnsupported, IntegrityError, NoRepository, ObjectMissing, WrongKey
from cloudsave.repository.keys import SLOT_BYTES_MAX, Secret, open_slots
from cloudsave.repository.plain import read_plain
from cloudsave.store.api import ObjectInfo, ObjectStore

REPOSITORY_OBJECT = "cloudsave.json"
KEYS = "keys/"
FORMAT_VERSION = 1
HEAD_FIELDS = ("format", "repository_id", "key_id", "features", "created_utc")
KNOWN_FEATURES: frozenset[str] = frozenset()
"""Feature bits that this release understands; a repository with another one is refused."""


@dataclass(frozen=True, slots=True)
class UnlockedKey:
    """The key of a repository. `repr` shows nothing of it."""

    repository_id: str
    key: bytes

    def __repr__(self) -> str:
        return f"UnlockedKey({self.repository_id!r})"


def unlock(store: ObjectStore, secret: Secret) -> UnlockedKey:
    """
    The key of the repository in `store`. Takes some 0.2 s with a passphrase, outside of the interpreter lock.

    Raises: NoRepository, WrongKey, FormatUnsupported, IntegrityError, StoreError.
    """
    head = read_head(store)
    if secret.passphrase is None and secret.recovery_key is None:
        raise WrongKey(
            "no passphrase or recovery key was given",
            hints=["set CLOUDSAVE_PASSPHRASE_FILE, or repository.passphrase_file in the configuration"],
        )
    slots = list(read_slots(store).values())
    return UnlockedKey(head["repository_id"], open_slots(slots, head["key_id"], secret))


def read_slots(store: ObjectStore) -> dict[ObjectInfo, bytes]:
    """
    All key slots, in name order; the content of one that is too large to be one is left out, so that nobody
    can exhaust memory with it.
    """
    return {
        info: store.get(info.name) if info.size_bytes <= SLOT_BYTES_MAX else b"" for info in store.list(KEYS)
    }


def read_head(store: ObjectStore) -> dict[str, Any]:
    """The repository's plain head. Raises: NoRepository, IntegrityError, FormatUnsupported."""
    try:
        content = store.get(REPOSITORY_OBJECT)
    except ObjectMissing as error:
        raise NoRepository(
            f"no cloudsave repository at {store.url}",
            hints=["is the URL right?", "`cloudsave init` makes a new repository"],
        ) from error
    found = read_plain(content)
    try:
        if found is None:
            raise ValueError("no JSON object")
        version, features = found.fields["format"], set(found.fields["features"])
        found.fields["key_id"], found.fields["repository_id"]
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged_head() from error
    if version != FORMAT_VERSION or features - KNOWN_FEATURES:
        if found.intact is False:
            raise _damaged_head()
        raise FormatUnsupported(
            f"cannot read repository at {store.url}",
            detail=f"It has format {version} with features {sorted(features)}, not {FORMAT_VERSION}.",
            hints=["use a newer release of cloudsave"],
        )
    return found.fields


def _damaged_head() -> IntegrityError:
    return IntegrityError(
        f"object {REPOSITORY_OBJECT!r} is damaged",
        detail="It is not the JSON object that `cloudsave init` wrote.",
        hints=["restore it from a copy of the repository; it holds no secrets"],
    )
