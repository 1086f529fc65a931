"""Sort orders after a restore: what this host sorts otherwise, and the statements that put it right."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cloudsave.engines.collation_api import CollationInspector
from cloudsave.model.collation import CollationChange

FILE_SUFFIX = ".reindex.sql"


@dataclass(frozen=True, slots=True)
class CollationReport:
    """What differs, and the file that says what to do; None: nothing differs."""

    changes: Sequence[CollationChange]
    file: Path | None


def report_collations(
    inspector: CollationInspector, url: str, recorded: Mapping[str, str], directory: Path
) -> CollationReport:
    """
    Ask the restored server of `directory`, and write the statements beside it. Raises: EngineError, OSError.
    """
    changes = inspector.changes(url, recorded)
    file = directory.with_name(directory.name + FILE_SUFFIX)
    if not changes:
        file.unlink(missing_ok=True)
        return CollationReport(changes, None)
    lines = [
        "-- Sort orders have changed: until these ran, queries may miss rows and indexes take duplicates."
    ]
    for database in dict.fromkeys(one.database for one in changes):
        lines.append(f"\\connect {_quoted(database)}")
        for one in changes:
            if one.database == database:
                what = one.collation or "the default order"
                lines.append(
                    f"-- {what}: built with version {one.recorded}, here is {one.actual or 'another'}"
                )
                lines += one.statements
    file.write_text("\n".join(lines) + "\n")
    owner = directory.stat()
    if os.geteuid() == 0:
        os.chown(file, owner.st_uid, owner.st_gid)
    return CollationReport(changes, file)


def _quoted(name: str) -> str:
    """A name as psql's `\\connect` takes it."""
    doubled = name.replace('"', '""')
    return f'"{doubled}"'
