"""The repository façade: what the flows see of stored objects. The format is in docs/repository_format.md."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from cloudsave.clock import Clock
from cloudsave.errors import IntegrityError, ObjectExists, RepositoryExists, StoreUnfit, UsageError
from cloudsave.repository.crypto import KEY_BYTES, LineageKeys
from cloudsave.repository.head import (
    FORMAT_VERSION,
    KEYS,
    REPOSITORY_OBJECT,
    UnlockedKey,
    read_slots,
    unlock,
)
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
from cloudsave.repository.plain import write_plain
from cloudsave.store.api import ObjectStore

_IN_LINEAGE = re.compile(
    r"lineages/([a-z]+-[^/]+)/"
    r"(identity$|(generations|packs|maps|backups|logs|pins|proofs|holds|verifications)/)"
)


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
            name = f"{KEYS}{clock.random_bytes(8).hex()}"
            store.put(name, [slot])
        _prove_conditional_put(store, name, slot)
        repository_id = clock.random_bytes(16).hex()
        head = {
            "format": FORMAT_VERSION,
            "repository_id": repository_id,
            "key_id": key_id(repository_key),
            "features": [],
            "created_utc": clock.now().isoformat(timespec="seconds"),
        }
        try:
            store.put(REPOSITORY_OBJECT, [write_plain(head)])
        except ObjectExists as error:
            raise _exists(store) from error
        return CreatedRepository(Repository(store, repository_id, repository_key, clock=clock), recovery_key)

    @staticmethod
    def open(store: ObjectStore, *, secret: Secret, clock: Clock) -> Repository:
        """
        Open with a passphrase or recovery key. Raises: NoRepository, WrongKey, FormatUnsupported,
        IntegrityError.
        """
        return Repository.unlocked(store, unlock(store, secret), clock=clock)

    @staticmethod
    def unlocked(store: ObjectStore, key: UnlockedKey, *, clock: Clock) -> Repository:
        """The repository in `store`, whose key is at hand."""
        return Repository(store, key.repository_id, key.key, clock=clock)

    def lineage_ids(self) -> list[str]:
        """Ids of all lineages of which anything is stored, sorted. One listing."""
        found = (_IN_LINEAGE.match(info.name) for info in self.store.list("lineages/"))
        return sorted({match[1] for match in found if match})

    def lineage(self, lineage_id: str) -> Lineage:
        """The lineage of that id, stored already or not."""
        return Lineage(self.store, LineageKeys.derive(self._key, lineage_id), clock=self._clock)

    def key_slots(self) -> list[KeySlot]:
        """The slots that wrap this repository's key, by id; damaged and left-over ones are among them."""
        return [
            describe_slot(info.name[len(KEYS) :], content, stored_utc=info.modified_utc)
            for info, content in read_slots(self.store).items()
        ]

    def add_passphrase(self, passphrase: str) -> str:
        """One more slot that a passphrase opens; its id."""
        return self._put_slot(
            passphrase_slot(self._key, passphrase, clock=self._clock), Secret(passphrase=passphrase)
        )

    def add_recipient(self, recipient: str) -> str:
        """One more slot that the owner of an age recipient opens; its id."""
        return self._put_slot(recipient_slot(self._key, recipient), None)

    def add_recovery_key(self, recovery_key: RecoveryKey) -> str:
        """One more slot that a recovery key opens; its id."""
        return self._put_slot(
            recipient_slot(self._key, recovery_key.recipient), Secret(recovery_key=recovery_key.identity)
        )

    def remove_slots(
        self, slot_ids: Collection[str], *, secret: Secret | None = None, dry_run: bool = False
    ) -> None:
        """
        Remove key slots; what they opened stays sealed with the same key. With `secret`, what is left must
        open by it: a stranger's slot may look like one of ours.

        Raises: UsageError for a slot that is not there, or where too little would be left; StorePermission
        where the store lets nobody delete: then the slots go on opening the repository.
        """
        contents = {info.name[len(KEYS) :]: content for info, content in read_slots(self.store).items()}
        unknown = sorted(set(slot_ids) - set(contents))
        if unknown:
            raise UsageError(
                f"unknown key slot {unknown[0]!r}", hints=["`cloudsave key list` shows the slots"]
            )
        left = [content for slot_id, content in contents.items() if slot_id not in slot_ids]
        if not self._opens(left, secret):
            raise UsageError(
                "cannot remove the key slots: what is left does not open the repository",
                detail="It is not enough that a slot is left; the secret that you use must open it.",
                hints=["use another secret, which stays, or add one: `cloudsave key add`"],
            )
        for slot_id in [] if dry_run else sorted(slot_ids):
            self.store.delete(KEYS + slot_id)

    def _opens(self, slots: Sequence[bytes], secret: Secret | None) -> bool:
        """Whether `secret` opens one of the slots; without one, whether any is of this repository's key."""
        if secret is None:
            return any(describe_slot("", slot).key_id == self.key_id for slot in slots)
        try:
            return open_slots(slots, self.key_id, secret) == self._key
        except IntegrityError:
            return False

    def _put_slot(self, slot: bytes, secret: Secret | None) -> str:
        """
        Store a slot and read it back, so that nobody relies on one which does not open; by `secret` it is
        opened, too. Raises: IntegrityError.
        """
        slot_id = self._clock.random_bytes(8).hex()
        self.store.put(KEYS + slot_id, [slot])
        stored = self.store.get(KEYS + slot_id)
        if stored != slot or (secret and open_slots([stored], self.key_id, secret) != self._key):
            raise IntegrityError(f"key slot {slot_id!r} does not read back as it was stored")
        return slot_id


def _prove_conditional_put(store: ObjectStore, name: str, content: bytes) -> None:
    """The same object once more must be refused. Some servers take the condition and ignore it."""
    try:
        store.put(name, [content])
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
        if not info.name.startswith(KEYS):
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
