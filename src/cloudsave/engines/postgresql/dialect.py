"""What PostgreSQL's log looks like from outside: positions, file names, histories."""

from __future__ import annotations

import re

from cloudsave.engines.api import LogIndexer
from cloudsave.engines.postgresql.format_wal import WalIndexer
from cloudsave.engines.postgresql.log import branch_of, format_lsn
from cloudsave.errors import IntegrityError, UsageError
from cloudsave.model.history import BranchPoint
from cloudsave.model.position import Position

OFFSET_MAX = (1 << 64) - 1
_LSN = re.compile(r"([0-9A-Fa-f]{1,8})/([0-9A-Fa-f]{1,8})")
_FILE_NAME = re.compile(r"([0-9A-F]{8})([0-9A-F]{8})([0-9A-F]{8})")
_HISTORY_LINE = re.compile(rb"\s*(\d+)\s+([0-9A-Fa-f]{1,8})/([0-9A-Fa-f]{1,8})(?:\s.*)?")


class PostgresDialect:
    """`Dialect` of PostgreSQL."""

    name = "postgresql"

    def parse_position(self, text: str, *, branch: str) -> int:
        """See `Dialect.parse_position`; every branch counts the same way."""
        found = _LSN.fullmatch(text.strip())
        if found is None:
            raise UsageError(
                f"cannot understand position {text!r}",
                detail=f"A position on timeline {branch} is an LSN: two hexadecimal numbers and a slash.",
                hints=["SELECT pg_current_wal_lsn() prints one, such as 16/B374D848"],
            )
        return (int(found[1], 16) << 32) | int(found[2], 16)

    def format_position(self, position: Position) -> str:
        """See `Dialect.format_position`."""
        return format_lsn(position.offset)

    def parse_history(self, content: bytes) -> tuple[BranchPoint, ...]:
        """
        See `Dialect.parse_history`: lines "timeline LSN reason", "#" comments, timelines ascending.

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
            if points and (point.branch <= points[-1].branch or point.end_offset < points[-1].end_offset):
                raise _damaged("its timelines do not ascend")
            points.append(point)
        return tuple(points)

    def indexer(self, start: Position, *, log_file_bytes: int, system_identifier: str) -> LogIndexer:
        """See `Dialect.indexer`."""
        return WalIndexer(start, log_file_bytes=log_file_bytes, system_identifier=system_identifier)

    def log_file_name(self, branch: str, offset: int, *, log_file_bytes: int) -> str:
        """See `Dialect.log_file_name`. Source: XLogFileName(), src/include/access/xlog_internal.h."""
        files_per_id = (1 << 32) // log_file_bytes
        high, low = divmod(offset // log_file_bytes, files_per_id)
        return f"{branch}{high:08X}{low:08X}"

    def parse_log_file_name(self, name: str, *, log_file_bytes: int) -> Position | None:
        """See `Dialect.parse_log_file_name`."""
        found = _FILE_NAME.fullmatch(name)
        files_per_id = (1 << 32) // log_file_bytes
        if found is None or int(found[3], 16) >= files_per_id:
            return None
        number = int(found[2], 16) * files_per_id + int(found[3], 16)
        return Position(found[1], number * log_file_bytes)


def _damaged(what: str) -> IntegrityError:
    return IntegrityError("timeline history file is damaged", detail=f"Of the file: {what}.")
