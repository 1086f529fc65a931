"""
Where the things of a backup go in the file system. Pure but for looking at what is there already.

Invariant: nothing is ever written outside of the directory asked for, its `.config` sibling, and the PG_...
directories below the places of tablespaces: a manifest's paths are checked, not trusted.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from cloudsave.errors import IntegrityError, TargetDirectoryInUse, UsageError
from cloudsave.model.item import ItemKind
from cloudsave.model.manifest import FileEntry, Manifest

TABLESPACES = "pg_tblspc"
OWN_DIRECTORY = "PG_"
"""How the directory begins that holds all files of a tablespace. A manifest names the place of a tablespace
itself: one who made it up must not get a file with a name of his choice into a directory of this machine."""
CONTROL_FILES = frozenset({"global/pg_control"})
"""Files without which no server starts on the directory: they come last."""
REPLACED_FILES = frozenset({"tablespace_map"})
"""Files that tell the server to make links of its own; the restore has made the right ones."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The places of one restore."""

    directory: Path
    config_directory: Path
    tablespaces: Mapping[str, Path]
    """Tablespace oid to the directory that it gets."""

    def place(self, entry: FileEntry) -> Path:
        """Where an entry goes. Raises: IntegrityError where its path would lead elsewhere."""
        if entry.outside:
            return self.config_directory / _checked(entry.path.removeprefix("/"), entry.path)
        parts = _checked(entry.path, entry.path).parts
        if len(parts) >= 2 and parts[0] == TABLESPACES and parts[1] in self.tablespaces:
            if len(parts) > 2 and not parts[2].startswith(OWN_DIRECTORY):
                raise IntegrityError(
                    f"manifest puts {entry.path!r} where no server keeps files of a tablespace",
                    hints=["was the repository tampered with? nothing was written"],
                )
            return self.tablespaces[parts[1]].joinpath(*parts[2:])
        return self.directory.joinpath(*parts)

    def roots(self) -> tuple[Path, ...]:
        """The directories that are filled."""
        return (self.directory, *self.tablespaces.values())

    def is_tablespace(self, entry: FileEntry) -> bool:
        """Whether the entry is the root of a tablespace, which is a link to its directory."""
        head, _, oid = entry.path.partition("/")
        return head == TABLESPACES and oid in self.tablespaces


def plan_layout(manifest: Manifest, directory: Path, remap: Mapping[str, str]) -> Layout:
    """
    Choose the places. `remap`: tablespace oid or its old path to a new absolute path.

    Raises: UsageError, IntegrityError. Looks at nothing; `check_vacant` does.
    """
    directory = Path(directory).absolute()
    left = dict(remap)
    tablespaces: dict[str, Path] = {}
    for oid, old in sorted(manifest.tablespaces.items()):
        if not oid.isdigit():
            raise IntegrityError(f"manifest of backup {manifest.backup_id!r} names tablespace {oid!r}")
        chosen = left.pop(oid, None) or left.pop(old, None) or old
        if not chosen.startswith("/"):
            raise UsageError(f"tablespace {oid} needs an absolute path, not {chosen!r}")
        tablespaces[oid] = Path(chosen)
    if left:
        known = ", ".join(f"{oid}={old}" for oid, old in sorted(manifest.tablespaces.items())) or "none"
        raise UsageError(
            f"the backup has no tablespace {sorted(left)[0]!r}", hints=[f"its tablespaces are: {known}"]
        )
    layout = Layout(directory, directory.with_name(directory.name + ".config"), tablespaces)
    _check_apart(layout)
    for entry in manifest.files:
        layout.place(entry)
        if entry.kind is ItemKind.LINK and not layout.is_tablespace(entry):
            raise IntegrityError(
                f"cannot restore link {entry.path!r}", detail="Only links to tablespaces are known."
            )
    return layout


def check_vacant(layout: Layout, *, ignored: Collection[str] = ()) -> None:
    """Nothing is there yet but files that are `ignored`. Raises: TargetDirectoryInUse."""
    for place in (layout.directory, layout.config_directory):
        if is_occupied(place, ignored):
            raise TargetDirectoryInUse(
                f"directory to restore into is not empty: {place}",
                detail="A restore never deletes or overwrites what it did not write itself.",
                hints=["choose an empty or absent directory, or move the old one aside"],
            )
    for oid, place in layout.tablespaces.items():
        if is_occupied(place, ignored):
            raise TargetDirectoryInUse(
                f"directory of tablespace {oid} is not empty: {place}",
                hints=[f"give it another one: --tablespace {oid}=/new/directory"],
            )


def _check_apart(layout: Layout) -> None:
    places = [*layout.roots(), layout.config_directory]
    for number, one in enumerate(places):
        for other in places[number + 1 :]:
            if one == other or one in other.parents or other in one.parents:
                raise UsageError(
                    f"directories overlap: {one} and {other}",
                    hints=["give each tablespace a directory of its own: --tablespace OID=/new/directory"],
                )


def is_occupied(place: Path, ignored: Collection[str] = ()) -> bool:
    """Whether something is there that is not `ignored`. Raises: TargetDirectoryInUse."""
    try:
        return any(one.name not in ignored for one in place.iterdir())
    except FileNotFoundError:
        return place.is_symlink()
    except NotADirectoryError:
        return True
    except OSError as error:
        raise TargetDirectoryInUse(f"cannot look into {place}", detail=f"{error.strerror}.") from error


def _checked(path: str, shown: str) -> PurePosixPath:
    parts = path.split("/")
    if not path or "\0" in path or any(part in ("", ".", "..") for part in parts):
        raise IntegrityError(
            f"manifest names a path that leads outside: {shown!r}",
            hints=["was the repository tampered with? nothing was written"],
        )
    return PurePosixPath(*parts)
