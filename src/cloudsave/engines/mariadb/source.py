"""
A base backup of MariaDB by mariadb-backup, which runs beside the server and streams what it copies.

The program follows the redo log while it copies, and holds the server's stages of backup itself; one of its
last files says at which place of the binlog, and at which GTID, the copy is once prepared. That is exact.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from cloudsave.engines.binlog.position import file_number, offset_of
from cloudsave.engines.mariadb.backup_program import BackupProgram, Chunk
from cloudsave.errors import EngineError, UnsuitableSettings
from cloudsave.kernels.innodb import PageForm, bad_pages, page_form
from cloudsave.model.engine_facts import BackupStart, BackupStop
from cloudsave.model.identity import SourceIdentity
from cloudsave.model.item import CorruptPage, Item, ItemKind, Piece, StreamPiece
from cloudsave.model.position import Position

METHOD = "mariadb-backup"
BLOCK_BYTES = 8192
FILE_MODE = 0o660
CORRUPT_LISTED_MAX = 10_000
"""Limit: pages that the manifest names."""
SMALL_BYTES_MAX = 1 << 16
"""Limit: bytes of a file of the program's own that is read here."""
GTID_SETTING = "gtid_binlog_pos"
"""Where the copy is, once prepared."""
PROGRAM_SETTINGS = re.compile(r"^(innodb_\w+)\s*=\s*(.+)$", re.MULTILINE)
_BINLOG_INFO = ("xtrabackup_binlog_info", "mariadb_backup_binlog_info")
_OPTIONS = "backup-my.cnf"
_INNODB = re.compile(r"(?:.+/)?(?:[^/]+\.ibd|ibdata\d+|undo\d+)")
_DOUBLEWRITE_PAGES = range(64, 192)
"""Of the first system file: copies of other pages, torn ones among them."""


@dataclass(slots=True)
class _File:
    """A file that is coming in. `rest` is what does not fill a block yet."""

    item: Item
    received: int = 0
    rest: bytearray = field(default_factory=bytearray)
    form: PageForm | None = None
    content: bytearray | None = None
    """All bytes of a file that is read here."""


class MariadbSource:
    """`BackupSource` of a MariaDB server on this host."""

    def __init__(
        self,
        identity: SourceIdentity,
        program: BackupProgram,
        ask: Callable[[], tuple[int, int, Mapping[str, Any]]],
    ) -> None:
        """`ask`: the end of the binlog, the server's clock, and the settings that a restore needs."""
        self._identity = identity
        self._program = program
        self._ask = ask
        self._files: dict[str, _File] = {}
        self._ended: set[str] = set()
        self._own: dict[str, bytes] = {}
        self._corrupt: list[CorruptPage] = []

    def begin(self) -> BackupStart:
        """See `BackupSource.begin`."""
        end, clock_us, settings = self._ask()
        self._program.start()
        return BackupStart(
            position=Position(self._identity.branch, end),
            method=METHOD,
            bytes_expected=0,
            tablespaces={},
            settings={name: str(value) for name, value in settings.items()},
            clock_us=clock_us,
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
            corrupt_pages=tuple(self._corrupt),
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
        begin = file.received - len(file.rest)
        data = file.rest + chunk.data if file.rest else chunk.data
        file.received += len(chunk.data)
        if file.content is not None and file.received <= SMALL_BYTES_MAX:
            file.content += chunk.data
        unit = max(BLOCK_BYTES, file.item.page_bytes)
        whole = len(data) - len(data) % unit
        file.rest = data[whole:]
        content = memoryview(data)[:whole]
        if file.item.page_bytes and whole:
            self._check(file, begin, content)
        return StreamPiece(file.item, begin, content, last=False) if whole else None

    def _begin_file(self, path: str) -> _File:
        if path in self._ended:
            raise EngineError("stream of mariadb-backup is damaged", detail=f"{path!r} comes twice.")
        if path.endswith(".isl"):
            raise UnsuitableSettings(
                "cannot back up tables outside of the data directory",
                detail=f"{path!r} leads elsewhere; a restored server would open the original there.",
                hints=["move it: ALTER TABLE ... without DATA DIRECTORY"],
            )
        page_bytes = self._identity.page_bytes if _INNODB.fullmatch(path) else 0
        item = Item(path, ItemKind.FILE, FILE_MODE, page_bytes=page_bytes)
        own = bytearray() if path in (*_BINLOG_INFO, _OPTIONS) else None
        return _File(item, content=own)

    def _end_file(self, path: str) -> Piece:
        file = self._files.pop(path)
        self._ended.add(path)
        if file.content is not None:
            self._own[path] = bytes(file.content)
        begin = file.received - len(file.rest)
        return StreamPiece(file.item, begin, memoryview(file.rest), last=True)

    def _check(self, file: _File, begin: int, pages: memoryview) -> None:
        page_bytes, path = file.item.page_bytes, file.item.path
        if begin == 0:
            file.form = page_form(pages)
        if file.form is None:
            return
        first = begin // page_bytes
        for bad in bad_pages(pages, page_bytes=page_bytes, form=file.form):
            number = first + bad
            if path == "ibdata1" and number in _DOUBLEWRITE_PAGES:
                continue
            if len(self._corrupt) < CORRUPT_LISTED_MAX:
                self._corrupt.append(CorruptPage(path, number, "the checksum is wrong"))

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
