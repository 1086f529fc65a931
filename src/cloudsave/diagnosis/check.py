"""Is a source protected right now: base backups, their log, and a capture that is close behind."""

from __future__ import annotations

from collections.abc import Iterator

from cloudsave.clock import Clock
from cloudsave.engines.api import Engine
from cloudsave.errors import IntegrityError
from cloudsave.model.engine_facts import SlotState
from cloudsave.model.finding import Finding, Severity
from cloudsave.model.ledger import Ledger
from cloudsave.model.log import instant_from_us
from cloudsave.model.manifest import Manifest
from cloudsave.repository.lineage import Lineage
from cloudsave.repository.verifications import last_verifications

BACKUP_AGE_DAYS_MAX = 8
"""Older than this, replay takes long and one bad backup hurts."""
VERIFIED_AGE_DAYS_MAX = 31
"""Longer ago than this, nobody knows what the store has kept."""


def check_protection(
    engine: Engine, lineage: Lineage, *, slot: str, rpo_seconds: float, clock: Clock
) -> list[Finding]:
    """
    Findings about what the repository holds of a source and about the capture of its log. Changes nothing.
    """
    return [
        *_capture(engine, slot, rpo_seconds),
        *_backups(lineage, clock),
        *_verified(lineage, clock),
    ]


def _capture(engine: Engine, slot: str, rpo_seconds: float) -> Iterator[Finding]:
    state = engine.slot_state(slot)
    if state is SlotState.ACTIVE:
        yield Finding(
            Severity.OK, "capture", f"log is captured through slot {slot}, wanted RPO {rpo_seconds:g} s"
        )
    elif state is SlotState.IDLE:
        yield Finding(
            Severity.PROBLEM,
            "capture",
            f"nobody fetches the log that slot {slot} holds: it grows, and new commits are not protected",
            "start `cloudsave logs capture` as a service",
        )
    else:
        yield Finding(
            Severity.PROBLEM,
            "capture",
            "the log is not captured: only the moments of the base backups themselves can be restored",
            "start `cloudsave logs capture` as a service",
        )


def _backups(lineage: Lineage, clock: Clock) -> Iterator[Finding]:
    backup_ids = lineage.backup_ids()
    if not backup_ids:
        yield Finding(Severity.PROBLEM, "backup", "there is no base backup", "run `cloudsave backup`")
        return
    try:
        newest = lineage.manifest(backup_ids[-1])
    except IntegrityError as error:
        yield Finding(
            Severity.PROBLEM,
            "backup",
            f"the newest backup cannot be used: {error.message}",
            "take a new one with `cloudsave backup NAME --full`, and run `cloudsave verify`",
        )
        return
    age_days = (clock.now() - instant_from_us(newest.finished_us)).total_seconds() / 86400
    old = age_days > BACKUP_AGE_DAYS_MAX
    yield Finding(
        Severity.WARNING if old else Severity.OK,
        "backup",
        f"{len(backup_ids)} base backups; the newest, {newest.backup_id}, is {age_days:.1f} days old",
        "run `cloudsave backup` daily" if old else "",
    )
    if newest.corrupt_pages:
        yield Finding(
            Severity.PROBLEM,
            "backup",
            f"the newest backup holds {len(newest.corrupt_pages)} pages that are damaged in the source",
            "`cloudsave show` names them; keep older backups",
        )
    yield from _log(lineage, newest)


def _log(lineage: Lineage, newest: Manifest) -> Iterator[Finding]:
    ledger = Ledger(lineage.logs())
    reached = ledger.frontier(newest.start.branch, newest.log_begin)
    if reached < newest.stop.offset:
        yield Finding(
            Severity.PROBLEM,
            "log",
            f"log that backup {newest.backup_id} needs is missing: it cannot be restored",
            "`cloudsave logs status` shows the holes; take a new backup",
        )
    else:
        yield Finding(
            Severity.OK,
            "log",
            f"the log from the newest backup on is stored without a hole so far ({reached:#x})",
        )


def _verified(lineage: Lineage, clock: Clock) -> Iterator[Finding]:
    last = last_verifications(lineage)
    hint = f"`cloudsave verify --record` as a timer, with --read-all each {VERIFIED_AGE_DAYS_MAX} days or so"
    if last.newest is None:
        yield Finding(
            Severity.NOTICE, "verification", "nobody has recorded that what is stored is sound", hint
        )
        return
    if not last.newest.sound:
        when = f"{last.newest.at:%Y-%m-%d %H:%M} UTC"
        fact = f"the last verification, of {when}, found something wrong"
        yield Finding(Severity.PROBLEM, "verification", fact, "`cloudsave verify` tells what")
        return
    age_days = (clock.now() - last.newest.at).total_seconds() / 86400
    old = age_days > VERIFIED_AGE_DAYS_MAX
    depth = "every byte was read" if last.newest.read_all else "sizes and indexes were read"
    yield Finding(
        Severity.WARNING if old else Severity.OK,
        "verification",
        f"what is stored was sound {age_days:.1f} days ago ({depth})",
        hint if old else "",
    )
