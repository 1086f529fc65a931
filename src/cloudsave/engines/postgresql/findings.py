"""
Is a server protectable: its settings, our rights, the log it holds, its disks, its clock.

Each check is a function from facts to findings; one that may not look says so instead of failing the rest.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cloudsave.clock import Clock
from cloudsave.engines.postgresql.backup_session import BackupSession
from cloudsave.engines.postgresql.connection import grant_statement
from cloudsave.engines.postgresql.data_directory import is_not_the_servers
from cloudsave.errors import EngineError
from cloudsave.model.finding import Finding, Severity
from cloudsave.model.identity import Role, SourceIdentity

CLOCK_SKEW_SECONDS_MAX = 5.0
REPLICA_LAG_SECONDS_MAX = 300.0
DISK_FULL_SECONDS_MIN = 86400.0
"""Below this the time until a slot has filled the disk is a warning."""
SENDERS_WANTED = 2
"""Free WAL senders: one for the capture of the log, one for a base backup."""
SLOT_PREFIX = "cloudsave"
_MIB = 1 << 20
_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class _Facts:
    """What the checks share."""

    session: BackupSession
    identity: SourceIdentity
    clock: Clock
    settings: Mapping[str, str]
    local: str
    """"" where the data directory is readable here, else why not."""

    @property
    def log_directory(self) -> Path:
        return Path(self.identity.data_directory) / "pg_wal"


def gather_findings(session: BackupSession, identity: SourceIdentity, *, clock: Clock) -> list[Finding]:
    """All findings, in a fixed order. Changes nothing on the server."""
    query = "select json_object_agg(name, setting) from pg_settings where setting is not null"
    (settings,) = session.row(query, doing="read the settings")
    directory = Path(identity.data_directory)
    local = is_not_the_servers(session.connection, directory, identity.system_identifier)
    facts = _Facts(session, identity, clock, settings, local)
    found: list[Finding] = []
    for subject, check in _CHECKS.items():
        try:
            found.extend(check(facts))
        except EngineError as error:
            found.append(
                Finding(Severity.NOTICE, subject, f"not checked: {error.detail}", hint="; ".join(error.hints))
            )
    return found


# ---- settings
# ------------------------------------------------------------------------------------------------


def _log_settings(facts: _Facts) -> Iterator[Finding]:
    level = facts.settings["wal_level"]
    if level == "minimal":
        yield Finding(
            Severity.PROBLEM,
            "wal_level",
            "wal_level is minimal: the log cannot restore anything",
            "ALTER SYSTEM SET wal_level = 'replica'; then restart the server",
        )
    else:
        yield Finding(Severity.OK, "wal_level", f"wal_level is {level}")
    if not _writes_full_pages(facts):
        yield Finding(
            Severity.PROBLEM,
            "full_page_writes",
            "full_page_writes is off: a page torn by a crash or a copy cannot be repaired",
            "ALTER SYSTEM SET full_page_writes = on; SELECT pg_reload_conf()",
        )
    if facts.settings["fsync"] == "off":
        yield Finding(
            Severity.WARNING,
            "fsync",
            "fsync is off: a crash of the host may corrupt the server's files, and backups of them",
            "ALTER SYSTEM SET fsync = on; SELECT pg_reload_conf()",
        )
    if facts.settings["synchronous_commit"] == "off":
        yield Finding(
            Severity.NOTICE,
            "synchronous_commit",
            "synchronous_commit is off: commits are acknowledged before they are in the log",
        )
    names = facts.settings.get("synchronous_standby_names", "")
    if names:
        yield Finding(
            Severity.NOTICE, "synchronous_standby_names", f"commits wait for {names!r} before they return"
        )


def _writes_full_pages(facts: _Facts) -> bool:
    """By the setting; a replica's own says nothing, so by the last checkpoint of its primary."""
    if facts.identity.role != Role.REPLICA:
        return facts.settings["full_page_writes"] == "on"
    query = "select full_page_writes from pg_control_checkpoint()"
    return bool(facts.session.row(query, doing="read the last checkpoint")[0])


def _checksums(facts: _Facts) -> Iterator[Finding]:
    if facts.identity.page_checksums:
        yield Finding(Severity.OK, "data checksums", "data checksums are on")
    else:
        yield Finding(
            Severity.WARNING,
            "data checksums",
            "data checksums are off: a page that the disk has damaged is backed up unnoticed",
            "with the server stopped: pg_checksums --enable -D <data directory>",
        )


def _senders(facts: _Facts) -> Iterator[Finding]:
    maximum = int(facts.settings["max_wal_senders"])
    (used,) = facts.session.row("select count(*) from pg_stat_get_wal_senders()", doing="count WAL senders")
    yield _left("max_wal_senders", "WAL senders", maximum=maximum, used=used, wanted=SENDERS_WANTED)
    maximum = int(facts.settings["max_replication_slots"])
    (used,) = facts.session.row("select count(*) from pg_replication_slots", doing="count the slots")
    (ours,) = facts.session.row(
        "select count(*) from pg_replication_slots where slot_name like %s",
        (SLOT_PREFIX + "%",),
        doing="count the slots",
    )
    wanted = 0 if ours else 1
    yield _left("max_replication_slots", "replication slots", maximum=maximum, used=used, wanted=wanted)


def _left(setting: str, what: str, *, maximum: int, used: int, wanted: int) -> Finding:
    left = maximum - used
    fact = f"{left} of {maximum} {what} are free"
    if left >= wanted:
        return Finding(Severity.OK, setting, fact)
    return Finding(
        Severity.PROBLEM if left <= 0 else Severity.WARNING,
        setting,
        f"{fact}, {wanted} are needed",
        f"ALTER SYSTEM SET {setting} = {maximum + wanted - left}; then restart the server",
    )


# ---- rights
# --------------------------------------------------------------------------------------------------

_RIGHTS = """
select rolname, rolsuper, rolreplication or rolsuper,
       pg_has_role(oid, 'pg_read_all_settings', 'usage'), pg_has_role(oid, 'pg_read_all_stats', 'usage')
from pg_roles where rolname = current_user
"""
_BACKUP_FUNCTIONS = ("pg_backup_start", "pg_backup_stop")
_BACKUP_FUNCTIONS_14 = ("pg_start_backup", "pg_stop_backup")
_FILE_FUNCTIONS = ("pg_show_all_file_settings", "pg_hba_file_rules", "pg_ident_file_mappings")


def _rights(facts: _Facts) -> Iterator[Finding]:
    role, superuser, replication, settings, statistics = facts.session.row(_RIGHTS, doing="read the rights")
    quoted = facts.session.row("select quote_ident(%s)", (role,), doing="read the rights")[0]
    if superuser:
        yield Finding(
            Severity.NOTICE,
            "role",
            f"role {role!r} is a superuser, more than cloudsave needs",
            "\n".join(least_privileges("cloudsave", facts.identity.major)),
        )
        return
    if not replication:
        yield Finding(
            Severity.PROBLEM,
            "role",
            f"role {role!r} may not stream the log",
            f"as a superuser: ALTER ROLE {quoted} REPLICATION;",
        )
    missing: list[str] = []
    if not settings or not statistics:
        missing.append(f"GRANT pg_read_all_settings, pg_read_all_stats TO {quoted};")
    for function in _functions(facts.identity.major):
        name = grant_statement(function, role)
        signature = name.removeprefix("GRANT EXECUTE ON FUNCTION ").partition(" TO ")[0]
        query = "select has_function_privilege(%s, 'execute')"
        if not facts.session.row(query, (signature,), doing="read the rights")[0]:
            missing.append(name)
    if missing:
        yield Finding(
            Severity.NOTICE,
            "rights",
            f"role {role!r} lacks rights for local backups or complete checks; remote backups work",
            "as a superuser: " + " ".join(missing),
        )
    elif replication:
        yield Finding(Severity.OK, "role", f"role {role!r} has the rights that cloudsave needs")


def backup_functions(major: int) -> tuple[str, ...]:
    """Functions that begin and end a local backup."""
    return _BACKUP_FUNCTIONS if major >= 15 else _BACKUP_FUNCTIONS_14


def _functions(major: int) -> tuple[str, ...]:
    """Functions that an ordinary role needs to be granted."""
    return backup_functions(major) + (_FILE_FUNCTIONS if major >= 16 else _FILE_FUNCTIONS[:1])


def least_privileges(role: str, major: int) -> tuple[str, ...]:
    """The statements that make a role with exactly the rights that all of cloudsave needs."""
    return (
        f'CREATE ROLE "{role}" LOGIN REPLICATION;',
        f'GRANT pg_read_all_settings, pg_read_all_stats TO "{role}";',
        *(grant_statement(function, role) for function in _functions(major)),
    )


# ---- the log that the server holds
# ---------------------------------------------------------------------------

_SLOTS = """
select coalesce(json_agg(slot), '[]') from (
  select slot_name as name, active, wal_status as status, safe_wal_size as safe,
         case when restart_lsn is null then null
              when pg_is_in_recovery() then pg_wal_lsn_diff(pg_last_wal_replay_lsn(), restart_lsn)::bigint
              else pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn)::bigint end as held
  from pg_replication_slots where slot_type = 'physical' and not temporary order by 1) slot
"""
_LOG_RATE = """
select (wal_bytes / greatest(extract(epoch from clock_timestamp() - stats_reset), 1))::float8 from pg_stat_wal
"""


def _log_limit(facts: _Facts) -> Iterator[Finding]:
    limit_mib = int(facts.settings["max_slot_wal_keep_size"])
    subject = "max_slot_wal_keep_size"
    if limit_mib >= 0:
        fact = f"a slot may hold {_size(limit_mib * _MIB)} of log; one that falls behind further is lost"
        yield Finding(Severity.OK, subject, fact)
    else:
        yield Finding(
            Severity.WARNING,
            subject,
            "max_slot_wal_keep_size is -1: while nobody takes the log it grows until the disk is full",
            f"ALTER SYSTEM SET max_slot_wal_keep_size = '{_sane_limit(facts)}'; SELECT pg_reload_conf()",
        )
    if facts.settings.get("idle_replication_slot_timeout", "0") != "0":
        yield Finding(
            Severity.WARNING,
            "idle_replication_slot_timeout",
            "the server invalidates slots that are idle; a capture that is down for so long leaves a hole",
            "ALTER SYSTEM SET idle_replication_slot_timeout = 0; SELECT pg_reload_conf()",
        )


def _sane_limit(facts: _Facts) -> str:
    """Two thirds of what is free for the log now; else a day of log by the measured rate, at least 1 GB."""
    if not facts.local:
        free = _free_bytes(facts.log_directory)
        return f"{max(free * 2 // 3 // _GIB, 1)}GB"
    return f"{max(int(_log_rate(facts) * 86400) // _GIB, 1)}GB"


def _log_rate(facts: _Facts) -> float:
    """Bytes of log per second, averaged since the statistics were reset."""
    return float(facts.session.row(_LOG_RATE, doing="measure the log's rate")[0] or 0.0)


def _slots(facts: _Facts) -> Iterator[Finding]:
    (slots,) = facts.session.row(_SLOTS, doing="read the slots")
    for slot in slots:
        ours = str(slot["name"]).startswith(SLOT_PREFIX)
        subject = f"slot {slot['name']}"
        if slot["status"] == "lost":
            yield Finding(
                Severity.PROBLEM if ours else Severity.NOTICE,
                subject,
                "the slot is lost: the server has removed log that was not captured",
                "start the capture anew; a base backup after that closes the history" if ours else "",
            )
        elif slot["held"] is None:
            yield Finding(
                Severity.WARNING, subject, "the slot holds no log", "was it created without reserving?"
            )
        else:
            yield _slot_held(facts, slot, subject)


def _slot_held(facts: _Facts, slot: Mapping[str, object], subject: str) -> Finding:
    held = int(str(slot["held"]))
    parts = [f"{'in use' if slot['active'] else 'idle'}, holds {_size(held)} of log ({slot['status']})"]
    severity = Severity.OK
    if slot["status"] == "unreserved":
        severity = Severity.PROBLEM
        parts.append("the server is about to remove log that it needs")
    rate = _log_rate(facts)
    room = _room_for_log(facts, slot["safe"])
    if room is not None and rate > 0:
        seconds = room / rate
        parts.append(f"at {_size(rate)}/s there is room for {_duration(seconds)} more")
        if seconds < DISK_FULL_SECONDS_MIN and not slot["active"]:
            severity = max(severity, Severity.WARNING, key=list(Severity).index)
    elif room is not None:
        parts.append("the rate of the log is not known yet")
    else:
        parts.append("time until the disk is full unknown from here")
    hint = "" if severity == Severity.OK else "is the capture of the log running?"
    return Finding(severity, subject, "; ".join(parts), hint)


def _room_for_log(facts: _Facts, safe_bytes: object) -> int | None:
    """Bytes of log that may still come before the disk is full or the slot is lost; None: unknown."""
    rooms = [] if facts.local else [_free_bytes(facts.log_directory)]
    if safe_bytes is not None:
        rooms.append(max(int(str(safe_bytes)), 0))
    return min(rooms, default=None)


_ARCHIVER = """
select archived_count, failed_count, last_archived_time, last_failed_time, last_failed_wal,
       (last_failed_time > coalesce(last_archived_time, '-infinity')) is true
from pg_stat_archiver
"""


def _archiver(facts: _Facts) -> Iterator[Finding]:
    if facts.settings["archive_mode"] == "off":
        return
    has_way = facts.settings.get("archive_command", "") or facts.settings.get("archive_library", "")
    if not has_way or has_way == "(disabled)":
        yield Finding(
            Severity.WARNING,
            "archive_mode",
            "archive_mode is on without archive_command or archive_library: log piles up in pg_wal",
            "set archive_command, or ALTER SYSTEM SET archive_mode = off and restart",
        )
        return
    row = facts.session.row(_ARCHIVER, doing="read the archiver's state")
    archived, failed, _, failed_time, failed_file, failing = row
    if failing:
        since = failed_time.isoformat(timespec="seconds") if isinstance(failed_time, datetime) else "?"
        yield Finding(
            Severity.WARNING,
            "archiver",
            f"archiving fails: last {failed_file} at {since}; log piles up in pg_wal",
            "the server's log says what archive_command printed",
        )
    else:
        yield Finding(Severity.OK, "archiver", f"{archived} log files archived, {failed} failures, none now")


# ---- the rest of the world
# -----------------------------------------------------------------------------------


def _clock(facts: _Facts) -> Iterator[Finding]:
    before = facts.clock.now()
    (server,) = facts.session.row(
        "select extract(epoch from clock_timestamp())::float8", doing="read the server's clock"
    )
    after = facts.clock.now()
    skew = max(before.timestamp() - server, server - after.timestamp(), 0.0)
    if skew > CLOCK_SKEW_SECONDS_MAX:
        yield Finding(
            Severity.WARNING,
            "clock",
            f"the clocks of the server and of this machine differ by {skew:.0f} s",
            "restore times mean the server's clock; is time synchronisation running on both?",
        )
    else:
        yield Finding(Severity.OK, "clock", "the clocks of the server and of this machine agree")


_TABLESPACES = "select pg_tablespace_location(oid) from pg_tablespace"


def _volumes(facts: _Facts) -> Iterator[Finding]:
    if facts.local:
        yield Finding(Severity.NOTICE, "data directory", f"backups are read remotely: {facts.local}")
        return
    places = {"data directory": Path(facts.identity.data_directory), "pg_wal": facts.log_directory}
    for location in facts.session.column(_TABLESPACES, doing="list the tablespaces"):
        if location and location.startswith("/"):
            places[f"tablespace {location}"] = Path(location)
    devices: dict[int, list[str]] = {}
    for name, path in places.items():
        try:
            devices.setdefault(path.resolve().stat().st_dev, []).append(name)
        except OSError as error:
            yield Finding(Severity.WARNING, name, f"{path} cannot be read here: {error.strerror}")
    if len(devices) == 1:
        yield Finding(Severity.OK, "volumes", "data directory, pg_wal and tablespaces share one file system")
    else:
        layout = "; ".join(", ".join(names) for names in devices.values())
        yield Finding(
            Severity.NOTICE,
            "volumes",
            f"the server uses {len(devices)} file systems: {layout}",
            "storage snapshots of them are not simultaneous; base backups are not concerned",
        )


_UNLOGGED = "select count(*) from pg_class where relpersistence = 'u' and relkind in ('r', 'm')"


def _unlogged(facts: _Facts) -> Iterator[Finding]:
    (count,) = facts.session.row(_UNLOGGED, doing="count unlogged tables")
    if count:
        (database,) = facts.session.row("select current_database()", doing="name the database")
        yield Finding(
            Severity.NOTICE,
            "unlogged tables",
            f"{count} unlogged tables in database {database!r}: a restore brings them back empty",
            "ALTER TABLE ... SET LOGGED protects them",
        )


_LAG = """
select extract(epoch from clock_timestamp() - pg_last_xact_replay_timestamp())::float8,
       pg_wal_lsn_diff(pg_last_wal_receive_lsn(), pg_last_wal_replay_lsn())::bigint,
       pg_is_wal_replay_paused()
"""


def _replica(facts: _Facts) -> Iterator[Finding]:
    if facts.identity.role != Role.REPLICA:
        return
    seconds, lag_bytes, paused = facts.session.row(_LAG, doing="measure the replica's lag")
    behind = f"{_size(max(lag_bytes or 0, 0))} behind what it received"
    age = "no commit replayed yet" if seconds is None else f"last commit {_duration(seconds)} ago"
    if paused:
        fact = f"replay is paused, {behind}, {age}"
        yield Finding(Severity.WARNING, "replica", fact, "SELECT pg_wal_replay_resume()")
    elif (lag_bytes or 0) > 0 and seconds is not None and seconds > REPLICA_LAG_SECONDS_MAX:
        yield Finding(Severity.WARNING, "replica", f"{behind}, {age}", "is the replica overloaded?")
    else:
        yield Finding(Severity.OK, "replica", f"{behind}, {age}")


_CHECKS: Mapping[str, Callable[[_Facts], Iterator[Finding]]] = {
    "settings": _log_settings,
    "data checksums": _checksums,
    "replication": _senders,
    "rights": _rights,
    "max_slot_wal_keep_size": _log_limit,
    "slots": _slots,
    "archiver": _archiver,
    "clock": _clock,
    "volumes": _volumes,
    "unlogged tables": _unlogged,
    "replica": _replica,
}


def _free_bytes(path: Path) -> int:
    facts = os.statvfs(path.resolve())
    return facts.f_bavail * facts.f_frsize


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} TB"


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
