"""
The settings with which a restored server recovers, and the file that they are kept in.

`postgresql.auto.conf` overrides `postgresql.conf` name by name, so that every setting that could lead
recovery astray is written, also where its value is empty: the source's own configuration may hold a target,
an archive clean-up command, or the connection of a standby.
Source: PostgreSQL manual, Archive Recovery and Recovery Target; src/backend/utils/misc/guc-file.l.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from cloudsave.engines.postgresql.log import format_lsn
from cloudsave.errors import UsageError
from cloudsave.model.engine_facts import ServerRequest

AUTO_CONF = "postgresql.auto.conf"
RECOVERY_SIGNAL = "recovery.signal"
STANDBY_SIGNAL = "standby.signal"
BACKUP_LABEL = "backup_label"
_LINE = re.compile(r"\s*([A-Za-z_][A-Za-z0-9_.]*)[\s=]")
_NEUTRAL = {
    "archive_cleanup_command": "",
    "primary_conninfo": "",
    "primary_slot_name": "",
    "recovery_end_command": "",
    "recovery_min_apply_delay": "0",
    "recovery_target": "",
    "recovery_target_action": "pause",
    "recovery_target_inclusive": "on",
    "recovery_target_lsn": "",
    "recovery_target_name": "",
    "recovery_target_time": "",
    "recovery_target_timeline": "latest",
    "recovery_target_xid": "",
    "restore_command": "",
}
KEPT_AFTERWARDS = {"archive_mode": "off"}
"""A restored server must not archive into the history of the server that it is a copy of."""
HELD_SETTINGS = frozenset(
    {
        *_NEUTRAL,
        *KEPT_AFTERWARDS,
        "config_file",
        "data_directory",
        "external_pid_file",
        "hba_file",
        "hot_standby",
        "lc_messages",
        "log_destination",
        "logging_collector",
        "port",
        "unix_socket_directories",
        "unix_socket_group",
        "unix_socket_permissions",
    }
)
"""What leads replay to its target, keeps the copy out of its source's archive, and lets it be asked."""


def refuse_held_settings(given: Mapping[str, str]) -> None:
    """
    Names are taken as the server's command line takes them: in any case, a dash for an underscore.

    Raises: UsageError for one that is not free.
    Source: PostgreSQL ParseLongOption(), src/backend/utils/misc/guc.c.
    """
    held = sorted(name for name in given if name.strip().lower().replace("-", "_") in HELD_SETTINGS)
    if held:
        raise UsageError(
            f"cannot set {', '.join(held)} for a restored server",
            detail="The restore depends on it: to stop at its target, to keep the copy out of its source's"
            " archive, or to ask the server where it is.",
            hints=["--port gives the port; all else can be changed once the server has been opened"],
        )


def has_ended_recovery(data: Path) -> bool:
    """
    Whether a server has ended its recovery on a restored directory: it removes the signal only when the
    history of its new timeline is written, and there is no way back from then on.

    Every backup holds a label, which the server puts aside when it begins; and recovery is always begun with
    the signal.
    Source: PostgreSQL StartupXLOG(), src/backend/access/transam/xlog.c.
    """
    return not any((data / name).exists() for name in (RECOVERY_SIGNAL, STANDBY_SIGNAL, BACKUP_LABEL))


def recovery_settings(request: ServerRequest, needed: Mapping[str, int]) -> dict[str, str]:
    """
    All settings that recovery depends on. `needed`: those that must be as high as on the source, whatever the
    configuration says that was restored or written for this host. Raises: UsageError.
    """
    settings = dict(_NEUTRAL)
    for name, least in needed.items():
        settings[name] = str(least)
        given = request.settings.get(name, "")
        if given.isdigit() and int(given) < least:
            raise UsageError(
                f"cannot replay the log with {name} = {given}",
                detail=f"The source had {least}, and a server that replays its log needs as much.",
                hints=[f"--set {name}={least}; lower it after the server has been opened"],
            )
    settings["restore_command"] = request.fetch_command
    settings["recovery_target_timeline"] = str(int(request.branch, 16))
    settings["recovery_target_lsn"] = format_lsn(request.recovery_end)
    settings["recovery_target_inclusive"] = "on" if request.inclusive else "off"
    settings["hot_standby"] = "on"
    settings.update(KEPT_AFTERWARDS)
    settings.update(request.settings)
    return settings


def with_settings(content: str, settings: Mapping[str, str]) -> str:
    """
    The text of an auto.conf in which exactly `settings` hold of the names that recovery depends on.

    Empty values come first: the server takes an empty target that follows a real one for a second target.
    """
    managed = {*_NEUTRAL, *KEPT_AFTERWARDS, "hot_standby", *settings}
    kept = [line for line in content.splitlines() if not _is_about(line, managed)]
    added = [f"{name} = {quoted(value)}" for name, value in sorted(settings.items(), key=_order)]
    return "\n".join([*kept, *added]) + "\n"


def quoted(value: str) -> str:
    """A value as a configuration file wants it."""
    return "'" + value.replace("\\", "\\\\").replace("'", "''") + "'"


def _order(setting: tuple[str, str]) -> tuple[bool, str]:
    name, value = setting
    return value != "", name


def _is_about(line: str, names: set[str]) -> bool:
    found = _LINE.match(line)
    return found is not None and found[1].lower() in names
