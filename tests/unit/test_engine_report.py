"""
The table of engines exercised: it is printed, and an incomplete run is not green where so asked.

The same in one process and in several, where no process has seen all tests.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import cast

import pytest

Run = Callable[..., pytest.RunResult]
PLUGIN = """
    import pytest
    from tests.engine_report import note_engine, require_engine

    def pytest_configure(config):
        for major in ("7", "8"):
            require_engine(config, "madeupdb", major, fixture="madeupdb")

    @pytest.fixture
    def madeupdb(request):
        return lambda major: note_engine(request.node, "madeupdb", major, version=major + ".3")
"""
BOTH = """
    def test_seven(madeupdb): madeupdb("7")
    def test_eight(madeupdb): madeupdb("8")
"""
ONE = "def test_seven(madeupdb): madeupdb('7')"
ONE_FAILS = """
    def test_seven(madeupdb): madeupdb("7")
    def test_eight(madeupdb):
        madeupdb("8")
        assert False
"""
NONE = "def test_nothing(): pass"
IN_PARALLEL = ("-n", "2", "--dist", "load")
"""Of two tests each worker gets one."""


@pytest.fixture(params=[(), IN_PARALLEL], ids=["alone", "in-parallel"], autouse=True)
def workers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """Options of a run in one process and in two; outside of CI, and a worker of no run around."""
    for name in list(os.environ):
        if name == "CI" or name.startswith("PYTEST_XDIST"):
            monkeypatch.delenv(name)
    return cast("tuple[str, ...]", request.param)


@pytest.fixture
def run(pytester: pytest.Pytester, workers: tuple[str, ...]) -> Run:
    """Run tests of the made-up engine with options."""

    def run(tests: str, *options: str) -> pytest.RunResult:
        pytester.makeconftest(PLUGIN)
        pytester.makepyfile(tests)
        plugins = ("-p", "tests.engine_report", "-p", "no:cacheprovider")
        return pytester.runpytest(*plugins, *workers, *options)

    return run


def test_table_counts_tests_by_version(run: Run) -> None:
    result = run(BOTH, "--require-all-engines")
    result.stdout.fnmatch_lines(["*engines exercised*", "madeupdb*7.3*1*0", "madeupdb*8.3*1*0"])
    assert result.ret == pytest.ExitCode.OK


def test_missing_version_fails_a_complete_run(run: Run) -> None:
    result = run(ONE, "--require-all-engines")
    result.stdout.fnmatch_lines(["error: no test passed on madeupdb 8"])
    assert result.ret == pytest.ExitCode.TESTS_FAILED


def test_missing_version_fails_in_ci(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    assert run(ONE).ret == pytest.ExitCode.TESTS_FAILED


def test_missing_version_only_warns_at_the_desk(run: Run) -> None:
    result = run(ONE)
    result.stdout.fnmatch_lines(["warning: no test passed on madeupdb 8"])
    assert result.ret == pytest.ExitCode.OK


def test_version_whose_only_test_failed_was_not_exercised(run: Run) -> None:
    result = run(ONE_FAILS)
    result.stdout.fnmatch_lines(["madeupdb*8.3*0*1", "warning: no test passed on madeupdb 8"])


def test_run_without_engine_tests_asks_for_none(run: Run) -> None:
    result = run(NONE, "--require-all-engines")
    assert "engines exercised" not in result.stdout.str()
    assert result.ret == pytest.ExitCode.OK
