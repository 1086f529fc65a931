"""What PostgreSQL's log looks like from outside: positions, file names, histories."""

from __future__ import annotations

import os
import re
from pathlib import Path

from cloudsave.engines.dialect_api import LogIndexer
from cloudsave.engines.postgresql.format_tablespace import tablespaces_made
from cloudsave.engines.postgresql.format_wal import (
    WalIndexer,
    format_lsn,
    parse_lsn,
    parse_segment_name,
    segment_name,
)
from cloudsave.engines.postgresql.log import branch_of
from cloudsave.errors import IntegrityError, TargetDirectoryInUse, UsageError
from cloudsave.model.history import FIRST_BRANCH, BranchPoint
from cloudsave.model.position import Position

_HISTORY_LINE = re.compile(rb"\s*(\d+)\s+([0-9A-Fa-f]{1,8})/([0-9A-Fa-f]{1,8})(?:\s.*)?")


class PostgresDialect:
    """`Dialect` of PostgreSQL."""

    name = "postgresql"
    instants_at_commit = True

    def parse_position(self, text: str, *, branch: str) -> int:
        """See `Dialect.parse_position`; every branch counts the same way."""
        try:
            return parse_lsn(text.strip())
        except ValueError:
            where = f" on timeline {branch}" if branch else ""
            raise UsageError(
                f"cannot understand position {text!r}",
                detail=f"A position{where} is an LSN: two hexadecimal numbers and a slash.",
                hints=["SELECT pg_current_wal_lsn() prints one, such as 16/B374D848"],
            ) from None

    def format_position(self, position: Position) -> str:
        """See `Dialect.format_position`."""
        return format_lsn(position.offset)

    def parse_history(self, content: bytes) -> tuple[BranchPoint, ...]:
        """
        See `Dialect.parse_history`; ancestors that gave nothing to the branch are left out.

        A server that was told to follow timeline 2, and stopped on timeline 1 before 2 began, writes that 2
        ended where it stopped: before 2 began. What counts is timeline 1 up to there.
        Source: PostgreSQL tliOfPointInHistory(), src/backend/access/transam/timeline.c: the newest timeline
        that holds a position is the one.
        """
        points: list[BranchPoint] = []
        for point in _history_lines(content):
            while points and points[-1].end_offset > point.end_offset:
                earlier = points.pop()
                began = points[-1].end_offset if points else 0
                if began < point.end_offset:
                    points.append(BranchPoint(earlier.branch, point.end_offset))
            if point.end_offset > (points[-1].end_offset if points else 0):
                points.append(point)
        return tuple(points)

    def first_branch(self, system_identifier: str) -> str:  # noqa: ARG002
        """See `Dialect.first_branch`: every cluster begins on timeline 1."""
        return FIRST_BRANCH

    def transaction_text(self, log: memoryview) -> str:  # noqa: ARG002
        """See `Dialect.transaction_text`."""
        return ""

    def parse_transaction(self, text: str) -> int:
        """See `Dialect.parse_transaction`. The log has 32 bits of what pg_current_xact_id() shows."""
        try:
            return int(text) & 0xFFFFFFFF
        except ValueError:
            raise UsageError(
                f"cannot understand transaction {text!r}",
                hints=["a transaction is named by its number, as SELECT pg_current_xact_id() prints it"],
            ) from None

    def indexer(self, start: Position, *, log_file_bytes: int, system_identifier: str) -> LogIndexer:
        """See `Dialect.indexer`."""
        return WalIndexer(start, log_file_bytes=log_file_bytes, system_identifier=system_identifier)

    def log_file_name(self, branch: str, offset: int, *, log_file_bytes: int) -> str:
        """See `Dialect.log_file_name`. Source: XLogFileName(), src/include/access/xlog_internal.h."""
        return segment_name(int(branch, 16), offset, segment_bytes=log_file_bytes)

    def parse_log_file_name(self, name: str, *, log_file_bytes: int) -> Position | None:
        """See `Dialect.parse_log_file_name`."""
        found = parse_segment_name(name, segment_bytes=log_file_bytes)
        return None if found is None else Position(branch_of(found[0]), found[1])

    def check_replay(
        self, log: bytes | bytearray, *, until: int, log_file_bytes: int, directory: Path
    ) -> None:
        """
        See `Dialect.check_replay`: replay of CREATE TABLESPACE links to the source's own directory. Beside a
        running source that would be shared, and the source's files overwritten.
        """
        for oid, location in tablespaces_made(log, until=until, log_file_bytes=log_file_bytes).items():
            link = directory / "pg_tblspc" / oid
            ours = link.is_symlink() and os.readlink(link) == location
            if link.parent.is_dir() and not ours and _in_use(Path(location)):
                raise TargetDirectoryInUse(
                    f"replay would write into a directory that is in use: {location}",
                    detail=f"Tablespace {oid} was made there after the backup had begun; replay makes it"
                    " there again, and cannot be told another place.",
                    hints=[
                        "restore on a machine (or in a container) where that directory is empty",
                        "a backup taken after the tablespace was made can be restored beside the source",
                        "a target before it was made is not affected",
                    ],
                )


def _in_use(place: Path) -> bool:
    try:
        return any(place.iterdir())
    except FileNotFoundError:
        return False
    except OSError:
        return True


def followed_branch(history: bytes) -> str:
    """The branch that a server followed before it wrote this history; "" where it names none."""
    last = last_ancestor(history)
    return last.branch if last else ""


def last_ancestor(history: bytes) -> BranchPoint | None:
    """The branch that a server followed before it wrote this history, and where it left it."""
    points = _history_lines(history)
    return points[-1] if points else None


def _history_lines(content: bytes) -> list[BranchPoint]:
    """
    Lines "timeline LSN reason", "#" comments, timelines ascending. Raises: IntegrityError.

    Source: PostgreSQL readTimeLineHistory(), src/backend/access/transam/timeline.c.
    """
    points: list[BranchPoint] = []
    for line in content.splitlines():
        if not line.strip() or line.lstrip().startswith(b"#"):
            continue
        found = _HISTORY_LINE.fullmatch(line)
        if found is None:
            raise _damaged(f"it has the line {line[:60]!r}")
        point = BranchPoint(branch_of(int(found[1])), (int(found[2], 16) << 32) | int(found[3], 16))
        if points and point.branch <= points[-1].branch:
            raise _damaged("its timelines do not ascend")
        points.append(point)
    return points


def _damaged(what: str) -> IntegrityError:
    return IntegrityError("timeline history file is damaged", detail=f"Of the file: {what}.")
