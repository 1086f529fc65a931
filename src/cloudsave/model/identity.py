"""Who a source is."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Role(StrEnum):
    """The part that a server plays."""

    PRIMARY = "primary"
    REPLICA = "replica"


@dataclass(frozen=True, slots=True)
class SourceIdentity:
    """
    The identity of a source and what it runs on.

    `system_identifier` is what the engine gives a cluster when it is created and never changes; together
    with `engine` it names the lineage in the repository.
    """

    engine: str
    system_identifier: str
    version: str
    """Full version text, such as "18.6"."""
    major: int
    branch: str
    """The branch that the server is on now."""
    role: Role
    data_directory: str
    page_bytes: int
    log_file_bytes: int
    """Size of a file of the log (a WAL segment)."""
    page_checksums: bool
    ragged_log: bool = False
    """
    A log file ends where the server ends it, not when it is full; and log is sent from the begin of a record
    on only, not from any byte.
    """

    @property
    def lineage(self) -> str:
        """The lineage's id: engine and system identifier."""
        return f"{self.engine}-{self.system_identifier}"
