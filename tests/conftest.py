"""Plugins that every test may use: real engines as fixtures, and the table of those exercised."""

from __future__ import annotations

pytest_plugins = ["pytester", "tests.engine_report", "tests.integration.postgresql.fixtures"]
