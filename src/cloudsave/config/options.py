"""
Every option there is: one table, from which come the parser, the command line and the reference.

A name is the path of the option in the TOML file. A per-source option stands in each table `[sources.NAME]`
and its variable is made from the source's name.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """What values an option takes."""

    TEXT = "text"
    PATH = "path"
    INTEGER = "integer"
    NUMBER = "number"
    SIZE = "size"
    BOOLEAN = "true or false"


Value = str | int | float | bool
"""A parsed value; a path is text until the configuration is built."""

ENVIRONMENT_PREFIX = "CLOUDSAVE_"
SOURCE_PREFIX = "CLOUDSAVE_SOURCES_"
SOURCE_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,52}")
"""Limit: so that `cloudsave_` and the name fit a replication slot's 63 characters."""
RATE_MIN_BYTES = 64 * 1024
"""Limit: slower than this is a mistake in the unit."""


@dataclass(frozen=True, slots=True)
class Option:
    """
    One option.

    `default` None: not set; `default_text` tells of a default that depends on the machine or on the name.
    `minimum` and `maximum` are inclusive. A secret is never read from a file and never shown.
    """

    name: str
    kind: Kind
    help: str
    default: Value | None = None
    default_text: str = ""
    choices: tuple[str, ...] = ()
    pattern: str = ""
    minimum: float | None = None
    maximum: float | None = None
    secret: bool = False
    per_source: bool = False
    variable: str = ""

    @property
    def environment(self) -> str:
        """The environment variable; of a per-source option the part after the source's name."""
        if self.variable:
            return self.variable
        name = self.name.upper().replace(".", "_")
        return name if self.per_source else ENVIRONMENT_PREFIX + name

    @property
    def toml(self) -> str:
        """The path in the TOML file, `NAME` standing for a source's name."""
        return f"sources.NAME.{self.name}" if self.per_source else self.name

    def source_environment(self, source: str) -> str:
        """The variable of a per-source option of one source."""
        return SOURCE_PREFIX + environment_name(source) + "_" + self.environment


def environment_name(source: str) -> str:
    """A source's name as it stands in variables."""
    return source.upper().replace("-", "_")


def workers_default() -> int:
    """One more than the cores that this process may use, since a worker waits for the disk now and then."""
    return len(os.sched_getaffinity(0)) + 1


GLOBAL_OPTIONS = (
    Option(
        "repository.url",
        Kind.TEXT,
        "Where the repository is: a directory, or s3://, gs:// or az:// with bucket and prefix.",
    ),
    Option(
        "repository.passphrase",
        Kind.TEXT,
        "The passphrase itself. Only by the environment, never in a file.",
        secret=True,
        variable="CLOUDSAVE_PASSPHRASE",
    ),
    Option(
        "repository.passphrase_file",
        Kind.PATH,
        "File that holds the passphrase; must be readable by its owner alone.",
        variable="CLOUDSAVE_PASSPHRASE_FILE",
    ),
    Option(
        "repository.passphrase_command",
        Kind.TEXT,
        "Program with arguments that prints the passphrase. No shell is involved.",
        variable="CLOUDSAVE_PASSPHRASE_COMMAND",
    ),
    Option(
        "repository.recovery_key_file",
        Kind.PATH,
        "File that holds the recovery key, in place of the passphrase; must be readable by its owner alone.",
        variable="CLOUDSAVE_RECOVERY_KEY_FILE",
    ),
    Option(
        "repository.lock_days",
        Kind.INTEGER,
        "Days for which S3 Object Lock keeps each object from deletion; renewed for what a backup reuses.",
        default_text="no lock",
        minimum=1,
        maximum=36500,
    ),
    Option(
        "compression_level",
        Kind.INTEGER,
        "Level of zstd. Each level above 3 costs much time for few bytes.",
        default=1,
        minimum=1,
        maximum=19,
    ),
    Option(
        "workers",
        Kind.INTEGER,
        "Threads that check, compress, encrypt and store.",
        default_text="cores + 1",
        minimum=1,
        maximum=256,
    ),
    Option(
        "rate_limit_bytes_per_second",
        Kind.SIZE,
        "Bytes per second sent to and read from the store, at most.",
        default_text="no limit",
        minimum=RATE_MIN_BYTES,
    ),
    Option(
        "read_limit_bytes_per_second",
        Kind.SIZE,
        "Bytes per second that a base backup and `check --pages` read from the server, at most.",
        default_text="no limit",
        minimum=RATE_MIN_BYTES,
    ),
    Option(
        "rpo_seconds",
        Kind.NUMBER,
        "Age at which captured log is made durable: how much may be lost with the server.",
        default=1.0,
        minimum=0.1,
        maximum=86400,
    ),
    Option(
        "log_object_bytes_max",
        Kind.SIZE,
        "Size at which a log object is closed and stored before its age demands it.",
        default=16 * 1024 * 1024,
        minimum=1024 * 1024,
        maximum=256 * 1024 * 1024,
    ),
    Option(
        "paranoid",
        Kind.BOOLEAN,
        "Decode and compare every frame before it is stored, not only samples.",
        default=False,
    ),
    Option(
        "timezone",
        Kind.TEXT,
        "Zone of times that are given without one, and in which times are shown, such as Europe/Berlin.",
        default_text="none: a time without a zone is refused",
    ),
    Option(
        "spool_directory",
        Kind.PATH,
        "Local directory for log that a restore fetches ahead.",
        default_text="beside the restored directory",
    ),
    Option(
        "retry_deadline_seconds",
        Kind.NUMBER,
        "How long one operation of the store is tried again before the command fails.",
        default=300.0,
        minimum=0,
        maximum=86400,
    ),
    Option(
        "notify.webhook_url",
        Kind.TEXT,
        "Where alarms of a running capture are sent to, as signed JSON: https://...",
    ),
    Option(
        "notify.webhook_key_file",
        Kind.PATH,
        "File that holds the key that webhooks are signed with; must be readable by its owner alone.",
    ),
    Option(
        "notify.apprise_file",
        Kind.PATH,
        "File with a URL of Apprise on each line, to which alarms go too; readable by its owner alone.",
    ),
    Option(
        "notify.heartbeat_url",
        Kind.TEXT,
        "Asked for as long as capture is well; a service that misses it raises the alarm.",
    ),
    Option(
        "notify.heartbeat_seconds",
        Kind.NUMBER,
        "Between two heartbeats.",
        default=30.0,
        minimum=1,
        maximum=86400,
    ),
    Option(
        "postgresql.bin_directory",
        Kind.PATH,
        "Directory of the PostgreSQL programs that start a restored server.",
        default_text="looked for in the usual places",
    ),
)

SERVER_OPTIONS = (
    Option(
        "url",
        Kind.TEXT,
        "The server, such as postgresql://user@host:5432/postgres, without a password.",
        per_source=True,
    ),
    Option(
        "backup_url",
        Kind.TEXT,
        "Server that base backups are read from, such as a standby of `url`.",
        default_text="`url`",
        per_source=True,
    ),
    Option(
        "canary_seconds",
        Kind.NUMBER,
        "Between two small commits of ours that capture awaits in the repository; 0: none.",
        default=15.0,
        minimum=0,
        maximum=3600,
        per_source=True,
    ),
    Option(
        "slot",
        Kind.TEXT,
        "Name of the permanent replication slot.",
        default_text="`cloudsave_` and the source's name",
        pattern="[a-z0-9_]{1,63}",
        per_source=True,
    ),
    Option(
        "checkpoint",
        Kind.TEXT,
        "Whether a base backup begins with a fast checkpoint or waits for a spread one.",
        default="fast",
        choices=("fast", "spread"),
        per_source=True,
    ),
    Option(
        "mode",
        Kind.TEXT,
        "Read the data directory on this host, or by the replication protocol, or what is possible.",
        default="auto",
        choices=("auto", "local", "remote"),
        per_source=True,
    ),
    Option(
        "rpo_seconds",
        Kind.NUMBER,
        "As above, for this source alone.",
        default_text="the general `rpo_seconds`",
        minimum=0.1,
        maximum=86400,
        per_source=True,
    ),
)

KEEP_MAX = 100_000
"""Limit: more than this is a mistake."""


def _keep(name: str, text: str, kind: Kind = Kind.INTEGER) -> Option:
    return Option(
        f"keep_{name}", kind, text, default_text="no such rule", minimum=0, maximum=KEEP_MAX, per_source=True
    )


RETENTION_OPTIONS = (
    _keep("days", "`expire` keeps every moment of the last so many days reachable.", Kind.NUMBER),
    _keep("last", "`expire` keeps so many of the newest backups, and every moment since the oldest of them."),
    _keep("hourly", "`expire` keeps the newest backup of each of so many hours that have one."),
    _keep("daily", "`expire` keeps the newest backup of each of so many days that have one."),
    _keep("weekly", "`expire` keeps the newest backup of each of so many weeks that have one."),
    _keep("monthly", "`expire` keeps the newest backup of each of so many months that have one."),
    _keep("yearly", "`expire` keeps the newest backup of each of so many years that have one."),
    _keep("proved", "`expire` keeps so many of the newest backups that a restore drill has proved."),
)
"""Of each source. A rule of 0 is none; without any nothing is ever removed."""

SOURCE_OPTIONS = (*SERVER_OPTIONS, *RETENTION_OPTIONS)
OPTIONS = GLOBAL_OPTIONS + SOURCE_OPTIONS


def option(name: str) -> Option:
    """The option that is not per source, by its path. Raises KeyError for a name that is none."""
    for entry in GLOBAL_OPTIONS:
        if entry.name == name:
            return entry
    raise KeyError(name)
