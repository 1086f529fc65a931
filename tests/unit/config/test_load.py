"""Files, environment and command line become one configuration, or an error that says where."""

from __future__ import annotations

import dataclasses
import logging
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudsave.config.files import line_of
from cloudsave.config.load import load_config
from cloudsave.config.model import Config
from cloudsave.config.options import GLOBAL_OPTIONS, OPTIONS, Kind, Option
from cloudsave.config.values import BadValue, parse_size
from cloudsave.errors import ConfigurationError, SecretInline
from cloudsave.model.retention import RetentionRules

FULL = """\
compression_level = 3
workers = 7
rate_limit_bytes_per_second = "50 MB"
read_limit_bytes_per_second = "40 MB"
rpo_seconds = 2
log_object_bytes_max = "8 MiB"
paranoid = true
timezone = "Europe/Berlin"
spool_directory = "/spool"
retry_deadline_seconds = 60

[repository]
url = "s3://backups/orders"
passphrase_file = "/etc/cloudsave/passphrase"
passphrase_command = "pass show x"
recovery_key_file = "/etc/cloudsave/key"
lock_days = 35

[notify]
webhook_url = "https://example.org/hook"
webhook_key_file = "/etc/cloudsave/webhook"
apprise_file = "/etc/cloudsave/apprise"
heartbeat_url = "https://example.org/beat"
heartbeat_seconds = 20

[postgresql]
bin_directory = "/usr/lib/postgresql/16/bin"

[sources.orders]
url = "postgresql://u@db1/postgres"
slot = "mine"
canary_seconds = 5
backup_url = "postgresql://u@db9/postgres"
checkpoint = "spread"
mode = "remote"
rpo_seconds = 0.5
keep_days = 7.5
keep_last = 3
keep_hourly = 24
keep_daily = 7
keep_weekly = 5
keep_monthly = 12
keep_yearly = 10
keep_proved = 1

[sources.web-shop]
url = "postgresql://u@db2:5433/postgres"
"""


def _load(tmp_path: Path, text: str = "", **environ: str) -> Config:
    path = tmp_path / "cloudsave.toml"
    path.write_text(text)
    return load_config(path=path, environ=environ)


def test_every_option_of_a_file_arrives(tmp_path: Path) -> None:
    config = _load(tmp_path, FULL)
    assert dataclasses.asdict(config) == {
        "repository": {
            "url": "s3://backups/orders",
            "passphrase_file": Path("/etc/cloudsave/passphrase"),
            "passphrase_command": "pass show x",
            "recovery_key_file": Path("/etc/cloudsave/key"),
            "lock_days": 35,
        },
        "notify": {
            "webhook_url": "https://example.org/hook",
            "webhook_key_file": Path("/etc/cloudsave/webhook"),
            "apprise_file": Path("/etc/cloudsave/apprise"),
            "heartbeat_url": "https://example.org/beat",
            "heartbeat_seconds": 20.0,
        },
        "postgresql": {"bin_directory": Path("/usr/lib/postgresql/16/bin")},
        "compression_level": 3,
        "workers": 7,
        "rate_limit_bytes_per_second": 50_000_000,
        "read_limit_bytes_per_second": 40_000_000,
        "rpo_seconds": 2.0,
        "log_object_bytes_max": 8 << 20,
        "paranoid": True,
        "timezone": "Europe/Berlin",
        "spool_directory": Path("/spool"),
        "retry_deadline_seconds": 60.0,
        "sources": {
            "orders": {
                "name": "orders",
                "url": "postgresql://u@db1/postgres",
                "slot": "mine",
                "checkpoint": "spread",
                "mode": "remote",
                "rpo_seconds": 0.5,
                "canary_seconds": 5.0,
                "backup_url": "postgresql://u@db9/postgres",
                "retention": {
                    "days": 7.5,
                    "last": 3,
                    "hourly": 24,
                    "daily": 7,
                    "weekly": 5,
                    "monthly": 12,
                    "yearly": 10,
                    "proved": 1,
                },
            },
            "web-shop": {
                "name": "web-shop",
                "url": "postgresql://u@db2:5433/postgres",
                "slot": "cloudsave_web_shop",
                "checkpoint": "fast",
                "mode": "auto",
                "rpo_seconds": 2.0,
                "canary_seconds": 15.0,
                "backup_url": None,
                "retention": dataclasses.asdict(RetentionRules()),
            },
        },
        "files": (tmp_path / "cloudsave.toml",),
    }


def test_the_sample_file_uses_every_option_but_the_secret(tmp_path: Path) -> None:
    leaves = [entry.name.rpartition(".")[2] for entry in OPTIONS if not entry.secret]
    assert [leaf for leaf in leaves if f"{leaf} = " not in FULL] == []


def test_defaults_need_no_file(tmp_path: Path) -> None:
    config = load_config(environ={"HOME": str(tmp_path)}, system_file=tmp_path / "none.toml")
    assert (config.compression_level, config.rpo_seconds, config.log_object_bytes_max) == (1, 1.0, 16 << 20)
    assert config.workers >= 2
    assert config.rate_limit_bytes_per_second is None
    assert config.sources == {}
    assert config.files == ()


def test_command_line_wins_over_environment_over_users_file_over_systems_file(tmp_path: Path) -> None:
    system = tmp_path / "system.toml"
    system.write_text(
        'workers = 1\ncompression_level = 4\n[sources.a]\nurl = "postgresql://a/"\nmode = "local"\n'
    )
    own = tmp_path / "xdg/cloudsave/cloudsave.toml"
    own.parent.mkdir(parents=True)
    own.write_text('workers = 2\nparanoid = true\n[sources.a]\nmode = "remote"\n')

    def load(environ: dict[str, str], overrides: dict[str, int | str]) -> Config:
        environ = {"XDG_CONFIG_HOME": str(tmp_path / "xdg"), **environ}
        return load_config(environ=environ, overrides=overrides, system_file=system)

    config = load({}, {})
    assert (config.workers, config.compression_level, config.paranoid) == (2, 4, True)
    assert (config.sources["a"].url, config.sources["a"].mode) == ("postgresql://a/", "remote")
    assert config.files == (system, own)
    assert load({"CLOUDSAVE_WORKERS": "3"}, {}).workers == 3
    assert load({"CLOUDSAVE_WORKERS": ""}, {}).workers == 2
    assert load({"CLOUDSAVE_WORKERS": "3"}, {"workers": 4}).workers == 4


def test_an_explicit_file_stands_alone(tmp_path: Path) -> None:
    system = tmp_path / "system.toml"
    system.write_text("workers = 9\n")
    explicit = tmp_path / "explicit.toml"
    explicit.write_text("paranoid = true\n")
    config = load_config(path=explicit, environ={}, system_file=system)
    assert config.workers != 9
    assert config.files == (explicit,)
    with pytest.raises(ConfigurationError, match="does not exist"):
        load_config(path=tmp_path / "gone.toml", environ={})
    assert load_config(path=tmp_path / "gone.toml", environ={}, missing_ok=True).sources == {}


def test_variables_make_and_change_sources(tmp_path: Path) -> None:
    config = _load(
        tmp_path,
        FULL,
        CLOUDSAVE_SOURCES_WEB_SHOP_MODE="local",
        CLOUDSAVE_SOURCES_ORDERS_URL="postgresql://u:secret@other/",
        CLOUDSAVE_SOURCES_NEW_ONE_URL="postgresql://n/",
        CLOUDSAVE_SOURCES_NEW_ONE_RPO_SECONDS="0.25",
    )
    assert config.sources["web-shop"].mode == "local"
    assert config.sources["orders"].url == "postgresql://u:secret@other/"
    assert config.sources["new_one"].rpo_seconds == 0.25
    assert "secret" not in repr(config)


def test_variables_that_could_mean_two_sources_are_refused(tmp_path: Path) -> None:
    text = '[sources.a-b]\nurl = "postgresql://1/"\n[sources.a_b]\nurl = "postgresql://2/"\n'
    assert len(_load(tmp_path, text).sources) == 2
    with pytest.raises(ConfigurationError, match="which source"):
        _load(tmp_path, text, CLOUDSAVE_SOURCES_A_B_MODE="local")


@pytest.mark.parametrize("entry", GLOBAL_OPTIONS, ids=lambda entry: entry.name)
def test_each_variable_is_read(tmp_path: Path, entry: Option) -> None:
    value = {Kind.TEXT: "UTC", Kind.PATH: "/p", Kind.BOOLEAN: "yes", Kind.SIZE: "17 MiB"}.get(
        entry.kind, "17"
    )
    config = _load(tmp_path, **{entry.environment: value})
    if entry.secret:
        assert value not in repr(config)
    else:
        assert config != _load(tmp_path)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("workers = \n", "line 1"),
        ("\n\nworker = 3\n", "'worker'.*line 3.*did you mean 'workers'"),
        ("url = 's3://b'\n", "'url'.*did you mean 'repository.url'"),
        ("[repository]\n\nurll = 's3://b'\n", "'repository.urll'.*line 3.*did you mean 'repository.url'"),
        (
            "[sources.a]\nurl = 'postgresql://h/'\nslott = 'x'\n",
            "sources.a.slott.*line 3.*did you mean 'slot'",
        ),
        ("[storage]\nx = 1\n", "'storage'.*line 1"),
        ("repository = 3\n", "repository must be a table.*line 1"),
        ("sources = 'a'\n", "sources must be a table"),
        ("[sources]\na = 'postgresql://h/'\n", "sources.a must be a table.*line 2"),
        ("workers = '3'\n", "workers.*line 1.*whole number"),
        ("workers = true\n", "whole number"),
        ("workers = 0\n", "at least 1"),
        ("compression_level = 23\n", "at most 19"),
        ("rpo_seconds = nan\n", "must be a number"),
        ("rpo_seconds = inf\n", "must be a number"),
        ("paranoid = 1\n", "true or false"),
        ("timezone = 'Europe/Berln'\n", "time zone database"),
        ("timezone = '../etc/passwd'\n", "time zone database"),
        ("log_object_bytes_max = '16 MeB'\n", "unit"),
        ("spool_directory = ''\n", "must not be empty"),
        ("[sources.a]\nslot = 'a'\n", "source 'a' has no url"),
        ("[sources.a]\nurl = 'postgresql://h/'\nslot = 'A-B'\n", "must match"),
        ("[sources.a]\nurl = 'postgresql://h/'\nmode = 'near'\n", "one of auto, local, remote"),
        ("[sources.Orders]\nurl = 'postgresql://h/'\n", "source name 'Orders'"),
        (
            "[sources.a]\nurl='postgresql://h/'\nslot='s'\n[sources.b]\nurl='postgresql://h/'\nslot='s'\n",
            "share",
        ),
    ],
)
def test_what_is_not_understood_is_an_error_that_says_where(tmp_path: Path, text: str, wanted: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        _load(tmp_path, text)
    assert re.search(wanted, " ".join(str(caught.value).split())), str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("CLOUDSAVE_WORKERS", "many"),
        ("CLOUDSAVE_WORKERS", "1.5"),
        ("CLOUDSAVE_RPO_SECONDS", "nan"),
        ("CLOUDSAVE_PARANOID", "perhaps"),
        ("CLOUDSAVE_LOG_OBJECT_BYTES_MAX", "-1"),
    ],
)
def test_a_bad_variable_is_named(tmp_path: Path, variable: str, value: str) -> None:
    with pytest.raises(ConfigurationError, match=variable):
        _load(tmp_path, **{variable: value})


class Kept(logging.Handler):
    """Keeps what was logged."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def test_a_misspelt_variable_is_warned_of(tmp_path: Path) -> None:
    kept, logger = Kept(), logging.getLogger("cloudsave.config.load")
    logger.addHandler(kept)
    try:
        _load(tmp_path, CLOUDSAVE_WORKER="3", CLOUDSAVE_SERVICE_HOST="10.0.0.1")
    finally:
        logger.removeHandler(kept)
    assert kept.messages == ["unknown environment variable CLOUDSAVE_WORKER: did you mean CLOUDSAVE_WORKERS?"]


@pytest.mark.parametrize(
    "text",
    [
        "[repository]\npassphrase = 'geheim99'\n",
        "[repository]\npassword = 'geheim99'\n",
        "passphrase = 'geheim99'\n",
        "[sources.a]\nurl = 'postgresql://u:geheim99@h/'\n",
        "[sources.a]\nurl = 'postgresql://u:ge/heim99@h/'\n",
        "[sources.a]\nurl = 'postgresql://h/db?user=u&password=geheim99'\n",
        "[sources.a]\nurl = 'host=h password=geheim99'\n",
        "[sources.a]\nurl = 'postgresql://h/'\npassword = 'geheim99'\n",
        "[repository]\nurl = 's3://key:geheim99@bucket'\n",
        "[repository]\nurl = 's3://bucket/x?secret_access_key=geheim99'\n",
    ],
)
def test_a_secret_in_a_file_is_refused_and_not_repeated(tmp_path: Path, text: str) -> None:
    with pytest.raises(SecretInline) as caught:
        _load(tmp_path, text)
    assert "geheim99" not in str(caught.value)
    assert "heim99" not in str(caught.value)
    assert "line " in caught.value.detail
    assert caught.value.hints


@pytest.mark.parametrize("content", [b"\xff\xfe", b"x" * (1024 * 1024 + 1), b"a = 1\na = 2\n", b"[a\n"])
def test_a_file_that_is_no_toml_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "cloudsave.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"cloudsave\.toml"):
        load_config(path=path, environ={})


def test_a_directory_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot use configuration file"):
        load_config(path=tmp_path, environ={})


def test_lines_are_found_by_table_and_key() -> None:
    text = '# x\n[a]\nb = 1\n\n[ "c" . d ] # y\n e.f = 2\n'
    assert line_of(text, ("a", "b")) == 3
    assert line_of(text, ("c", "d", "e", "f")) == 6
    assert line_of(text, ("c",)) == 5
    assert line_of(text, ("b",)) is None


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("0", 0), ("17", 17), ("16 MiB", 16 << 20), ("1.5GB", 1_500_000_000), ("2 kib", 2048), ("0.1 KB", 100)],
)
def test_sizes_have_units(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@given(st.text(max_size=20))
def test_a_size_is_understood_or_refused(text: str) -> None:
    try:
        assert parse_size(text) >= 0
    except BadValue:
        assert not text.strip().isascii() or not text.strip().isdigit() or len(text.strip()) > 18
