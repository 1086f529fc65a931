"""
Log that is stored more than once: pieces that were stored as they came, and once more as one object.

Where an object cannot be read, others that hold the same stretch serve. A stranger who may add objects could
otherwise put one over good log, and no restore would get past it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from cloudsave.errors import IntegrityError
from cloudsave.model.ledger import Ledger, read_extents
from cloudsave.model.log import LogSegment

COPIES_MAX = 64
"""Limit: objects that are tried in place of one."""

_log = logging.getLogger("cloudsave.repository.log_copies")


def reading_copies(
    read: Callable[[LogSegment], bytes], segments: Iterable[LogSegment]
) -> Callable[[LogSegment], bytes]:
    """
    `read`, with all of `segments` to fall back upon. Raises: IntegrityError where no others hold the log of
    one that cannot be read, and what else `read` raises.
    """
    known = tuple(segments)

    def read_any(segment: LogSegment) -> bytes:
        try:
            return read(segment)
        except IntegrityError as error:
            content = _from_others(read, known, segment)
            if content is None:
                raise
            _log.warning("%s; the same log was read from other objects", error.message)
            return content

    return read_any


def _from_others(
    read: Callable[[LogSegment], bytes], known: tuple[LogSegment, ...], lost: LogSegment
) -> bytes | None:
    """The bytes of a stretch from other objects of its branch; None where they do not hold all of it."""
    near = [
        one
        for one in known
        if one.branch == lost.branch and one.first < lost.last and lost.first < one.last and one != lost
    ]
    for _ in range(COPIES_MAX):
        cover = Ledger(near).cover([(lost.branch, 0, None)], lost.first, lost.last)
        if not cover.complete:
            return None
        failed: list[LogSegment] = []

        def noting(segment: LogSegment, failed: list[LogSegment] = failed) -> bytes:
            try:
                return read(segment)
            except IntegrityError:
                failed.append(segment)
                raise

        try:
            return read_extents(noting, cover.extents)
        except IntegrityError:
            near = [one for one in near if one not in failed]
    return None
