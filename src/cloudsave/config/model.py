"""The configuration as frozen values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cloudsave.config.redact import redact
from cloudsave.model.retention import RetentionRules


@dataclass(frozen=True, slots=True)
class RepositoryConfig:
    """Where the repository is and where its secrets are found; never the secrets themselves."""

    url: str | None = None
    passphrase_file: Path | None = None
    passphrase_command: str | None = None
    recovery_key_file: Path | None = None
    lock_days: int | None = None


@dataclass(frozen=True, slots=True)
class NotifyConfig:
    """Who is told of alarms, and where the secrets for that are."""

    webhook_url: str | None = field(default=None, repr=False)
    webhook_key_file: Path | None = None
    apprise_file: Path | None = None
    heartbeat_url: str | None = field(default=None, repr=False)
    heartbeat_seconds: float = 30.0


@dataclass(frozen=True, slots=True)
class SourceConfig:
    """One protected server. The URL may hold a password when it comes from the environment."""

    name: str
    url: str
    slot: str
    checkpoint: str
    """`fast` or `spread`."""
    mode: str
    """`auto`, `local` or `remote`."""
    rpo_seconds: float
    canary_seconds: float = 15.0
    """Between two canaries; 0: none."""
    backup_url: str | None = None
    """Where base backups are read, if not at `url`."""
    retention: RetentionRules = field(default_factory=RetentionRules)

    def __repr__(self) -> str:
        return f"SourceConfig(name={self.name!r}, url={redact(self.url)!r})"


@dataclass(frozen=True, slots=True)
class PostgresqlConfig:
    """Where the programs of PostgreSQL are."""

    bin_directory: Path | None = None


@dataclass(frozen=True, slots=True)
class Config:
    """All settings of one process. `files` are those that were read, the weakest first."""

    repository: RepositoryConfig
    postgresql: PostgresqlConfig
    compression_level: int
    workers: int
    rate_limit_bytes_per_second: int | None
    read_limit_bytes_per_second: int | None
    rpo_seconds: float
    log_object_bytes_max: int
    paranoid: bool
    timezone: str | None
    spool_directory: Path | None
    retry_deadline_seconds: float
    notify: NotifyConfig = field(default_factory=NotifyConfig)
    sources: Mapping[str, SourceConfig] = field(default_factory=dict)
    files: tuple[Path, ...] = ()

    def bin_directory_of(self, engine: str) -> Path | None:
        """Where the programs of an engine are, if that is configured."""
        return self.postgresql.bin_directory if engine == "postgresql" else None
