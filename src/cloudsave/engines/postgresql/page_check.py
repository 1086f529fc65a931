"""
The check of every page that a base backup takes, and the list of those that stay wrong.

A page that fails may be in the middle of being written. It is then whole again at a second look, or its
bytes have changed, or its LSN lies within the backup: in these cases the log holds an image of it, since the
server writes full pages during a backup, and replay makes it right. All else is damage. An LSN beyond the
backup's end is of no page that a server has written: a page of garbage has a large one almost always.
Source: PostgreSQL src/backend/backup/basebackup.c, verify_page_checksum(); pgBackRest pageChecksum.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from cloudsave.clock import Clock
from cloudsave.engines.postgresql.exclusions import PAGE_BYTES
from cloudsave.kernels.pages import PageStatus, pg_page_status
from cloudsave.model.item import CorruptPage

REREAD_SECONDS = 0.1
"""Pause before the second look at pages that failed."""
CORRUPT_PAGES_MAX = 10_000
"""Limit: pages named in one backup; the last one's reason says how many more there are."""


class PageCheck:
    """The page check of one backup. Thread-safe: the only shared state is a list that grows."""

    def __init__(self, *, start_offset: int, checksums: bool, clock: Clock) -> None:
        """`start_offset`: where replay will begin. Without `checksums` only headers are looked at."""
        self._start_offset = start_offset
        self._checksums = checksums
        self._clock = clock
        self._corrupt: list[CorruptPage] = []
        self._younger: list[tuple[int, CorruptPage]] = []
        """Pages that fail and whose LSN (given with each) is not older than the backup."""

    def check_file(
        self, path: str, pages: memoryview, *, first_block: int, descriptor: int, offset: int
    ) -> None:
        """
        Check the whole pages of `pages`, read from `descriptor` at `offset`. Pages that failed are read
        again, once, in place; those that stay wrong are noted and kept as they are.
        """
        suspects = self._suspects(path, pages, first_block)
        if not suspects:
            return
        self._clock.sleep(REREAD_SECONDS)
        for index in suspects:
            page = pages[index * PAGE_BYTES : (index + 1) * PAGE_BYTES]
            before = bytes(page)
            again = bytearray(PAGE_BYTES)
            if os.preadv(descriptor, [again], offset + index * PAGE_BYTES) < PAGE_BYTES:
                continue  # The relation was truncated; replay truncates it too.
            page[:] = again
            if bytes(again) == before:
                self._note(path, first_block + index, page)

    def check_received(self, path: str, pages: memoryview, *, first_block: int) -> None:
        """As `check_file`, for pages that the server has sent after looking twice by itself."""
        for index in self._suspects(path, pages, first_block):
            self._note(path, first_block + index, pages[index * PAGE_BYTES : (index + 1) * PAGE_BYTES])

    def corrupt_pages(self, *, end_offset: int) -> tuple[CorruptPage, ...]:
        """The pages that stayed wrong, by path and block; `end_offset`: where the backup ends in the log."""
        beyond = [page for lsn, page in self._younger if lsn > end_offset]
        found = sorted({*self._corrupt, *beyond}, key=lambda page: (page.path, page.block))
        surplus = len(found) - CORRUPT_PAGES_MAX
        if surplus > 0:
            last = found[CORRUPT_PAGES_MAX - 1]
            found[CORRUPT_PAGES_MAX - 1 :] = [
                replace(last, reason=f"{last.reason}; and {surplus} more pages")
            ]
        return tuple(found)

    def _suspects(self, path: str, pages: memoryview, first_block: int) -> Sequence[int]:
        """Indexes of pages that fail and are older than the backup; those that seem younger are noted."""
        whole = len(pages) // PAGE_BYTES * PAGE_BYTES
        if not whole:
            return ()
        lsns = np.empty(whole // PAGE_BYTES, np.uint64)
        status = pg_page_status(
            pages[:whole], first_block=first_block, checksums=self._checksums, lsn_out=lsns
        )
        if not status.any():
            return ()
        failed = status == PageStatus.CHECKSUM
        younger = failed & (lsns >= np.uint64(self._start_offset))
        for index in np.flatnonzero(younger).tolist():
            lsn = int(lsns[index])
            reason = f"checksum is wrong; its LSN is {_lsn_text(lsn)}, beyond the end of the log"
            self._younger.append((lsn, CorruptPage(path, first_block + index, reason)))
        suspects: list[int] = np.flatnonzero(failed & ~younger | (status == PageStatus.HEADER)).tolist()
        return suspects

    def _note(self, path: str, block: int, page: memoryview) -> None:
        lsn = int.from_bytes(page[:4], "little") << 32 | int.from_bytes(page[4:8], "little")
        what = "checksum or header" if self._checksums else "header"
        reason = f"{what} is wrong, twice; its LSN is {_lsn_text(lsn)}"
        self._corrupt.append(CorruptPage(path, block, reason))


def _lsn_text(lsn: int) -> str:
    return f"{lsn >> 32:X}/{lsn & 0xFFFFFFFF:X}"
