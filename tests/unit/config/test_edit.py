"""Sources are added and removed, and all else in the file stays."""

from __future__ import annotations

import os
import resource
import tomllib
from pathlib import Path

import pytest

from cloudsave.config.edit import add_source, remove_source
from cloudsave.errors import ConfigurationError, SecretInline, UnknownSource

URL = "postgresql://u@h/postgres"
COMMENTED = """\
# The backups of the shop.
workers = 3   # not more: the host is small

[repository]
url = "s3://backups"  # versioned bucket

[sources.orders]
# The primary.
url = "postgresql://u@db1/postgres"

[sources.stock]  # small
url = "postgresql://u@db2/postgres"
"""


def test_an_absent_file_is_made_private(tmp_path: Path) -> None:
    path = tmp_path / "deep/er/cloudsave.toml"
    add_source(path, "orders", {"url": URL, "rpo_seconds": 0.5})
    assert tomllib.loads(path.read_text()) == {"sources": {"orders": {"url": URL, "rpo_seconds": 0.5}}}
    assert path.stat().st_mode & 0o777 == 0o600
    assert os.listdir(path.parent) == ["cloudsave.toml"]


def test_comments_and_order_stay(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text(COMMENTED)
    add_source(path, "web-shop", {"url": URL, "mode": "local"})
    text = path.read_text()
    assert text.startswith(COMMENTED)
    assert tomllib.loads(text)["sources"]["web-shop"] == {"url": URL, "mode": "local"}
    remove_source(path, "web-shop")
    assert path.read_text().rstrip() == COMMENTED.rstrip()
    remove_source(path, "orders")
    assert "# The backups of the shop." in path.read_text()
    assert list(tomllib.loads(path.read_text())["sources"]) == ["stock"]
    remove_source(path, "stock")
    assert tomllib.loads(path.read_text()) == {"workers": 3, "repository": {"url": "s3://backups"}}


@pytest.mark.parametrize(
    "text",
    [
        "sources = {a = {url = 'postgresql://h/'}}\n",
        "sources.a.url = 'postgresql://h/'\n",
        "[sources]\na = {url = 'postgresql://h/'}\n",
        "[sources]\n[sources.a]\nurl = 'postgresql://h/'\n[repository]\nurl = '/r'\n",
    ],
)
def test_other_ways_to_write_tables_are_edited_as_well(tmp_path: Path, text: str) -> None:
    path = tmp_path / "c.toml"
    path.write_text(text)
    before = tomllib.loads(text)
    add_source(path, "b", {"url": URL})
    after = tomllib.loads(path.read_text())
    assert after == {**before, "sources": {**before["sources"], "b": {"url": URL}}}
    remove_source(path, "a")
    assert list(tomllib.loads(path.read_text())["sources"]) == ["b"]


@pytest.mark.parametrize(
    ("name", "settings", "error"),
    [
        ("orders", {"url": URL}, ConfigurationError),
        ("Bad Name", {"url": URL}, ConfigurationError),
        ("x", {"url": "postgresql://u:geheim99@h/"}, SecretInline),
        ("x", {"url": URL, "rpo_seconds": 0.0}, ConfigurationError),
        ("x", {"url": URL, "slot": "no-slot"}, ConfigurationError),
    ],
)
def test_what_would_break_the_file_is_not_written(
    tmp_path: Path, name: str, settings: dict[str, str | float], error: type[Exception]
) -> None:
    path = tmp_path / "c.toml"
    path.write_text(COMMENTED)
    with pytest.raises(error) as caught:
        add_source(path, name, dict(settings))
    assert "geheim99" not in str(caught.value)
    assert path.read_text() == COMMENTED


def test_removing_what_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    with pytest.raises(UnknownSource):
        remove_source(path, "orders")
    path.write_text(COMMENTED)
    with pytest.raises(UnknownSource):
        remove_source(path, "order")
    assert path.read_text() == COMMENTED


def test_a_symbolic_link_stays_one(tmp_path: Path) -> None:
    real, link = tmp_path / "real.toml", tmp_path / "link.toml"
    real.write_text(COMMENTED)
    link.symlink_to(real)
    add_source(link, "x", {"url": URL})
    assert link.is_symlink()
    assert "[sources.x]" in real.read_text()


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text(COMMENTED)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The new file ends in the middle, as on a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(ConfigurationError):
            add_source(path, "x", {"url": URL})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_text() == COMMENTED
    assert os.listdir(tmp_path) == ["c.toml"]
