"""
The check of every page that a base backup takes, and the list of those that stay wrong.

A page that fails may be in the middle of being written. It is then whole again at a second look, or its
bytes have changed, or its LSN is not older than the backup: in these cases the log holds an image of it,
since the server writes full pages during a backup, and replay makes it right. All else is damage.
Source: PostgreSQL src/backend/backup/basebackup.c, verify_page_checksum(); pgBackRest pageChecksum.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

from cloudsave.clock import Clock
from cloudsave.engines.postgresql.exclusions import PAGE_BYTES
from cloudsave.kernels.pages import pg_page_check
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

    def check_file(
        self, path: str, pages: memoryview, *, first_block: int, descriptor: int, offset: int
    ) -> None:
        """
        Check the whole pages of `pages`, read from `descriptor` at `offset`. Pages that failed are read
        again, once, in place; those that stay wrong are noted and kept as they are.
        """
        suspects = self._suspects(pages, first_block)
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
        for index in self._suspects(pages, first_block):
            self._note(path, first_block + index, pages[index * PAGE_BYTES : (index + 1) * PAGE_BYTES])

    def corrupt_pages(self) -> tuple[CorruptPage, ...]:
        """The pages that stayed wrong, by path and block."""
        found = sorted(set(self._corrupt), key=lambda page: (page.path, page.block))
        surplus = len(found) - CORRUPT_PAGES_MAX
        if surplus > 0:
            last = found[CORRUPT_PAGES_MAX - 1]
            found[CORRUPT_PAGES_MAX - 1 :] = [
                replace(last, reason=f"{last.reason}; and {surplus} more pages")
            ]
        return tuple(found)

    def _suspects(self, pages: memoryview, first_block: int) -> Sequence[int]:
        """Indexes of pages that fail and are older than the backup."""
        whole = len(pages) // PAGE_BYTES * PAGE_BYTES
        if not whole:
            return ()
        return pg_page_check(
            pages[:whole], first_block=first_block, checksums=self._checksums, lsn_limit=self._start_offset
        )

    def _note(self, path: str, block: int, page: memoryview) -> None:
        lsn = int.from_bytes(page[:4], "little") << 32 | int.from_bytes(page[4:8], "little")
        what = "checksum or header" if self._checksums else "header"
        reason = f"{what} is wrong, twice; its LSN is {lsn >> 32:X}/{lsn & 0xFFFFFFFF:X}"
        self._corrupt.append(CorruptPage(path, block, reason))
