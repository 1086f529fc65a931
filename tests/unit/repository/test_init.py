"""A new repository is there as a whole or not at all."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from cloudsave.errors import RepositoryExists, StoreUnfit
from cloudsave.repository.head import REPOSITORY_OBJECT
from cloudsave.repository.repository import Repository
from cloudsave.store.api import Buffer
from cloudsave.store.memory import MemoryStore
from tests.unit.repository.samples import SeededClock


class Overwriting(MemoryStore):
    """Says that it knows put-if-absent, and does not."""

    def put(self, name: str, parts: Sequence[Buffer]) -> None:
        """Overwrite."""
        self.objects.pop(name, None)
        super().put(name, parts)


def test_a_store_that_overwrites_is_refused_and_holds_no_repository_afterwards() -> None:
    store = Overwriting()
    for _ in range(2):  # The second time it must say the same, not that there is a repository.
        with pytest.raises(StoreUnfit, match="in spite of"):
            Repository.create(store, passphrase=None, clock=SeededClock(1))
        assert REPOSITORY_OBJECT not in store.objects
    good = MemoryStore()
    good.objects.update(store.objects)
    made = Repository.create(good, passphrase=None, clock=SeededClock(2))
    with pytest.raises(RepositoryExists):
        Repository.create(good, passphrase=None, clock=SeededClock(3))
    assert REPOSITORY_OBJECT in good.objects
    assert made.recovery_key
