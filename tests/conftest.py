"""Plugins that every test may use: real engines as fixtures, and the table of those exercised."""

from __future__ import annotations

import os

import pytest

pytest_plugins = [
    "pytester",
    "tests.engine_report",
    "tests.fault_report",
    "tests.integration.postgresql.fixtures",
    "tests.integration.mysql.fixtures",
]

WORKERS_PER_CORE = 2
"""A test of a real server keeps a core busy for about half of its time; the rest it waits."""
WORKERS_MAX = 16
"""Each has servers of its own in memory."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """What `-n auto` stands for."""
    return min(WORKERS_MAX, WORKERS_PER_CORE * len(os.sched_getaffinity(0)))
