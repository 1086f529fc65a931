"""What a check found."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Severity(StrEnum):
    """How bad a finding is."""

    OK = "ok"
    NOTICE = "notice"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True)
class Finding:
    """One fact, its weight, and what to do."""

    severity: Severity
    subject: str
    """What was looked at, in a word or two: "wal_level", "replication slot"."""
    fact: str
    hint: str = ""
