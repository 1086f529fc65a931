"""
From the configuration to working parts: the only place that builds stores with their wrappers, and
repositories.

What is large is imported when it is built, so that the key can be derived meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

from cloudsave.clock import Clock
from cloudsave.config.credentials import FoundSecrets
from cloudsave.config.model import Config, SourceConfig
from cloudsave.engines.registry import log_purger as open_log_purger
from cloudsave.engines.registry import open_engine
from cloudsave.errors import (
    ConfigurationError,
    ForeignSystem,
    IntegrityError,
    UnknownBackup,
    UnknownSource,
    UsageError,
)
from cloudsave.repository.head import unlock
from cloudsave.repository.keys import Secret
from cloudsave.repository.parallel import begin
from cloudsave.store.api import ObjectStore
from cloudsave.store.open import open_store, open_versions
from cloudsave.store.retrying import Retrying, RetryLimits
from cloudsave.store.throttled import Throttled, TokenBucket

if TYPE_CHECKING:
    from cloudsave.backup.run import LogCover
    from cloudsave.engines.api import BackupSource, Engine, LogSource
    from cloudsave.engines.purge_api import LogPurger
    from cloudsave.model.engine_facts import SlotState
    from cloudsave.model.identity import SourceIdentity
    from cloudsave.repository.lineage import Lineage
    from cloudsave.repository.repository import Repository

LIMITS = ("rate_limit_bytes_per_second", "read_limit_bytes_per_second", "workers")
"""Options that running commands follow when a configuration file changes (decision 0014)."""


class Limits:
    """What a command may use; `apply` changes it while the command runs. Thread-safe."""

    def __init__(self, config: Config, *, clock: Clock) -> None:
        self.store = TokenBucket(bytes_per_second=config.rate_limit_bytes_per_second, clock=clock)
        self.read = TokenBucket(bytes_per_second=config.read_limit_bytes_per_second, clock=clock)
        self._config = config

    def workers(self) -> int:
        """How many threads may work now."""
        return self._config.workers

    def apply(self, config: Config) -> list[str]:
        """Take the limits of `config` from now on; a sentence for each that changed."""
        before, self._config = self._config, config
        self.store.set_rate(config.rate_limit_bytes_per_second)
        self.read.set_rate(config.read_limit_bytes_per_second)
        return [
            f"{name} is {getattr(config, name) or 'not limited'} from now on"
            for name in LIMITS
            if getattr(config, name) != getattr(before, name)
        ]


def build_store(config: Config, *, clock: Clock, limits: Limits | None = None) -> ObjectStore:
    """
    The configured store: throttled, with retries outside, so that a repeated request waits its turn too.
    """
    if not config.repository.url:
        raise ConfigurationError(
            "no repository is configured",
            hints=[
                "name one with --repository, CLOUDSAVE_REPOSITORY_URL or repository.url in the configuration"
            ],
        )
    store = open_store(config.repository.url, clock=clock, lock_days=config.repository.lock_days)
    store = Throttled(store, (limits or Limits(config, clock=clock)).store)
    return Retrying(store, clock=clock, limits=RetryLimits(deadline_seconds=config.retry_deadline_seconds))


def lock_renewal(config: Config, *, clock: Clock) -> Callable[[Iterable[str]], None] | None:
    """
    How objects that a backup goes on to need are locked anew; None: nothing is locked.

    Raises: StoreUnfit where the bucket cannot lock.
    """
    days, url = config.repository.lock_days, config.repository.url
    if days is None or not url:
        return None
    bucket = open_versions(url)
    bucket.check()
    return lambda names: bucket.renew(names, until=clock.now() + timedelta(days=days))


def open_repository(
    config: Config, secrets: FoundSecrets, *, clock: Clock, limits: Limits | None = None
) -> Repository:
    """The configured repository. Raises: ConfigurationError, NoRepository, WrongKey, StoreError."""
    return begin_opening(config, secrets, clock=clock, limits=limits)()


def begin_opening(
    config: Config, secrets: FoundSecrets, *, clock: Clock, limits: Limits | None = None
) -> Callable[[], Repository]:
    """
    Begin to open the configured repository, beside what the caller does next; what is returned waits for it,
    and raises as `open_repository` does. Raises: ConfigurationError.
    """
    store = build_store(config, clock=clock, limits=limits)
    secret = Secret(passphrase=secrets.passphrase, recovery_key=secrets.recovery_key)
    unlocked = begin(lambda: unlock(store, secret), "unlock")

    def opened() -> Repository:
        from cloudsave.repository.repository import Repository

        return Repository.unlocked(store, unlocked(), clock=clock)

    return opened


def engine(source: SourceConfig) -> Engine:
    """The engine of a source; connects to nothing yet."""
    return open_engine(source.url)


def backup_engine(source: SourceConfig) -> Engine:
    """The engine that a source's base backups are read from; connects to nothing yet."""
    return open_engine(source.backup_url or source.url)


def log_purger(source: SourceConfig, identity: SourceIdentity, replicas: Sequence[str]) -> LogPurger | None:
    """What removes log files from a source's server; None where that does it itself."""
    return open_log_purger(source.url, identity, slot=source.slot, replicas=replicas)


def backup_source(opened: Engine, source: SourceConfig, limits: Limits, *, mode: str | None) -> BackupSource:
    """A base backup of a source by `mode`, or the source's own, no faster than `limits` allow."""
    from cloudsave.engines.paced import PacedSource

    found = opened.backup_source(
        mode=mode or source.mode, fast=source.checkpoint == "fast", label=f"cloudsave {source.name}"
    )
    return PacedSource(found, limits.read.take)


def lineage_of(repository: Repository, name: str) -> Lineage:
    """
    The stored lineage of a source, by the source's name or by the lineage's id; needs no server.

    Raises: UnknownSource where nothing is stored, UsageError where several systems had that name,
    IntegrityError where it may be the name of a lineage whose identity is damaged.
    """
    ids = repository.lineage_ids()
    if name in ids:
        return repository.lineage(name)
    named = []
    damage: list[IntegrityError] = []
    for lineage_id in ids:
        lineage = repository.lineage(lineage_id)
        try:
            identity = lineage.identity()
        except IntegrityError as error:
            damage.append(error)
            continue
        if identity is not None and identity.source == name:
            named.append((identity.first_seen_utc, lineage))
    if not named and damage:
        raise damage[0]
    if not named:
        raise UnknownSource(
            f"the repository holds nothing of source {name!r}",
            detail=f"It holds the lineages: {', '.join(ids) or 'none'}.",
            hints=[f"`cloudsave backup {name}` makes the first backup"],
        )
    if len(named) > 1:
        listed = "; ".join(
            f"{lineage.id} (since {since})" for since, lineage in sorted(named, key=lambda n: n[0])
        )
        raise UsageError(
            f"source {name!r} stands for several database systems",
            detail=f"They are: {listed}.",
            hints=["give the lineage's id in place of the name"],
        )
    return named[0][1]


def lineage_with(repository: Repository, backup_id: str) -> Lineage:
    """The lineage that holds a backup. Raises: UnknownBackup."""
    for lineage_id in repository.lineage_ids():
        lineage = repository.lineage(lineage_id)
        if backup_id in lineage.backup_ids():
            return lineage
    raise UnknownBackup(
        f"backup {backup_id!r} is not in the repository", hints=["`cloudsave list` shows the backups"]
    )


def lineage_for(
    repository: Repository, identity: SourceIdentity, *, source: str, record: bool = True
) -> Lineage:
    """
    The lineage of a running server's backups and log; with `record` it is noted under the name `source`.

    Raises: ForeignSystem where the name belongs to another system: a clone or a new cluster must not slip
    in silently.
    """
    for lineage_id in repository.lineage_ids():
        if lineage_id == identity.lineage:
            continue
        known = repository.lineage(lineage_id).identity()
        if known is not None and known.source == source:
            raise ForeignSystem(
                f"server is not the one that source {source!r} was",
                detail=f"It is {identity.lineage}; the repository knows {source!r} as {lineage_id}.",
                hints=[
                    "was the cluster created anew? Then add it under another name with `cloudsave source add`"
                ],
            )
    lineage = repository.lineage(identity.lineage)
    if record:
        lineage.record_identity(identity, source=source)
    return lineage


def log_cover(source: SourceConfig, lineage: Lineage, *, clock: Clock) -> LogCover:
    """
    Who captures the log while a base backup runs: the capture that runs, or one of the backup's own.

    Without a permanent slot that is at the server which the backup is read from: a standby begins a backup
    at its own last restart point, before which its primary may have removed the log.
    Raises: ForeignSystem where log and base backups are configured to come from two clusters.
    """
    from cloudsave.logs.background import BackupLogCover
    from cloudsave.model.engine_facts import SlotState

    opened = engine(source)
    if source.backup_url and (found := opened.identify().lineage) != lineage.id:
        raise ForeignSystem(
            f"url and backup_url of source {source.name!r} lead to two clusters",
            detail=f"At url is {found}, at backup_url {lineage.id}.",
            hints=["is one of them of another cluster, or was one created anew?"],
        )

    def own_source(slot: SlotState) -> LogSource:
        if slot is not SlotState.ABSENT:
            return opened.log_source(slot=source.slot, temporary=False)
        name = f"{source.slot}_{clock.random_bytes(3).hex()}"[-63:]
        return backup_engine(source).log_source(slot=name, temporary=True)

    return BackupLogCover(
        lambda: opened.slot_state(source.slot), own_source, lineage, opened.dialect, clock=clock
    )
