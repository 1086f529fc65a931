"""Settings on which the outcome of replayed statements depends: what a restored server must be told alike."""

from __future__ import annotations

from collections.abc import Mapping

from cloudsave.engines.binlog.connection import Session

RESTORE_SETTINGS = (
    "lower_case_table_names",
    "character_set_server",
    "collation_server",
    "default_storage_engine",
    "explicit_defaults_for_timestamp",
    "innodb_page_size",
    "innodb_data_file_path",
    "innodb_default_row_format",
    "innodb_file_per_table",
    "innodb_strict_mode",
    "gtid_mode",
)
ZONE_SETTING = "default_time_zone"
"""The source's zone, as an offset from UTC where it was that of its system."""
GTID_SETTING = "gtid_binlog_pos"
"""Where a copy of MariaDB is, once prepared."""
_NOT_COPIED = ("gtid_mode", GTID_SETTING)
_ZONE = (
    "SELECT @@GLOBAL.time_zone,"
    " TIMESTAMPDIFF(MINUTE, UTC_TIMESTAMP(), CONVERT_TZ(UTC_TIMESTAMP(), '+00:00', 'SYSTEM'))"
)


def restore_settings(session: Session) -> dict[str, str]:
    """What is to be recorded of a source."""
    known = session.variables("%")
    settings = {name: known[name] for name in RESTORE_SETTINGS if name in known}
    zone, minutes = session.row(_ZONE, doing="read the server's time zone")
    settings[ZONE_SETTING] = _offset(int(minutes or 0)) if zone == "SYSTEM" else str(zone)
    return settings


def copied_settings(base: Mapping[str, str]) -> dict[str, str]:
    """The same as options of a server; names that it does not know are passed over."""
    names = [name for name in base if name not in _NOT_COPIED]
    return {f"loose-{name.replace('_', '-')}": base[name].strip() for name in names}


def _offset(minutes: int) -> str:
    sign = "-" if minutes < 0 else "+"
    return f"{sign}{abs(minutes) // 60:02}:{abs(minutes) % 60:02}"
