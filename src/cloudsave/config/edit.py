"""
Adds and removes sources in the configuration file; comments and order of the rest stay as they were.

Invariant: the file is replaced as a whole (written beside, synced, renamed), so that a crash leaves the old
one or the new one.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import tomlkit
from tomlkit.exceptions import TOMLKitError
from tomlkit.items import Table

from cloudsave.config.files import read_file
from cloudsave.config.load import check_source_name, checked_value, refuse_secret_url
from cloudsave.config.options import SOURCE_OPTIONS, Value
from cloudsave.errors import ConfigurationError, UnknownSource

_NEW_FILE = "# Configuration of cloudsave. All keys: docs/reference/configuration.md\n"


def add_source(path: Path, name: str, settings: Mapping[str, Value]) -> None:
    """
    Add the table `[sources.NAME]` with `settings`, which hold at least `url`.

    Raises: ConfigurationError if the name is taken or unfit; SecretInline.
    """
    check_source_name(name, place="the command line")
    refuse_secret_url(str(settings["url"]), place="the command line")
    known = {option.name: option for option in SOURCE_OPTIONS}
    for key, value in settings.items():
        checked_value(known[key], value, place="the command line", name=f"sources.{name}.{key}")
    document = _open(path)
    sources = document.get("sources")
    if sources is None:
        sources = tomlkit.table(is_super_table=True)
        document["sources"] = sources
    if name in sources:
        raise ConfigurationError(
            f"source {name!r} exists already",
            detail=f'It stands in "{path}".',
            hints=[f"cloudsave source remove {name} --yes, or choose another name"],
        )
    table = tomlkit.table()
    for key, value in settings.items():
        table[key] = value
    sources[name] = table
    _replace(path, tomlkit.dumps(document))


def remove_source(path: Path, name: str) -> None:
    """Remove the table of a source. What the repository holds of it stays. Raises: UnknownSource."""
    document = _open(path)
    sources = document.get("sources")
    if not isinstance(sources, Mapping) or name not in sources:
        raise UnknownSource(
            f"unknown source {name!r}",
            detail=f'There is no table [sources.{name}] in "{path}".',
            hints=["cloudsave source list shows the names and files"],
        )
    document["sources"].remove(name)
    if not document["sources"]:
        document.remove("sources")
    _replace(path, tomlkit.dumps(document))


def _open(path: Path) -> tomlkit.TOMLDocument:
    """The file with its comments; an absent one is a new document."""
    file = read_file(path)
    if file is None:
        return tomlkit.parse(_NEW_FILE)
    try:
        document = tomlkit.parse(file.text)
    except TOMLKitError as error:
        raise ConfigurationError(f'cannot edit configuration file "{path}"', detail=f"{error}.") from None
    sources = document.get("sources")
    if sources is not None and not isinstance(sources, Table) and not isinstance(sources, Mapping):
        raise ConfigurationError(f'cannot edit configuration file "{path}"', detail="sources is no table.")
    return document


def _replace(path: Path, text: str) -> None:
    """Write `text` in place of the file; a symbolic link stays and its target is replaced."""
    target = path.resolve()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, beside = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    except OSError as error:
        raise _not_written(path, error) from error
    try:
        with os.fdopen(descriptor, "wb") as stream:
            os.fchmod(stream.fileno(), 0o600)
            _keep_owner(target, stream.fileno())
            stream.write(text.encode("utf-8"))
            stream.flush()
            os.fsync(stream.fileno())
        Path(beside).replace(target)
    except OSError as error:
        with contextlib.suppress(OSError):
            Path(beside).unlink()
        raise _not_written(path, error) from error
    _sync_directory(target.parent)


def _keep_owner(target: Path, descriptor: int) -> None:
    """Root who edits a user's file leaves it the user's."""
    if target.exists() and os.geteuid() == 0:
        status = target.stat()
        os.fchown(descriptor, status.st_uid, status.st_gid)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _not_written(path: Path, error: OSError) -> ConfigurationError:
    return ConfigurationError(f'could not write configuration file "{path}"', detail=f"{error.strerror}.")
