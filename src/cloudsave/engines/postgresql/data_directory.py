"""
A data directory on this machine: is it really the server's, and what is in it.

A clone of a cluster has the same system identifier, the same `pg_control` but for a moment, and even a copied
`postmaster.pid`. So the proof is cause and effect: a snapshot that we export in a session of the server is
seen as a file here while our transaction lives, and is gone when it ends.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psycopg

from cloudsave.engines.postgresql.exclusions import (
    CONTROL_FILE,
    DATA_DIRECTORIES,
    EMPTIED_DIRECTORIES,
    NEEDED_DIRECTORIES,
    PAGE_BYTES,
    is_excluded,
    relation_of,
    storage_of,
    unlogged_relations,
)
from cloudsave.errors import SourceUnreadable, UnsuitableSettings
from cloudsave.model.item import Item, ItemKind

NOTES_MAX = 20
"""Limit: sentences about things that were left out."""
_SNAPSHOT_BYTES_MAX = 65536
_TABLESPACE = re.compile(r"pg_tblspc/(\d+)")
_UNREADABLE_HINTS = (
    "run cloudsave as the user that runs the server, or read remotely: --mode remote",
    "initdb --allow-group-access lets members of the server's group read the data directory",
)


def is_not_the_servers(session: psycopg.Connection, directory: Path, system_identifier: str) -> str:
    """
    Why `directory` cannot be taken for the data directory of the server of `session`; "" where it is proved.
    """
    if not directory.is_absolute():
        return "the role may not see where the data directory is"
    try:
        with (directory / CONTROL_FILE).open("rb") as control:
            found = int.from_bytes(control.read(8), "little")
        os.scandir(directory / "base").close()
    except FileNotFoundError:
        return f"{directory} is not on this machine"
    except OSError as error:
        return f"{directory} cannot be read ({error.strerror})"
    if str(found) != system_identifier:
        return f"{directory} on this machine belongs to another cluster"
    with session.transaction(force_rollback=True):
        row = session.execute("select pg_export_snapshot(), pg_backend_pid()").fetchone()
        assert row is not None
        exported = directory / "pg_snapshots" / str(row[0])
        try:
            with exported.open("rb") as file:
                if f"pid:{row[1]}\n".encode() not in file.read(_SNAPSHOT_BYTES_MAX):
                    return f"{directory} on this machine is used by another server"
        except FileNotFoundError:
            return f"{directory} on this machine is not the server's, it may be a copy"
        except OSError as error:
            return f"{directory} cannot be read ({error.strerror})"
    if exported.exists():
        return f"{directory} on this machine does not follow the server"
    return ""


@dataclass(slots=True)
class Walk:
    """
    One look over a data directory. Files come from `files`; directories and notes gather on the way.
    """

    root: Path
    tablespace_version: str
    """The directory of a tablespace that is this server's, such as "PG_18_202506291"; others are not ours."""
    directories: dict[str, Item] = field(default_factory=dict)
    """By path; parents before children."""
    notes: list[str] = field(default_factory=list)
    _inside: frozenset[str] = frozenset()
    """Directories of tablespaces that lie in the data directory; they are read through their links."""

    def files(self) -> Iterator[Item]:
        """
        Every regular file that belongs into a backup but `pg_control`, with its size now; in no order.

        Raises: SourceUnreadable, UnsuitableSettings.
        """
        for name in NEEDED_DIRECTORIES:
            self._add_directory(name)
        self._inside = self._tablespaces_inside()
        yield from self._directory("")

    def _directory(self, path: str) -> Iterator[Item]:
        entries = self._list(path)
        unlogged = unlogged_relations(path, [entry.name for entry in entries])
        below: list[str] = []
        for entry in entries:
            if is_excluded(path, entry.name, unlogged=unlogged):
                continue
            if _TABLESPACE.fullmatch(path) and entry.name != self.tablespace_version:
                continue
            entry_path = f"{path}/{entry.name}" if path else entry.name
            if entry_path == CONTROL_FILE:
                continue
            try:
                facts = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise unreadable(self.root / entry_path, error) from error
            if stat.S_ISREG(facts.st_mode):
                yield file_item(entry_path, facts)
            elif stat.S_ISDIR(facts.st_mode):
                self._add_directory(entry_path, facts.st_mode)
                below.append(entry_path)
            elif stat.S_ISLNK(facts.st_mode):
                below.extend(self._link(entry_path))
            else:
                self._note(f"{entry_path!r} is not a regular file and was left out")
        for entry_path in below:
            if entry_path not in EMPTIED_DIRECTORIES and entry_path not in self._inside:
                yield from self._directory(entry_path)

    def _tablespaces_inside(self) -> frozenset[str]:
        """Source: basebackup.c, skip_this_dir."""
        inside: set[str] = set()
        for entry in self._list("pg_tblspc"):
            if entry.is_symlink():
                target = Path(os.readlink(entry.path))
                if target.is_relative_to(self.root):
                    inside.add(str(target.relative_to(self.root)))
        return frozenset(inside)

    def _link(self, path: str) -> Iterator[str]:
        """A symbolic link: a tablespace is followed, an emptied directory becomes one, others stay out."""
        if path in EMPTIED_DIRECTORIES:
            self._add_directory(path)
        elif _TABLESPACE.fullmatch(path):
            target = os.readlink(self.root / path)
            self.directories[path] = Item(path, ItemKind.LINK, 0o777, link_target=target)
            yield path
        elif path.partition("/")[0] in DATA_DIRECTORIES:
            raise UnsuitableSettings(
                f"data directory has a symbolic link in a place that cannot be backed up: {path!r}",
                detail="PostgreSQL supports links for pg_wal and tablespaces only; pg_basebackup would leave "
                "it out and the restored server would lack data.",
                hints=["move the data with CREATE TABLESPACE, or mount a file system there"],
            )
        else:
            self._note(f"{path!r} is a symbolic link and was left out")

    def _list(self, path: str) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(self.root / path) as entries:
                return list(entries)
        except FileNotFoundError as error:
            if not path or _TABLESPACE.fullmatch(path) or path in DATA_DIRECTORIES:
                raise unreadable(self.root / path, error) from error
            return []  # A database or relation directory that was dropped meanwhile; replay drops it too.
        except OSError as error:
            raise unreadable(self.root / path, error) from error

    def _add_directory(self, path: str, mode: int | None = None) -> None:
        if mode is None:
            mode = os.stat(self.root).st_mode
        self.directories.setdefault(path, Item(path, ItemKind.DIRECTORY, stat.S_IMODE(mode)))

    def _note(self, text: str) -> None:
        if len(self.notes) < NOTES_MAX and text not in self.notes:
            self.notes.append(text)

    def ordered_directories(self) -> tuple[Item, ...]:
        """Directories and links, parents before children."""
        return tuple(self.directories[path] for path in sorted(self.directories))


def file_item(path: str, facts: os.stat_result) -> Item:
    """The item of a regular file below the data directory."""
    return Item(
        path=path,
        kind=ItemKind.FILE,
        mode=stat.S_IMODE(facts.st_mode),
        size_bytes=facts.st_size,
        modified_us=facts.st_mtime_ns // 1000,
        page_bytes=PAGE_BYTES if relation_of(path) else 0,
        storage=storage_of(path),
    )


def unreadable(path: Path, error: OSError) -> SourceUnreadable:
    """The error for a path of the data directory that cannot be read."""
    return SourceUnreadable(
        f"cannot read {str(path)!r}",
        detail=f"The operating system said: {error.strerror}.",
        hints=_UNREADABLE_HINTS if isinstance(error, PermissionError) else (),
    )


def postmaster_shares_our_mounts(directory: Path, *, read: Callable[[str], str] = os.readlink) -> bool:
    """
    Whether links of the data directory mean the same to the server as to us.

    A server in a container may see other files at the same path. True where it cannot be told.
    """
    try:
        pid = int((directory / "postmaster.pid").read_text().split("\n", 1)[0])
        return read(f"/proc/{pid}/ns/mnt") == read("/proc/self/ns/mnt")
    except FileNotFoundError:
        return False
    except (OSError, ValueError):
        return True
