"""The rules of the house hold in every file, and each rule would notice if they did not."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path, PurePosixPath

import pytest

from tests.tidy import rules

ROOT = Path(__file__).parents[2]
FOLDERS = ("src", "tests", "tools", "benchmarks", "docs", "changelog.d", ".ci")
SUFFIXES = frozenset({".py", ".md", ".c", ".h", ".toml", ".yaml", ".yml", ".json", ".txt", ".sh", ""})
ALL_RULES = pytest.mark.parametrize("rule", rules.RULES, ids=[rule.name for rule in rules.RULES])


def _files() -> list[Path]:
    """Every text file of ours, relative to the top."""
    top = [path for path in ROOT.iterdir() if path.is_file() and not path.name.startswith(".")]
    below = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()]
    relative = [path.relative_to(ROOT) for path in top + below if path.suffix in SUFFIXES]
    return [path for path in sorted(relative) if "__pycache__" not in path.parts and path.name != "LICENSE"]


FILES = [(PurePosixPath(path.as_posix()), (ROOT / path).read_text()) for path in _files()]


def test_the_files_are_found() -> None:
    names = {str(path) for path, _ in FILES}
    assert {"pyproject.toml", "src/cloudsave/errors.py", "docs/messages.md", "tests/tidy/rules.py"} <= names


@ALL_RULES
def test_every_file_keeps_the_rule(rule: rules.Rule) -> None:
    findings = [found for path, text in FILES if rule.applies(path) for found in rule.check(path, text)]
    assert not findings, "\n".join(findings)


@ALL_RULES
def test_rule_notices_a_bad_sample(rule: rules.Rule) -> None:
    path, text = PurePosixPath(rule.bad[0]), rule.bad[1]
    assert rule.applies(path)
    assert list(rule.check(path, text))


GOOD = '''"""Docstring."""

import time
from datetime import datetime


def wait(deadline: float) -> None:
    while True:
        time.sleep(1)
'''


def test_rules_leave_a_good_test_module_alone() -> None:
    path = PurePosixPath("tests/unit/test_a.py")
    assert not [found for rule in rules.RULES if rule.applies(path) for found in rule.check(path, GOOD)]


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("src/cloudsave/engines/postgresql/a.py", "import psycopg\n"),
        ("src/cloudsave/kernels/a.py", "from blake3 import blake3\n"),
        ("src/cloudsave/cli/a.py", "def f():\n    import click\n"),
        ("src/cloudsave/engines/registry.py", "def f():\n    import os\n"),
        ("src/cloudsave/clock.py", "import time\ntime.sleep(1)\n"),
        ("docs/a.md", "a storage snapshot; pg_export_snapshot(); https://example.net/work/a\n"),
    ],
)
def test_what_is_allowed_in_its_place_is_left_alone(path: str, text: str) -> None:
    words = ("driver_import", "late_import", "clock_use", "snapshot_word", "machine_path")
    found = [
        finding
        for rule in rules.RULES
        if rule.name in words and rule.applies(PurePosixPath(path))
        for finding in rule.check(PurePosixPath(path), text)
    ]
    assert not found


# ---- documents and code agree ------------------------------------------------------------------------------


def test_every_error_code_is_unique_and_documented() -> None:
    errors = (ROOT / "src/cloudsave/errors.py").read_text()
    messages = (ROOT / "docs/messages.md").read_text()
    faults = list(rules.error_code_faults(errors, messages))
    assert not faults, "\n".join(faults)


SECTION = "## {code}: it broke\n\n**What happened.** a\n\n**Your data.** b\n\n**What to do.** c\n\n"


@pytest.mark.parametrize(
    ("errors", "messages", "fault"),
    [
        ("class A:\n    code = 'CS-0001'\n", "", "no section for CS-0001"),
        ("", SECTION.format(code="CS-0001"), "CS-0001 is no error"),
        ("class A:\n    code = 'E1'\n", "", "not of the form"),
        (
            "class A:\n    code = 'CS-0001'\nclass B:\n    code = 'CS-0001'\n",
            SECTION.format(code="CS-0001"),
            "used by A and B",
        ),
        ("class A:\n    code = 'CS-0001'\n", SECTION.format(code="CS-0001") * 2, "CS-0001 twice"),
        ("class A:\n    code = 'CS-0001'\n", "## CS-0001: it broke\n", "lacks **Your data.**"),
    ],
)
def test_documented_codes_check_notices(errors: str, messages: str, fault: str) -> None:
    assert any(fault in found for found in rules.error_code_faults(errors, messages))


def test_documented_codes_check_passes_what_is_right() -> None:
    right = SECTION.format(code="CS-0001")
    assert not list(rules.error_code_faults("class A:\n    code = 'CS-0001'\n", right))


def test_changelog_fragments_are_named_well() -> None:
    names = [path.name for path in (ROOT / "changelog.d").iterdir()]
    assert not [found for name in names for found in rules.fragment_name(name)]


@pytest.mark.parametrize("name", ["feature.md", "2.feature", "2.wonder.md", "two.feature.md"])
def test_changelog_check_notices(name: str) -> None:
    assert list(rules.fragment_name(name))


def test_links_inside_the_docs_lead_somewhere() -> None:
    link = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
    pages = [(path, text) for path, text in FILES if path.suffix == ".md"]
    links = [(path, target) for path, text in pages for target in link.findall(text) if "://" not in target]
    broken = [f"{page}: {to}" for page, to in links if not (ROOT / page).parent.joinpath(to).exists()]
    assert not broken, "\n".join(broken)


# ---- layers ------------------------------------------------------------------------------------------------


def _lint_imports(*options: str) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("lint-imports")
    command = [str(program), "--no-cache", *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    return subprocess.run(
        command, cwd=ROOT, env=environment, check=False, capture_output=True, text=True, timeout=120
    )


def test_layers_are_kept() -> None:
    done = _lint_imports()
    assert done.returncode == 0, done.stdout + done.stderr


def test_layers_check_notices(tmp_path: Path) -> None:
    upside_down = tmp_path / "contracts.toml"
    upside_down.write_text(
        '[tool.importlinter]\nroot_package = "cloudsave"\n'
        '[[tool.importlinter.contracts]]\nname = "upside down"\ntype = "layers"\n'
        'layers = ["cloudsave.model", "cloudsave.engines"]\n'
    )
    done = _lint_imports("--config", str(upside_down))
    assert done.returncode != 0
    assert "0 kept, 1 broken" in done.stdout
