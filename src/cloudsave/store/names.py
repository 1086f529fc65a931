"""What a store accepts as names and ranges: one check for all back ends, so that none is more lenient."""

from __future__ import annotations

import re

from cloudsave.errors import IntegrityError, StoreError
from cloudsave.store.api import COMPONENT_BYTES_MAX, NAME_BYTES_MAX, OBJECT_BYTES_MAX

_COMPONENT = re.compile(rf"[A-Za-z0-9_=-][A-Za-z0-9._=-]{{0,{COMPONENT_BYTES_MAX - 1}}}", re.ASCII)


def is_component(text: str) -> bool:
    """Whether `text` may be a part of a name. A leading dot is kept for the files of back ends."""
    return _COMPONENT.fullmatch(text) is not None


def validate_name(name: str) -> None:
    """Raises StoreError unless `name` is the name of an object; such a name cannot leave the store."""
    if len(name) > NAME_BYTES_MAX or not all(map(is_component, name.split("/"))):
        raise StoreError("cannot use object name", detail=f"The name {name!r} breaks the rules for names.")


def validate_prefix(prefix: str) -> None:
    """Raises StoreError unless `prefix` is empty or a name that is followed by one slash."""
    if not prefix:
        return
    if not prefix.endswith("/"):
        raise StoreError("cannot list by prefix", detail=f'The prefix {prefix!r} does not end in "/".')
    validate_name(prefix[:-1])


def readable_size(name: str, size_bytes: int) -> int:
    """The size of an object that is to be read whole. Raises: IntegrityError above OBJECT_BYTES_MAX."""
    if size_bytes > OBJECT_BYTES_MAX:
        raise IntegrityError(
            f'object "{name}" is too large to be one of cloudsave',
            detail=f"It has {size_bytes} bytes; none that is read whole has more than {OBJECT_BYTES_MAX}.",
            hints=["who put it there?"],
        )
    return size_bytes


def validate_range(*, offset: int, length: int) -> None:
    """Raises StoreError for a negative offset or length."""
    if offset < 0 or length < 0:
        raise StoreError(
            "cannot read object range", detail=f"Offset {offset} or length {length} is negative."
        )
