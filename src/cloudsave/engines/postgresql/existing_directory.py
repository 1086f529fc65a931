"""
A PostgreSQL data directory that is there already: whose it is, whether a server uses it, what log lies in it.

A server is found by the directory that its processes work in, so that one which has lost its
`postmaster.pid` is found too, and one whose tablespaces are linked from a copied data directory. What runs in
another container cannot be seen; there `postmaster.pid` must do.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from cloudsave.clock import SYSTEM_CLOCK
from cloudsave.engines.postgresql.exclusions import CONTROL_FILE
from cloudsave.engines.postgresql.format_control import parse_control
from cloudsave.engines.postgresql.leftover import end_leftover_server
from cloudsave.engines.postgresql.target import is_private
from cloudsave.errors import CloudsaveError, TargetDirectoryInUse
from cloudsave.model.engine_facts import DirectoryFacts, PresentLog

ENGINE = "postgresql"
_SERVER_NAMES = ("postgres", "postmaster")
_LONG_HEADER = struct.Struct("<HHIQI4xQI")
"""magic, info, timeline, page address, rest of a record, system identifier, segment bytes."""
_SEGMENT_NAME = re.compile(r"([0-9A-F]{8})([0-9A-F]{8})([0-9A-F]{8})(?:\.partial)?")
_HISTORY_NAME = re.compile(r"([0-9A-F]{8})\.history")
_LONG_HEADER_FLAG = 2


class PostgresDirectoryInspector:
    """`DirectoryInspector` of PostgreSQL."""

    def inspect(self, directory: Path) -> DirectoryFacts | None:
        """See `DirectoryInspector.inspect`."""
        try:
            if not _is_data_directory(directory):
                return None
            tablespaces = {one.name: one.parent / one.readlink() for one in _links(directory / "pg_tblspc")}
            log_directory = (directory / "pg_wal").resolve()
            lineage, system_identifier = _lineage_of(directory)
            return DirectoryFacts(
                lineage=lineage,
                in_use=self._in_use(directory, [log_directory, *tablespaces.values()]),
                tablespaces=tablespaces,
                log_directory=log_directory,
                log_files=tuple(_log_files(log_directory, system_identifier)),
            )
        except OSError as error:
            raise TargetDirectoryInUse(
                f"cannot look into {error.filename or directory}",
                detail=f"The operating system said: {error.strerror}.",
            ) from error

    def users_of(self, places: Sequence[Path]) -> str:
        """See `DirectoryInspector.users_of`."""
        wanted = [place.resolve() for place in places]
        for pid, data in _servers():
            for used in _places_of(data):
                if any(used == one or used in one.parents or one in used.parents for one in wanted):
                    return f"Process {pid}, a server on {data}, uses {used}."
        return ""

    def end_server(self, directory: Path) -> None:
        """See `DirectoryInspector.end_server`."""
        end_leftover_server(directory, private=lambda path: is_private(path, directory), clock=SYSTEM_CLOCK)

    def _in_use(self, directory: Path, places: Sequence[Path]) -> str:
        pid_file = directory / "postmaster.pid"
        if pid_file.exists():
            return (
                f"There is a {pid_file.name} in it. If that server was killed, and runs on no other host or"
                " container either, remove the file."
            )
        return self.users_of([directory, *places])


def _is_data_directory(directory: Path) -> bool:
    folders = all((directory / name).is_dir() for name in ("base", "global"))
    return folders and (directory / "PG_VERSION").is_file()


def _lineage_of(directory: Path) -> tuple[str, int]:
    """The lineage and the system identifier; ("", 0) where the control file cannot tell."""
    try:
        control = parse_control((directory / CONTROL_FILE).read_bytes())
    except (FileNotFoundError, CloudsaveError):
        return "", 0
    return f"{ENGINE}-{control.system_identifier}", control.system_identifier


def _links(directory: Path) -> list[Path]:
    return [one for one in directory.iterdir() if one.is_symlink()] if directory.is_dir() else []


def _log_files(directory: Path, system_identifier: int) -> Iterator[PresentLog]:
    """
    Files that hold the log that their name says. A file that waits to be used again bears a name of the
    future, and its pages the addresses of the past.
    """
    if not directory.is_dir():
        return
    for path in sorted(directory.iterdir()):
        history = _HISTORY_NAME.fullmatch(path.name)
        if history:
            yield PresentLog(path, history[1], 0, 0)
        name = _SEGMENT_NAME.fullmatch(path.name)
        if name is None or path.is_symlink() or not path.is_file():
            continue
        with path.open("rb") as file:
            head = file.read(_LONG_HEADER.size)
        if len(head) < _LONG_HEADER.size:
            continue
        _, info, _, address, _, system, segment_bytes = _LONG_HEADER.unpack(head)
        begin = (int(name[2], 16) << 32) + int(name[3], 16) * segment_bytes
        if info & _LONG_HEADER_FLAG and address == begin and system_identifier in (0, system):
            yield PresentLog(path, name[1], begin, begin + segment_bytes)


def _servers() -> Iterator[tuple[int, Path]]:
    """The processes of servers that can be seen, one for each directory that servers work in."""
    seen: set[Path] = set()
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        with suppress(OSError):
            command = Path(f"/proc/{name}/comm").read_text()
            if not command.startswith(_SERVER_NAMES):
                continue
            data = Path(os.readlink(f"/proc/{name}/cwd"))
            if data not in seen and _is_data_directory(data):
                seen.add(data)
                yield int(name), data


def _places_of(data: Path) -> list[Path]:
    """All directories of a server that works in `data`."""
    with suppress(OSError):
        return [data, (data / "pg_wal").resolve(), *(one.resolve() for one in _links(data / "pg_tblspc"))]
    return [data]
