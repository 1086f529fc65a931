"""
Where in a binlog file replay ends, and which GTIDs are executed then: by its events.

Source: MariaDB sql/log_event.h (GTID_LIST); decision 0036.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from cloudsave.engines.binlog.format_event import (
    CHECKSUM_BYTES,
    HEADER_BYTES,
    MAGIC,
    MARIADB_GTID,
    MYSQL_ANONYMOUS,
    MYSQL_GTID,
    MYSQL_TAGGED_GTID,
    ends_transaction,
    parse_gtid,
    parse_header,
)
from cloudsave.errors import LogDamaged, UnsuitableSettings

MARIADB_GTID_LIST = 163
_COUNT_BITS = 28
_LIST_ENTRY = struct.Struct("<IIQ")


@dataclass(frozen=True, slots=True)
class Cut:
    """A file ends at `place`; `executed`: of each domain the last GTID before it."""

    place: int
    executed: dict[int, str]
    transactions: int
    """How many complete ones are before `place`."""


def cut_mariadb(log: bytes | memoryview, *, stop: int, inclusive: bool) -> Cut:
    """
    Where to end a file of MariaDB so that it holds all transactions that begin before the place `stop`, and
    with `inclusive` the one that begins there. A transaction that is not complete is left out. Raises:
    LogDamaged.
    """
    place, begin, open_gtid = len(MAGIC), 0, ""
    end = place
    executed: dict[int, str] = {}
    domain, standalone, transactions = 0, False, 0
    while place + HEADER_BYTES <= len(log):
        header = parse_header(log, place)
        if place + header.length > len(log):
            break
        event = log[place : place + header.length]
        if header.kind == MARIADB_GTID or not open_gtid:
            if place > stop or (place == stop and not inclusive):
                break
            begin = place
        if header.kind == MARIADB_GTID_LIST:
            executed |= _listed(event)
        if header.kind == MARIADB_GTID:
            gtid = parse_gtid(event, header)
            open_gtid, standalone = gtid.text, gtid.standalone
            domain = int(gtid.text.partition("-")[0])
        place += header.length
        if (
            open_gtid
            and header.kind != MARIADB_GTID
            and ends_transaction(event, header, standalone=standalone)
        ):
            executed[domain] = open_gtid
            open_gtid, transactions = "", transactions + 1
        end = begin if open_gtid else place
    return Cut(end, executed, transactions)


def _listed(event: bytes | memoryview) -> dict[int, str]:
    """Of each domain the newest GTID of a GTID_LIST event, which stands last."""
    body = memoryview(event)[HEADER_BYTES:-CHECKSUM_BYTES]
    try:
        (count,) = struct.unpack_from("<I", body)
        entries = [_LIST_ENTRY.unpack_from(body, 4 + 16 * n) for n in range(count & ((1 << _COUNT_BITS) - 1))]
    except struct.error as error:
        raise LogDamaged("binlog is damaged", detail=f"A GTID_LIST event is malformed: {error}.") from error
    return {domain: f"{domain}-{server}-{number}" for domain, server, number in entries}


class GtidSet:
    """GTIDs of MySQL, as they come along a binlog."""

    def __init__(self) -> None:
        self._spans: dict[str, list[list[int]]] = {}

    def add(self, gtid: str) -> None:
        """`uuid:number` or `uuid:tag:number`."""
        source, _, text = gtid.rpartition(":")
        number, spans = int(text), self._spans.setdefault(source, [])
        if spans and spans[-1][1] + 1 == number:
            spans[-1][1] = number
        else:
            spans.append([number, number])

    def __str__(self) -> str:
        """As the server reads it; "" for none."""
        return ",".join(
            ":".join([source, *(f"{first}-{last}" for first, last in spans)])
            for source, spans in self._spans.items()
        )


def cut_mysql(
    log: bytes | memoryview, gtids: GtidSet, *, begin: int = len(MAGIC), stop: int, inclusive: bool
) -> int:
    """
    Where to end a file of MySQL, as `cut_mariadb` does; the GTIDs of its transactions from `begin` on go
    into `gtids`.

    Raises: LogDamaged; UnsuitableSettings where a transaction has no GTID.
    """
    place = begin
    while place + HEADER_BYTES <= len(log) and not (place > stop or (place == stop and not inclusive)):
        header = parse_header(log, place)
        end = place + header.length
        if header.kind == MYSQL_ANONYMOUS:
            raise UnsuitableSettings(
                "cannot replay transactions without a GTID",
                detail="The source ran with gtid_mode OFF, so that nobody can tell which of them a copy has.",
                hints=["turn gtid_mode on in the source; a target before such transactions can be reached"],
            )
        if header.kind in (MYSQL_GTID, MYSQL_TAGGED_GTID):
            if end > len(log):
                break
            gtid = parse_gtid(log[place:end], header)
            if gtid.length < header.length:
                raise LogDamaged("binlog is damaged", detail="A transaction is shorter than its first event.")
            end = place + gtid.length
            if end > len(log):
                break
            gtids.add(gtid.text)
        if end > len(log):
            break
        place = end
    return place
