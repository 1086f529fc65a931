"""
The named locks of ours on a server. A lock ends with the session that holds it, however that ends.

Servers take names of 64 characters (source: the MySQL manual, "Locking Functions").
"""

from __future__ import annotations

import uuid

NAME_MAX = 64


def capture_lock(slot: str) -> str:
    """Held by the session that a running capture asks questions on."""
    return _name("cloudsave", slot)


def reader_lock(slot: str) -> str:
    """Held by the session that a running capture is sent the binlog on."""
    return _name("cloudsave-reader", slot)


def _name(purpose: str, slot: str) -> str:
    name = f"{purpose}:{slot}"
    return name if len(name) <= NAME_MAX else f"{purpose}:{uuid.uuid5(uuid.NAMESPACE_OID, slot)}"
