"""
Files that a server sends from their begin on, in stretches of any length, and what is wrong with their
pages.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cloudsave.kernels.innodb import PageForm, bad_pages, page_form
from cloudsave.model.item import CorruptPage, Item, StreamPiece

BLOCK_BYTES = 8192
CORRUPT_LISTED_MAX = 10_000
"""Limit: pages that the manifest names."""


class PageWatch:
    """Checks pages as they come. `unwatched`: pages, by path, that may be torn."""

    def __init__(self, page_bytes: int, unwatched: Mapping[str, range] | None = None) -> None:
        self.corrupt: list[CorruptPage] = []
        self._page_bytes = page_bytes
        self._unwatched = unwatched or {}
        self._forms: dict[str, PageForm | None] = {}

    def look(self, path: str, offset: int, pages: memoryview) -> None:
        """Check what stands at `offset` of a file, the begin of which came first; only whole pages are."""
        if offset == 0:
            self._forms[path] = page_form(pages)
        form = self._forms.get(path)
        if form is None or offset % self._page_bytes or len(pages) % self._page_bytes:
            return
        unwatched = self._unwatched.get(path, range(0))
        for bad in bad_pages(pages, page_bytes=self._page_bytes, form=form):
            number = offset // self._page_bytes + bad
            if number not in unwatched and len(self.corrupt) < CORRUPT_LISTED_MAX:
                self.corrupt.append(CorruptPage(path, number, "the checksum is wrong"))


@dataclass(slots=True)
class StreamFile:
    """A file that is coming in; its pieces are whole pages, but for the last one."""

    item: Item
    watch: PageWatch
    received: int = 0
    _rest: bytearray = field(default_factory=bytearray)
    """What does not fill a page yet."""

    def append(self, data: bytearray | memoryview) -> StreamPiece | None:
        """The piece that `data`, which must not change any more, completes; None where it completes none."""
        begin = self.received - len(self._rest)
        joined = memoryview(self._rest + data if self._rest else data)
        whole = len(joined) - len(joined) % max(BLOCK_BYTES, self.item.page_bytes)
        self.received += len(data)
        self._rest = bytearray(joined[whole:])
        if not whole:
            return None
        if self.item.page_bytes:
            self.watch.look(self.item.path, begin, joined[:whole])
        return StreamPiece(self.item, begin, joined[:whole], last=False)

    def end(self) -> StreamPiece:
        """The last piece, which may be empty."""
        return StreamPiece(self.item, self.received - len(self._rest), memoryview(self._rest), last=True)
