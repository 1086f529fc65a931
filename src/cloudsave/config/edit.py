"""
Adds and removes sources in the configuration file; comments and order of the rest stay as they were.

Invariant: the file is replaced as a whole (written beside, synced, renamed), so that a crash leaves the old
one or the new one.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import tomllib
from collections.abc import Mapping, MutableMapping
from pathlib import Path

import tomlkit
from tomlkit.exceptions import TOMLKitError
from tomlkit.items import InlineTable

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
    if "sources" not in document:
        document["sources"] = tomlkit.table(is_super_table=True)
    sources = document["sources"]
    if not isinstance(sources, MutableMapping):
        raise _not_editable(path, "sources is no table.")
    if name in sources:
        raise ConfigurationError(
            f"source {name!r} exists already",
            detail=f'It stands in "{path}".',
            hints=[f"cloudsave source remove {name} --yes, or choose another name"],
        )
    wanted = document.unwrap()
    wanted["sources"][name] = dict(settings)
    table = tomlkit.inline_table() if isinstance(sources, InlineTable) else tomlkit.table()
    table.update(settings)
    sources[name] = table
    _replace(path, _checked_text(document, wanted, path))


def remove_source(path: Path, name: str) -> None:
    """Remove the table of a source. What the repository holds of it stays. Raises: UnknownSource."""
    document = _open(path)
    sources = document.get("sources")
    if not isinstance(sources, MutableMapping) or name not in sources:
        raise UnknownSource(
            f"unknown source {name!r}",
            detail=f'There is no table [sources.{name}] in "{path}".',
            hints=["cloudsave source list shows the names and files"],
        )
    wanted = document.unwrap()
    del wanted["sources"][name]
    if wanted["sources"]:
        del sources[name]
    else:
        del wanted["sources"]
        del document["sources"]
    _replace(path, _checked_text(document, wanted, path))


def _open(path: Path) -> tomlkit.TOMLDocument:
    """The file with its comments; an absent one is a new document."""
    file = read_file(path)
    if file is None:
        return tomlkit.parse(_NEW_FILE)
    try:
        return tomlkit.parse(file.text)
    except TOMLKitError as error:
        raise _not_editable(path, f"{error}.") from None


def _checked_text(document: tomlkit.TOMLDocument, wanted: Mapping[str, object], path: Path) -> str:
    """The new text, but only if a parser of another make reads in it what is wanted and nothing else."""
    text = tomlkit.dumps(document)
    try:
        read = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        read = {}
    if read != wanted:
        raise _not_editable(path, "It is written in a way that cannot be kept.")
    return text


def _not_editable(path: Path, detail: str) -> ConfigurationError:
    return ConfigurationError(
        f'cannot edit configuration file "{path}"',
        detail=detail,
        hints=["edit it by hand: each source is a table [sources.NAME] with url = ..."],
    )


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
