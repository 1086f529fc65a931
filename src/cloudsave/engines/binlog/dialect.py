"""What a binlog looks like from outside: positions and file names."""

from __future__ import annotations

import re
import struct
from pathlib import Path

from cloudsave.engines.binlog.format_event import parse_gtid, parse_header
from cloudsave.engines.binlog.indexer import BinlogIndexer
from cloudsave.engines.binlog.position import (
    format_offset,
    number_of,
    parse_offset,
)
from cloudsave.engines.dialect_api import LogIndexer
from cloudsave.errors import LogDamaged, UsageError
from cloudsave.model.history import BranchPoint
from cloudsave.model.position import Position

_GTID = re.compile(r"(?:\d+-\d+-|[0-9a-fA-F-]{36}:(?:[a-z_]\w*:)?)?(\d{1,20})")


class BinlogDialect:
    """`Dialect` of an engine whose log is a binlog."""

    def __init__(self, name: str) -> None:
        self.name = name
        # MariaDB stamps a transaction with the begin of its last statement.
        self.instants_at_commit = name != "mariadb"

    def parse_position(self, text: str, *, branch: str) -> int:
        """See `Dialect.parse_position`."""
        try:
            return parse_offset(text.strip())
        except ValueError:
            raise UsageError(
                f"cannot understand position {text!r}",
                detail=f"A position in the binlog of {branch} is the number of a file, a colon and a place.",
                hints=["the server's binlog.000012 and 4711 are written 000012:4711 or binlog.000012:4711"],
            ) from None

    def format_position(self, position: Position) -> str:
        """See `Dialect.format_position`."""
        return format_offset(position.offset)

    def parse_history(self, content: bytes) -> tuple[BranchPoint, ...]:  # noqa: ARG002
        """See `Dialect.parse_history`: servers write none, each has a binlog of its own."""
        return ()

    def first_branch(self, system_identifier: str) -> str:
        """See `Dialect.first_branch`: the only branch is the server."""
        return system_identifier

    def transaction_text(self, log: memoryview) -> str:
        """See `Dialect.transaction_text`: its GTID."""
        try:
            return parse_gtid(log[: (header := parse_header(log)).length], header).text
        except struct.error as error:
            raise LogDamaged("binlog is damaged", detail="A transaction is cut off.") from error

    def parse_transaction(self, text: str) -> int:
        """See `Dialect.parse_transaction`: a GTID, of which the index holds the number."""
        found = _GTID.fullmatch(text.strip())
        if found is None:
            raise UsageError(
                f"cannot understand transaction {text!r}",
                detail="A transaction is named by its GTID, or by the number at the end of it.",
                hints=["SELECT @@gtid_binlog_pos (MariaDB) or @@gtid_executed (MySQL) shows such"],
            )
        return int(found[1])

    def indexer(
        self,
        start: Position,
        *,
        log_file_bytes: int,  # noqa: ARG002
        system_identifier: str,  # noqa: ARG002
    ) -> LogIndexer:
        """See `Dialect.indexer`."""
        return BinlogIndexer(start)

    def log_file_name(self, branch: str, offset: int, *, log_file_bytes: int) -> str:  # noqa: ARG002
        """See `Dialect.log_file_name`; the base name is the servers' default."""
        return f"binlog.{number_of(offset):06}"

    def parse_log_file_name(
        self,
        name: str,  # noqa: ARG002
        *,
        log_file_bytes: int,  # noqa: ARG002
    ) -> Position | None:
        """See `Dialect.parse_log_file_name`: a name does not tell whose file it is, so none is taken."""
        return None

    def check_replay(
        self, log: bytes | bytearray, *, until: int, log_file_bytes: int, directory: Path
    ) -> None:
        """See `Dialect.check_replay`: replay writes into the restored server alone."""
