"""What `--set` may give to a restored server, and what the restore keeps for itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloudsave.engines.postgresql.recovery_settings import refuse_held_settings
from cloudsave.engines.postgresql.target import PostgresTarget
from cloudsave.errors import UsageError
from cloudsave.model.engine_facts import ServerRequest

HELD = [
    "archive_mode",
    "Archive_Mode",
    "archive-mode",
    "unix_socket_directories",
    "recovery_target_time",
    "restore_command",
    "port",
]


def request_with(directory: Path, name: str) -> ServerRequest:
    return ServerRequest(
        data_directory=directory,
        bin_directory=None,
        port=None,
        private_socket=True,
        fetch_command="false",
        recovery_end=1 << 24,
        inclusive=True,
        branch="00000001",
        consistent_offset=1 << 24,
        settings={name: "on"},
    )


@pytest.mark.parametrize("name", HELD)
def test_what_the_restore_depends_on_is_refused_before_one_is_written(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=name):
        PostgresTarget().configure(request_with(tmp_path, name))
    assert list(tmp_path.iterdir()) == []


def test_any_other_setting_is_the_users() -> None:
    refuse_held_settings({"listen_addresses": "*", "max_connections": "200", "shared_preload_libraries": ""})
