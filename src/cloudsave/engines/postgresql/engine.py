"""A PostgreSQL server: who it is, whether it can be protected, and its sources."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg

from cloudsave.clock import SYSTEM_CLOCK, Clock
from cloudsave.engines.api import BackupSource, LogSource
from cloudsave.engines.postgresql.backup_session import BackupSession
from cloudsave.engines.postgresql.connection import FUNCTION_SIGNATURES, connect, conninfo, grant_statement
from cloudsave.engines.postgresql.data_directory import (
    is_not_the_servers,
    postmaster_shares_our_mounts,
)
from cloudsave.engines.postgresql.dialect import PostgresDialect
from cloudsave.engines.postgresql.findings import backup_functions, gather_findings
from cloudsave.engines.postgresql.log import PostgresLogSource, branch_of
from cloudsave.engines.postgresql.replication import ReplicationConnection
from cloudsave.engines.postgresql.source_local import LocalBackupSource
from cloudsave.engines.postgresql.source_remote import RemoteBackupSource
from cloudsave.errors import (
    CloudsaveError,
    PermissionMissing,
    UnsuitableSettings,
    UnsupportedVersion,
    UsageError,
)
from cloudsave.model.engine_facts import BackupStart, SlotState
from cloudsave.model.finding import Finding
from cloudsave.model.identity import Role, SourceIdentity

NAME = "postgresql"
MAJOR_MIN, MAJOR_MAX = 14, 18
PAGE_BYTES = 8192
GEOMETRY = {"block_size": PAGE_BYTES, "segment_size": 131072, "wal_block_size": 8192}
"""Sizes that servers are built with: bytes of a page, pages in a file of a relation, bytes of a log page."""
MODES = ("auto", "local", "remote")

_IDENTITY = """
select (pg_control_system()).system_identifier::text,
       current_setting('server_version'),
       current_setting('server_version_num')::int,
       pg_is_in_recovery(),
       (select setting from pg_settings where name = 'data_directory'),
       (select array_agg(setting::int order by name) from pg_settings
         where name in ('block_size', 'segment_size', 'wal_block_size')),
       (pg_control_init()).bytes_per_wal_segment,
       (pg_control_init()).data_page_checksum_version,
       case when pg_is_in_recovery() then null
            else substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8) end
"""
_REPLICA_TIMELINES = """
select greatest((pg_control_checkpoint()).timeline_id,
                (pg_control_recovery()).min_recovery_end_timeline,
                (select received_tli from pg_stat_wal_receiver))
"""


class PostgresEngine:
    """`Engine` of a server named by a libpq URL."""

    def __init__(self, url: str, *, clock: Clock = SYSTEM_CLOCK) -> None:
        self._url = url
        self._clock = clock
        self.dialect = PostgresDialect()

    def identify(self) -> SourceIdentity:
        """See `Engine.identify`."""
        session = self._open("cloudsave identify")
        try:
            return self._identity(session)
        finally:
            session.close()

    def findings(self) -> Sequence[Finding]:
        """See `Engine.findings`."""
        session = self._open("cloudsave check")
        try:
            return gather_findings(session, self._identity(session), clock=self._clock)
        finally:
            session.close()

    def backup_source(self, *, mode: str, fast: bool, label: str) -> BackupSource:
        """See `Engine.backup_source`. Raises: UnsuitableSettings where `mode` is not possible."""
        if mode not in MODES:
            raise UsageError(f"cannot read by mode {mode!r}", hints=[f"the modes are {', '.join(MODES)}"])
        session = self._open("cloudsave backup")
        try:
            identity = self._identity(session)
            obstacle = "" if mode == "remote" else self._obstacle_to_local(session, identity)
            if mode == "local":
                _refuse_without_rights(session, identity)
            if mode == "local" and obstacle:
                raise UnsuitableSettings(
                    "data directory cannot be read locally",
                    detail=f"Reason: {obstacle}.",
                    hints=["run cloudsave on the server's host as the server's user", "or use --mode remote"],
                )
        except BaseException:
            session.close()
            raise
        if mode == "remote" or obstacle:
            remote = RemoteBackupSource(
                conninfo(self._url, application_name="cloudsave backup"),
                session,
                identity,
                label=label,
                fast=fast,
                clock=self._clock,
            )
            reason = f"read remotely, since {obstacle}" if obstacle else "read remotely, as asked for"
            return _Noted(remote, reason)
        local = LocalBackupSource(session, identity, label=label, fast=fast, clock=self._clock)
        return _Noted(
            local, f"read locally from {identity.data_directory}, which is proved to be the server's"
        )

    def slot_state(self, slot: str) -> SlotState:
        """See `Engine.slot_state`."""
        return self._log_source(slot, temporary=False).slot_state()

    def log_source(
        self,
        *,
        slot: str,
        temporary: bool,
        synchronous: bool = False,  # noqa: ARG002
    ) -> LogSource:
        """See `Engine.log_source`; the server's synchronous_standby_names say which commits wait."""
        return self._log_source(slot, temporary=temporary)

    def _log_source(self, slot: str, *, temporary: bool) -> PostgresLogSource:
        return PostgresLogSource(
            conninfo(self._url, application_name="cloudsave capture"),
            slot=slot,
            temporary=temporary,
            identify=self.identify,
            clock=self._clock,
        )

    def _open(self, application_name: str) -> BackupSession:
        return BackupSession(connect(self._url, application_name=application_name))

    def _identity(self, session: BackupSession) -> SourceIdentity:
        row = session.row(_IDENTITY, doing="read the server's identity")
        identifier, version, number, in_recovery, directory, geometry, segment, checksums, branch = row
        major = number // 10000
        if not MAJOR_MIN <= major <= MAJOR_MAX:
            raise UnsupportedVersion(
                f"cannot protect PostgreSQL {major}",
                detail=f"The server is version {version}; supported are {MAJOR_MIN} to {MAJOR_MAX}.",
                hints=["is there a newer release of cloudsave?"],
            )
        if geometry != list(GEOMETRY.values()):
            found = ", ".join(f"{name} {value}" for name, value in zip(GEOMETRY, geometry, strict=True))
            usual = ", ".join(f"{name} {value}" for name, value in GEOMETRY.items())
            raise UnsuitableSettings(
                "cannot protect a server that was built with other sizes than PostgreSQL's own",
                detail=f"It has {found}; supported is {usual}.",
                hints=["pg_dump and a server with the usual sizes are the way out of such a build"],
            )
        return SourceIdentity(
            engine=NAME,
            system_identifier=identifier,
            version=version.partition(" ")[0],
            major=major,
            branch=branch or self._replica_branch(session, identifier),
            role=Role.REPLICA if in_recovery else Role.PRIMARY,
            data_directory=directory or "",
            page_bytes=PAGE_BYTES,
            log_file_bytes=segment,
            page_checksums=bool(checksums),
        )

    def _replica_branch(self, session: BackupSession, identifier: str) -> str:
        """
        The branch that a replica replays. Only IDENTIFY_SYSTEM tells it at once; the control file lags
        behind until the next restart point.
        """
        info = conninfo(self._url, application_name="cloudsave identify")
        try:
            connection = ReplicationConnection.open(info, clock=self._clock)
        except CloudsaveError:
            (timeline,) = session.row(_REPLICA_TIMELINES, doing="read the replica's timeline")
            return branch_of(timeline)
        try:
            system = connection.query("IDENTIFY_SYSTEM")[0].mappings()[0]
        finally:
            connection.close()
        if system["systemid"] != identifier:
            raise UnsuitableSettings(
                "two connections to the source reached two clusters",
                detail=f"System identifiers {identifier} and {system['systemid']}.",
                hints=["does the URL name several hosts, or a load balancer?"],
            )
        return branch_of(int(system["timeline"] or 0))

    def _obstacle_to_local(self, session: BackupSession, identity: SourceIdentity) -> str:
        """Why the data directory cannot be read here; "" where it can."""
        connection: psycopg.Connection[Any] = session.connection
        if missing := _missing_functions(session):
            return f"the role may not call {FUNCTION_SIGNATURES[missing[0]]}"
        directory = Path(identity.data_directory)
        obstacle = is_not_the_servers(connection, directory, identity.system_identifier)
        if obstacle:
            return obstacle
        (tablespaces,) = session.row(
            "select count(*) from pg_tablespace where pg_tablespace_location(oid) like '/%%'",
            doing="count the tablespaces",
        )
        if tablespaces and not postmaster_shares_our_mounts(directory):
            return "the server runs in a container, where tablespaces may be elsewhere"
        return ""


def _missing_functions(session: BackupSession) -> list[str]:
    """The functions of a local backup that the role may not call; also the one that is called at the end."""
    names = backup_functions(session.connection.info.server_version // 10000)
    allowed = session.column(
        "select has_function_privilege(name, 'execute')"
        " from unnest(%s::text[]) with ordinality as f (name, n) order by n",
        ([f"pg_catalog.{FUNCTION_SIGNATURES[name]}" for name in names],),
        doing="read the role's rights",
    )
    return [name for name, is_allowed in zip(names, allowed, strict=True) if not is_allowed]


def _refuse_without_rights(session: BackupSession, identity: SourceIdentity) -> None:
    """Raises PermissionMissing with the statements that give what a local backup needs."""
    (role, quoted) = session.row("select current_user, quote_ident(current_user)", doing="read the rights")
    missing = _missing_functions(session)
    reasons = [f"may not call {FUNCTION_SIGNATURES[name]}" for name in missing]
    statements = [grant_statement(name, role) for name in missing]
    if not identity.data_directory:
        reasons.append("may not see where the data directory is")
        statements.append(f"GRANT pg_read_all_settings TO {quoted};")
    if statements:
        raise PermissionMissing(
            "role may not make a local backup",
            detail=f"Reason: the role {', '.join(reasons)}.",
            hints=[*(f"as a superuser: {one}" for one in statements), "or use --mode remote"],
        )


class _Noted:
    """A backup source whose start says why it was chosen."""

    def __init__(self, source: LocalBackupSource | RemoteBackupSource, reason: str) -> None:
        self._source = source
        self._reason = reason
        self.pieces = source.pieces
        self.finish = source.finish
        self.abort = source.abort

    def begin(self) -> BackupStart:
        """See `BackupSource.begin`."""
        begun = self._source.begin()
        return replace(begun, notes=(self._reason, *begun.notes))
