"""The commands that need no other part, and the options that all have."""

from __future__ import annotations

import json
import re
import subprocess
import tomllib
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from cloudsave.cli.frame import Command, CommandContext, config_option, with_context
from cloudsave.cli.invocation import Invocation
from cloudsave.cli.main import cli
from cloudsave.cli.table import COMMANDS
from cloudsave.errors import (
    ConfigurationError,
    ExitCode,
    SecretInline,
    StoreUnavailable,
    UnknownSource,
    UnusableUrl,
    UsageError,
)

URL = "postgresql://u@h:5432/postgres"


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CLOUDSAVE_CONFIG", str(tmp_path / "c.toml"))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)


def _run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, list(arguments))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_of_the_table_exists_and_shows_its_exit_codes(name: str) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    assert command.name == name
    pages = [_run(name, "--help").output]
    if isinstance(command, click.Group):
        pages += [_run(name, inner, "--help").output for inner in command.commands]
    for page in pages:
        assert "Exit codes:" in page
        assert "130  cancelled" in page
        assert "--timezone" in page
    assert COMMANDS[name].short_help in " ".join(_run("--help").output.split())


def test_a_source_is_added_shown_listed_and_removed(tmp_path: Path) -> None:
    added = _run("source", "add", "orders", URL, "--mode", "local", "--rpo-seconds", "0.5", "--json")
    assert json.loads(added.stdout)["slot"] == "cloudsave_orders"
    assert tomllib.loads((tmp_path / "c.toml").read_text()) == {
        "sources": {"orders": {"url": URL, "mode": "local", "rpo_seconds": 0.5}}
    }
    listed = json.loads(_run("source", "list", "--json").stdout)["sources"]
    assert [(entry["name"], entry["url"], entry["rpo_seconds"]) for entry in listed] == [("orders", URL, 0.5)]
    assert URL in _run("source", "list").stdout
    assert json.loads(_run("source", "show", "orders", "--json").stdout)["files"] == [
        str(tmp_path / "c.toml")
    ]

    kept = _run("source", "remove", "orders")
    assert isinstance(kept.exception, UsageError)
    assert "orders" in (tmp_path / "c.toml").read_text()

    removed = _run("source", "remove", "orders", "--yes")
    assert removed.exit_code == 0
    assert "cloudsave_orders" in removed.stderr
    assert tomllib.loads((tmp_path / "c.toml").read_text()) == {}
    assert json.loads(_run("source", "list", "--json").stdout) == {"sources": []}


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("orders", URL), ConfigurationError),
        (("other", "postgresql://u:geheim99@h/"), SecretInline),
        (("other", "postgresql://h/?password=geheim99"), SecretInline),
        (("other", "host=h password=geheim99"), SecretInline),
        (("other", "mongodb://h/"), UnusableUrl),
        (("other", "h:5432"), UnusableUrl),
        (("other", "postgresql://h/a b"), UnusableUrl),
        (("Other", "postgresql://h/"), ConfigurationError),
        (("other", URL, "--slot", "cloudsave_orders"), ConfigurationError),
        (("other", URL, "--rpo-seconds", "0"), ConfigurationError),
        (("other", URL, "--slot", "A B"), ConfigurationError),
    ],
)
def test_a_source_that_cannot_be_is_not_added(
    tmp_path: Path, arguments: tuple[str, ...], error: type[Exception]
) -> None:
    _run("source", "add", "orders", URL)
    before = (tmp_path / "c.toml").read_text()
    result = _run("source", "add", *arguments)
    assert isinstance(result.exception, error), result.exception
    assert "geheim99" not in str(result.exception)
    assert (tmp_path / "c.toml").read_text() == before


def test_an_unknown_source_gets_a_guess(tmp_path: Path) -> None:
    _run("source", "add", "orders", URL)
    result = _run("source", "show", "order")
    assert isinstance(result.exception, UnknownSource)
    assert "did you mean 'orders'?" in result.exception.hints


def test_a_source_of_the_environment_is_shown_without_its_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "c.toml").touch()
    monkeypatch.setenv("CLOUDSAVE_SOURCES_ORDERS_URL", "postgresql://u:geheim99@h/")
    for arguments in (("list",), ("show", "orders"), ("list", "--json"), ("show", "orders", "--json")):
        shown = _run("source", *arguments).output
        assert "postgresql://u:***@h/" in shown
        assert "geheim99" not in shown
    assert isinstance(_run("source", "remove", "orders", "--yes").exception, UnknownSource)


def test_a_store_that_keeps_its_promises(tmp_path: Path) -> None:
    result = _run("store", "validate", str(tmp_path / "store"), "--json")
    assert result.exit_code == 0, result.exception
    report = json.loads(result.stdout)
    assert report["fit"] is True
    assert all(check["passed"] for check in report["checks"])
    assert not [path for path in (tmp_path / "store").rglob("*") if path.is_file()]
    assert "this store is fit" in _run("store", "validate", str(tmp_path / "store")).stdout


def test_a_store_that_breaks_promises_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    from cloudsave.cli import store
    from cloudsave.clock import Clock
    from cloudsave.store.api import Buffer
    from cloudsave.store.memory import MemoryStore

    class Overwriting(MemoryStore):
        """Loses the first content, as a store without conditional put does."""

        def put(self, name: str, parts: list[Buffer]) -> None:  # type: ignore[override]
            self.delete(name)
            super().put(name, parts)

    def open_overwriting(url: str, *, clock: Clock) -> Overwriting:
        return Overwriting(clock=clock)

    monkeypatch.setattr(store, "open_store", open_overwriting)
    result = CliRunner().invoke(cli, ["store", "validate", "memory://"], standalone_mode=False)
    assert result.return_value is ExitCode.FINDINGS
    assert "BROKEN  put refuses an existing name" in result.stdout
    assert "NOT fit" in result.stdout


def test_a_store_that_is_away_is_an_error_and_no_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    result = CliRunner().invoke(cli, ["store", "validate", "s3://b/p?endpoint=http://127.0.0.1:9"])
    assert isinstance(result.exception, StoreUnavailable), result.exception


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell: str) -> None:
    script = _run("completion", shell, "--quiet", "--json")
    assert "_CLOUDSAVE_COMPLETE" in json.loads(script.stdout)["script"]


def test_the_bash_script_is_valid() -> None:
    script = _run("completion", "bash").stdout
    assert subprocess.run(["bash", "-n"], input=script.encode(), check=False).returncode == 0


# ---- global options --------------------------------------------------------------------------------------


@click.command("probe", cls=Command)
@config_option("workers")
@config_option("paranoid")
@with_context
def probe(context: CommandContext) -> None:
    """Tell what arrived."""
    config = context.config
    facts = {
        "repository": config.repository.url,
        "zone": context.zone_name,
        "workers": config.workers,
        "paranoid": config.paranoid,
        "files": config.files,
        "progress": type(context.progress).__name__,
    }
    context.output.emit(facts, lambda: context.output.line("for people"))


@pytest.mark.parametrize("before", [True, False])
def test_global_options_stand_before_or_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: bool
) -> None:
    from cloudsave.cli import table

    config = tmp_path / "other.toml"
    config.write_text("paranoid = false\n")
    entry = table.Entry(f"{__name__}:probe", "Probe.")
    monkeypatch.setitem(COMMANDS, "probe", entry)
    flags = [
        "--json",
        "--repository",
        "/r",
        "--timezone",
        "Europe/Berlin",
        "--config",
        str(config),
        "--no-progress",
    ]
    own = ["probe", "--workers", "5", "--paranoid"]
    result = CliRunner().invoke(cli, [*flags, *own] if before else [*own, *flags], obj=Invocation())
    assert result.exit_code == 0, result.exception
    assert json.loads(result.stdout) == {
        "repository": "/r",
        "zone": "Europe/Berlin",
        "workers": 5,
        "paranoid": True,
        "files": [str(config)],
        "progress": "NoProgress",
    }


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--workers", "many"], "--workers"),
        (["--workers", "0"], "at least 1"),
        (["--timezone", "Mars/Base"], "Mars/Base|--timezone"),
        (["--repository", ""], "--repository"),
    ],
)
def test_a_bad_flag_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], why: str
) -> None:
    from cloudsave.cli import table

    (tmp_path / "c.toml").touch()
    monkeypatch.setitem(COMMANDS, "probe", table.Entry(f"{__name__}:probe", "Probe."))
    result = CliRunner().invoke(cli, ["probe", *flags])
    assert isinstance(result.exception, UsageError)
    assert re.search(why, str(result.exception))


def test_no_secret_and_nobody_to_ask(tmp_path: Path) -> None:
    (tmp_path / "c.toml").touch()
    with pytest.raises(ConfigurationError, match="no passphrase was given"):
        CommandContext(Invocation()).secrets()


def test_no_repository_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "c.toml").touch()
    assert isinstance(_run("store", "validate").exception, UsageError)
