"""MySQL: its identity, rights and settings, on the library of the binlog."""

from __future__ import annotations

from collections.abc import Iterator

from cloudsave.clock import SYSTEM_CLOCK, Clock
from cloudsave.engines.api import BackupSource
from cloudsave.engines.binlog.connection import Session, connect
from cloudsave.engines.binlog.engine import BinlogEngine, Product
from cloudsave.engines.binlog.findings import Facts, Rules
from cloudsave.engines.binlog.identity import identity_of, release_of
from cloudsave.engines.binlog.log import Flavour
from cloudsave.engines.mysql.clone_session import CloneSession
from cloudsave.engines.mysql.cloneable import require_cloneable
from cloudsave.engines.mysql.source import MysqlSource
from cloudsave.errors import UnusableUrl, UsageError
from cloudsave.model.finding import Finding, Severity
from cloudsave.model.identity import SourceIdentity

NAME = "mysql"
VERSION_MIN = (8, 4)
"""Before it, the statements about replication have other names."""
_IDENTITY = "SELECT VERSION(), @@server_uuid, @@datadir, @@innodb_page_size, @@read_only"
_DONOR_TIMEOUT = "clone_donor_timeout_after_network_failure"
_FLAVOUR = Flavour(
    status_statement="SHOW BINARY LOG STATUS",
    session_settings=(
        "@source_binlog_checksum = 'CRC32', @master_binlog_checksum = 'CRC32'",
        "@source_heartbeat_period = {heartbeat}, @master_heartbeat_period = {heartbeat}",
        "@replica_uuid = '{uuid}', @slave_uuid = '{uuid}'",
    ),
    dump_flags=0,
    semi_sync_settings="@rpl_semi_sync_replica = 1, @rpl_semi_sync_slave = 1",
    semi_sync_variable="rpl_semi_sync_source_enabled",
)


def _identity(session: Session) -> SourceIdentity:
    version, uuid, directory, page_bytes, read_only = session.row(
        _IDENTITY, doing="read the server's identity"
    )
    if "mariadb" in version.lower():
        raise UnusableUrl(
            "server is not a MySQL server",
            detail=f"It says that it is {version}.",
            hints=["begin the source URL with mariadb://"],
        )
    release = release_of("MySQL", version, minimum=VERSION_MIN)
    return identity_of(
        NAME, uuid, release, directory=directory, page_bytes=page_bytes, read_only=bool(read_only)
    )


def _gtid_mode(facts: Facts) -> Iterator[Finding]:
    mode = facts.settings["gtid_mode"]
    if mode == "ON":
        yield Finding(Severity.OK, "gtid_mode", "every transaction has a GTID")
    else:
        yield Finding(
            Severity.WARNING,
            "gtid_mode",
            f"gtid_mode is {mode}: transactions cannot be told apart by their GTID",
            "turn it on in the steps of the MySQL manual, Changing GTID Mode Online",
        )


def _encryption(facts: Facts) -> Iterator[Finding]:
    if facts.settings.get("binlog_encryption") == "ON":
        yield Finding(
            Severity.NOTICE,
            "binlog_encryption",
            "the server decrypts its binlog before it sends it: use TLS; the repository encrypts it again",
        )


def _clone(facts: Facts) -> Iterator[Finding]:
    if "clone_buffer_size" in facts.settings:  # A variable of the plugin's, there only while it is active.
        yield Finding(Severity.OK, "clone", "the plugin clone is active: base backups are possible")
        return
    yield Finding(
        Severity.PROBLEM,
        "clone",
        "the plugin clone is not active: base backups are not possible",
        "INSTALL PLUGIN clone SONAME 'mysql_clone.so'",
    )


def _clone_left_alone(facts: Facts) -> Iterator[Finding]:
    """Source: MySQL manual, clone_donor_timeout_after_network_failure (minutes)."""
    minutes = facts.settings.get(_DONOR_TIMEOUT, "0")
    if minutes != "0":
        yield Finding(
            Severity.WARNING,
            _DONOR_TIMEOUT,
            f"after a backup that was killed or cut off, DDL and the next backup wait for {minutes} minutes,"
            " in which the server hopes that the clone goes on",
            f"SET PERSIST {_DONOR_TIMEOUT} = 0",
        )


def _doublewrite(facts: Facts) -> Iterator[Finding]:
    if facts.settings.get("innodb_doublewrite", "ON").upper() not in ("ON", "1", "DETECT_AND_RECOVER"):
        yield Finding(
            Severity.WARNING,
            "innodb_doublewrite",
            "innodb_doublewrite is off: a crash may tear pages of the source",
            "turn it on in the server's configuration, unless its file system never tears a page",
        )


_RULES = Rules(
    rights=(
        (("REPLICATION SLAVE",), "receive the binlog"),
        (("REPLICATION CLIENT",), "see where the binlog ends"),
        (("BACKUP_ADMIN",), "clone the server for base backups"),
        (("SELECT",), "see tables that a clone would leave out"),
    ),
    checks=(_gtid_mode, _encryption, _clone, _clone_left_alone, _doublewrite),
)


class MysqlEngine(BinlogEngine):
    """`Engine` of a MySQL server, by its source URL."""

    def __init__(self, url: str, *, clock: Clock = SYSTEM_CLOCK) -> None:
        super().__init__(url, Product(NAME, _FLAVOUR, _RULES, _identity), clock=clock)

    def backup_source(
        self,
        *,
        mode: str,
        fast: bool,  # noqa: ARG002
        label: str,  # noqa: ARG002
    ) -> BackupSource:
        """See `Engine.backup_source`: always over the SQL port. Raises: UsageError, UnsuitableSettings."""
        if mode == "local":
            raise UsageError(
                "cannot back up MySQL from its files",
                detail="It is cloned over a connection, from this host or another one.",
                hints=["leave --mode out"],
            )
        with connect(self._url) as session:
            identity = _identity(session)
            require_cloneable(session)
        return MysqlSource(identity, self._clone_session, self.moment)

    def _clone_session(self) -> CloneSession:
        return CloneSession(connect(self._url), connect(self._url), self._clock)
