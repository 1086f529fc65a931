"""
A base backup of MariaDB by mariadb-backup, which runs beside the server and streams what it copies.

The program follows the redo log while it copies, and holds the server's stages of backup itself; one of its
last files says at which place of the binlog, and at which GTID, the copy is once prepared. That is exact.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from cloudsave.engines.binlog.engine import ServerMoment
from cloudsave.engines.binlog.position import file_number, offset_of
from cloudsave.engines.binlog.server_settings import GTID_SETTING
from cloudsave.engines.binlog.stream_files import PageWatch, StreamFile
from cloudsave.engines.mariadb.backup_program import BackupProgram, Chunk
from cloudsave.errors import EngineError, UnsuitableSettings
from cloudsave.model.engine_facts import BackupStart, BackupStop
from cloudsave.model.identity import SourceIdentity
from cloudsave.model.item import Item, ItemKind, Piece
from cloudsave.model.position import Position

METHOD = "mariadb-backup"
FILE_MODE = 0o660
SMALL_BYTES_MAX = 1 << 16
"""Limit: bytes of a file of the program's own that is read here."""
PROGRAM_SETTINGS = re.compile(r"^(innodb_\w+)\s*=\s*(.+)$", re.MULTILINE)
_BINLOG_INFO = ("xtrabackup_binlog_info", "mariadb_backup_binlog_info")
_OPTIONS = "backup-my.cnf"
_INNODB = re.compile(r"(?:.+/)?(?:[^/]+\.ibd|ibdata\d+|undo\d+)")
_DOUBLEWRITE = {"ibdata1": range(64, 192)}
"""Pages that are copies of other pages, torn ones among them."""


class MariadbSource:
    """`BackupSource` of a MariaDB server on this host."""

    def __init__(
        self,
        identity: SourceIdentity,
        program: BackupProgram,
        ask: Callable[[], ServerMoment],
    ) -> None:
        self._identity = identity
        self._program = program
        self._ask = ask
        self._files: dict[str, StreamFile] = {}
        self._ended: set[str] = set()
        self._own: dict[str, bytearray] = {}
        """Files of the program's own that are read here."""
        self._watch = PageWatch(identity.page_bytes, _DOUBLEWRITE)

    def begin(self) -> BackupStart:
        """See `BackupSource.begin`."""
        moment = self._ask()
        self._program.start()
        return BackupStart(
            position=Position(self._identity.branch, moment.log_end),
            method=METHOD,
            bytes_expected=0,
            tablespaces={},
            settings=moment.settings,
            clock_us=moment.clock_us,
        )

    def pieces(self) -> Iterator[Piece]:
        """See `BackupSource.pieces`."""
        for chunk in self._program.chunks():
            piece = self._piece(chunk)
            if piece is not None:
                yield piece
        if self._files:
            self._program.finish()
            raise EngineError(
                "stream of mariadb-backup is not complete", detail=f"{sorted(self._files)[0]!r} has no end."
            )

    def finish(self) -> BackupStop:
        """See `BackupSource.finish`."""
        self._program.finish()
        position, gtid = self._binlog_info()
        options = self._own.get(_OPTIONS, b"").decode("utf-8", "replace")
        blocked = self._program.blocked_seconds
        told = "" if blocked is None else f"commits waited {blocked:.2f} s for mariadb-backup"
        return BackupStop(
            position=position,
            directories=(),
            late_files=(),
            corrupt_pages=tuple(self._watch.corrupt),
            notes=(told,) if told else (),
            settings={GTID_SETTING: gtid, **dict(PROGRAM_SETTINGS.findall(options))},
        )

    def abort(self) -> None:
        """See `BackupSource.abort`."""
        self._program.abort()

    # ---- files out of chunks

    def _piece(self, chunk: Chunk) -> Piece | None:
        file = self._files.get(chunk.path)
        if file is None:
            file = self._files[chunk.path] = self._begin_file(chunk.path)
        if chunk.data is None:
            return self._end_file(chunk.path)
        if chunk.offset != file.received:
            raise EngineError(
                "stream of mariadb-backup has a gap",
                detail=f"{chunk.path!r} goes on at byte {chunk.offset}; {file.received} bytes were sent.",
            )
        if chunk.path in (*_BINLOG_INFO, _OPTIONS) and chunk.offset < SMALL_BYTES_MAX:
            self._own.setdefault(chunk.path, bytearray()).extend(chunk.data)
        return file.append(chunk.data)

    def _begin_file(self, path: str) -> StreamFile:
        if path in self._ended:
            raise EngineError("stream of mariadb-backup is damaged", detail=f"{path!r} comes twice.")
        if path.endswith(".isl"):
            raise UnsuitableSettings(
                "cannot back up tables outside of the data directory",
                detail=f"{path!r} leads elsewhere; a restored server would open the original there.",
                hints=["move it: ALTER TABLE ... without DATA DIRECTORY"],
            )
        page_bytes = self._identity.page_bytes if _INNODB.fullmatch(path) else 0
        return StreamFile(Item(path, ItemKind.FILE, FILE_MODE, page_bytes=page_bytes), self._watch)

    def _end_file(self, path: str) -> Piece:
        self._ended.add(path)
        return self._files.pop(path).end()

    def _binlog_info(self) -> tuple[Position, str]:
        """Where the copy is: in the binlog, and as GTIDs. Raises: EngineError."""
        raw = next((self._own[name] for name in _BINLOG_INFO if name in self._own), b"")
        fields = raw.decode("utf-8", "replace").rstrip("\n").split("\t")
        try:
            name, place, gtid = fields[0], int(fields[1]), fields[2] if len(fields) > 2 else ""
            return Position(self._identity.branch, offset_of(file_number(name), place)), gtid
        except (IndexError, ValueError) as error:
            raise EngineError(
                "mariadb-backup did not tell where in the binlog its copy is",
                detail=f"It said {raw[:200]!r}.",
                hints=["does the server write a binlog? `cloudsave check` tells"],
            ) from error
