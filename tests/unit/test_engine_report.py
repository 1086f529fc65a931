"""
The table of engines exercised: it is printed, and an incomplete run is not green where so asked.

The same in one process and in several, where no process has seen all tests.
"""

from __future__ import annotations

import os
from collections.abc import Callable

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
EITHER_WAY = pytest.mark.parametrize(
    "workers", [(), ("-n", "2", "--dist", "load")], ids=["alone", "in-parallel"]
)
"""Of two tests each worker gets one."""


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run tests of the made-up engine with options, as if outside of CI and of this run's workers."""
    for name in list(os.environ):
        if name == "CI" or name.startswith("PYTEST_XDIST"):
            monkeypatch.delenv(name)

    def run(tests: str, *options: str) -> pytest.RunResult:
        pytester.makeconftest(PLUGIN)
        pytester.makepyfile(tests)
        return pytester.runpytest("-p", "tests.engine_report", "-p", "no:cacheprovider", *options)

    return run


@EITHER_WAY
def test_table_counts_tests_by_version(run: Run, workers: tuple[str, ...]) -> None:
    result = run(BOTH, "--require-all-engines", *workers)
    result.stdout.fnmatch_lines(["*engines exercised*", "madeupdb*7.3*1*0", "madeupdb*8.3*1*0"])
    assert result.ret == pytest.ExitCode.OK


@EITHER_WAY
def test_missing_version_fails_a_complete_run(run: Run, workers: tuple[str, ...]) -> None:
    result = run(ONE, "--require-all-engines", *workers)
    result.stdout.fnmatch_lines(["error: no test passed on madeupdb 8"])
    assert result.ret == pytest.ExitCode.TESTS_FAILED


def test_missing_version_fails_in_ci(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    assert run(ONE).ret == pytest.ExitCode.TESTS_FAILED


def test_missing_version_only_warns_at_the_desk(run: Run) -> None:
    result = run(ONE)
    result.stdout.fnmatch_lines(["warning: no test passed on madeupdb 8"])
    assert result.ret == pytest.ExitCode.OK


@EITHER_WAY
def test_version_whose_only_test_failed_was_not_exercised(run: Run, workers: tuple[str, ...]) -> None:
    result = run(ONE_FAILS, *workers)
    result.stdout.fnmatch_lines(["madeupdb*8.3*0*1", "warning: no test passed on madeupdb 8"])


@EITHER_WAY
def test_run_without_engine_tests_asks_for_none(run: Run, workers: tuple[str, ...]) -> None:
    result = run(NONE, "--require-all-engines", *workers)
    assert "engines exercised" not in result.stdout.str()
    assert result.ret == pytest.ExitCode.OK
