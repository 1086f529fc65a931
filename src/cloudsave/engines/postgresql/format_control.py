"""
`global/pg_control`: what a PostgreSQL server must know before it can read its log. Host order
(little-endian).

    0    8   u64 system identifier
    8    4   u32 version of this format: 1300 (servers 14 to 16), 1700 (17), 1800 (18)
    12   4   u32 version of the system catalogue
    16   4   u32 state, see `ServerRunState`
    24   8   i64 time of the last change, seconds since 1970
    32   8   u64 LSN of the last checkpoint record
    40   88  copy of that checkpoint:
             40 u64 redo LSN, 48 u32 timeline, 52 u32 timeline before, 56 u8 full page writes,
             60 u32 wal_level (since 1700), 64 u64 next transaction with its epoch, 72 u32 next OID,
             104 i64 time, seconds since 1970
    136  8   u64 minimum recovery point: replay must reach it before the data are consistent; 0: none
    144  4   u32 its timeline
    152  8   u64 backup start LSN, while a base backup is being recovered; else 0
    160  8   u64 backup end LSN, if it was taken from a standby
    168  1   u8 an end-of-backup record must be met
    172  4   u32 wal_level
    180  20  i32 max_connections, max_worker_processes, max_wal_senders, max_prepared_transactions,
             max_locks_per_transaction: what a standby must have at least
    204  4   u32 alignment: 8
    208  8   f64 1234567.0
    216  4   u32 bytes of a page
    220  4   u32 blocks of a relation in one file
    224  4   u32 bytes of a WAL page
    228  4   u32 bytes of a WAL segment
    252  4   u32 version of the page checksums; 0: the cluster has none
    ..       (1800: 256 u8 signedness of char), 32 bytes of nonce
    288  4   u32 CRC-32C of all before it (1800: at 292)

Validity: known version, CRC, 1234567.0; the file has 8192 bytes, of which the rest is zero.
Source: PostgreSQL src/include/catalog/pg_control.h of the versions 14, 16, 17 and 18.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import IntEnum

from cloudsave.errors import IntegrityError, UnsupportedVersion
from cloudsave.kernels.checksums import crc32c

CONTROL_FILE_BYTES = 8192
CONTROL_VERSIONS = {1300: (14, 15, 16), 1700: (17,), 1800: (18,)}
"""Version of the format to the major versions of servers that write it."""
_CRC_OFFSET = {1300: 288, 1700: 288, 1800: 292}
_FLOAT_SAMPLE = 1234567.0
_SECONDS_MAX = 253_402_300_799
"""Limit: the end of the year 9999; a time beyond it is taken for unknown."""

_IDENTITY = struct.Struct("<QIII4xqQ")
_CHECKPOINT = struct.Struct("<QIIB7xQI28xq")
_RECOVERY = struct.Struct("<QI4xQQB3xI")
_GEOMETRY = struct.Struct("<IdIIII")
_U32 = struct.Struct("<I")
_NEEDED = struct.Struct("<5i")
NEEDED_SETTINGS = (
    "max_connections",
    "max_worker_processes",
    "max_wal_senders",
    "max_prepared_transactions",
    "max_locks_per_transaction",
)
"""In the order of the file. Source: PostgreSQL CheckRequiredParameterValues(), xlogrecovery.c."""


class ServerRunState(IntEnum):
    """What the server was doing when it last wrote the file."""

    STARTING_UP = 0
    SHUT_DOWN = 1
    SHUT_DOWN_IN_RECOVERY = 2
    SHUTTING_DOWN = 3
    IN_CRASH_RECOVERY = 4
    IN_ARCHIVE_RECOVERY = 5
    IN_PRODUCTION = 6


@dataclass(frozen=True, slots=True)
class ControlFile:
    """The parts of a control file that matter to backup and recovery. LSNs are 0 where there is none."""

    system_identifier: int
    control_version: int
    catalog_version: int
    state: ServerRunState
    changed: datetime
    checkpoint: int
    """LSN of the last checkpoint record."""
    redo: int
    """Where replay from that checkpoint begins."""
    timeline: int
    previous_timeline: int
    full_page_writes: bool
    next_transaction: int
    """With its epoch."""
    checkpoint_time: datetime
    min_recovery_point: int
    min_recovery_timeline: int
    backup_start: int
    backup_end: int
    backup_end_required: bool
    wal_level: int
    """0 minimal, 1 replica, 2 logical."""
    page_bytes: int
    relation_file_blocks: int
    wal_page_bytes: int
    wal_segment_bytes: int
    data_checksum_version: int
    needed_settings: Mapping[str, int]
    """Settings that must be as high as these, or no reader comes in while log is replayed."""

    @property
    def has_page_checksums(self) -> bool:
        """The cluster has page checksums."""
        return self.data_checksum_version != 0

    @property
    def was_shut_down(self) -> bool:
        """The data files are consistent as they are."""
        return self.state in (ServerRunState.SHUT_DOWN, ServerRunState.SHUT_DOWN_IN_RECOVERY)


def parse_control(content: bytes) -> ControlFile:
    """
    A control file. Pure.

    Raises:  UnsupportedVersion; IntegrityError where the CRC does not fit, as in a file caught while it was
             written: read it again.
    """
    if len(content) < 16:
        raise _damaged(f"it has {len(content)} bytes")
    version = _U32.unpack_from(content, 8)[0]
    if version not in CONTROL_VERSIONS:
        raise UnsupportedVersion(
            f"cannot read control file of format {version}",
            detail="Formats 1300, 1700 and 1800 (PostgreSQL 14 to 18) are understood.",
            hints=["is this a pg_control file? use a release of cloudsave that knows the server's version"],
        )
    crc_at = _CRC_OFFSET[version]
    if len(content) < crc_at + _U32.size:
        raise _damaged(f"it has {len(content)} bytes")
    if crc32c(content[:crc_at]) != _U32.unpack_from(content, crc_at)[0]:
        raise _damaged("its CRC does not fit")
    return _unpack(content)


def _unpack(content: bytes) -> ControlFile:
    """The fields of a file whose CRC fits. Raises: IntegrityError."""
    system, version, catalog, state, changed, checkpoint = _IDENTITY.unpack_from(content)
    redo, timeline, previous, full_pages, transaction, _, checkpoint_time = _CHECKPOINT.unpack_from(
        content, 40
    )
    min_point, min_timeline, backup_start, backup_end, end_required, wal_level = _RECOVERY.unpack_from(
        content, 136
    )
    _, sample, page, file_blocks, wal_page, wal_segment = _GEOMETRY.unpack_from(content, 204)
    if sample != _FLOAT_SAMPLE or state > max(ServerRunState):
        raise _damaged(f"its CRC fits, but it comes from another machine type (state {state})")
    return ControlFile(
        system_identifier=system,
        control_version=version,
        catalog_version=catalog,
        state=ServerRunState(state),
        changed=_instant(changed),
        checkpoint=checkpoint,
        redo=redo,
        timeline=timeline,
        previous_timeline=previous,
        full_page_writes=bool(full_pages),
        next_transaction=transaction,
        checkpoint_time=_instant(checkpoint_time),
        min_recovery_point=min_point,
        min_recovery_timeline=min_timeline,
        backup_start=backup_start,
        backup_end=backup_end,
        backup_end_required=bool(end_required),
        wal_level=wal_level,
        page_bytes=page,
        relation_file_blocks=file_blocks,
        wal_page_bytes=wal_page,
        wal_segment_bytes=wal_segment,
        data_checksum_version=_U32.unpack_from(content, 252)[0],
        needed_settings=dict(zip(NEEDED_SETTINGS, _NEEDED.unpack_from(content, 180), strict=True)),
    )


def _instant(seconds: int) -> datetime:
    return datetime.fromtimestamp(seconds if 0 <= seconds <= _SECONDS_MAX else 0, UTC)


def _damaged(what: str) -> IntegrityError:
    return IntegrityError("control file of the server is damaged", detail=f"Of the file: {what}.")
