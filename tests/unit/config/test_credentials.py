"""Secrets are found in their order, and only in files that are private."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

import pytest

from cloudsave.config.credentials import FoundSecrets, find_secrets, read_passphrase_file
from cloudsave.config.model import RepositoryConfig
from cloudsave.errors import ConfigurationError

IDENTITY = "AGE-SECRET-KEY-1QQQQQQQQQQQQQQQQQQQQQQQQQQQQ"


def _file(path: Path, content: str | bytes, mode: int = 0o600) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    path.chmod(mode)
    return path


def _python(code: str) -> str:
    return shlex.join([sys.executable, "-c", code])


def test_the_order_of_places(tmp_path: Path) -> None:
    credential = _file(tmp_path / "credentials/cloudsave-passphrase", "from credential\n", 0o440)
    repository = RepositoryConfig(
        passphrase_file=_file(tmp_path / "configured", "from configured file\n"),
        passphrase_command=_python("print('from command')"),
    )
    environ = {
        "CLOUDSAVE_PASSPHRASE": "from variable",
        "CLOUDSAVE_PASSPHRASE_FILE": str(_file(tmp_path / "named", "from named file\r\n")),
        "CREDENTIALS_DIRECTORY": str(credential.parent),
    }
    seen = []
    for gone in ("CLOUDSAVE_PASSPHRASE", "CLOUDSAVE_PASSPHRASE_FILE"):
        seen.append(find_secrets(repository, environ).passphrase)
        del environ[gone]
    seen.append(find_secrets(repository, environ).passphrase)
    without_command = RepositoryConfig(passphrase_file=repository.passphrase_file)
    seen.append(find_secrets(without_command, environ).passphrase)
    seen.append(find_secrets(without_command, {"CREDENTIALS_DIRECTORY": str(tmp_path)}).passphrase)
    seen.append(find_secrets(RepositoryConfig(), {}).passphrase)
    assert seen == [
        "from variable",
        "from named file",
        "from command",
        "from credential",
        "from configured file",
        None,
    ]


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o660, 0o604, 0o610])
def test_a_file_that_others_may_touch_is_refused(tmp_path: Path, mode: int) -> None:
    path = _file(tmp_path / "pass phrase", "geheim99\n", mode)
    with pytest.raises(ConfigurationError) as caught:
        read_passphrase_file(path)
    assert caught.value.hints == (f"chmod 600 '{path}'",)
    assert f"{mode:04o}" in caught.value.detail
    assert "geheim99" not in str(caught.value)
    path.chmod(0o400)
    assert read_passphrase_file(path) == "geheim99"


@pytest.mark.parametrize("content", [b"", b"\n", b"  \n", b"one\ntwo\n", b"\xff\xfe", b"a\0b", b"x" * 70_000])
def test_what_is_no_passphrase_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(ConfigurationError):
        read_passphrase_file(_file(tmp_path / "p", content))


def test_only_the_end_of_the_line_is_taken_off(tmp_path: Path) -> None:
    assert read_passphrase_file(_file(tmp_path / "p", "  spaces stay  \n")) == "  spaces stay  "


def test_a_pipe_serves_as_a_file() -> None:
    reader, writer = os.pipe()
    os.write(writer, b"from a pipe\n")
    os.close(writer)
    try:
        assert read_passphrase_file(Path(f"/dev/fd/{reader}")) == "from a pipe"
    finally:
        os.close(reader)


def test_a_missing_file_is_an_error_and_not_no_passphrase(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot read"):
        find_secrets(RepositoryConfig(passphrase_file=tmp_path / "gone"), {})


@pytest.mark.parametrize(
    ("command", "why"),
    [
        (_python("print('geheim99'); raise SystemExit(3)"), "exit code 3"),
        (_python("pass"), "holds no secret"),
        ("/no/such/program", "could not be started"),
        ("echo 'unclosed", "cannot be split"),
    ],
)
def test_a_command_that_fails_gives_no_passphrase(command: str, why: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        find_secrets(RepositoryConfig(passphrase_command=command), {})
    assert why in str(caught.value)
    assert "geheim99" not in str(caught.value)


def test_a_command_gets_no_shell() -> None:
    found = find_secrets(RepositoryConfig(passphrase_command="echo $HOME; id"), {})
    assert found.passphrase == "$HOME; id"


def test_the_recovery_key_is_found_among_comments(tmp_path: Path) -> None:
    path = _file(tmp_path / "key", f"# created: today\n# public key: age1xyz\n{IDENTITY}\n")
    assert find_secrets(RepositoryConfig(recovery_key_file=path), {}).recovery_key == IDENTITY
    _file(path, f"{IDENTITY}\n{IDENTITY}\n")
    with pytest.raises(ConfigurationError, match="several keys"):
        find_secrets(RepositoryConfig(recovery_key_file=path), {})
    _file(path, "age1publickey\n")
    with pytest.raises(ConfigurationError, match="no recovery key"):
        find_secrets(RepositoryConfig(recovery_key_file=path), {})


def test_secrets_are_not_shown_by_repr() -> None:
    assert "geheim99" not in repr(FoundSecrets("geheim99", "geheim99"))
