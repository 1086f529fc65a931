"""Which configuration files there are, and what stands in them and on which line."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cloudsave.errors import ConfigurationError

SYSTEM_FILE = Path("/etc/cloudsave/cloudsave.toml")
FILE_BYTES_MAX = 1024 * 1024
"""Limit: a configuration file is not larger than this."""
_TABLE = re.compile(r"\s*\[\s*([^\[\]]+?)\s*\]\s*(?:#.*)?$")
_KEY = re.compile(r"""\s*((?:[\w-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[\w-]+|"[^"]*"|'[^']*'))*)\s*=""")


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """One parsed file."""

    path: Path
    text: str
    tables: Mapping[str, object]

    def place(self, *keys: str) -> str:
        """Where a key stands, for messages: `FILE line 3`, or the file alone."""
        line = line_of(self.text, keys)
        return f'"{self.path}" line {line}' if line else f'"{self.path}"'


def user_file(environ: Mapping[str, str]) -> Path | None:
    """The user's own file, whether it exists or not; None for a user without a home."""
    configured = environ.get("XDG_CONFIG_HOME", "")
    if configured.startswith("/"):
        return Path(configured, "cloudsave/cloudsave.toml")
    home = environ.get("HOME", "")
    return Path(home, ".config/cloudsave/cloudsave.toml") if home.startswith("/") else None


def candidate_files(
    explicit: Path | None, environ: Mapping[str, str], *, system_file: Path = SYSTEM_FILE
) -> Sequence[Path]:
    """The files to read if they exist, the weakest first. An explicit one stands alone."""
    if explicit is not None:
        return (explicit,)
    own = user_file(environ)
    return (system_file,) if own is None else (system_file, own)


def file_to_edit(
    explicit: Path | None, environ: Mapping[str, str], *, system_file: Path = SYSTEM_FILE
) -> Path:
    """The file that `source add` writes: the explicit one, root's the system's, else the user's own."""
    if explicit is not None:
        return explicit
    own = user_file(environ)
    return system_file if own is None or os.geteuid() == 0 else own


def read_file(path: Path) -> ConfigFile | None:
    """One file parsed; None if there is none. Raises: ConfigurationError."""
    try:
        with path.open("rb") as stream:
            content = stream.read(FILE_BYTES_MAX + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise _unreadable(path, f"{error.strerror}.") from error
    if len(content) > FILE_BYTES_MAX:
        raise _unreadable(path, f"It is larger than {FILE_BYTES_MAX} bytes.")
    try:
        text = content.decode("utf-8")
        return ConfigFile(path, text, tomllib.loads(text))
    except UnicodeDecodeError as error:
        raise _unreadable(path, f"It is not UTF-8 text at byte {error.start}.") from None
    except tomllib.TOMLDecodeError as error:
        raise _unreadable(path, f"It is not valid TOML: {error}.") from None


def _unreadable(path: Path, detail: str) -> ConfigurationError:
    return ConfigurationError(
        f'cannot use configuration file "{path}"', detail=detail, hints=["--config FILE names another one"]
    )


def line_of(text: str, keys: Sequence[str]) -> int | None:
    """
    The line, from 1, on which `keys` stand or their table begins; None where it is not found.

    Good enough for messages: it knows tables and dotted keys, not keys inside of inline tables.
    """
    table: tuple[str, ...] = ()
    wanted = tuple(keys)
    for number, line in enumerate(text.splitlines(), 1):
        if header := _TABLE.match(line):
            table = _split_key(header[1])
            if table[: len(wanted)] == wanted:
                return number
        elif key := _KEY.match(line):
            full = table + _split_key(key[1])
            if full[: len(wanted)] == wanted:
                return number
    return None


def _split_key(text: str) -> tuple[str, ...]:
    return tuple(part.strip().strip("\"'") for part in text.split("."))
