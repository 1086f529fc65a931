"""The engines by URL scheme and name; the only door to them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cloudsave.errors import UnusableUrl

if TYPE_CHECKING:
    from cloudsave.engines.api import Engine, RestoreTarget
    from cloudsave.engines.apply_api import LogApplier
    from cloudsave.engines.collation_api import CollationInspector
    from cloudsave.engines.dialect_api import Dialect
    from cloudsave.engines.directory_api import DirectoryInspector
    from cloudsave.engines.extract_api import Extractor
    from cloudsave.engines.purge_api import LogPurger
    from cloudsave.engines.search_api import LogSearch
    from cloudsave.engines.watch_api import SourceWatch
    from cloudsave.model.identity import SourceIdentity

SCHEMES = {
    "postgresql": "postgresql",
    "postgres": "postgresql",
    "mysql": "mysql",
    "mariadb": "mariadb",
}
"""URL scheme to engine."""


def open_engine(url: str) -> Engine:
    """The engine for a source URL; connects to nothing. Raises: UnusableUrl."""
    scheme = url.partition("://")[0]
    engine = SCHEMES.get(scheme)
    if engine == "postgresql":
        from cloudsave.engines.postgresql.engine import PostgresEngine

        return PostgresEngine(url)
    if engine == "mysql":
        from cloudsave.engines.mysql.engine import MysqlEngine

        return MysqlEngine(url)
    if engine == "mariadb":
        from cloudsave.engines.mariadb.engine import MariadbEngine

        return MariadbEngine(url)
    raise UnusableUrl(
        f"cannot use source URL scheme {scheme!r}",
        hints=["a source URL looks like postgresql://user@host:5432/postgres"],
    )


def dialect(name: str) -> Dialect:
    """The formats of an engine by its name. Raises: UnusableUrl."""
    if name == "postgresql":
        from cloudsave.engines.postgresql.dialect import PostgresDialect

        return PostgresDialect()
    if name in ("mysql", "mariadb"):
        from cloudsave.engines.binlog.dialect import BinlogDialect

        return BinlogDialect(name)
    raise UnusableUrl(f"cannot read backups of engine {name!r}", hints=["use a newer release of cloudsave"])


def restore_target(name: str) -> RestoreTarget:
    """The engine's way to bring a restored directory up. Raises: UnusableUrl."""
    if name == "postgresql":
        from cloudsave.engines.postgresql.target import PostgresTarget

        return PostgresTarget()
    raise UnusableUrl(f"cannot start servers of engine {name!r}", hints=["use a newer release of cloudsave"])


def log_applier(name: str) -> LogApplier | None:
    """The engine's way to apply its log to a restored directory; None where its server fetches log itself."""
    if name == "mysql":
        from cloudsave.engines.mysql.applier import MysqlApplier

        return MysqlApplier()
    if name == "mariadb":
        from cloudsave.engines.mariadb.applier import MariadbApplier

        return MariadbApplier()
    return None


def server_account(name: str) -> str:
    """The user that usually runs servers of an engine, and owns their files."""
    return "postgres" if name == "postgresql" else "mysql"


def directory_inspector(name: str) -> DirectoryInspector:
    """The engine's way to look at a data directory that is there already. Raises: UnusableUrl."""
    if name == "postgresql":
        from cloudsave.engines.postgresql.existing_directory import PostgresDirectoryInspector

        return PostgresDirectoryInspector()
    raise UnusableUrl(f"cannot look at data of engine {name!r}", hints=["use a newer release of cloudsave"])


def extractor(name: str, *, version: str, bin_directory: Path | None) -> Extractor:
    """
    The engine's way to take single objects out of a server of that version. Raises: UnusableUrl,
    ServerToolsMissing.
    """
    if name == "postgresql":
        from cloudsave.engines.postgresql.extract import PostgresExtractor

        return PostgresExtractor(int(version.partition(".")[0]), bin_directory)
    if name in ("mysql", "mariadb"):
        from cloudsave.engines.binlog.extract import BinlogExtractor

        return BinlogExtractor(name, version, bin_directory)
    raise UnusableUrl(f"cannot extract from engine {name!r}", hints=["use a newer release of cloudsave"])


def collation_inspector(name: str) -> CollationInspector:
    """The engine's way to compare sort orders with those of the source. Raises: UnusableUrl."""
    if name == "postgresql":
        from cloudsave.engines.postgresql.collation import PostgresCollationInspector

        return PostgresCollationInspector()
    raise UnusableUrl(f"cannot ask servers of engine {name!r}", hints=["use a newer release of cloudsave"])


def source_watch(url: str) -> SourceWatch:
    """The engine's way to watch a source; connects to nothing. Raises: UnusableUrl."""
    engine = SCHEMES.get(url.partition("://")[0])
    if engine == "postgresql":
        from cloudsave.engines.postgresql.watch import PostgresWatch

        return PostgresWatch(url)
    if engine in ("mysql", "mariadb"):
        from cloudsave.engines.binlog.watch import BinlogWatch

        return BinlogWatch(url)
    raise UnusableUrl("cannot watch a source of this URL scheme")


def log_purger(url: str, identity: SourceIdentity, *, slot: str, replicas: Sequence[str]) -> LogPurger | None:
    """
    The engine's way to remove log files from the server; connects to nothing. None where the server keeps
    no log longer than its readers need it. `replicas` are URLs. Raises: UnusableUrl.
    """
    if identity.engine == "postgresql":
        return None
    from cloudsave.engines.binlog.purge import BinlogPurger

    return BinlogPurger(identity.engine, url, branch=identity.branch, slot=slot, replicas=replicas)


def log_search(name: str, *, server_version: str, log_file_bytes: int) -> LogSearch:
    """How the log of a server of that version is searched. Raises: UnusableUrl."""
    if name == "postgresql":
        from cloudsave.engines.postgresql.log_search import PostgresLogSearch

        return PostgresLogSearch(server_version, log_file_bytes=log_file_bytes)
    raise UnusableUrl(f"cannot search the log of engine {name!r}", hints=["use a newer release of cloudsave"])
