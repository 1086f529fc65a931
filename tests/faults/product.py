"""
The command line with a configuration and a repository of its own, run in this process.

There is no start-up to wait for, so that a long list of cases stays quick; processes of their own are the
business of tests/integration/postgresql/command_line.py.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cloudsave.cli.main import run
from tests.integration.postgresql.command_line import Answer

PASSPHRASE = "correct horse battery staple"


class Product:
    """
    A folder with a configuration, a passphrase and a repository, and the source `db` at `url`.

    `store`: the directory of the repository; None: in the folder. `address`: its URL, where it is in none.
    """

    def __init__(self, folder: Path, url: str, *, store: Path | None = None, address: str = "") -> None:
        self.folder = folder
        self.url = url
        self.address = address
        self.repository = store or folder / "repository"
        self.configuration = folder / "cloudsave.toml"
        self.passphrase = folder / "passphrase"
        self.passphrase.write_text(PASSPHRASE + "\n")
        self.passphrase.chmod(0o600)
        self.configure(url)

    def configure(self, url: str, *, settings: str = "", source: str = "") -> None:
        """Write the configuration anew; `settings` and `source` are further lines of TOML."""
        address = self.address or self.repository
        self.configuration.write_text(
            f"{settings}\n[repository]\nurl = '{address}'\npassphrase_file = '{self.passphrase}'\n"
            f"[sources.db]\nurl = '{url}'\n{source}\n"
        )

    def environment(self, **more: str) -> dict[str, str]:
        """The caller's environment without anything that cloudsave or libpq would listen to."""
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith(("CLOUDSAVE_", "PG"))
        }
        return {**kept, "CLOUDSAVE_CONFIG": str(self.configuration), "HOME": str(self.folder), **more}

    def answer(self, *arguments: str, **environment: str) -> Answer:
        """Run one command line with --json."""
        out, err = io.StringIO(), io.StringIO()
        with (
            _environ(self.environment(**environment)),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            exit_code = run([*arguments, "--json"])
        return Answer(arguments, exit_code, out.getvalue(), err.getvalue())

    def run(self, *arguments: str, exit_code: int = 0, **environment: str) -> Any:
        """Run a command that must end with `exit_code`; its result. Raises: CommandFailed."""
        return self.answer(*arguments, **environment).expect(exit_code).result

    def objects(self) -> dict[str, bytes]:
        """Everything in the repository."""
        files = (path for path in self.repository.rglob("*") if path.is_file())
        return {str(path.relative_to(self.repository)): path.read_bytes() for path in files}


@contextlib.contextmanager
def _environ(wanted: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(wanted)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
