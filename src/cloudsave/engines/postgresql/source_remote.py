"""
A base backup sent by the server: BASE_BACKUP of the replication protocol, taken apart as it arrives.

The server verifies page checksums itself (it re-reads a torn page before it sends it); we check again, so
that a bad page is named and the rest of the backup is kept. Every file is held against the server's manifest.
Memory is one piece here, plus those that the flow has queued.
Source: PostgreSQL manual, Streaming Replication Protocol; src/backend/backup/basebackup.c.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

from cloudsave.clock import SYSTEM_CLOCK, Clock
from cloudsave.engines.postgresql.backup_session import (
    NOT_IN_PREREQUISITE_STATE,
    BackupSession,
    outside_files,
    read_by_server,
    worthless,
)
from cloudsave.engines.postgresql.exclusions import EMPTIED_DIRECTORIES, PAGE_BYTES, relation_of
from cloudsave.engines.postgresql.format_manifest import FileDigest, compare, parse_manifest
from cloudsave.engines.postgresql.format_tar import DIRECTORY, FILE, LINK, TarMember, TarParser
from cloudsave.engines.postgresql.format_wal import parse_lsn
from cloudsave.engines.postgresql.log import branch_of
from cloudsave.engines.postgresql.page_check import PageCheck
from cloudsave.engines.postgresql.replication import (
    CopyEvent,
    CopyMark,
    ReplicationConnection,
    Rows,
    literal,
)
from cloudsave.errors import EngineError, ForeignSystem, IntegrityError
from cloudsave.kernels.checksums import crc32c
from cloudsave.model.engine_facts import BackupStart, BackupStop
from cloudsave.model.identity import SourceIdentity
from cloudsave.model.item import Item, ItemKind, Piece
from cloudsave.model.position import Position

PIECE_BYTES = 1 << 20
"""Length of a piece: what is held of a file at a time."""
MANIFEST_BYTES_MAX = 4 << 30
"""Limit: a manifest is about 150 bytes per file."""
CHECKPOINT_SECONDS_MAX = 7200.0
"""Limit: silence of the server; a spread checkpoint may take most of `checkpoint_timeout`."""
_PARENTHESISED_SINCE = 150000
_CORRUPTED = "SQLSTATE XX001"
_WORTHLESS = f"SQLSTATE {NOT_IN_PREREQUISITE_STATE}"
_IN_PLACE = "select count(*) from pg_tablespace where pg_tablespace_location(oid) like 'pg_tblspc/%'"
_TABLESPACE_ARCHIVE = re.compile(r"(\d+)\.tar")


class RemoteBackupSource:
    """`BackupSource` over a replication connection, with an SQL session for the settings."""

    def __init__(
        self,
        conninfo: str,
        session: BackupSession,
        identity: SourceIdentity,
        *,
        label: str,
        fast: bool,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._conninfo = conninfo
        self._session = session
        self._identity = identity
        self._label = label
        self._fast = fast
        self._clock = clock
        self._connection: ReplicationConnection | None = None
        self._events: Iterator[CopyEvent] = iter(())
        self._reader: _StreamReader | None = None
        self._outside: tuple[tuple[Item, bytes], ...] = ()

    def begin(self) -> BackupStart:
        """See `BackupSource.begin`. Returns when the server begins to send, after its checkpoint."""
        found = outside_files(
            self._session,
            self._identity.data_directory,
            lambda path: read_by_server(self._session, path),
        )
        self._outside = found.files
        settings = self._session.settings()
        (in_place,) = self._session.row(_IN_PLACE, doing="read the tablespaces")
        connection = self._connection = ReplicationConnection.open(self._conninfo, clock=self._clock)
        self._see_identity(connection)
        command = base_backup_command(
            self._label, fast=self._fast, version=connection.server_version, tablespace_map=not in_place
        )
        self._events = connection.copy_out(command, timeout_seconds=CHECKPOINT_SECONDS_MAX)
        begun, listed = _expect_rows(self._events), _expect_rows(self._events)
        start, clock_us = _position(begun), self._session.clock_us()
        self._session.close()
        tablespaces = [_Tablespace.of(row) for row in listed.mappings()]
        check = PageCheck(
            start_offset=start.offset, checksums=self._identity.page_checksums, clock=self._clock
        )
        self._reader = _StreamReader(
            check, tablespaces, single_copy=connection.server_version >= _PARENTHESISED_SINCE
        )
        return BackupStart(
            position=start,
            method="remote",
            bytes_expected=sum(tablespace.size_bytes for tablespace in tablespaces),
            tablespaces={t.oid: t.location for t in tablespaces if t.location.startswith("/")},
            settings=settings,
            clock_us=clock_us,
            notes=found.notes,
        )

    def pieces(self) -> Iterator[Piece]:
        """See `BackupSource.pieces`; in the order of the server."""
        assert self._reader is not None
        try:
            for event in self._events:
                yield from self._reader.take(event)
        except EngineError as error:
            # The server has sent all of it, and says at the very end that pages are bad: we name them.
            if _WORTHLESS in error.detail:
                raise worthless(error.detail) from None
            if not (_CORRUPTED in error.detail and self._reader.stop is not None):
                raise
            self._reader.server_found_corruption = True
        for item, content in self._outside:
            yield BytesPiece(item, bytearray(content), 0, None)

    def finish(self) -> BackupStop:
        """
        See `BackupSource.finish`.

        Raises: IntegrityError where what arrived is not what the server's manifest says.
        """
        reader = self._reader
        assert reader is not None
        if reader.stop is None:
            raise EngineError("server ended the base backup early", detail="It named no end position.")
        manifest = parse_manifest(bytes(reader.manifest))
        if manifest.system_identifier not in ("", self._identity.system_identifier):
            raise ForeignSystem(
                "base backup is of another cluster",
                detail=f"Its system identifier is {manifest.system_identifier}.",
            )
        compare(manifest, reader.received)
        corrupt = reader.check.corrupt_pages(end_offset=reader.stop.offset)
        if reader.server_found_corruption and not corrupt:
            raise IntegrityError(
                "server reports corrupt pages that were not found in what it sent",
                detail="The server ended the backup with: checksum verification failure.",
                hints=["does the server's log name the files?", "run the backup again"],
            )
        self.abort()
        return BackupStop(
            position=reader.stop,
            directories=reader.ordered_directories(),
            late_files=(),
            corrupt_pages=corrupt,
            notes=tuple(reader.notes),
        )

    def abort(self) -> None:
        """See `BackupSource.abort`: the server stops sending when the connection ends."""
        self._session.close()
        if self._connection is not None:
            connection, self._connection = self._connection, None
            with contextlib.suppress(OSError):
                connection.close()

    def _see_identity(self, connection: ReplicationConnection) -> None:
        system = connection.query("IDENTIFY_SYSTEM")[0].mappings()[0]["systemid"]
        if system != self._identity.system_identifier:
            raise ForeignSystem(
                "two connections to the source reached two clusters",
                detail=f"System identifiers {self._identity.system_identifier} and {system}.",
                hints=["does the URL name several hosts, or a load balancer?"],
            )


def base_backup_command(label: str, *, fast: bool, version: int, tablespace_map: bool) -> str:
    """
    BASE_BACKUP in the grammar of the server's version (such as 180006).

    Without `tablespace_map` the archive has the links instead, whose targets are limited to 99 bytes; with it
    servers before PostgreSQL 16 leave out tablespaces in place.
    """
    if version >= _PARENTHESISED_SINCE:
        checkpoint = "fast" if fast else "spread"
        return (
            f"BASE_BACKUP (LABEL {literal(label)}, PROGRESS true, CHECKPOINT '{checkpoint}', WAL false, "
            f"WAIT false, TABLESPACE_MAP {str(tablespace_map).lower()}, MANIFEST 'yes', "
            "MANIFEST_CHECKSUMS 'CRC32C', VERIFY_CHECKSUMS true)"
        )
    speed = " FAST" if fast else ""
    mapped = " TABLESPACE_MAP" if tablespace_map else ""
    return (
        f"BASE_BACKUP LABEL {literal(label)} PROGRESS{speed} NOWAIT{mapped} "
        "MANIFEST 'yes' MANIFEST_CHECKSUMS 'CRC32C'"
    )


class BytesPiece:
    """A piece that has been received; its pages are checked by the reader."""

    def __init__(self, item: Item, content: bytearray, offset: int, check: PageCheck | None) -> None:
        self.item = item
        self.offset = offset
        self.length = len(content)
        self._content = memoryview(content)
        self._check = check

    def read_into(self, target: memoryview, *, offset: int) -> int:
        """See `Piece.read_into`."""
        part = self._content[offset : offset + len(target)]
        target[: len(part)] = part
        relation = relation_of(self.item.path) if self._check else None
        if self._check is not None and relation is not None and part:
            first_block = relation.first_block + (self.offset + offset) // PAGE_BYTES
            self._check.check_received(self.item.path, target[: len(part)], first_block=first_block)
        return len(part)

    def close(self) -> None:
        """See `Piece.close`."""


@dataclass(frozen=True, slots=True)
class _Tablespace:
    """A row of the second result set; the data directory itself has no oid."""

    oid: str
    location: str
    size_bytes: int

    @classmethod
    def of(cls, row: dict[str, str | None]) -> _Tablespace:
        return cls(row["spcoid"] or "", row["spclocation"] or "", int(row["size"] or 0) * 1024)


class _StreamReader:
    """
    Turns what the server copies into pieces, and remembers what they were.

    Since PostgreSQL 15 one COPY carries tagged messages (n archive, d data, m manifest, p progress); before,
    each archive is a COPY of its own, in the order of the tablespaces, and the manifest is the last.
    """

    def __init__(self, check: PageCheck, tablespaces: list[_Tablespace], *, single_copy: bool) -> None:
        self.check = check
        self.stop: Position | None = None
        self.manifest = bytearray()
        self.received: dict[str, FileDigest] = {}
        self.notes: list[str] = []
        self.server_found_corruption = False
        self._single_copy = single_copy
        self._copies_left = list(tablespaces)
        self._directories: dict[str, Item] = {}
        self._locations = {t.oid: t.location for t in tablespaces}
        self._prefix = ""
        self._archive: TarParser | None = None
        self._in_manifest = False
        self._file: _Receiving | None = None

    def take(self, event: CopyEvent) -> Iterator[Piece]:
        """One event of the connection."""
        if isinstance(event, Rows):
            self._end_archive()
            self.stop = _position(event)
        elif isinstance(event, CopyMark):
            if not self._single_copy:
                self._begin_or_end_copy(event)
        elif self._single_copy:
            yield from self._message(event)
        else:
            yield from self._data(event)

    def ordered_directories(self) -> tuple[Item, ...]:
        """Directories and links, parents before children."""
        return tuple(self._directories[path] for path in sorted(self._directories))

    def _begin_or_end_copy(self, mark: CopyMark) -> None:
        self._end_archive()
        if mark is CopyMark.BEGIN:
            if self._copies_left:
                self._begin_archive(self._copies_left.pop(0).oid)
            else:
                self._in_manifest = True

    def _message(self, message: memoryview) -> Iterator[Piece]:
        kind = bytes(message[:1])
        if kind == b"d":
            yield from self._data(message[1:])
        elif kind == b"n":
            self._end_archive()
            name = bytes(message[1:]).split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
            found = _TABLESPACE_ARCHIVE.fullmatch(name)
            if found is None and name != "base.tar":
                raise _unexpected(f"an archive called {name!r}")
            self._begin_archive(found[1] if found else "")
        elif kind == b"m":
            self._end_archive()
            self._in_manifest = True
        elif kind != b"p":
            raise _unexpected(f"a message of type {kind!r}")

    def _begin_archive(self, oid: str) -> None:
        self._archive = TarParser()
        self._prefix = f"pg_tblspc/{oid}/" if oid else ""
        if oid:
            # Beside a tablespace map the server sends no links.
            location = self._locations.get(oid, "")
            linked = location.startswith("/")
            kind, target = (ItemKind.LINK, location) if linked else (ItemKind.DIRECTORY, "")
            self._add(Item(f"pg_tblspc/{oid}", kind, 0o700, link_target=target))

    def _end_archive(self) -> None:
        if self._archive is not None:
            self._archive.finish()
        self._archive, self._in_manifest = None, False

    def _data(self, data: memoryview) -> Iterator[Piece]:
        if self._in_manifest:
            self.manifest += data
            if len(self.manifest) > MANIFEST_BYTES_MAX:
                raise _unexpected("a manifest without end")
            return
        if self._archive is None:
            raise _unexpected("data outside of an archive")
        for event in self._archive.feed(data):
            if isinstance(event, TarMember):
                yield from self._member(event)
            else:
                assert self._file is not None
                yield from self._file.take(event)
                self._note_if_complete()

    def _member(self, member: TarMember) -> Iterator[Piece]:
        path = self._prefix + member.path if member.path else self._prefix.rstrip("/")
        if member.type == FILE:
            item = Item(
                path,
                ItemKind.FILE,
                member.mode,
                member.size_bytes,
                member.modified_seconds * 1_000_000,
                page_bytes=PAGE_BYTES if relation_of(path) else 0,
            )
            self._file = _Receiving(item, self.check if item.page_bytes else None)
            if item.size_bytes == 0:
                yield BytesPiece(item, bytearray(), 0, None)
                self._note_if_complete()
        elif member.type == DIRECTORY:
            self._add(Item(path, ItemKind.DIRECTORY, member.mode))
        elif member.type == LINK and path.startswith("pg_tblspc/"):
            self._add(Item(path, ItemKind.LINK, 0o777, link_target=member.link_target))
        elif path in EMPTIED_DIRECTORIES:
            self._add(Item(path, ItemKind.DIRECTORY, 0o700))
        else:
            self.notes.append(f"{path!r} is a symbolic link and was left out")

    def _add(self, item: Item) -> None:
        """The first that names a path wins, but for a link: it comes after the plain directory of 14."""
        if item.path in ("", ".") or (item.path in self._directories and item.kind != ItemKind.LINK):
            return
        self._directories[item.path] = item

    def _note_if_complete(self) -> None:
        file = self._file
        if file is not None and file.done == file.item.size_bytes:
            if file.item.path in self.received:
                raise _unexpected(f"file {file.item.path!r} twice")
            self.received[file.item.path] = FileDigest(file.done, file.crc)
            self._file = None


class _Receiving:
    """A file of which not all has come."""

    def __init__(self, item: Item, check: PageCheck | None) -> None:
        self.item = item
        self.done = 0
        self.crc = 0
        self._check = check
        self._content = bytearray()
        self._content_offset = 0

    def take(self, data: memoryview) -> Iterator[Piece]:
        """The next bytes; a piece when one is full or the file is complete."""
        while data:
            room = PIECE_BYTES - len(self._content)
            part = data[:room]
            self._content += part
            self.done += len(part)
            data = data[len(part) :]
            if len(self._content) == PIECE_BYTES or self.done == self.item.size_bytes:
                self.crc = crc32c(self._content, self.crc)
                yield BytesPiece(self.item, self._content, self._content_offset, self._check)
                self._content, self._content_offset = bytearray(), self.done


def _expect_rows(events: Iterator[CopyEvent]) -> Rows:
    event = next(events, None)
    if not isinstance(event, Rows):
        raise _unexpected("no result set at the begin")
    return event


def _position(rows: Rows) -> Position:
    """Result sets one and last: a position and its timeline."""
    lsn, timeline = rows.rows[0][:2]
    return Position(branch_of(int(timeline or 0)), parse_lsn(lsn or "0/0"))


def _unexpected(what: str) -> IntegrityError:
    return IntegrityError("base backup stream is not understood", detail=f"The server sent {what}.")
