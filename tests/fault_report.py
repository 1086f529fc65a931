"""
Pytest plugin: which faults of the catalogue did this run play, on which versions, and how did they end?

`@pytest.mark.fault("name", ..., control="test_x")` says that a test plays these faults and asserts their
outcome. `control` names the test of the same module that shows that the assertion can fail; without it the
test is its own control: it runs without the fault as well, or judges by a check that proves itself.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests import engine_report
from tests.faults.catalogue import BY_NAME, FAULTS, Fault

PROPERTY = "fault_played"
NO_SERVER = "any"
"""Where no server takes part."""
MAJORS_REQUIRED = frozenset({"14", "18"})
BINLOG_GROUP = "Binlogs"
BINLOG_SERIES_REQUIRED = frozenset({"9.7", "10.11", "11.8"})
ONLY = {
    "slot-idle-timeout": frozenset({"18"}),
    "binlog-server-and-capture-killed": frozenset({"9.7"}),
    "clone-leaves-tables-out": frozenset({"9.7"}),
    "clone-plugin-absent": frozenset({"9.7"}),
    "backup-program-of-another-series": frozenset({"10.11", "11.8"}),
}
"""Faults that not every version can have."""


@dataclass
class FaultReport:
    """By fault: versions on which its tests passed, and on which one failed."""

    passed: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    failed: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))

    def seen(self, name: str) -> list[str]:
        """Versions on which the fault was played and ended as it must."""
        return sorted(self.passed[name] - self.failed[name])

    def incomplete(self) -> list[str]:
        """Faults that failed somewhere, were not played, or only on some of the versions required."""
        return [one.name for one in FAULTS if self.failed[one.name] or not self._complete(one)]

    def _complete(self, fault: Fault) -> bool:
        passed = self.passed[fault.name]
        usual = BINLOG_SERIES_REQUIRED if fault.group == BINLOG_GROUP else MAJORS_REQUIRED
        return NO_SERVER in passed or ONLY.get(fault.name, usual) <= passed


_KEY = pytest.StashKey[FaultReport]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """--fault-table"""
    text = "print the catalogue of faults with what was seen; fail when one was not played where it must be"
    parser.addoption("--fault-table", action="store_true", help=text)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Check what markers say, and let the reports of the tests carry it."""
    for item in items:
        for mark in item.iter_markers("fault"):
            _check(item, mark)
            item.user_properties += [(PROPERTY, name) for name in mark.args]


def _check(item: pytest.Item, mark: pytest.Mark) -> None:
    unknown = [name for name in mark.args if name not in BY_NAME]
    control = mark.kwargs.get("control")
    if unknown or not mark.args:
        raise pytest.UsageError(f"{item.nodeid}: not in tests/faults/catalogue.py: {unknown}")
    if control is not None and not hasattr(getattr(item, "module", None), control):
        raise pytest.UsageError(f"{item.nodeid}: its control {control} does not exist")


class _Recorder:
    """Hears of every test, in whichever process it ran."""

    def __init__(self, report: FaultReport) -> None:
        self._report = report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note the versions of a test that passed, or of the phase in which it failed."""
        played = [str(value) for name, value in report.user_properties if name == PROPERTY]
        used = [value for name, value in report.user_properties if name == engine_report.PROPERTY]
        majors = {str(value[1]) for value in used} or {NO_SERVER}  # type: ignore[index]
        for name in played:
            if report.failed:
                self._report.failed[name] |= majors
            elif report.when == "call":
                self._report.passed[name] |= majors


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker; listen."""
    text = "fault(*names, control=None): plays these faults of tests/faults/catalogue.py"
    config.addinivalue_line("markers", text)
    config.pluginmanager.register(_Recorder(config.stash.setdefault(_KEY, FaultReport())))


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A catalogue that was played in part must not look green."""
    config = session.config
    judged = config.getoption("--fault-table") and not hasattr(config, "workeroutput")
    if judged and exitstatus == pytest.ExitCode.OK and config.stash[_KEY].incomplete():
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the table."""
    if not config.getoption("--fault-table"):
        return
    report = config.stash[_KEY]
    terminalreporter.section("faults")
    for one in FAULTS:
        seen = ", ".join(report.seen(one.name)) or "NOT SEEN"
        failed = (
            "  FAILED on " + ", ".join(sorted(report.failed[one.name])) if report.failed[one.name] else ""
        )
        terminalreporter.write_line(f"{one.group:<10} {one.name:<34} {one.outcome:<10} {seen}{failed}")
    incomplete = ", ".join(report.incomplete()) or "none"
    terminalreporter.write_line(f"{len(FAULTS)} faults; not as they must be: {incomplete}")
