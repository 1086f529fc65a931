"""
A base backup read from the data directory on this machine, in backup mode, by many threads.

Invariant: nothing is copied before the server is in backup mode, and `pg_control` is copied after all else,
so that replay from the start of the backup makes every page right, torn ones included.
Invariant: the session that started the backup stops it; when it ends in any other way, so does the backup.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cloudsave.clock import SYSTEM_CLOCK, Clock
from cloudsave.engines.postgresql.backup_session import (
    BackupSession,
    Stopped,
    label_start,
    outside_files,
    read_local,
)
from cloudsave.engines.postgresql.data_directory import Walk, file_item, unreadable
from cloudsave.engines.postgresql.exclusions import CONTROL_FILE, relation_of
from cloudsave.engines.postgresql.format_control import ControlFile, parse_control
from cloudsave.engines.postgresql.format_page import page_lsns
from cloudsave.engines.postgresql.format_wal import segment_name
from cloudsave.engines.postgresql.page_check import PageCheck
from cloudsave.engines.postgresql.summaries import changes_by_summaries, summarizes
from cloudsave.errors import EngineError, IntegrityError
from cloudsave.model.engine_facts import BackupStart, BackupStop, LogAtHand
from cloudsave.model.identity import Role, SourceIdentity
from cloudsave.model.item import ContentPiece, Item, ItemKind, LateFile, Piece
from cloudsave.model.position import Position

PIECE_BYTES = 32 << 20
"""Length of a piece."""
SMALL_FILE_BYTES_MAX = 1 << 20
"""
Files up to this size come between the pieces of larger ones, since the work on them is done under the
interpreter lock. Those without pages are read at once, to their end, wherever that is by then.
"""
CONTROL_TRIES_MAX = 10
"""Limit: reads of `pg_control` until its CRC fits; the server overwrites it in place."""
CONTROL_RETRY_SECONDS = 0.1
ALIVE_SECONDS = 30.0
"""How often the held session is used: a firewall must not drop it, and its loss is to be known early."""
_CONTROL_BYTES_MAX = 8192


class LocalBackupSource:
    """`BackupSource` over a data directory that is proved to be the server's."""

    def __init__(
        self,
        session: BackupSession,
        identity: SourceIdentity,
        *,
        label: str,
        fast: bool,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._session = session
        self._identity = identity
        self._label = label
        self._fast = fast
        self._clock = clock
        self._root = Path(identity.data_directory)
        self._walk: Walk | None = None
        self._items: list[Item] = []
        """Files as they were in backup mode; those that come later are made by replay."""
        self._outside: tuple[tuple[Item, bytes], ...] = ()
        self._notes: list[str] = []
        self._check: PageCheck | None = None
        self._start: Position | None = None

    def begin(self) -> BackupStart:
        """See `BackupSource.begin`. Raises: UnsuitableSettings, PermissionMissing, SourceUnreadable."""
        start = self._start = self._session.start(self._label, fast=self._fast)
        clock_us = self._session.clock_us()
        self._check = PageCheck(
            start_offset=start.offset, checksums=self._identity.page_checksums, clock=self._clock
        )
        found = outside_files(self._session, self._identity.data_directory, read_local)
        self._outside = found.files
        self._walk = Walk(self._root, self._session.tablespace_version())
        self._items = list(self._walk.files())
        links = [item for item in self._walk.ordered_directories() if item.kind == ItemKind.LINK]
        tablespaces = {item.path.rpartition("/")[2]: item.link_target for item in links}
        return BackupStart(
            position=start,
            method="local",
            bytes_expected=sum(item.size_bytes for item in self._items),
            tablespaces=tablespaces,
            settings=self._session.settings(),
            clock_us=clock_us,
            notes=found.notes,
            block_position=lambda page: int(page_lsns(page)[0]),
            log_at_hand=LogAtHand(self._identity, self._read_log),
            changes_told=self._changes_since if self._can_tell_changes() else None,
        )

    def pieces(self) -> Iterator[Piece]:
        """
        See `BackupSource.pieces`. What grows beyond the size first seen is brought back by replay.

        Raises: SourceUnreadable; EngineError as soon as the held session turns out to be lost, or the replica
        to be one no more.
        """
        used_at = self._clock.monotonic()
        for piece in self._all_pieces():
            yield piece
            if self._clock.monotonic() - used_at >= ALIVE_SECONDS:
                self._session.see_role(self._identity.role)
                used_at = self._clock.monotonic()

    def _all_pieces(self) -> Iterator[Piece]:
        """The largest files first, small ones spread between their pieces."""
        large = [item for item in self._items if item.size_bytes > SMALL_FILE_BYTES_MAX]
        large.sort(key=lambda item: (-item.size_bytes, item.path))
        small = [item for item in self._items if item.size_bytes <= SMALL_FILE_BYTES_MAX]
        pieces_large = sum(-(-item.size_bytes // PIECE_BYTES) for item in large)
        between = len(small) // (pieces_large + 1)
        rest = iter(small)
        for item in large:
            for piece in self._file_pieces(item):
                yield piece
                for one in itertools.islice(rest, between):
                    yield from self._file_pieces(one)
        for one in rest:
            yield from self._file_pieces(one)
        for item, content in self._outside:
            yield ContentPiece(item, content)

    def _file_pieces(self, item: Item) -> Iterator[Piece]:
        assert self._check is not None
        if item.page_bytes == 0 and item.size_bytes <= SMALL_FILE_BYTES_MAX:
            whole = self._whole_file(item)
            if whole is not None:
                yield whole
            return
        if not item.size_bytes:
            yield ContentPiece(item, b"")
        for offset in range(0, item.size_bytes, PIECE_BYTES):
            yield FilePiece(self._root, item, self._check, offset=offset)

    def finish(self) -> BackupStop:
        """See `BackupSource.finish`. Raises: EngineError where the server has left backup mode."""
        assert self._check is not None
        assert self._walk is not None
        assert self._start is not None
        control, control_item, content = self._read_control()
        stopped = self._session.stop()
        self._session.close()
        begun = label_start(stopped.label)
        if begun != self._start:
            raise IntegrityError(
                "backup label does not belong to this backup",
                detail=f"Started at {self._start}, the label says {begun}.",
            )
        return BackupStop(
            position=Position(self._stop_branch(control), stopped.offset),
            directories=self._walk.ordered_directories(),
            late_files=(*self._labels(stopped), LateFile(control_item, content)),
            corrupt_pages=self._check.corrupt_pages(end_offset=stopped.offset),
            notes=tuple(self._walk.notes + self._notes),
        )

    def abort(self) -> None:
        """See `BackupSource.abort`: the end of the session ends backup mode."""
        self._session.close()

    def _can_tell_changes(self) -> bool:
        """A replica's own summaries are not asked: it may have summarised what it never replays."""
        return self._identity.role == Role.PRIMARY and summarizes(self._session)

    def _changes_since(self, first: Position, branch_begin: int) -> Iterator[npt.NDArray[np.void]]:
        """See `BackupStart.changes_told`."""
        assert self._start is not None
        return changes_by_summaries(
            self._session, first, self._start, branch_begin=branch_begin, clock=self._clock
        )

    def _read_log(self, begin: Position, end: int) -> bytes:
        """See `LogAtHand`."""
        size, parts, offset = self._identity.log_file_bytes, [], begin.offset
        while offset < end:
            path = self._root / "pg_wal" / segment_name(int(begin.branch, 16), offset, segment_bytes=size)
            try:
                with path.open("rb") as file:
                    file.seek(offset % size)
                    part = file.read(min(end - offset, size - offset % size))
            except FileNotFoundError:
                break
            except OSError as error:
                raise unreadable(path, error) from error
            parts.append(part)
            offset += len(part)
            if not part:
                break
        return b"".join(parts)

    def _whole_file(self, item: Item) -> Piece | None:
        """
        A small file without pages. Some are replaced by rename while we look, so that the size first seen
        means nothing. None where it is gone.
        """
        path = self._root / item.path
        try:
            with path.open("rb") as file:
                return ContentPiece(file_item(item.path, os.fstat(file.fileno())), file.read())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise unreadable(path, error) from error

    def _read_control(self) -> tuple[ControlFile, Item, bytes]:
        """`pg_control` with a CRC that fits."""
        path = self._root / CONTROL_FILE
        for attempt in range(CONTROL_TRIES_MAX):
            if attempt:
                self._clock.sleep(CONTROL_RETRY_SECONDS)
            try:
                with path.open("rb") as file:
                    content = file.read(_CONTROL_BYTES_MAX)
                    item = file_item(CONTROL_FILE, os.fstat(file.fileno()))
                control = parse_control(content)
            except OSError as error:
                raise unreadable(path, error) from error
            except IntegrityError:
                continue
            if str(control.system_identifier) != self._identity.system_identifier:
                raise EngineError(
                    "data directory has been replaced during the backup",
                    detail=f"Its system identifier is now {control.system_identifier}.",
                )
            return control, item, content
        raise IntegrityError(
            "control file of the server is damaged",
            detail=f"The CRC of {str(path)!r} was wrong {CONTROL_TRIES_MAX} times in a row.",
            hints=["is the server healthy? it could not start from this file"],
        )

    def _stop_branch(self, control: ControlFile) -> str:
        """
        The branch on which the backup ends. A primary cannot leave its branch; a replica follows another
        one, and says so in its control file.
        """
        assert self._start is not None
        if self._identity.role == Role.REPLICA and control.min_recovery_timeline:
            return f"{control.min_recovery_timeline:08X}"
        return self._start.branch

    def _labels(self, stopped: Stopped) -> Iterator[LateFile]:
        mode = (self._root / "PG_VERSION").stat().st_mode & 0o7777
        now_us = int(self._clock.now().timestamp() * 1_000_000)
        for name, text in (("backup_label", stopped.label), ("tablespace_map", stopped.tablespace_map)):
            if text:
                content = text.encode("utf-8", "surrogateescape")
                yield LateFile(Item(name, ItemKind.FILE, mode, len(content), now_us), content)


class FilePiece:
    """
    A stretch of a file of the data directory, opened when it is first read, so that the open files are as
    many as the readers.
    """

    def __init__(self, root: Path, item: Item, check: PageCheck, *, offset: int) -> None:
        self.item = item
        self.offset = offset
        self.length = min(PIECE_BYTES, item.size_bytes - offset)
        self._root = root
        self._check = check
        self._file: FileIO | None = None
        self._done = 0

    def read_into(self, target: memoryview, *, offset: int) -> int:
        """See `Piece.read_into`. A file that is gone was dropped; replay drops it too."""
        want = min(len(target), self.length - offset)
        try:
            if self._file is None:
                self._file = FileIO(f"{self._root}/{self.item.path}")
            descriptor = self._file.fileno()
            self._read_ahead(descriptor, offset, offset + want)
            got = _read_fully(descriptor, target[:want], self.offset + offset)
            relation = relation_of(self.item.path) if self.item.page_bytes else None
            if relation is not None and got:
                first_block = relation.first_block + (self.offset + offset) // self.item.page_bytes
                self._check.check_file(
                    self.item.path,
                    target[:got],
                    first_block=first_block,
                    descriptor=descriptor,
                    offset=self.offset + offset,
                )
        except FileNotFoundError:
            return 0
        except OSError as error:
            raise unreadable(self._root / self.item.path, error) from error
        return got

    def close(self) -> None:
        """See `Piece.close`."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _read_ahead(self, descriptor: int, begin: int, end: int) -> None:
        """Ask for what is read next while this is worked on; not where only parts of the piece are read."""
        sequential, self._done = begin == self._done, end
        left = min(self.length - end, 1 << 20)
        if left > 0 and sequential:
            os.posix_fadvise(descriptor, self.offset + end, left, os.POSIX_FADV_WILLNEED)


def _read_fully(descriptor: int, target: memoryview, offset: int) -> int:
    """Fill `target`; fewer bytes only at the end of the file."""
    done = 0
    while done < len(target):
        got = os.preadv(descriptor, [target[done:]], offset + done)
        if got == 0:
            break
        done += got
    return done
