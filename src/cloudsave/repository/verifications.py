"""Records of verifications: when all that a lineage has was last looked at, and whether it was sound."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime

from cloudsave.errors import IntegrityError, ObjectMissing
from cloudsave.repository.lineage import Lineage

FOLDER = "verifications"
READ_MAX = 20
"""Limit: records that are opened, the newest first; objects of a stranger cost a reading each."""
_NAME = re.compile(r"\d{8}T\d{6}Z-[0-9a-f]{8}")


@dataclass(frozen=True, slots=True)
class Verification:
    """One that was recorded."""

    at: datetime
    """When it ended."""
    sound: bool
    read_all: bool
    """Every byte was read, not sizes and indexes alone."""


@dataclass(frozen=True, slots=True)
class LastVerifications:
    """The newest of all, and the newest that found nothing wrong."""

    newest: Verification | None = None
    newest_sound: Verification | None = None


def put_verification(lineage: Lineage, *, sound: bool, read_all: bool) -> None:
    """Record that all of a lineage has been verified now. Raises: StoreError."""
    now = lineage.clock.now()
    name = f"{FOLDER}/{now:%Y%m%dT%H%M%SZ}-{lineage.clock.random_bytes(4).hex()}"
    at = now.isoformat(timespec="seconds")
    lineage.put_record_json(name, {"at_utc": at, "sound": sound, "read_all": read_all})


def last_verifications(lineage: Lineage) -> LastVerifications:
    """What was recorded; damaged records count for nothing. Raises: StoreError."""
    newest: Verification | None = None
    for one in _newest_first(lineage):
        newest = newest or one
        if one.sound:
            return LastVerifications(newest, one)
    return LastVerifications(newest)


def read_verification(lineage: Lineage, name: str) -> Verification:
    """The record of that name, relative to the lineage. Raises: ObjectMissing, IntegrityError."""
    fields = lineage.get_record_json(name)
    try:
        at = datetime.fromisoformat(str(fields["at_utc"]))
        if at.tzinfo is None:
            raise ValueError("its instant has no zone")
        return Verification(at, fields["sound"] is True, fields["read_all"] is True)
    except (KeyError, ValueError) as error:
        raise IntegrityError(f"record {name!r} is malformed") from error


def _newest_first(lineage: Lineage) -> Iterator[Verification]:
    prefix = f"{lineage.root}{FOLDER}/"
    names = [info.name[len(prefix) :] for info in lineage.store.list(prefix)]
    for name in sorted(filter(_NAME.fullmatch, names), reverse=True)[:READ_MAX]:
        try:
            yield read_verification(lineage, f"{FOLDER}/{name}")
        except (IntegrityError, ObjectMissing):
            continue
