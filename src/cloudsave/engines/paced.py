"""A wrapper that holds the reading of a base backup to a pace, so that the source's disks stay free."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from cloudsave.engines.api import BackupSource
from cloudsave.model.engine_facts import BackupStart
from cloudsave.model.item import Item, Piece


class PacedSource:
    """`BackupSource` whose pieces, before they are read, ask `take` for so many bytes; it may wait."""

    def __init__(self, source: BackupSource, take: Callable[[int], None]) -> None:
        self._source = source
        self._take = take
        self.finish = source.finish
        self.abort = source.abort

    def begin(self) -> BackupStart:
        """See `BackupSource.begin`."""
        return self._source.begin()

    def pieces(self) -> Iterator[Piece]:
        """See `BackupSource.pieces`."""
        for piece in self._source.pieces():
            yield _PacedPiece(piece, self._take)


class _PacedPiece:
    """A piece that waits its turn."""

    def __init__(self, piece: Piece, take: Callable[[int], None]) -> None:
        self._piece = piece
        self._take = take

    @property
    def item(self) -> Item:
        """The file."""
        return self._piece.item

    @property
    def offset(self) -> int:
        """See `Piece.offset`."""
        return self._piece.offset

    @property
    def length(self) -> int:
        """See `Piece.length`."""
        return self._piece.length

    def read_into(self, target: memoryview, *, offset: int) -> int:
        """See `Piece.read_into`."""
        self._take(len(target))
        return self._piece.read_into(target, offset=offset)

    def close(self) -> None:
        """See `Piece.close`."""
        self._piece.close()
