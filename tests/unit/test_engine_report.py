"""The table of engines exercised: it is printed, and an incomplete run is not green where so asked."""

from __future__ import annotations

import pytest

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


def _run(pytester: pytest.Pytester, tests: str, *options: str) -> pytest.RunResult:
    pytester.makeconftest(PLUGIN)
    pytester.makepyfile(tests)
    return pytester.runpytest("-p", "tests.engine_report", "-p", "no:cacheprovider", *options)


@pytest.fixture(autouse=True)
def _outside_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)


def test_table_counts_tests_by_version(pytester: pytest.Pytester) -> None:
    result = _run(pytester, BOTH, "--require-all-engines")
    result.stdout.fnmatch_lines(["*engines exercised*", "madeupdb*7.3*1*0", "madeupdb*8.3*1*0"])
    assert result.ret == pytest.ExitCode.OK


def test_missing_version_fails_a_complete_run(pytester: pytest.Pytester) -> None:
    result = _run(pytester, ONE, "--require-all-engines")
    result.stdout.fnmatch_lines(["error: no test passed on madeupdb 8"])
    assert result.ret == pytest.ExitCode.TESTS_FAILED


def test_missing_version_fails_in_ci(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    assert _run(pytester, ONE).ret == pytest.ExitCode.TESTS_FAILED


def test_missing_version_only_warns_at_the_desk(pytester: pytest.Pytester) -> None:
    result = _run(pytester, ONE)
    result.stdout.fnmatch_lines(["warning: no test passed on madeupdb 8"])
    assert result.ret == pytest.ExitCode.OK


def test_version_whose_only_test_failed_was_not_exercised(pytester: pytest.Pytester) -> None:
    result = _run(pytester, ONE_FAILS)
    result.stdout.fnmatch_lines(["madeupdb*8.3*0*1", "warning: no test passed on madeupdb 8"])


def test_run_without_engine_tests_asks_for_none(pytester: pytest.Pytester) -> None:
    result = _run(pytester, NONE, "--require-all-engines")
    assert "engines exercised" not in result.stdout.str()
    assert result.ret == pytest.ExitCode.OK
