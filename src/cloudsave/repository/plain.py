"""
Plain JSON objects, which can be read without keys: the head, key slots, identities, tombs.

Each has a field `blake3`, the digest of the object without it: it tells damage, it is no authentication.
Heads, identities and tombs of the first repositories lack it, and are read all the same.
Source: docs/repository_format.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from blake3 import blake3

_DIGEST = "blake3"


@dataclass(frozen=True, slots=True)
class PlainObject:
    """An object that was read."""

    fields: dict[str, Any]
    """Without the digest."""
    intact: bool | None
    """Whether the digest is the right one; None: it has none."""
    as_written: bool
    """Whether these are the very bytes that a writer makes of the fields."""


def write_plain(fields: Mapping[str, Any]) -> bytes:
    """The object as it is stored."""
    return _text({**fields, _DIGEST: _digest(fields)})


def read_plain(content: bytes) -> PlainObject | None:
    """An object as it was stored; None where it is none at all."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict):
        return None
    as_written = content == _text(found)
    digest = found.pop(_DIGEST, None)
    return PlainObject(found, None if digest is None else digest == _digest(found), as_written)


def _text(fields: Mapping[str, Any]) -> bytes:
    return json.dumps(fields, indent=1, sort_keys=True).encode()


def _digest(fields: Mapping[str, Any]) -> str:
    return blake3(json.dumps(fields, sort_keys=True).encode()).hexdigest()
