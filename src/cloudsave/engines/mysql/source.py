"""
A base backup of MySQL by CLONE: over the SQL port, without a file of the server's being touched here.

First come all files, while they change; then the pages that changed meanwhile, and the redo log of the
rest. What comes after a file was sent goes into a file of the backup's own, which is applied when the
backup is restored (`format_changes.py`): so nothing is held back here, and nothing that is stored is ever
stored anew.
Source: decision 0035.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from cloudsave.engines.binlog.engine import ServerMoment
from cloudsave.engines.binlog.stream_files import PageWatch, StreamFile
from cloudsave.engines.mysql.clone_session import CloneSession
from cloudsave.engines.mysql.format_changes import MAGIC, encode_end, encode_size, encode_write
from cloudsave.engines.mysql.format_clone import DataDescriptor, FileDescriptor, State, StateDescriptor
from cloudsave.errors import BackupInvalidated, EngineError, UnsuitableSettings
from cloudsave.model.engine_facts import BackupStart, BackupStop
from cloudsave.model.identity import SourceIdentity
from cloudsave.model.item import Item, ItemKind, Piece
from cloudsave.model.position import Position

METHOD = "clone"
CHANGES_FILE = "#cloudsave_changes"
"""Beside the server's own files; applied and removed by the restore."""
CHANGES_PIECE_BYTES = 1 << 20
FILE_MODE = 0o640
_UNPAGED = ("ib_buffer_pool",)


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
        self._open: dict[str, StreamFile] = {}
        """Files that are coming in, by path; several may be under way at once."""
        self._watch = PageWatch(identity.page_bytes)
        self._changes = StreamFile(Item(CHANGES_FILE, ItemKind.FILE, FILE_MODE), self._watch)
        self._gathered = bytearray(MAGIC)
        """Changes that have not become a piece yet."""

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
            self._gathered += encode_size(path, size)
        self._gathered += encode_end()
        yield from self._hand_out_changes()
        yield self._changes.end()

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
            corrupt_pages=tuple(self._watch.corrupt),
        )

    def abort(self) -> None:
        """See `BackupSource.abort`."""
        if self._session is not None:
            self._session.close()

    # ---- what the server sends

    def _state(self, state: StateDescriptor) -> Iterator[Piece]:
        if state.state == State.FILE and not state.flags:
            while self._open:
                yield self._open.popitem()[1].end()

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
        item = Item(file.name, ItemKind.FILE, FILE_MODE, file.size_bytes, page_bytes=page_bytes)
        self._open[file.name] = StreamFile(item, self._watch)

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
            if (piece := file.append(content)) is not None:
                yield piece
            if file.received >= file.item.size_bytes:  # As announced; it may have grown since.
                yield self._open.pop(path).end()
            return
        if not redo and path not in _UNPAGED:
            self._watch.look(path, data.offset, content)
        self._gathered += encode_write(path, data.offset, content)
        if len(self._gathered) >= CHANGES_PIECE_BYTES:
            yield from self._hand_out_changes()

    def _hand_out_changes(self) -> Iterator[Piece]:
        gathered, self._gathered = self._gathered, bytearray()
        if (piece := self._changes.append(gathered)) is not None:
            yield piece
