"""
From files, environment and command line to one frozen configuration.

Invariant: what is written and not understood is an error, never ignored; a typing error in an option must not
leave a database less protected than its owner believes.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from cloudsave.config.files import SYSTEM_FILE, ConfigFile, candidate_files, read_file
from cloudsave.config.model import Config, NotifyConfig, PostgresqlConfig, RepositoryConfig, SourceConfig
from cloudsave.config.options import (
    ENVIRONMENT_PREFIX,
    GLOBAL_OPTIONS,
    SOURCE_NAME,
    SOURCE_OPTIONS,
    SOURCE_PREFIX,
    Option,
    Value,
    environment_name,
    option,
    workers_default,
)
from cloudsave.config.redact import holds_secret, is_secret_name
from cloudsave.config.values import BadValue, check_value, parse_text
from cloudsave.errors import ConfigurationError, SecretInline
from cloudsave.model.retention import RetentionRules

logger = logging.getLogger(__name__)

Settings = dict[str, Value]
"""Path of an option to its value; per-source options by their own name."""

OTHER_VARIABLES = ("CLOUDSAVE_CONFIG",)
"""Variables that are no options of the table."""
_PASSWORD_HINTS = (
    "put the password into ~/.pgpass (mode 0600), or into a file that PGPASSFILE or the URL's passfile names",
    "PGPASSWORD or a service file (PGSERVICEFILE) work as well",
)
REFERENCE_HINT = "docs/reference/configuration.md lists all keys and their values"
_T = TypeVar("_T")


def load_config(
    *,
    path: Path | None = None,
    environ: Mapping[str, str],
    overrides: Mapping[str, Value] | None = None,
    system_file: Path = SYSTEM_FILE,
    missing_ok: bool = False,
) -> Config:
    """
    The configuration: command line over environment over files over defaults.

    Args:
        path: The only file to read, in place of the system's and the user's.
        overrides: From the command line: option name to value, already of the right kind or text.
        missing_ok: An explicit `path` that does not exist counts as empty.
    Raises: ConfigurationError, SecretInline.
    """
    settings: Settings = {}
    sources: dict[str, Settings] = {}
    read: list[Path] = []
    for candidate in candidate_files(path, environ, system_file=system_file):
        file = read_file(candidate)
        if file is None:
            if path is not None and not missing_ok:
                raise ConfigurationError(
                    f'configuration file "{path}" does not exist',
                    hints=["is the name after --config or in CLOUDSAVE_CONFIG right?"],
                )
            continue
        read.append(candidate)
        settings |= _file_settings(file)
        for name, values in _file_sources(file).items():
            sources.setdefault(name, {}).update(values)
    settings |= _environment_settings(environ)
    _add_environment_sources(sources, environ)
    _warn_of_misspelt_variables(environ, sources)
    for name, value in (overrides or {}).items():
        settings[name] = checked_value(option(name), value, place=f"option --{name.rpartition('.')[2]}")
    return _build(settings, sources, tuple(read))


# ---- files -----------------------------------------------------------------------------------------------


def _file_settings(file: ConfigFile) -> Settings:
    """The options of a file that are not per source."""
    known = {entry.name: entry for entry in GLOBAL_OPTIONS}
    tables = {name.partition(".")[0] for name in known if "." in name}
    settings: Settings = {}
    for keys, value in _flatten(file, tables):
        name = ".".join(keys)
        entry = known.get(name)
        if (entry is not None and entry.secret) or (entry is None and is_secret_name(keys[-1])):
            raise _inline(file, keys)
        if entry is None:
            raise _unknown(file, keys, [*known, "sources"])
        settings[name] = _file_value(file, keys, entry, value)
    return settings


def _flatten(file: ConfigFile, tables: set[str]) -> Iterator[tuple[tuple[str, ...], object]]:
    """Key paths and values of all but the sources; known tables are opened."""
    for key, value in file.tables.items():
        if key == "sources":
            continue
        if key in tables:
            for inner, inner_value in _table(file, (key,), value).items():
                yield (key, inner), inner_value
        else:
            yield (key,), value


def _file_sources(file: ConfigFile) -> dict[str, Settings]:
    """The sources of a file."""
    known = {entry.name: entry for entry in SOURCE_OPTIONS}
    sources: dict[str, Settings] = {}
    for name, table in _table(file, ("sources",), file.tables.get("sources", {})).items():
        check_source_name(name, place=file.place("sources", name))
        settings = sources.setdefault(name, {})
        for key, value in _table(file, ("sources", name), table).items():
            keys = ("sources", name, key)
            if key not in known:
                raise _inline(file, keys) if is_secret_name(key) else _unknown(file, keys, known)
            settings[key] = _file_value(file, keys, known[key], value)
    return sources


def _table(file: ConfigFile, keys: tuple[str, ...], value: object) -> Mapping[str, object]:
    if not isinstance(value, dict):
        raise ConfigurationError(
            f"configuration key {'.'.join(keys)} must be a table",
            detail=f"It stands in {file.place(*keys)}.",
            hints=[f"write it as [{'.'.join(keys)}] on a line of its own, and its options below"],
        )
    return value


def _file_value(file: ConfigFile, keys: tuple[str, ...], entry: Option, value: object) -> Value:
    checked = checked_value(entry, value, place=file.place(*keys), name=".".join(keys))
    if entry.name.endswith("url"):
        refuse_secret_url(str(checked), place=file.place(*keys))
    return checked


def checked_value(entry: Option, value: object, *, place: str, name: str = "") -> Value:
    """The value in the option's kind; `place` and `name` are for the message. Raises: ConfigurationError."""
    try:
        return check_value(entry, value)
    except BadValue as error:
        shown = "" if entry.secret else f" in {place}"
        raise ConfigurationError(
            f"cannot use configuration value of {name or entry.toml}",
            detail=f"The value{shown} {error}.",
            hints=[REFERENCE_HINT],
        ) from None


def _unknown(file: ConfigFile, keys: tuple[str, ...], known: Iterable[str]) -> ConfigurationError:
    name = ".".join(keys)
    given = name if len(keys) < 3 else keys[-1]
    return ConfigurationError(
        f"unknown configuration key {name!r}",
        detail=f"It stands in {file.place(*keys)}.",
        hints=[*_did_you_mean(given, list(known)), REFERENCE_HINT],
    )


def _did_you_mean(given: str, known: Sequence[str]) -> list[str]:
    """A key of like spelling, or one of another table with the same last part."""
    close = difflib.get_close_matches(given, known, n=1, cutoff=0.6)
    same_leaf = [name for name in known if name.rpartition(".")[2] == given.rpartition(".")[2]]
    return [f"did you mean {name!r}?" for name in (same_leaf or close)[:1]]


# ---- secrets ---------------------------------------------------------------------------------------------


def refuse_secret_url(url: str, *, place: str) -> None:
    """Raises SecretInline for a URL with a password, without repeating it."""
    if holds_secret(url):
        raise SecretInline(
            "a URL with a password cannot be stored in a configuration file",
            detail=f"It stands in {place}. Configuration files are copied, backed up and shown.",
            hints=_PASSWORD_HINTS,
        )


def _inline(file: ConfigFile, keys: tuple[str, ...]) -> SecretInline:
    if keys[0] == "sources":
        hints = _PASSWORD_HINTS
    else:
        hints = (
            "put it into a file of mode 0600 and name that by repository.passphrase_file",
            "or use repository.passphrase_command, CLOUDSAVE_PASSPHRASE or a systemd credential",
        )
    return SecretInline(
        f"secret {'.'.join(keys)} cannot be stored in a configuration file",
        detail=f"It stands in {file.place(*keys)}. Configuration files are copied, backed up and shown.",
        hints=hints,
    )


def check_source_name(name: str, *, place: str) -> None:
    """Raises ConfigurationError for a name that is no source name."""
    if not SOURCE_NAME.fullmatch(name):
        raise ConfigurationError(
            f"cannot use source name {name!r}",
            detail=f"It stands in {place}. A name has lower-case letters, digits, - and _, begins with a "
            "letter or digit, and has at most 53 characters.",
        )


# ---- environment -----------------------------------------------------------------------------------------


def _environment_settings(environ: Mapping[str, str]) -> Settings:
    return {
        entry.name: _environment_value(entry, entry.environment, environ)
        for entry in GLOBAL_OPTIONS
        if environ.get(entry.environment) and not entry.secret
    }


def _environment_value(entry: Option, variable: str, environ: Mapping[str, str]) -> Value:
    try:
        return parse_text(entry, environ[variable])
    except BadValue as error:
        raise ConfigurationError(
            f"cannot use environment variable {variable}",
            detail=f"Its value {error}.",
            hints=[REFERENCE_HINT],
        ) from None


def _add_environment_sources(sources: dict[str, Settings], environ: Mapping[str, str]) -> None:
    """Variables of the sources in the files, and new sources from variables CLOUDSAVE_SOURCES_NAME_URL."""
    names = {environment_name(name): name for name in sources}
    for variable in sorted(environ):
        middle = variable.removeprefix(SOURCE_PREFIX).removesuffix("_URL")
        if variable == f"{SOURCE_PREFIX}{middle}_URL" and environ[variable] and middle not in names:
            name = middle.lower()
            check_source_name(name, place=f"the variable {variable}")
            names[middle] = name
            sources[name] = {}
    if len(names) != len(sources) and any(variable.startswith(SOURCE_PREFIX) for variable in environ):
        raise ConfigurationError(
            f"variables {SOURCE_PREFIX}... do not say which source they mean",
            detail="The names of two sources differ only by - and _.",
        )
    for name, settings in sources.items():
        for entry in SOURCE_OPTIONS:
            variable = entry.source_environment(name)
            if environ.get(variable):
                settings[entry.name] = _environment_value(entry, variable, environ)


def _warn_of_misspelt_variables(environ: Mapping[str, str], sources: Mapping[str, Settings]) -> None:
    """A variable may belong to somebody else, so that one like ours is a warning and no error."""
    known = [entry.environment for entry in GLOBAL_OPTIONS] + list(OTHER_VARIABLES)
    known += [entry.source_environment(name) for name in sources for entry in SOURCE_OPTIONS]
    for variable in sorted(environ):
        if variable.startswith(ENVIRONMENT_PREFIX) and variable not in known:
            close = difflib.get_close_matches(variable, known, n=1, cutoff=0.85)
            if close:
                logger.warning("unknown environment variable %s: did you mean %s?", variable, close[0])


# ---- build -----------------------------------------------------------------------------------------------


def _build(settings: Settings, sources: Mapping[str, Settings], files: tuple[Path, ...]) -> Config:
    values: dict[str, Value | None] = {entry.name: entry.default for entry in GLOBAL_OPTIONS}
    values |= settings
    rpo_seconds = _of(float, values["rpo_seconds"])
    return Config(
        repository=RepositoryConfig(
            url=_optional(str, values["repository.url"]),
            passphrase_file=_path(values["repository.passphrase_file"]),
            passphrase_command=_optional(str, values["repository.passphrase_command"]),
            recovery_key_file=_path(values["repository.recovery_key_file"]),
            lock_days=_optional(int, values["repository.lock_days"]),
        ),
        postgresql=PostgresqlConfig(bin_directory=_path(values["postgresql.bin_directory"])),
        notify=NotifyConfig(
            webhook_url=_optional(str, values["notify.webhook_url"]),
            webhook_key_file=_path(values["notify.webhook_key_file"]),
            apprise_file=_path(values["notify.apprise_file"]),
            heartbeat_url=_optional(str, values["notify.heartbeat_url"]),
            heartbeat_seconds=_of(float, values["notify.heartbeat_seconds"]),
        ),
        compression_level=_of(int, values["compression_level"]),
        workers=_optional(int, values["workers"]) or workers_default(),
        rate_limit_bytes_per_second=_optional(int, values["rate_limit_bytes_per_second"]),
        read_limit_bytes_per_second=_optional(int, values["read_limit_bytes_per_second"]),
        rpo_seconds=rpo_seconds,
        log_object_bytes_max=_of(int, values["log_object_bytes_max"]),
        paranoid=_of(bool, values["paranoid"]),
        timezone=_optional(str, values["timezone"]),
        spool_directory=_path(values["spool_directory"]),
        retry_deadline_seconds=_of(float, values["retry_deadline_seconds"]),
        sources=_build_sources(sources, rpo_seconds),
        files=files,
    )


def _build_sources(sources: Mapping[str, Settings], rpo_seconds: float) -> Mapping[str, SourceConfig]:
    built: dict[str, SourceConfig] = {}
    slots: dict[tuple[str, str], str] = {}
    for name, settings in sources.items():
        values: dict[str, Value | None] = {entry.name: entry.default for entry in SOURCE_OPTIONS}
        values |= settings
        if values["url"] is None:
            raise ConfigurationError(
                f"source {name!r} has no url", hints=[f'add url = "postgresql://..." to [sources.{name}]']
            )
        source = SourceConfig(
            name=name,
            url=_of(str, values["url"]),
            slot=_optional(str, values["slot"]) or default_slot(name),
            checkpoint=_of(str, values["checkpoint"]),
            mode=_of(str, values["mode"]),
            rpo_seconds=_optional(float, values["rpo_seconds"]) or rpo_seconds,
            canary_seconds=_of(float, values["canary_seconds"]),
            backup_url=_optional(str, values["backup_url"]),
            retention=retention_rules(values),
        )
        other = slots.setdefault((source.url, source.slot), name)
        if other != name:
            raise ConfigurationError(
                f"sources {other!r} and {name!r} share the replication slot {source.slot!r} of one server",
                detail="Each would release log that the other still needs.",
                hints=["remove one, or give each a slot of its own"],
            )
        built[name] = source
    return built


def retention_rules(values: Mapping[str, Value | None]) -> RetentionRules:
    """The rules among the options of a source, by the options' names."""
    return RetentionRules(
        days=_optional(float, values["keep_days"]) or 0.0,
        **{
            name: _optional(int, values[f"keep_{name}"]) or 0
            for name in ("last", "hourly", "daily", "weekly", "monthly", "yearly", "proved")
        },
    )


def default_slot(name: str) -> str:
    """The replication slot of a source that names none."""
    return "cloudsave_" + name.replace("-", "_")


def _of(kind: type[_T], value: object) -> _T:
    assert isinstance(value, kind), f"the table's default is no {kind.__name__}"
    return value


def _optional(kind: type[_T], value: object) -> _T | None:
    return None if value is None else _of(kind, value)


def _path(value: Value | None) -> Path | None:
    return None if value is None else Path(_of(str, value)).expanduser()
