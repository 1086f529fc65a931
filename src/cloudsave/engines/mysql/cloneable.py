"""What must be so for a MySQL server to be cloned as a whole."""

from __future__ import annotations

from cloudsave.engines.binlog.connection import Session
from cloudsave.errors import UnsuitableSettings

LISTED_MAX = 5
_PLUGIN = "SELECT PLUGIN_STATUS FROM information_schema.PLUGINS WHERE PLUGIN_NAME = 'clone'"
_LEFT_OUT = """
SELECT CONCAT(TABLE_SCHEMA, '.', TABLE_NAME, ' (', ENGINE, ')') FROM information_schema.TABLES
WHERE TABLE_TYPE = 'BASE TABLE' AND ENGINE NOT IN ('InnoDB', 'PERFORMANCE_SCHEMA', 'MEMORY', 'BLACKHOLE')
  AND NOT (TABLE_SCHEMA = 'mysql' AND ENGINE = 'CSV') ORDER BY 1
"""


def require_cloneable(session: Session) -> None:
    """Raises: UnsuitableSettings where a clone is not possible, or would leave tables out."""
    rows = session.rows(_PLUGIN, doing="look for the plugin clone")
    if not rows or rows[0][0] != "ACTIVE":
        raise UnsuitableSettings(
            "server has no active plugin clone",
            detail="Base backups of MySQL are clones.",
            hints=["INSTALL PLUGIN clone SONAME 'mysql_clone.so'"],
        )
    names = [str(row[0]) for row in session.rows(_LEFT_OUT, doing="look for tables that are not InnoDB's")]
    if names:
        more = f" and {len(names) - LISTED_MAX} more" if len(names) > LISTED_MAX else ""
        raise UnsuitableSettings(
            "cannot clone a server with tables that are not InnoDB's",
            detail=f"A clone would leave them out: {', '.join(names[:LISTED_MAX])}{more}.",
            hints=["ALTER TABLE ... ENGINE = InnoDB", "or back them up by other means and drop them here"],
        )
