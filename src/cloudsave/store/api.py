"""
The seam of object stores: a flat namespace of write-once objects.

Names are relative, "/"-separated, of the characters `[A-Za-z0-9._=-]`, at most NAME_BYTES_MAX long; no
component is empty, begins with a dot or is longer than COMPONENT_BYTES_MAX; no name is a directory of
another. `names.py` checks this for every back end. All methods are safe to call from several threads. Back
ends translate their driver's exceptions to the branch StoreError and nothing else leaves them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

NAME_BYTES_MAX = 512
"""Limit: the longest object name."""

COMPONENT_BYTES_MAX = 200
"""Limit: the longest part between two slashes; file systems allow 255."""

OBJECT_BYTES_MAX = 1 << 30
"""Limit: an object that is read whole is not larger; whoever may add objects could else exhaust memory."""

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class StoreCapabilities:
    """What a store promises beyond put, get, list."""

    conditional_put: bool
    """`put` is atomic and refuses an existing name, also between machines."""
    durable_put: bool
    """When `put` returns, the object survives a power cut."""
    distant: bool = False
    """A request takes a round trip over a network, whatever its size: many at once, and few bytes, pay."""


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One stored object as a listing shows it."""

    name: str
    size_bytes: int
    modified_utc: datetime


class ObjectStore(Protocol):
    """A place for write-once objects."""

    @property
    def url(self) -> str:
        """Where it is, without secrets, for messages."""

    @property
    def capabilities(self) -> StoreCapabilities:
        """What this store promises."""

    def put(self, name: str, parts: Sequence[Buffer]) -> None:
        """
        Store the concatenation of `parts` under `name`, durably and atomically, if nothing has that name.

        A reader sees nothing or all. The memory of `parts` is the caller's again on return. May be repeated
        after an unclear failure: then ObjectExists may mean that the first try had succeeded, and the caller
        compares content.
        Raises: ObjectExists, StoreFull, StorePermission, StoreUnavailable.
        """

    def get(self, name: str) -> bytes:
        """
        The whole object. Raises: ObjectMissing, IntegrityError for one above OBJECT_BYTES_MAX,
        StoreUnavailable, StorePermission.
        """

    def get_range(self, name: str, *, offset: int, length: int) -> Buffer:
        """
        Exactly `length` bytes from `offset`. A shorter object raises IntegrityError; a missing one
        ObjectMissing.
        """

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """All objects whose name begins with `prefix` (which ends in "/" or is empty), in name order."""

    def delete(self, name: str) -> None:
        """
        Remove an object; a missing one is not an error. Only garbage collection, the removal of key slots and
        validation call it.
        """
