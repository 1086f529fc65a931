"""The repository façade: what the flows see of stored objects. The format is in docs/repository_format.md."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cloudsave.clock import Clock
from cloudsave.errors import (
    FormatUnsupported,
    IntegrityError,
    NoRepository,
    ObjectExists,
    ObjectMissing,
    RepositoryExists,
    StoreUnfit,
    WrongKey,
)
from cloudsave.repository.crypto import KEY_BYTES, LineageKeys
from cloudsave.repository.keys import (
    KeySlot,
    RecoveryKey,
    Secret,
    describe_slot,
    key_id,
    new_recovery_key,
    open_slots,
    passphrase_slot,
    recipient_slot,
)
from cloudsave.repository.lineage import Lineage
from cloudsave.repository.plain import read_plain, write_plain
from cloudsave.store.api import ObjectStore

REPOSITORY_OBJECT = "cloudsave.json"
FORMAT_VERSION = 1
HEAD_FIELDS = ("format", "repository_id", "key_id", "features", "created_utc")
_IN_LINEAGE = re.compile(
    r"lineages/([a-z]+-[^/]+)/(identity$|(generations|packs|maps|backups|logs|pins|proofs|holds)/)"
)
KNOWN_FEATURES: frozenset[str] = frozenset()
"""Feature bits that this release understands; a repository with another one is refused."""


@dataclass(frozen=True, slots=True)
class CreatedRepository:
    """A new repository and the recovery key that was made for it; it is stored nowhere."""

    repository: Repository
    recovery_key: RecoveryKey


class Repository:
    """One repository, opened with its key."""

    def __init__(
        self, store: ObjectStore, repository_id: str, repository_key: bytes, *, clock: Clock
    ) -> None:
        self.store = store
        self.repository_id = repository_id
        self._key = repository_key
        self._clock = clock

    def __repr__(self) -> str:
        return f"Repository({self.store.url!r})"

    @property
    def key_id(self) -> str:
        """The public name of its key."""
        return key_id(self._key)

    @staticmethod
    def create(
        store: ObjectStore, *, passphrase: str | None, recipients: Sequence[str] = (), clock: Clock
    ) -> CreatedRepository:
        """
        Make a new repository with a fresh recovery key, and slots for the passphrase and further recipients.

        Invariant: `cloudsave.json` is put last. Killed before, the place is no repository and `create` may
        be run again; left-over slots wrap a key that nothing uses.
        Raises: RepositoryExists, StoreUnfit.
        """
        if not store.capabilities.conditional_put:
            raise StoreUnfit(
                "store does not offer put-if-absent",
                detail="Without it two writers could overwrite each other.",
                hints=["run `cloudsave store validate URL`"],
            )
        _refuse_foreign_content(store)
        repository_key = clock.random_bytes(KEY_BYTES)
        recovery_key = new_recovery_key()
        slots = [recipient_slot(repository_key, recovery_key.recipient)]
        slots += [recipient_slot(repository_key, recipient) for recipient in recipients]
        if passphrase is not None:
            slots.append(passphrase_slot(repository_key, passphrase, clock=clock))
        for slot in slots:
            store.put(f"keys/{clock.random_bytes(8).hex()}", [slot])
        repository_id = clock.random_bytes(16).hex()
        head = {
            "format": FORMAT_VERSION,
            "repository_id": repository_id,
            "key_id": key_id(repository_key),
            "features": [],
            "created_utc": clock.now().isoformat(timespec="seconds"),
        }
        content = write_plain(head)
        try:
            store.put(REPOSITORY_OBJECT, [content])
        except ObjectExists as error:
            raise _exists(store) from error
        _prove_conditional_put(store, content)
        return CreatedRepository(Repository(store, repository_id, repository_key, clock=clock), recovery_key)

    @staticmethod
    def open(store: ObjectStore, *, secret: Secret, clock: Clock) -> Repository:
        """
        Open with a passphrase or recovery key. Raises: NoRepository, WrongKey, FormatUnsupported,
        IntegrityError.
        """
        head = read_head(store)
        if secret.passphrase is None and secret.recovery_key is None:
            raise WrongKey(
                "no passphrase or recovery key was given",
                hints=["set CLOUDSAVE_PASSPHRASE_FILE, or repository.passphrase_file in the configuration"],
            )
        slots = [store.get(info.name) for info in store.list("keys/")]
        key = open_slots(slots, head["key_id"], secret)
        return Repository(store, head["repository_id"], key, clock=clock)

    def lineage_ids(self) -> list[str]:
        """Ids of all lineages of which anything is stored, sorted. One listing."""
        found = (_IN_LINEAGE.match(info.name) for info in self.store.list("lineages/"))
        return sorted({match[1] for match in found if match})

    def lineage(self, lineage_id: str) -> Lineage:
        """The lineage of that id, stored already or not."""
        return Lineage(self.store, LineageKeys.derive(self._key, lineage_id), clock=self._clock)

    def key_slots(self) -> list[KeySlot]:
        """The slots that wrap this repository's key; damaged ones are named so."""
        return [
            describe_slot(info.name.rpartition("/")[2], self.store.get(info.name))
            for info in self.store.list("keys/")
        ]

    def add_passphrase(self, passphrase: str) -> None:
        """One more slot that a passphrase opens."""
        self._put_slot(passphrase_slot(self._key, passphrase, clock=self._clock))

    def add_recipient(self, recipient: str) -> None:
        """One more slot that the owner of an age recipient opens."""
        self._put_slot(recipient_slot(self._key, recipient))

    def _put_slot(self, slot: bytes) -> None:
        self.store.put(f"keys/{self._clock.random_bytes(8).hex()}", [slot])


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


def _prove_conditional_put(store: ObjectStore, content: bytes) -> None:
    """The same object once more must be refused. Some servers take the condition and ignore it."""
    try:
        store.put(REPOSITORY_OBJECT, [content])
    except ObjectExists:
        return
    raise StoreUnfit(
        "store overwrites objects in spite of put-if-absent",
        detail="A second put of the same name was accepted; two writers could destroy each other's data.",
        hints=["run `cloudsave store validate URL`", "use a store or a server that knows If-None-Match"],
    )


def _refuse_foreign_content(store: ObjectStore) -> None:
    for info in store.list(""):
        if info.name == REPOSITORY_OBJECT:
            raise _exists(store)
        if not info.name.startswith("keys/"):
            raise RepositoryExists(
                f"place for the repository is not empty: {store.url}",
                detail=f"It holds {info.name!r}, which is not part of an unfinished `cloudsave init`.",
                hints=["choose an empty directory or prefix"],
            )


def _exists(store: ObjectStore) -> RepositoryExists:
    return RepositoryExists(
        f"a cloudsave repository is already at {store.url}",
        hints=["use it as it is, or choose another directory or prefix"],
    )
