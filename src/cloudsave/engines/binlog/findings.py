"""
Is a server's binlog fit to restore from: its settings, our rights, its durability, its retention.

Each check is a function from facts to findings.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from cloudsave.engines.binlog.connection import Session
from cloudsave.errors import EngineError
from cloudsave.model.finding import Finding, Severity
from cloudsave.model.identity import SourceIdentity

EXPIRE_SECONDS_MIN = 86400
"""Capture may stand still for so long before log is lost."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What the checks share."""

    identity: SourceIdentity
    settings: Mapping[str, str]
    grants: str
    account: str


Check = Callable[[Facts], Iterator[Finding]]


@dataclass(frozen=True, slots=True)
class Rules:
    """What one engine adds: its rights, by any of which a thing may be done, and its own checks."""

    rights: tuple[tuple[tuple[str, ...], str], ...]
    """(names as SHOW GRANTS prints them, what the right is for); the first name is the one to grant."""
    checks: tuple[Check, ...]


def gather_findings(session: Session, identity: SourceIdentity, rules: Rules) -> list[Finding]:
    """All findings, in a fixed order. Changes nothing on the server."""
    settings = session.variables("%")
    (account,) = session.row("SELECT CURRENT_USER()", doing="read the account's name")
    rows = session.rows("SHOW GRANTS", doing="read the account's rights")
    facts = Facts(identity, settings, "\n".join(str(row[0]) for row in rows), str(account))
    found: list[Finding] = list(_rights(facts, rules))
    for check in (*_CHECKS, *rules.checks):
        try:
            found.extend(check(facts))
        except (EngineError, KeyError, ValueError) as error:
            found.append(Finding(Severity.NOTICE, "settings", f"not checked: {error}"))
    return found


def quoted_account(account: str) -> str:
    """`user@host` as GRANT wants it."""
    user, _, host = account.rpartition("@")
    return "@".join("'" + part.replace("'", "''") + "'" for part in (user, host))


def granted_globally(grants: str) -> set[str]:
    """The rights on everything that the lines of SHOW GRANTS tell, in capitals."""
    return {
        right.strip().upper()
        for line in grants.splitlines()
        if (granted := re.match(r"GRANT (.+?) ON \*\.\* TO ", line))
        for right in granted[1].split(",")
    }


def _rights(facts: Facts, rules: Rules) -> Iterator[Finding]:
    globally = granted_globally(facts.grants)
    missing = []
    for names, purpose in rules.rights:
        if not globally & {"ALL PRIVILEGES", "ALL", *names}:
            missing.append(names[0])
            yield Finding(
                Severity.PROBLEM,
                "rights",
                f"account {facts.account} may not {purpose}",
                f"GRANT {names[0]} ON *.* TO {quoted_account(facts.account)};",
            )
    if not missing:
        yield Finding(Severity.OK, "rights", f"account {facts.account} has the rights that it needs")


def _binlog(facts: Facts) -> Iterator[Finding]:
    if facts.settings["log_bin"] != "ON":
        yield Finding(
            Severity.PROBLEM,
            "log_bin",
            "the server writes no binlog: no commit after a base backup could be restored",
            "set log_bin in the server's configuration, and restart it",
        )
        return
    yield Finding(Severity.OK, "log_bin", "the server writes a binlog")
    form = facts.settings["binlog_format"]
    if form == "ROW":
        yield Finding(Severity.OK, "binlog_format", "binlog_format is ROW")
    else:
        yield Finding(
            Severity.PROBLEM,
            "binlog_format",
            f"binlog_format is {form}: replay of statements may give other rows than the source had",
            "SET GLOBAL binlog_format = 'ROW'; and in the server's configuration",
        )
    image = facts.settings["binlog_row_image"]
    if image not in ("FULL", "FULL_NODUP"):
        yield Finding(
            Severity.WARNING,
            "binlog_row_image",
            f"binlog_row_image is {image}: the log restores, but does not show whole rows to a search",
            "SET GLOBAL binlog_row_image = 'FULL'",
        )
    if facts.settings["binlog_checksum"] != "CRC32":
        yield Finding(
            Severity.PROBLEM,
            "binlog_checksum",
            "the binlog is written without checksums: damage could not be told, so it is not captured",
            "SET GLOBAL binlog_checksum = 'CRC32'",
        )


def _durability(facts: Facts) -> Iterator[Finding]:
    weak = [name for name in ("sync_binlog", "innodb_flush_log_at_trx_commit") if facts.settings[name] != "1"]
    for name in weak:
        yield Finding(
            Severity.WARNING,
            name,
            f"{name} is {facts.settings[name]}: after a crash the server may lack commits that the"
            " repository holds, and go on from an older state",
            f"SET GLOBAL {name} = 1; and in the server's configuration",
        )
    if not weak:
        yield Finding(Severity.OK, "durability", "the server makes binlog and commits durable together")


def _expiry(facts: Facts) -> Iterator[Finding]:
    seconds = int(float(facts.settings["binlog_expire_logs_seconds"]))
    if 0 < seconds < EXPIRE_SECONDS_MIN:
        yield Finding(
            Severity.WARNING,
            "binlog_expire_logs_seconds",
            f"the server keeps its binlog for {seconds} s: if capture stands still for longer, log is lost",
            f"SET GLOBAL binlog_expire_logs_seconds = {7 * EXPIRE_SECONDS_MIN}",
        )


def _server_id(facts: Facts) -> Iterator[Finding]:
    if facts.settings["server_id"] in ("0", "1"):
        yield Finding(
            Severity.WARNING,
            "server_id",
            f"server_id is {facts.settings['server_id']}, as on every server that nobody gave one",
            "set a server_id of its own in the server's configuration",
        )


_CHECKS: tuple[Check, ...] = (_binlog, _durability, _expiry, _server_id)
