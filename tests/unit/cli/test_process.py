"""Real processes: exit codes, what goes to which stream, signals, broken pipes, full disks."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SECONDS_MAX = 60.0

PROBES = '''
"""Commands that end in the ways in which commands end."""
import atexit, errno, os, sys, threading
import click
from cloudsave.cli.frame import Command, with_context
from cloudsave.cli.table import COMMANDS, Entry
from cloudsave.clock import SYSTEM_CLOCK
from cloudsave.errors import ExitCode, LogHole, ReachablePoint, TargetUnreachable

@click.command("probe", cls=Command)
@click.argument("end")
@with_context
def probe(context, end):
    if end == "wait":
        try:
            context.progress.begin("waiting", bytes_total=None)
            print("waiting", flush=True)
            while True:
                SYSTEM_CLOCK.sleep(0.05)
        finally:
            print("unwound", flush=True)
    if end == "bug":
        raise ValueError("postgresql://u:geheim99@h/ is odd")
    if end == "disk":
        raise OSError(errno.ENOSPC, "No space left on device", "/x/y")
    if end == "memory":
        raise MemoryError
    if end == "hole":
        raise LogHole("log has a hole", detail="see postgresql://u:geheim99@h/", hints=["why?"])
    if end == "target":
        raise TargetUnreachable("target is not reachable", before=ReachablePoint("0/1", SYSTEM_CLOCK.now()))
    if end == "findings":
        context.output.emit({"found": 1}, lambda: context.output.line("found"))
        return ExitCode.FINDINGS
    if end == "done" or end == "thread":
        atexit.register(print, "taken apart")
        context.output.line("result")
    if end == "thread":
        threading.Timer(0.5, print, ("last words",)).start()
    if end == "socket":
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")
    if end == "flood":
        while True:
            context.output.emit({"x": "y" * 10000}, lambda: context.output.line("y" * 10000))

COMMANDS["probe"] = Entry("probes:probe", "Probe.")
from cloudsave.cli.main import main
if __name__ == "__main__":
    sys.modules["probes"] = sys.modules["__main__"]
    main()
'''


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    script = tmp_path / "probes.py"
    script.write_text(PROBES)
    return [sys.executable, str(script)]


def _environment(tmp_path: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("CLOUDSAVE_")}
    return kept | {"PYTHONPATH": str(ROOT / "src"), "HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path)}


def _run(command: list[str], *arguments: str, **more: object) -> subprocess.CompletedProcess[str]:
    home = Path(command[-1]).parent
    return subprocess.run(
        [*command, *arguments],
        env=_environment(home),
        capture_output=True,
        text=True,
        timeout=SECONDS_MAX,
        check=False,
        stdin=subprocess.DEVNULL,
    )


@pytest.mark.parametrize(
    ("arguments", "exit_code", "code"),
    [
        (["nonsense"], 2, "CS-1001"),
        (["--nonsense"], 2, "CS-1001"),
        (["probe"], 2, "CS-1001"),
        (["source", "add", "x"], 2, "CS-1001"),
        (["--config", "/no/such/file", "source", "list"], 2, "CS-1002"),
        (["source", "add", "x", "postgresql://u:geheim99@h/"], 2, "CS-1006"),
        (["store", "validate", "ftp://geheim99:geheim99@h/"], 2, "CS-1006"),
        (["probe", "bug"], 1, "CS-0001"),
        (["probe", "disk"], 1, "CS-0002"),
        (["probe", "memory"], 1, "CS-0003"),
        (["probe", "socket"], 1, "CS-0001"),
        (["probe", "hole"], 5, "CS-6004"),
        (["probe", "target"], 4, "CS-5001"),
    ],
)
def test_errors_go_to_stderr_with_their_code(
    command: list[str], arguments: list[str], exit_code: int, code: str
) -> None:
    done = _run(command, *arguments)
    assert done.returncode == exit_code, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith(f"error[{code}]: ")
    assert "Traceback" not in done.stderr
    assert "geheim99" not in done.stderr

    as_json = _run(command, *arguments, "--json")
    assert (as_json.returncode, as_json.stdout) == (exit_code, "")
    error = json.loads(as_json.stderr)["error"]
    assert (error["code"], error["exit_code"]) == (code, exit_code)
    assert "geheim99" not in as_json.stderr


def test_a_command_that_is_done_leaves_at_once_with_all_that_it_said(command: list[str]) -> None:
    done = _run(command, "probe", "done")
    assert (done.returncode, done.stdout, done.stderr) == (0, "result\n", "")


def test_a_thread_that_is_still_at_work_is_waited_for(command: list[str]) -> None:
    done = _run(command, "probe", "thread")
    assert (done.returncode, done.stdout) == (0, "result\nlast words\ntaken apart\n")


def test_unreachable_targets_tell_their_neighbours(command: list[str]) -> None:
    error = json.loads(_run(command, "--json", "probe", "target").stderr)["error"]
    assert error["before"]["position"] == "0/1"
    assert error["before"]["instant"].endswith("Z")
    assert error["after"] is None


def test_verbose_shows_where_a_bug_arose_without_secrets(command: list[str]) -> None:
    done = _run(command, "--verbose", "probe", "bug")
    assert "Traceback" in done.stderr
    assert "geheim99" not in done.stderr.replace('raise ValueError("postgresql://u:***@h/ is odd")', "")
    assert "error[CS-0001]: internal error" in done.stderr


def test_findings_are_a_result_with_exit_code_3(command: list[str]) -> None:
    done = _run(command, "probe", "findings")
    assert (done.returncode, done.stdout, done.stderr) == (3, "found\n", "")
    done = _run(command, "probe", "findings", "--json")
    assert (done.returncode, json.loads(done.stdout), done.stderr) == (3, {"found": 1}, "")


def test_help_and_version(command: list[str]) -> None:
    for arguments in (["--help"], ["-h"], ["source", "add", "--help"], ["--version"]):
        done = _run(command, *arguments)
        assert (done.returncode, done.stderr) == (0, "")
        assert "cloudsave" in done.stdout
    done = _run(command)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Commands:" in done.stderr


def test_help_imports_no_command_and_no_driver(command: list[str]) -> None:
    code = (
        "import sys, atexit\n"
        "from cloudsave.cli.main import run\n"
        "assert run(['--help']) == 0\n"
        "print([m for m in sys.modules if m.startswith('cloudsave.') or m.partition('.')[0] in"
        " ('rich', 'psycopg', 'numpy', 'obstore', 'tomlkit', 'cryptography')], file=sys.stderr)\n"
    )
    done = _run([command[0], "-c", code])
    loaded = set(eval(done.stderr))
    assert loaded <= {
        "cloudsave.cli",
        "cloudsave.cli.main",
        "cloudsave.cli.table",
        "cloudsave.cli.help_page",
        "cloudsave.cli.invocation",
        "cloudsave.cli.interruption",
        "cloudsave.cli.private_memory",
        "cloudsave.clock",
        "cloudsave.errors",
        "cloudsave.version",
    }


def _wait_for(process: subprocess.Popen[bytes], wanted: bytes) -> bytes:
    """Read stdout until `wanted` was seen, or fail at the deadline."""
    assert process.stdout is not None
    seen, deadline = b"", time.monotonic() + SECONDS_MAX
    while wanted not in seen:
        assert time.monotonic() < deadline, seen
        if select.select([process.stdout], [], [], 0.2)[0]:
            piece = os.read(process.stdout.fileno(), 65536)
            assert piece, seen
            seen += piece
    return seen


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("twice", [False, True])
def test_signals_cancel_and_unwind(command: list[str], number: signal.Signals, twice: bool) -> None:
    process = subprocess.Popen(
        [*command, "probe", "wait"],
        env=_environment(Path(command[-1]).parent),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    _wait_for(process, b"waiting\n")
    process.send_signal(number)
    # Echoes as of a terminal and a supervisor, until the process is gone: none may change how it ends.
    while twice and process.poll() is None:
        process.send_signal(number)
        time.sleep(0.001)
    out, err = process.communicate(timeout=SECONDS_MAX)
    assert process.returncode == 130, err
    assert out == b"unwound\n"
    assert err.startswith(b"error[CS-9001]: cancelled\n")
    assert b"Traceback" not in err


def test_an_ignored_hang_up_stays_ignored(command: list[str]) -> None:
    process = subprocess.Popen(
        ["nohup", *command, "probe", "wait"],
        env=_environment(Path(command[-1]).parent),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    _wait_for(process, b"waiting\n")
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=SECONDS_MAX)
    assert (process.returncode, out) == (130, b"unwound\n"), err


@pytest.mark.parametrize("arguments", [["probe", "flood"], ["probe", "flood", "--json"]])
def test_a_reader_that_leaves_ends_the_command_quietly(command: list[str], arguments: list[str]) -> None:
    process = subprocess.Popen(
        [*command, *arguments],
        env=_environment(Path(command[-1]).parent),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    _wait_for(process, b"y")
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    _, err = process.communicate(timeout=SECONDS_MAX)
    assert (process.returncode, err) == (1, b"")


@pytest.mark.parametrize(
    "arguments", [["probe", "findings"], ["--help"], ["completion", "bash", "--quiet", "--json"]]
)
def test_a_result_that_could_not_be_written_is_no_success(command: list[str], arguments: list[str]) -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [*command, *arguments],
            env=_environment(Path(command[-1]).parent),
            stdout=full,
            stderr=subprocess.PIPE,
            timeout=SECONDS_MAX,
            check=False,
        )
    assert done.returncode == 1
    assert b"CS-0002" in done.stderr
    assert b"Traceback" not in done.stderr


def test_completion_of_commands_options_and_sources(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "cloudsave").mkdir()
    (tmp_path / "cloudsave/cloudsave.toml").write_text('[sources.orders]\nurl = "postgresql://h/"\n')

    def complete(*words: str) -> list[str]:
        environment = _environment(tmp_path) | {
            "_CLOUDSAVE_COMPLETE": "bash_complete",
            "COMP_WORDS": " ".join(["cloudsave", *words]),
            "COMP_CWORD": str(len(words)),
        }
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        return [line.partition(",")[2] for line in done.stdout.splitlines()]

    assert complete("sou") == ["source"]
    assert complete("source", "re") == ["remove"]
    assert complete("source", "show", "or") == ["orders"]
    assert "--timezone" in complete("--t")
    assert complete("completion", "") == ["bash", "zsh", "fish"]


def test_a_person_at_a_terminal_is_asked_for_the_passphrase(tmp_path: Path) -> None:
    code = (
        "from cloudsave.cli.frame import CommandContext\n"
        "from cloudsave.cli.invocation import Invocation\n"
        "print('found', len(CommandContext(Invocation()).secrets(new=True).passphrase))\n"
    )
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env=_environment(tmp_path),
        stdin=theirs,
        stderr=theirs,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    shown, asked, deadline = b"", 0, time.monotonic() + SECONDS_MAX
    while process.poll() is None and time.monotonic() < deadline:
        if select.select([ours], [], [], 0.2)[0]:
            shown += os.read(ours, 4096)
        if shown.count(b": ") > asked:
            asked += 1
            os.write(ours, b"geheim99\n")
    out, _ = process.communicate(timeout=SECONDS_MAX)
    os.close(ours)
    os.close(theirs)
    assert out == b"found 8\n", shown
    assert asked == 2
    assert b"geheim99" not in shown
