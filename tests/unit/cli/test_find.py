"""`cloudsave find` as it is typed: what is printed, what is refused, and the exit codes."""

from __future__ import annotations

import contextlib
import io
import json
import shlex
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from cloudsave.cli.main import run
from cloudsave.clock import SYSTEM_CLOCK
from cloudsave.model.log import instant_from_us
from cloudsave.repository.repository import Repository
from cloudsave.store.posix import PosixStore
from tests.unit.kernels.synthetic_heap import end
from tests.unit.recovery.searched_site import LINEAGE, Site, accident, filler, instant, time
from tests.unit.repository.samples import IDENTITY

PASSPHRASE = "correct horse battery staple"


@dataclass
class Typed:
    """How a command line ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[Typed]:
    """A repository in which "orders" was dropped at second 6; object 12 of the log is missing."""
    store = PosixStore(tmp_path / "repository")
    repository = Repository.create(store, passphrase=PASSPHRASE, clock=SYSTEM_CLOCK).repository
    lineage = repository.lineage(LINEAGE)
    lineage.record_identity(replace(IDENTITY, system_identifier=LINEAGE.partition("-")[2]), source="db")
    site = Site(lineage=lineage)
    accident(site)
    filler(site, 9, 20)
    end(site.wal, 50, time(21), dropped=[(1663, 5, 17_000 + number) for number in range(30)])
    site.store(without=[15])
    secret = tmp_path / "passphrase"
    secret.write_text(PASSPHRASE)
    secret.chmod(0o600)
    config = tmp_path / "cloudsave.toml"
    config.write_text(f"[repository]\nurl = '{tmp_path}/repository'\npassphrase_file = '{secret}'\n")
    monkeypatch.setenv("CLOUDSAVE_CONFIG", str(config))
    monkeypatch.setenv("HOME", str(tmp_path))
    return Typed


def type_(*arguments: str) -> Typed:
    """Run a command line."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run(["find", "db", "--no-progress", *arguments])
    return Typed(code, out.getvalue(), err.getvalue())


def at(seconds: float) -> str:
    """A time as it is typed."""
    return instant_from_us(instant(seconds)).isoformat()


def test_a_hit_is_printed_with_the_restore_to_just_before_it(typed: type[Typed]) -> None:
    said = type_("--to", at(8), "--timezone", "Europe/Berlin", "--kind", "drop")
    assert said.code == 0, said.err
    lines = said.out.splitlines()
    first = next(number for number, line in enumerate(lines) if "transaction 5 at" in line)
    assert "+02:00)" in lines[first] or "+01:00)" in lines[first], "the local time is missing"
    assert lines[first + 1] == "    dropped table public.orders in database 5"
    words = shlex.split(lines[first + 2].partition(": ")[2])
    assert words[0] == "cloudsave"
    assert words[-2:] == ["--into", "DIR"]
    config = words.index("--config")
    del words[config : config + 2]
    position = words[words.index("--position") + 1]
    assert words[1:] == ["restore", "db", "--position", position, "--exclusive", "--into", "DIR"]


def test_a_long_list_of_changes_is_cut_for_people_alone(typed: type[Typed]) -> None:
    short = type_("--from", at(20), "--kind", "drop")
    assert "and 10 more, which --json shows" in short.out
    (hit,) = json.loads(type_("--from", at(20), "--kind", "drop", "--json").out)["hits"]
    assert len(hit["changes"]) == 30


def test_a_hole_in_the_span_is_said_and_changes_the_exit_code(typed: type[Typed]) -> None:
    said = type_("--relation", "orders")
    assert said.code == 3
    assert "dropped table public.orders" in said.out
    assert "NOT SEARCHED: the log has a hole from" in said.out
    nothing = type_("--from", at(10), "--kind", "truncate")
    assert nothing.code == 3
    assert nothing.out.startswith("nothing found in what could be searched")
    assert type_("--from", at(9), "--to", at(11), "--kind", "truncate").out == "nothing found\n"


@pytest.mark.parametrize(
    ("arguments", "exit_code", "wanted"),
    [
        (("--from", "2025-05-08 10:00"), 2, "error[CS-1003]"),
        (("--relation", "order"), 2, "did you mean orders"),
        (("--kind", "drop,explode"), 2, "cannot find 'explode'"),
        (("--kind", ","), 2, "--kind names nothing"),
        (("--rows-at-least", "0"), 2, "error[CS-1001]"),
        (("--from", at(5), "--to", at(4)), 2, "--from is later than --to"),
        (("--from", at(5000)), 4, "error[CS-5007]"),
        (("--to", at(-5000)), 4, "Commits are stored from"),
        (("--branch", "00000009"), 4, "branch 00000009 is not stored"),
    ],
)
def test_what_cannot_be_answered_is_refused(
    typed: type[Typed], arguments: tuple[str, ...], exit_code: int, wanted: str
) -> None:
    said = type_(*arguments)
    assert said.code == exit_code
    assert wanted in said.err
    assert said.out == ""
