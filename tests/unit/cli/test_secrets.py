"""Secrets stand in no argument, no message, no log and no core file; commands are processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PASSPHRASE = "geheim99 correct horse"
NEW = "geheim98 battery staple"
WEBHOOK_KEY = "geheim97-of-the-webhook"
TOKEN = "geheim96-token-in-an-address"
SECONDS_MAX = 120.0
PR_GET_DUMPABLE = 3


class User:
    """A configuration with every secret that there is."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.recovery_key = ""
        for name, text in (("passphrase", PASSPHRASE), ("new", NEW), ("webhook", WEBHOOK_KEY)):
            self.secret_file(name, text)
        (folder / "cloudsave.toml").write_text(
            f"[repository]\nurl = '{folder / 'repository'}'\npassphrase_file = '{folder / 'passphrase'}'\n"
            f"[notify]\nwebhook_url = 'http://127.0.0.1:9/{TOKEN}'\n"
            f"webhook_key_file = '{folder / 'webhook'}'\n"
            f"heartbeat_url = 'http://127.0.0.1:9/{TOKEN}'\n"
            "[sources.db]\nurl = 'postgresql://u@127.0.0.1:9/postgres?connect_timeout=2'\n"
        )

    def secret_file(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.touch(mode=0o600)
        path.write_text(text)
        return path

    def run(self, *arguments: str, **environment: str) -> str:
        """All that a command says; its arguments, and those of what it starts, are looked at meanwhile."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("CLOUDSAVE_", "PG"))}
        own = {"CLOUDSAVE_CONFIG": str(self.folder / "cloudsave.toml"), "HOME": str(self.folder)}
        process = subprocess.Popen(
            [sys.executable, "-m", "cloudsave", "--verbose", *arguments],
            env={**kept, **own, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=self.folder,
        )
        seen = ""
        while process.poll() is None:
            seen += _arguments_of_descendants(process.pid)
            try:
                process.wait(0.01)
            except subprocess.TimeoutExpired:
                continue
        assert "cloudsave" in seen
        self.assert_clean(seen, "the arguments")
        assert process.stdout is not None
        return process.stdout.read()

    def assert_clean(self, text: str, what: str) -> None:
        """No secret stands in a text."""
        for secret in (PASSPHRASE, NEW, WEBHOOK_KEY, TOKEN, self.recovery_key or "AGE-SECRET-KEY-1"):
            assert secret not in text, f"a secret is in {what}"


def _arguments_of_descendants(pid: int) -> str:
    try:
        own = Path(f"/proc/{pid}/cmdline").read_text()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return ""
    return own + "".join(_arguments_of_descendants(int(child)) for child in children)


@pytest.fixture
def user(tmp_path: Path) -> User:
    made = User(tmp_path)
    said = made.run("init", "--recovery-key-to", str(tmp_path / "recovery"))
    made.assert_clean(said, "init")
    made.recovery_key = (tmp_path / "recovery").read_text().splitlines()[-1]
    assert made.recovery_key.startswith("AGE-SECRET-KEY-1")
    return made


def test_no_command_shows_a_secret_whether_it_succeeds_or_fails(user: User) -> None:
    folder = user.folder
    wrong = user.secret_file("wrong", NEW)
    commands: list[tuple[list[str], dict[str, str]]] = [
        (["key", "list"], {}),
        (["key", "add", "--passphrase-from", str(folder / "new")], {}),
        (["key", "rotate", "--passphrase-from", str(folder / "new")], {}),
        (["list", "--json"], {"CLOUDSAVE_PASSPHRASE": PASSPHRASE}),
        (["verify"], {}),
        (["source", "list", "--json"], {}),
        (["check", "db"], {}),
        (["backup", "db"], {"PGPASSWORD": WEBHOOK_KEY}),
        (["logs", "capture", "db"], {"PGPASSWORD": WEBHOOK_KEY}),
        (["key", "list"], {"CLOUDSAVE_PASSPHRASE": "wrong " + PASSPHRASE}),
        (["key", "list"], {"CLOUDSAVE_PASSPHRASE_FILE": str(wrong)}),
        (["list"], {"CLOUDSAVE_NOTIFY_WEBHOOK_URL": f"ftp://{TOKEN}"}),
    ]
    for arguments, environment in commands:
        user.assert_clean(user.run(*arguments, **environment), " ".join(arguments))


def test_the_check_finds_a_secret_that_is_shown(user: User) -> None:
    """Control: what `init` without a file prints on purpose is found."""
    said = user.run("--repository", str(user.folder / "other"), "init")
    shown = next(line.strip() for line in said.splitlines() if "AGE-SECRET-KEY-1" in line)
    user.recovery_key = shown
    with pytest.raises(AssertionError, match="a secret is in"):
        user.assert_clean(said, "init")


def test_the_process_leaves_no_core_file() -> None:
    ask = f"ctypes.CDLL(None).prctl({PR_GET_DUMPABLE}, 0, 0, 0, 0)"
    own = f"import ctypes\nfrom cloudsave.cli import main\nmain.run = lambda arguments: {ask}\nmain.main()\n"
    assert _exit_code(own) == 0, "the process is dumpable"
    # A process of its own: what other tests did in this one may have made it undumpable too.
    assert _exit_code(f"import ctypes, sys\nsys.exit({ask})") == 1, "control: others are"


def _exit_code(code: str) -> int:
    return subprocess.run([sys.executable, "-c", code], check=False, timeout=SECONDS_MAX).returncode


def test_nothing_that_is_stored_holds_a_secret(user: User) -> None:
    for path in (user.folder / "repository").rglob("*"):
        if path.is_file():
            user.assert_clean(path.read_bytes().decode("latin-1"), str(path))
