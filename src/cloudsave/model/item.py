"""What a base backup consists of: files, directories and links, and the pieces that they are read in."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Protocol

from cloudsave.model.changes import StorageKey


class ItemKind(StrEnum):
    """Kinds of things in a data directory."""

    FILE = "file"
    DIRECTORY = "directory"
    LINK = "link"


@dataclass(frozen=True, slots=True)
class Item:
    """
    One thing of a source's data directory.

    `path` is relative to the data directory, "/"-separated, without "..", or, where `outside` is true, the
    absolute path of a file that the server uses outside of it (configuration). Tablespace contents appear
    below `pg_tblspc/<oid>/`.
    """

    path: str
    kind: ItemKind
    mode: int
    """Permission bits."""
    size_bytes: int = 0
    """Size when listed; a file under change may turn out otherwise when read."""
    modified_us: int = 0
    """Modification time, microseconds since 1970, of the source's clock; 0 where unknown."""
    page_bytes: int = 0
    """Size of a database page where the file consists of checked pages, else 0."""
    link_target: str = ""
    outside: bool = False
    storage: StorageKey | None = None
    """How the source's log names the file's blocks; None where it does not tell all of their changes."""


class Piece(Protocol):
    """
    A stretch of one file that can be read once, in whole or in parts, from any thread.

    Pieces of one file ascend without a gap from its begin; the last one ends at the item's size (`is_last`).
    """

    @property
    def item(self) -> Item:
        """The file."""

    @property
    def offset(self) -> int:
        """Where the stretch begins in the file, in bytes; a multiple of 8192."""

    @property
    def length(self) -> int:
        """Bytes expected; the last piece of a file may turn out shorter when the file shrank."""

    def read_into(self, target: memoryview, *, offset: int) -> int:
        """
        Fill `target` (a multiple of 8192 bytes, but for the end of the piece) from `offset` bytes into the
        piece, which ascend from call to call.

        Pages are checked on the way; a page that stays wrong is kept as it is and reported by the source
        when the backup finishes. Returns the bytes read; fewer than asked for only at the end of the file.
        Raises: SourceUnreadable.
        """

    def close(self) -> None:
        """Nothing more is read."""


def is_last(piece: Piece) -> bool:
    """Whether no other piece of its file follows."""
    return piece.offset + piece.length >= piece.item.size_bytes


class ContentPiece:
    """A piece, and a whole file, whose bytes are at hand: so many as there are, whatever `item` says."""

    def __init__(self, item: Item, content: bytes | memoryview) -> None:
        size_bytes = len(content)
        self.item = item if item.size_bytes == size_bytes else replace(item, size_bytes=size_bytes)
        self.offset = 0
        self.length = len(content)
        self._content = memoryview(content)

    def read_into(self, target: memoryview, *, offset: int) -> int:
        """See `Piece.read_into`."""
        part = self._content[offset : offset + len(target)]
        target[: len(part)] = part
        return len(part)

    def close(self) -> None:
        """See `Piece.close`."""


class StreamPiece(ContentPiece):
    """Part of a file of which more may come: its size so far is one more than what is known."""

    def __init__(self, item: Item, offset: int, content: memoryview, *, last: bool) -> None:
        super().__init__(item, content)
        self.offset = offset
        self.item = replace(item, size_bytes=offset + len(content) + (not last))


@dataclass(frozen=True, slots=True)
class CorruptPage:
    """A page whose checksum or header is wrong in the source, for good."""

    path: str
    block: int
    reason: str


@dataclass(frozen=True, slots=True)
class LateFile:
    """A small file whose content is known only when the backup finishes (backup_label, pg_control)."""

    item: Item
    content: bytes
