"""
Where the passphrase and the recovery key come from. They are never logged, shown or stored.

Order for the passphrase: CLOUDSAVE_PASSPHRASE, CLOUDSAVE_PASSPHRASE_FILE, passphrase_command, the systemd
credential `cloudsave-passphrase`, the configured file. Asking a person is the command line's last resort.
"""

from __future__ import annotations

import os
import shlex
import stat
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cloudsave.config.model import RepositoryConfig
from cloudsave.errors import ConfigurationError

SECRET_BYTES_MAX = 64 * 1024
"""Limit: a secret's file or a command's output is not larger."""
COMMAND_SECONDS_MAX = 60.0
"""Limit: a passphrase command answers within this; it may ask a person."""
CREDENTIAL_PREFIX = "cloudsave-"
_AGE_IDENTITY = "AGE-SECRET-KEY-"


@dataclass(frozen=True, slots=True)
class FoundSecrets:
    """What was found; both may be None."""

    passphrase: str | None = field(default=None, repr=False)
    recovery_key: str | None = field(default=None, repr=False)


def find_secrets(repository: RepositoryConfig, environ: Mapping[str, str]) -> FoundSecrets:
    """All secrets that the configuration and the environment lead to. Raises: ConfigurationError."""
    return FoundSecrets(_find_passphrase(repository, environ), _find_recovery_key(repository, environ))


def _find_passphrase(repository: RepositoryConfig, environ: Mapping[str, str]) -> str | None:
    if given := environ.get("CLOUDSAVE_PASSPHRASE"):
        return given
    if named := environ.get("CLOUDSAVE_PASSPHRASE_FILE"):
        return read_passphrase_file(Path(named).expanduser())
    if repository.passphrase_command is not None:
        return run_passphrase_command(repository.passphrase_command)
    if credential := _credential(CREDENTIAL_PREFIX + "passphrase", environ):
        return _single_line(_read(credential, private=False), place=f'credential "{credential}"')
    if repository.passphrase_file is not None:
        return read_passphrase_file(repository.passphrase_file)
    return None


def _find_recovery_key(repository: RepositoryConfig, environ: Mapping[str, str]) -> str | None:
    if repository.recovery_key_file is not None:
        return read_recovery_key_file(repository.recovery_key_file)
    if credential := _credential(CREDENTIAL_PREFIX + "recovery-key", environ):
        return _identity(_read(credential, private=False), place=f'credential "{credential}"')
    return None


def read_passphrase_file(path: Path) -> str:
    """The one line of a private file. Raises: ConfigurationError."""
    return _single_line(_read(path, private=True), place=f'file "{path}"')


def read_recovery_key_file(path: Path) -> str:
    """The identity in a private file as `key` and `age-keygen` write it. Raises: ConfigurationError."""
    return _identity(_read(path, private=True), place=f'file "{path}"')


def read_private_lines(path: Path) -> list[str]:
    """The lines of a private file, without empty ones and comments. Raises: ConfigurationError."""
    text = _text(_read(path, private=True), place=f'file "{path}"')
    lines = [line.strip() for line in text.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def run_passphrase_command(command: str) -> str:
    """What a program prints, which is started without a shell. Raises: ConfigurationError."""
    try:
        arguments = shlex.split(command)
        done = subprocess.run(arguments, stdout=subprocess.PIPE, check=False, timeout=COMMAND_SECONDS_MAX)
    except (ValueError, IndexError) as error:
        raise _command_failed(f"It cannot be split into words: {error}.") from None
    except subprocess.TimeoutExpired:
        raise _command_failed(f"It did not answer within {COMMAND_SECONDS_MAX:.0f} seconds.") from None
    except OSError as error:
        raise _command_failed(f"It could not be started: {error.strerror}.") from None
    if done.returncode != 0:
        raise _command_failed(f"It ended with exit code {done.returncode}.")
    return _single_line(done.stdout, place="output of repository.passphrase_command")


def _command_failed(detail: str) -> ConfigurationError:
    return ConfigurationError(
        "repository.passphrase_command gave no passphrase",
        detail=detail,
        hints=["run it by hand: it must print the passphrase to stdout and exit with 0"],
    )


def _credential(name: str, environ: Mapping[str, str]) -> Path | None:
    """The file of a systemd credential, if the service has it."""
    directory = environ.get("CREDENTIALS_DIRECTORY")
    path = Path(directory, name) if directory else None
    return path if path is not None and path.exists() else None


def _read(path: Path, *, private: bool) -> bytes:
    """The content of a secret's file; `private` refuses one that others may read."""
    try:
        with path.open("rb") as stream:
            mode = os.fstat(stream.fileno()).st_mode
            if private and mode & (stat.S_IRWXG | stat.S_IRWXO):
                raise ConfigurationError(
                    f'secret file "{path}" is open to other users',
                    detail=f"Its mode is {stat.S_IMODE(mode):04o}; only its owner may have access.",
                    hints=[f"chmod 600 {shlex.quote(str(path))}"],
                )
            return stream.read(SECRET_BYTES_MAX + 1)
    except OSError as error:
        raise ConfigurationError(
            f'cannot read secret file "{path}"',
            detail=f"{error.strerror}.",
            hints=["is its name right, and may this user read it?"],
        ) from None


def _text(content: bytes, *, place: str) -> str:
    if len(content) > SECRET_BYTES_MAX:
        raise ConfigurationError(f"{place} is too large for a secret")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        raise ConfigurationError(f"{place} is not UTF-8 text") from None
    if not text.strip() or "\0" in text:
        raise ConfigurationError(f"{place} holds no secret", detail="It is empty, or holds a NUL character.")
    return text


def _single_line(content: bytes, *, place: str) -> str:
    """One line without its end; a second line would be part of the passphrase or not, so it is refused."""
    line = _text(content, place=place).removesuffix("\n").removesuffix("\r")
    if "\n" in line or "\r" in line:
        raise ConfigurationError(f"{place} has more than one line", detail="A passphrase is one line.")
    return line


def _identity(content: bytes, *, place: str) -> str:
    lines = [line.strip() for line in _text(content, place=place).splitlines()]
    found = [line for line in lines if line.upper().startswith(_AGE_IDENTITY)]
    if len(found) != 1:
        raise ConfigurationError(
            f"{place} holds no recovery key" if not found else f"{place} holds several keys",
            detail=f"One line of it must begin with {_AGE_IDENTITY}.",
        )
    return found[0]
