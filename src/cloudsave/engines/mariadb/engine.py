"""MariaDB: its identity, rights and settings, on the library of the binlog."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from cloudsave.clock import SYSTEM_CLOCK, Clock
from cloudsave.engines.api import BackupSource
from cloudsave.engines.binlog.connection import Session
from cloudsave.engines.binlog.engine import BinlogEngine, Product
from cloudsave.engines.binlog.findings import Facts, Rules
from cloudsave.engines.binlog.identity import identity_of, release_of
from cloudsave.engines.binlog.log import Flavour
from cloudsave.engines.binlog.programs import find_program, parse_release
from cloudsave.engines.mariadb.backup_program import BACKUP_PROGRAMS, BackupProgram
from cloudsave.engines.mariadb.source import MariadbSource
from cloudsave.errors import ServerToolsMissing, SourceUnreadable, UnsuitableSettings, UnusableUrl, UsageError
from cloudsave.model.finding import Finding, Severity
from cloudsave.model.identity import SourceIdentity

NAME = "mariadb"
VERSION_MIN = (10, 6)
_SEND_ANNOTATE_ROWS = 2
_IDENTITY = (
    "SELECT @@gtid_domain_id, @@server_id, @@datadir, @@innodb_page_size, @@read_only, @@encrypt_binlog"
)
_FLAVOUR = Flavour(
    status_statement="SHOW MASTER STATUS",
    session_settings=(
        "@master_binlog_checksum = 'CRC32', @mariadb_slave_capability = 4",
        "@master_heartbeat_period = {heartbeat}",
    ),
    dump_flags=_SEND_ANNOTATE_ROWS,
)
"""
While a commit waits for an acknowledgement, MariaDB keeps everybody waiting who asks for the end of its
binlog or for its files. A capture that begins then would never get to acknowledge anything (seen on 10.11).
"""


def _identity(session: Session) -> SourceIdentity:
    (version,) = session.row("SELECT VERSION()", doing="read the server's version")
    if "mariadb" not in version.lower():
        raise UnusableUrl(
            "server is not a MariaDB server",
            detail=f"It says that it is version {version}.",
            hints=["begin the source URL with mysql://"],
        )
    release = release_of("MariaDB", version, minimum=VERSION_MIN)
    domain, server, directory, page_bytes, read_only, encrypted = session.row(
        _IDENTITY, doing="read the server's identity"
    )
    if encrypted:
        raise UnsuitableSettings(
            "cannot capture a binlog that MariaDB encrypts",
            detail="encrypt_binlog is on: what the server sends has other positions than its files.",
            hints=["turn encrypt_binlog off; the repository encrypts all that it stores"],
        )
    return identity_of(
        NAME,
        f"{domain}-{server}",
        release,
        directory=directory,
        page_bytes=page_bytes,
        read_only=bool(read_only),
    )


def _strict_gtids(facts: Facts) -> Iterator[Finding]:
    if facts.settings["gtid_strict_mode"] != "ON":
        yield Finding(
            Severity.WARNING,
            "gtid_strict_mode",
            "gtid_strict_mode is off: two servers may give one GTID to two transactions",
            "SET GLOBAL gtid_strict_mode = ON; and in the server's configuration",
        )


def _stages(facts: Facts) -> Iterator[Finding]:
    """Source: MDEV-32932, MariaDB's documentation of mariadb-backup."""
    major, minor, patch = parse_release(facts.identity.version)
    fixed = _FIXED_IN.get((major, minor))
    affected = (major, minor) < (11, 4) if fixed is None else patch < fixed
    if affected:
        yield Finding(
            Severity.WARNING,
            "mariadb-backup",
            f"mariadb-backup {facts.identity.version} keeps commits waiting while it copies tables"
            " that are not InnoDB's",
            "update the server and mariadb-backup to 10.11.8, 11.2.4, 11.4.2 or later",
        )


def _backup_program(facts: Facts) -> Iterator[Finding]:
    if not Path(facts.identity.data_directory).is_dir():
        yield Finding(
            Severity.PROBLEM,
            "mariadb-backup",
            f"{facts.identity.data_directory} is not on this host: base backups are not possible",
            "run cloudsave on the database host; capture of the log works from anywhere",
        )
        return
    try:
        found = find_program(BACKUP_PROGRAMS, parse_release(facts.identity.version)[:2])
    except ServerToolsMissing as error:
        yield Finding(
            Severity.PROBLEM,
            "mariadb-backup",
            f"{error.message}: base backups are not possible",
            error.hints[0],
        )
        return
    yield Finding(Severity.OK, "mariadb-backup", f"{found} takes the base backups")


_FIXED_IN = {(10, 11): 8, (11, 2): 4, (11, 4): 2}
"""
Series and the first of their releases that copies other tables before it blocks commits; all since 11.4.
"""
_RULES = Rules(
    rights=(
        (("RELOAD",), "take base backups"),
        (("PROCESS",), "see what the redo log of a base backup needs"),
        (("LOCK TABLES",), "lock tables that are not InnoDB's at the end of a base backup"),
        (("REPLICATION SLAVE", "REPLICATION REPLICA"), "receive the binlog"),
        (("BINLOG MONITOR", "REPLICATION CLIENT"), "see where the binlog ends"),
    ),
    checks=(_strict_gtids, _stages, _backup_program),
)


class MariadbEngine(BinlogEngine):
    """`Engine` of a MariaDB server, by its source URL."""

    def __init__(self, url: str, *, clock: Clock = SYSTEM_CLOCK) -> None:
        super().__init__(url, Product(NAME, _FLAVOUR, _RULES, _identity), clock=clock)

    def backup_source(
        self,
        *,
        mode: str,
        fast: bool,  # noqa: ARG002
        label: str,  # noqa: ARG002
    ) -> BackupSource:
        """See `Engine.backup_source`. Raises: UsageError, ServerToolsMissing, SourceUnreadable."""
        if mode == "remote":
            raise UsageError(
                "cannot back up MariaDB from another host",
                detail="mariadb-backup reads the server's files, so it runs where they are.",
                hints=["run cloudsave on the database host"],
            )
        identity = self.identify()
        if not Path(identity.data_directory).is_dir():
            raise SourceUnreadable(
                f"cannot find the server's data directory {identity.data_directory}",
                detail="mariadb-backup reads the server's files, so it runs where they are.",
                hints=["run cloudsave on the database host"],
            )
        found = find_program(BACKUP_PROGRAMS, parse_release(identity.version)[:2])
        program = BackupProgram(found, self._address, identity.data_directory, self._clock)
        return MariadbSource(identity, program, self.moment)
