"""
The two ends of the engine's own archiving: `push` for archive_command, `fetch` for restore_command.

`fetch` raises LogNotInArchive only for what is proved not to exist: a log file beyond the end of its branch,
the history of a branch of which nothing is stored. Everything else that goes wrong is another error: the
engine takes "not in the archive" for the end of the log and would open a truncated database without a word.
Source: PostgreSQL manual, Continuous Archiving; measured behaviour of recovery with missing files.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from cloudsave.engines.dialect_api import Dialect
from cloudsave.errors import (
    IntegrityError,
    LogConflict,
    LogHole,
    LogNotInArchive,
    ObjectMissing,
    RecoveryError,
    SourceUnreadable,
    UsageError,
)
from cloudsave.logs.ledger import file_begin
from cloudsave.logs.writer import segment_of
from cloudsave.model.history import Ancestry
from cloudsave.model.ledger import Cover, Ledger, read_extents
from cloudsave.model.position import Position
from cloudsave.repository.lineage import Lineage
from cloudsave.repository.log_copies import reading_copies

FIRST_BRANCH = "00000001"
"""The branch that has no history file by nature."""
OBJECT_BYTES_MAX = 16 << 20
"""A pushed log file is stored in objects of at most this, aligned."""
_FILE_BYTES_MIN, _FILE_BYTES_MAX = 1 << 20, 1 << 30
_PAGE_BYTES = 8192
_NOT_LOG = (".backup", ".partial")
"""Suffixes of files that recovery never needs by these names."""


def push(lineage: Lineage, dialect: Dialect, path: Path) -> str:
    """
    Store one file of the engine's archive; durable when it returns. What was done, in a sentence.

    Raises: LogConflict (the same file with other content is stored), IntegrityError (not a valid file of
    this system), UsageError (a name that is not known), SourceUnreadable, StoreError.
    """
    name = path.name
    if name.endswith(".backup"):
        return f"{name} accepted: the repository keeps its own labels"
    content = _read(path)
    if name.endswith(".history"):
        dialect.parse_history(content)
        lineage.put_history(name.removesuffix(".history"), content)
        return f"{name} stored"
    if name.endswith(".partial"):
        return _push_partial(lineage, dialect, name, content)
    begin = _log_position(dialect, name, len(content))
    return _store(lineage, dialect, begin, content, log_file_bytes=len(content), name=name)


def fetch(
    lineage: Lineage,
    dialect: Dialect,
    name: str,
    destination: Path,
    *,
    log_file_bytes: int,
    needed_until: int | None = None,
) -> None:
    """
    Write the archive file `name` to `destination`, all or nothing.

    `needed_until`: recovery stops at this offset, so that log missing after it does no harm.
    Raises: LogNotInArchive, LogHole, IntegrityError, UsageError, TargetDirectoryInUse, RecoveryError,
    StoreError.
    """
    if name.endswith(".history"):
        _write(destination, [_history(lineage, name.removesuffix(".history"))])
        return
    if name.endswith(_NOT_LOG):
        raise LogNotInArchive(f"log file {name} is not in the archive")
    begin = dialect.parse_log_file_name(name, log_file_bytes=log_file_bytes)
    if begin is None:
        raise UsageError(f"cannot understand log file name {name!r}")
    last = begin.offset + log_file_bytes
    own = [(begin.branch, 0, None)]
    cover = Ledger(lineage.logs_near(begin.branch, begin.offset)).cover(own, begin.offset, last)
    if not cover.complete:
        cover = _cover_with_parents(lineage, dialect, name, begin, last, needed_until)
    segments = lineage.logs_near(begin.branch, begin.offset)
    stored = read_extents(reading_copies(lineage.read_log, segments), cover.extents)
    # A server asks for a file to be put into a directory of its data directory.
    server = destination.absolute().parent.parent
    until = log_file_bytes if needed_until is None else needed_until - begin.offset
    dialect.check_replay(stored, until=until, log_file_bytes=log_file_bytes, directory=server)
    _write(destination, [stored, bytes(log_file_bytes - len(stored))])


# ---- push


def _push_partial(lineage: Lineage, dialect: Dialect, name: str, content: bytes) -> str:
    """The last file of a branch that ended: valid up to its last record, the rest is left-over."""
    begin = _log_position(dialect, name.removesuffix(".partial"), len(content))
    indexer = dialect.indexer(
        begin, log_file_bytes=len(content), system_identifier=_system_identifier(lineage)
    )
    for page in range(0, len(content), _PAGE_BYTES):
        try:
            indexer.feed(content[page : page + _PAGE_BYTES])
        except IntegrityError:
            if page == 0:
                raise
            break
    valid = max(0, indexer.take().records_end - begin.offset)
    if valid == 0:
        return f"{name} accepted: it holds no complete record"
    return _store(lineage, dialect, begin, content[:valid], log_file_bytes=len(content), name=name)


def _store(
    lineage: Lineage, dialect: Dialect, begin: Position, content: bytes, *, log_file_bytes: int, name: str
) -> str:
    """Compare with what is stored, then store in aligned objects. `content` begins with a log file."""
    ledger = Ledger(lineage.logs_near(begin.branch, begin.offset))
    last = begin.offset + len(content)
    _compare(lineage, ledger, begin, content, name=name)
    indexer = dialect.indexer(
        begin, log_file_bytes=log_file_bytes, system_identifier=_system_identifier(lineage)
    )
    if ledger.frontier(begin.branch, begin.offset) >= last:
        return f"{name} is stored already"
    for first in range(0, len(content), OBJECT_BYTES_MAX):
        part = content[first : first + OBJECT_BYTES_MAX]
        indexer.feed(part)
        index = indexer.take()
        offset = begin.offset + first
        lineage.put_log(segment_of(begin.branch, offset, offset + len(part), index), [part], index)
    return f"{name} stored"


def _compare(lineage: Lineage, ledger: Ledger, begin: Position, content: bytes, *, name: str) -> None:
    """Stored log of the same place must be the same. Raises: LogConflict."""
    last = begin.offset + len(content)
    cursor = begin.offset
    for first, end in ledger.ranges(begin.branch):
        cursor = max(cursor, first)
        if cursor >= min(end, last):
            continue
        cover = ledger.cover([(begin.branch, 0, None)], cursor, min(end, last))
        stored = read_extents(lineage.read_log, cover.extents)
        at = cursor - begin.offset
        if content[at : at + len(stored)] != stored:
            raise LogConflict(
                f"log file {name} differs from the stored log",
                detail=f"Other bytes are stored between {cursor:#x} and {min(end, last):#x}.",
                hints=["does a restored copy of the source archive into the same repository?"],
            )


def _log_position(dialect: Dialect, name: str, size: int) -> Position:
    if size & (size - 1) or not _FILE_BYTES_MIN <= size <= _FILE_BYTES_MAX:
        raise IntegrityError(
            f"log file {name} has an impossible size",
            detail=f"It has {size} bytes; a log file has a power of two from 1 MiB to 1 GiB.",
            hints=["was it cut off by a full disk?"],
        )
    begin = dialect.parse_log_file_name(name, log_file_bytes=size)
    if begin is None:
        raise UsageError(
            f"cannot understand log file name {name!r}",
            hints=["archive_command gives the path as %p: `cloudsave logs push NAME %p`"],
        )
    return begin


def _system_identifier(lineage: Lineage) -> str:
    return lineage.id.partition("-")[2]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SourceUnreadable(f"could not read log file {str(path)!r}", detail=str(error)) from error


# ---- fetch


def _history(lineage: Lineage, branch: str) -> bytes:
    with suppress(ObjectMissing):
        return lineage.history(branch)
    if branch != FIRST_BRANCH and any(segment.branch == branch for segment in lineage.logs()):
        raise IntegrityError(
            f"history of branch {branch} is missing",
            detail="Log of this branch is stored, so recovery without its history would miss it.",
            hints=["archive the .history file of the server's pg_wal with `cloudsave logs push`"],
        )
    raise LogNotInArchive(f"history of branch {branch} is not in the archive")


def _cover_with_parents(
    lineage: Lineage, dialect: Dialect, name: str, begin: Position, last: int, needed_until: int | None
) -> Cover:
    """
    What is stored of a log file, the parents' part of a branch's first file included; complete but for what
    lies beyond the end of the branch. Raises: LogNotInArchive, LogHole.
    """
    ledger = Ledger(lineage.logs())
    histories = lineage.readable_histories()
    damaged = [one for one in lineage.branches_with_history() if one not in histories]
    if begin.branch in damaged:
        lineage.history(begin.branch)
    ancestry = Ancestry({b: dialect.parse_history(raw) for b, raw in histories.items()})
    path = ancestry.lineage_of(begin.branch)
    switch = path[-1][1]
    if last <= file_begin(switch, last - begin.offset):
        raise LogNotInArchive(f"log file {name} is not in the archive", detail="Its branch begins later.")
    cover = ledger.cover(path, begin.offset, last)
    if cover.complete or (needed_until is not None and cover.end >= needed_until):
        return cover
    known_end = max(
        (
            ledger.furthest(begin.branch),
            *(hole.last for hole in lineage.holes() if hole.branch == begin.branch),
            *_ends(ancestry, begin.branch),
        )
    )
    if cover.end < known_end:
        raise LogHole(
            f"log file {name} has a hole",
            detail=f"Branch {cover.branch} is known up to {known_end:#x}; {cover.end:#x} is not stored.",
            hints=["`cloudsave ranges NAME` shows what can be recovered"],
        )
    if damaged:
        # It may tell that this branch goes on: then this is a hole, and not the end.
        lineage.history(damaged[0])
    if cover.end <= begin.offset:
        raise LogNotInArchive(f"log file {name} is beyond the end of the archive")
    return cover


def _ends(ancestry: Ancestry, branch: str) -> Iterator[int]:
    """Where other branches left this one: at least so far its log must go."""
    for points in ancestry.ancestors.values():
        yield from (point.end_offset for point in points if point.branch == branch)


def _write(destination: Path, parts: Sequence[bytes]) -> None:
    """Put a file in place at once: recovery must never see a part of it."""
    temporary = destination.with_name(f".{destination.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            file.writelines(parts)
        temporary.replace(destination)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise RecoveryError(f"could not write log file {str(destination)!r}", detail=str(error)) from error
