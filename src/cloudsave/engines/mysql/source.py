"""
A base backup of MySQL by CLONE: over the SQL port, without a file of the server's being touched here.

First come all files, while they change; then the pages that changed meanwhile, and the redo log of the
rest. What comes after a file was sent goes into a file of the backup's own, which is applied when the
backup is restored (`format_changes.py`): so nothing is held back here, and nothing that is stored is ever
stored anew.
Source: decision 0035.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from cloudsave.engines.mysql.clone_session import CloneSession
from cloudsave.engines.mysql.format_changes import MAGIC, encode_end, encode_size, encode_write
from cloudsave.engines.mysql.format_clone import DataDescriptor, FileDescriptor, State, StateDescriptor
from cloudsave.errors import BackupInvalidated, EngineError, UnsuitableSettings
from cloudsave.kernels.innodb import PageForm, bad_pages, page_form
from cloudsave.model.engine_facts import BackupStart, BackupStop
from cloudsave.model.identity import SourceIdentity
from cloudsave.model.item import CorruptPage, Item, ItemKind, Piece, StreamPiece
from cloudsave.model.position import Position

METHOD = "clone"
CHANGES_FILE = "#cloudsave_changes"
"""Beside the server's own files; applied and removed by the restore."""
CHANGES_PIECE_BYTES = 1 << 20
BLOCK_BYTES = 8192
FILE_MODE = 0o640
CORRUPT_LISTED_MAX = 10_000
"""Limit: pages that the manifest names."""
_UNPAGED = ("ib_buffer_pool",)


@dataclass(frozen=True, slots=True)
class ServerMoment:
    """What a server says of itself at one moment."""

    log_end: int
    clock_us: int
    settings: Mapping[str, str]


@dataclass(slots=True)
class _File:
    """A file that is coming in, from its begin on."""

    item: Item
    size_bytes: int
    """As announced; the file may have grown since."""
    received: int = 0
    rest: bytes = b""
    form: PageForm | None = None


class MysqlSource:
    """`BackupSource` of a MySQL server."""

    def __init__(
        self,
        identity: SourceIdentity,
        open_session: Callable[[], CloneSession],
        ask: Callable[[], ServerMoment],
    ) -> None:
        """`open_session` gives one that has not begun."""
        self._identity = identity
        self._open_session = open_session
        self._ask = ask
        self._session: CloneSession | None = None
        self._names: dict[int, str] = {}
        self._sizes: dict[str, int] = {}
        self._open: dict[str, _File] = {}
        """Files that are coming in, by path; several may be under way at once."""
        self._forms: dict[str, PageForm | None] = {}
        self._changes = bytearray(MAGIC)
        self._changes_begin = 0
        self._corrupt: list[CorruptPage] = []

    def begin(self) -> BackupStart:
        """See `BackupSource.begin`."""
        moment = self._ask()
        self._session = self._open_session()
        self._session.begin()
        note = f"waited {self._session.waited_seconds:.2f} s until DDL was blocked"
        return BackupStart(
            position=Position(self._identity.branch, moment.log_end),
            method=METHOD,
            bytes_expected=0,
            tablespaces={},
            settings=moment.settings,
            clock_us=moment.clock_us,
            notes=(note,),
        )

    def pieces(self) -> Iterator[Piece]:
        """See `BackupSource.pieces`."""
        assert self._session is not None, "begin comes first"
        done = False
        for one in self._session.received():
            descriptor = one.descriptor
            if isinstance(descriptor, FileDescriptor):
                self._file(descriptor)
            elif isinstance(descriptor, DataDescriptor):
                yield from self._take(descriptor, one.data)
            else:
                done = descriptor.state == State.DONE
                yield from self._state(descriptor)
        if not done:
            raise EngineError("server ended a clone before it was complete")
        for path, size in sorted(self._sizes.items()):
            self._changes += encode_size(path, size)
        self._changes += encode_end()
        yield from self._changes_pieces(last=True)

    def finish(self) -> BackupStop:
        """See `BackupSource.finish`."""
        assert self._session is not None, "begin comes first"
        self._session.finish()
        moment = self._ask()
        self._session.close()
        return BackupStop(
            position=Position(self._identity.branch, moment.log_end),
            directories=(),
            late_files=(),
            corrupt_pages=tuple(self._corrupt),
        )

    def abort(self) -> None:
        """See `BackupSource.abort`."""
        if self._session is not None:
            self._session.close()

    # ---- what the server sends

    def _state(self, state: StateDescriptor) -> Iterator[Piece]:
        if state.state == State.FILE and not state.flags:
            for path in list(self._open):
                yield from self._end_file(path)

    def _file(self, file: FileDescriptor) -> None:
        if file.state == State.REDO:
            path = f"#innodb_redo/#ib_redo{file.index}"
            self._sizes[path] = max(self._sizes.get(path, 0), file.size_bytes)
            return
        if file.state != State.FILE or file.index in self._names:
            raise BackupInvalidated(
                "server changed its tables during a clone",
                detail=f"It tells anew of file {file.name!r}, although DDL was blocked.",
                hints=["run the backup again"],
            )
        if not file.name or any(part in ("", ".", "..") for part in file.name.split("/")):
            raise UnsuitableSettings(
                "cannot back up tables outside of the data directory",
                detail=f"One is in {file.name!r}.",
                hints=["move it: ALTER TABLE ... TABLESPACE innodb_file_per_table, without DATA DIRECTORY"],
            )
        self._names[file.index] = file.name
        self._sizes[file.name] = file.size_bytes
        page_bytes = 0 if file.name in _UNPAGED else self._identity.page_bytes
        self._open[file.name] = _File(
            Item(file.name, ItemKind.FILE, FILE_MODE, page_bytes=page_bytes), file.size_bytes
        )

    def _take(self, data: DataDescriptor, content: memoryview) -> Iterator[Piece]:
        redo = data.state == State.REDO
        path = f"#innodb_redo/#ib_redo{data.index}" if redo else self._names.get(data.index)
        if path is None:
            raise EngineError("server sent bytes of a file that it has not told of")
        self._sizes[path] = max(self._sizes.get(path, 0), data.offset + data.length, data.file_bytes)
        if not data.length:
            return
        file = self._open.get(path)
        if file is not None and data.state == State.FILE and data.offset == file.received:
            yield from self._append(file, content)
            return
        if not redo:
            self._check(path, data.offset, content, self._forms.get(path))
        self._changes += encode_write(path, data.offset, content)
        yield from self._changes_pieces(last=False)

    def _append(self, file: _File, content: memoryview) -> Iterator[Piece]:
        if file.received == 0 and file.item.page_bytes:
            file.form = self._forms[file.item.path] = page_form(content)
        self._check(file.item.path, file.received, content, file.form)
        begin = file.received - len(file.rest)
        data = memoryview(file.rest + bytes(content)) if file.rest else content
        whole = len(data) - len(data) % BLOCK_BYTES
        file.received += len(content)
        file.rest = bytes(data[whole:])
        if whole:
            yield StreamPiece(file.item, begin, data[:whole], last=False)
        if file.received >= file.size_bytes:
            yield from self._end_file(file.item.path)

    def _end_file(self, path: str) -> Iterator[Piece]:
        file = self._open.pop(path)
        begin = file.received - len(file.rest)
        yield StreamPiece(file.item, begin, memoryview(file.rest), last=True)

    def _changes_pieces(self, *, last: bool) -> Iterator[Piece]:
        if not last and len(self._changes) < CHANGES_PIECE_BYTES:
            return
        item = Item(CHANGES_FILE, ItemKind.FILE, FILE_MODE)
        whole = len(self._changes) if last else len(self._changes) - len(self._changes) % BLOCK_BYTES
        data, self._changes = memoryview(bytes(self._changes[:whole])), self._changes[whole:]
        begin, self._changes_begin = self._changes_begin, self._changes_begin + whole
        yield StreamPiece(item, begin, data, last=last)

    # ---- pages

    def _check(self, path: str, offset: int, content: memoryview, form: PageForm | None) -> None:
        page_bytes = self._identity.page_bytes
        if form is None or offset % page_bytes or len(content) % page_bytes:
            return
        for bad in bad_pages(content, page_bytes=page_bytes, form=form):
            if len(self._corrupt) < CORRUPT_LISTED_MAX:
                page = CorruptPage(path, offset // page_bytes + bad, "the checksum is wrong")
                self._corrupt.append(page)
