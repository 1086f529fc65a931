"""
Pytest plugin: which database engines and versions did this run really exercise, and were all of them?

A run in parallel (pytest-xdist) is judged as one: the process that started the workers sees every test's
report, which names the versions that the test used, and is told by each worker which fixtures its tests use.
Workers judge nothing.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

PROPERTY = "engine_exercised"
SELECTED = "fixtures_selected"
EXIT_CODE_INCOMPLETE = pytest.ExitCode.TESTS_FAILED


@dataclass
class EngineReport:
    """What must be exercised and what was: (engine, major) to counts of tests, with the full version."""

    required: dict[tuple[str, str], str] = field(default_factory=dict)
    selected: set[str] = field(default_factory=set)
    passed: Counter[tuple[str, str]] = field(default_factory=Counter)
    failed: Counter[tuple[str, str]] = field(default_factory=Counter)
    versions: dict[tuple[str, str], str] = field(default_factory=dict)

    def missing(self) -> list[tuple[str, str]]:
        """Required versions, of engines whose tests were selected, on which no test passed."""
        wanted = [key for key, fixture in self.required.items() if fixture in self.selected]
        return [key for key in wanted if not self.passed[key]]

    def rows(self) -> list[tuple[str, str, int, int]]:
        """Engine, version, passed, failed; sorted by engine and version."""
        keys = sorted({*self.passed, *self.failed, *self.missing()})
        return [(key[0], self.versions.get(key, key[1]), self.passed[key], self.failed[key]) for key in keys]


_KEY = pytest.StashKey[EngineReport]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """--require-all-engines, which CI=true implies."""
    text = "fail the run when a required engine version was not exercised; implied by CI=true"
    parser.addoption("--require-all-engines", action="store_true", help=text)


def report_of(config: pytest.Config) -> EngineReport:
    """The report of this run."""
    return config.stash.setdefault(_KEY, EngineReport())


def require_engine(config: pytest.Config, engine: str, major: str, *, fixture: str) -> None:
    """A complete run exercises this version, if any test that uses the fixture is selected."""
    report_of(config).required[(engine, major)] = fixture


def note_engine(node: pytest.Item, engine: str, major: str, *, version: str) -> None:
    """This test talks to a real engine of this version."""
    entry = (PROPERTY, (engine, major, version))
    if entry not in node.user_properties:
        node.user_properties.append(entry)


class _Recorder:
    """Hears of every test, in whichever process it ran, and of every worker that ended."""

    def __init__(self, report: EngineReport) -> None:
        self._report = report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count a test for each version that it used: when it passed, or in the phase in which it failed."""
        used = [value for name, value in report.user_properties if name == PROPERTY]
        for engine, major, version in cast("list[tuple[str, str, str]]", used):
            self._report.versions[(engine, major)] = version
            if report.failed:
                self._report.failed[(engine, major)] += 1
            elif report.passed and report.when == "call":
                self._report.passed[(engine, major)] += 1

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any, error: object) -> None:
        """Take over what a worker's tests use. A worker that crashed tells nothing; it has failed the run."""
        self._report.selected.update(getattr(node, "workeroutput", {}).get(SELECTED, ()))


def pytest_configure(config: pytest.Config) -> None:
    """Listen."""
    config.pluginmanager.register(_Recorder(report_of(config)))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Remember which engines' fixtures the selected tests use."""
    report = report_of(session.config)
    for item in session.items:
        report.selected.update(getattr(item, "fixturenames", ()))


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """An incomplete run must not look green. A worker has run a part, and only tells what it knows."""
    report = report_of(session.config)
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput[SELECTED] = sorted(report.selected)
        return
    green = exitstatus == pytest.ExitCode.OK and not session.config.getoption("collectonly")
    if green and _complete_wanted(session.config) and report.missing():
        session.exitstatus = EXIT_CODE_INCOMPLETE


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the table, and what is missing in it."""
    report = report_of(config)
    rows = report.rows()
    if not rows or config.getoption("collectonly"):
        return
    terminalreporter.section("engines exercised")
    terminalreporter.write_line(f"{'engine':<12} {'version':<10} {'passed':>7} {'failed':>7}")
    for engine, version, passed, failed in rows:
        terminalreporter.write_line(f"{engine:<12} {version:<10} {passed:>7} {failed:>7}")
    for engine, major in report.missing():
        word = "error" if _complete_wanted(config) else "warning"
        terminalreporter.write_line(f"{word}: no test passed on {engine} {major}")


def _complete_wanted(config: pytest.Config) -> bool:
    return bool(config.getoption("--require-all-engines")) or os.environ.get("CI") == "true"
