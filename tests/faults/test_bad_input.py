"""
Bad input, case by case: refused with its code, its exit code and a hint, and everything is left as it was.

The control is the first test: the same repository, server and configuration without the fault do their work.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.engine_report import note_engine
from tests.faults.product import Product
from tests.faults.protected import Protected, protected
from tests.integration.postgresql.fixtures import version_of

NOTHING_LISTENS = "postgresql://postgres@127.0.0.1:1/postgres"
CHECKED = ("check", "backup")


pytestmark = pytest.mark.postgresql_majors("14", "18")


@pytest.fixture(scope="module")
def server(
    postgresql_major: str,
    postgresql_bindirs: dict[str, Path],
    postgresql_folders: tuple[Path, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Protected]:
    folder = tmp_path_factory.mktemp("protected")
    with protected(postgresql_major, postgresql_bindirs, postgresql_folders, folder) as made:
        yield made


@pytest.fixture
def product(server: Protected, tmp_path: Path, request: pytest.FixtureRequest) -> Product:
    """The protected server's repository, a copy that this test may spoil."""
    note_engine(request.node, "postgresql", server.cluster.major, version=version_of(server.cluster.bindir))
    return server.copy(tmp_path)


def test_without_a_fault_everything_works(product: Product, tmp_path: Path) -> None:
    """Control for all cases below."""
    assert product.run("backup", "db")["kind"] == "incremental"
    assert product.run("restore", "db", "--into", str(tmp_path / "new"))["bytes_written"] > 0
    assert product.run("verify", "--read-all")["sound"]
    assert len(product.run("list")) == 3
    product.run("source", "add", "other", "postgresql://u@h/x")


Setup = Callable[[Product], None]


def nothing(product: Product) -> None:
    """The fault is in the arguments."""


def source_url(url: str) -> Setup:
    """The source has another URL."""
    return lambda product: product.configure(url)


def settings(text: str) -> Setup:
    """The configuration has further lines at its top."""

    def setup(product: Product) -> None:
        product.configuration.write_text(text + "\n" + product.configuration.read_text())

    return setup


def no_passphrase(product: Product) -> None:
    """The configuration names no passphrase."""
    text = product.configuration.read_text()
    product.configuration.write_text(re.sub(r"passphrase_file.*\n", "", text))


def passphrase_file_gone(product: Product) -> None:
    """The file that the configuration names is not there."""
    product.passphrase.unlink()


def passphrase_open_to_all(product: Product) -> None:
    """Everybody may read the passphrase."""
    product.passphrase.chmod(0o644)


def target_in_use(product: Product) -> None:
    """The directory to restore into holds something of somebody."""
    (product.folder / "new").mkdir()
    (product.folder / "new" / "mine").write_text("precious")


@dataclass(frozen=True)
class Case:
    """A command line that must be refused."""

    arguments: str
    code: str
    exit_code: int
    setup: Setup = nothing
    environment: dict[str, str] = field(default_factory=dict)
    says: str = ""
    """What message, detail or hints must contain."""


INTO = "restore db --into {new}"
CASES = {
    # ---- what was asked for
    "time without zone": Case(f"{INTO} --time 2026-11-21T05:00:00", "CS-1003", 2, says="zone"),
    "nonsense time": Case(f"{INTO} --time soonish", "CS-1001", 2, says="soonish"),
    "impossible time": Case(f"{INTO} --time 2026-02-30T00:00:00Z", "CS-1001", 2, says="2026-02-30"),
    "unknown zone": Case(
        f"{INTO} --time 2026-11-21T05:00:00 --timezone Mars/Base", "CS-1001", 2, says="--timezone"
    ),
    "two targets": Case(f"{INTO} --latest --time 2026-11-21T05:00:00Z", "CS-1001", 2, says="target"),
    "nonsense position": Case(f"{INTO} --position here", "CS-1001", 2, says="here"),
    "exclusive latest": Case(f"{INTO} --latest --exclusive", "CS-1001", 2, says="--exclusive"),
    "no directory": Case("restore db", "CS-1001", 2, says="--into"),
    "unknown source": Case("backup nosuch", "CS-1004", 2, says="source list"),
    "unknown source checked": Case("check nosuch", "CS-1004", 2),
    "unknown source captured": Case("logs capture nosuch", "CS-1004", 2),
    "unknown source restored": Case("restore nosuch --into {new}", "CS-1004", 2),
    "misspelt source": Case("check dbb", "CS-1004", 2, says="did you mean 'db'?"),
    "unknown backup": Case(f"{INTO} --backup 20200101T000000Z-0000", "CS-1005", 2, says="list"),
    "unknown backup shown": Case("show 20200101T000000Z-0000", "CS-1005", 2, says="list"),
    "unknown backup verified": Case("verify 20200101T000000Z-0000", "CS-1005", 2, says="list"),
    # ---- targets
    "before the first backup": Case(f"{INTO} --time 2001-01-01T00:00:00Z", "CS-5001", 4),
    "after the end": Case(f"{INTO} --time 2199-01-01T00:00:00Z", "CS-5001", 4),
    "position before the first backup": Case(f"{INTO} --position 0/28", "CS-5001", 4),
    "position after the end": Case(f"{INTO} --position FFFF/0", "CS-5001", 4),
    "unknown transaction": Case(f"{INTO} --transaction 4000000000", "CS-5001", 4),
    "unknown restore point": Case(f"{INTO} --name nosuch", "CS-5001", 4),
    "unknown branch": Case(f"{INTO} --latest --branch 000000AA", "CS-5001", 4),
    "target directory in use": Case(INTO, "CS-5003", 2, target_in_use),
    # ---- configuration and secrets
    "unknown option": Case("list", "CS-1002", 2, settings("wokers = 3"), says="workers"),
    "broken TOML": Case("list", "CS-1002", 2, settings("workers = = 3")),
    "bad value": Case("list", "CS-1002", 2, settings("workers = -1"), says="workers"),
    "bad value in the environment": Case("list", "CS-1002", 2, environment={"CLOUDSAVE_WORKERS": "many"}),
    "no configuration": Case("--config {new} list", "CS-1002", 2),
    "password in a source URL": Case("source add x postgresql://u:geheim99@h/", "CS-1006", 2),
    "password in the configuration": Case("list", "CS-1006", 2, source_url("postgresql://u:geheim99@h/")),
    "password in a repository URL": Case("--repository s3://k:geheim99@b/p list", "CS-1006", 2),
    "wrong passphrase": Case(
        "list", "CS-6002", 5, environment={"CLOUDSAVE_PASSPHRASE": "geheim99 geheim99"}, says="recovery key"
    ),
    "no passphrase": Case("list", "CS-1002", 2, no_passphrase, says="CLOUDSAVE_PASSPHRASE_FILE"),
    "passphrase file gone": Case("list", "CS-1002", 2, passphrase_file_gone),
    "passphrase for all": Case("list", "CS-1002", 2, passphrase_open_to_all, says="chmod 600"),
    # ---- the place of the repository
    "unsupported store": Case("--repository ftp://h/p list", "CS-1007", 2),
    "no repository": Case("--repository {new} list", "CS-4008", 2, says="cloudsave init"),
    "repository exists": Case("init", "CS-4009", 2),
    "place for a repository in use": Case("--repository {folder} init", "CS-4009", 2),
    # ---- the server's URL
    "nothing listens": Case("{checked} db", "CS-2002", 1, source_url(NOTHING_LISTENS)),
    "no such host": Case("{checked} db", "CS-2002", 1, source_url("postgresql://u@no-such-host.invalid/x")),
    "no such socket": Case("{checked} db", "CS-2002", 1, source_url("postgresql://u@/x?host=/nosuch")),
    "impossible port": Case("{checked} db", "CS-1007", 2, source_url("postgresql://u@h:99999/x")),
    "no port": Case("{checked} db", "CS-1007", 2, source_url("postgresql://u@h:port/x")),
    "unknown parameter": Case("{checked} db", "CS-1007", 2, source_url("postgresql://u@h/x?colour=red")),
    "other engine": Case("{checked} db", "CS-1007", 2, source_url("mongodb://h/x")),
    "no URL": Case("{checked} db", "CS-1007", 2, source_url("localhost:5432")),
    "no such database": Case("{checked} db", "CS-2001", 1, source_url("{server}&dbname=nosuch")),
    "no such role": Case("{checked} db", "CS-2003", 1, source_url("{server}&user=nosuch")),
}


FAULTS = {
    "before the first backup": "target-before-first-backup",
    "position before the first backup": "target-before-first-backup",
    "after the end": "target-after-end",
    "position after the end": "target-after-end",
    "unknown transaction": "target-unknown-transaction",
    "unknown restore point": "target-unknown-name",
    "unknown branch": "target-unknown-branch",
    "time without zone": "target-without-zone",
    "impossible time": "target-impossible-time",
    "two targets": "target-two-kinds",
    "unknown backup": "backup-unknown",
    "target directory in use": "directory-not-empty",
    "wrong passphrase": "wrong-passphrase",
    "repository exists": "init-over-repository",
    "password in a source URL": "secret-in-url",
    "password in a repository URL": "secret-in-url",
}
"""Cases that are faults of the catalogue."""


def case_of(name: str) -> object:
    """A case, with the fault that it plays."""
    fault = FAULTS.get(name)
    control = "test_without_a_fault_everything_works"
    return pytest.param(name, marks=pytest.mark.fault(fault, control=control) if fault else ())


@pytest.mark.parametrize("name", [case_of(name) for name in CASES])
def test_bad_input_is_refused_and_changes_nothing(name: str, server: Protected, product: Product) -> None:
    case = CASES[name]
    case.setup(product)
    text = product.configuration.read_text().replace("{server}", server.cluster.url)
    product.configuration.write_text(text)
    before = everything_in(product.folder)
    for checked in CHECKED if "{checked}" in case.arguments else ("",):
        arguments = case.arguments.format(new=product.folder / "new", folder=product.folder, checked=checked)
        answer = product.answer(*arguments.split(), **case.environment)
        assert (answer.exit_code, answer.error["code"]) == (case.exit_code, case.code), answer.stderr
        assert answer.stdout == ""
        assert answer.error["hints"], f"no hint: {answer.stderr}"
        assert case.says in answer.stderr
        assert "Traceback" not in answer.stderr
        assert "geheim99" not in answer.stderr
        assert everything_in(product.folder) == before


def everything_in(folder: Path) -> dict[str, bytes]:
    """All files of a folder, by name; directories count."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in folder.rglob("*")
    }


@pytest.mark.fault("wrong-recovery-key")
def test_a_wrong_recovery_key_is_refused_and_the_right_one_opens(server: Protected, product: Product) -> None:
    no_passphrase(product)
    key_file = product.folder / "recovery.key"
    key_file.touch(mode=0o600)
    variables = {"CLOUDSAVE_RECOVERY_KEY_FILE": str(key_file)}
    key_file.write_text(server.recovery_key)
    assert len(product.run("list", **variables)) == 2
    other = Product(product.folder, server.cluster.url, store=product.folder / "other")
    foreign = other.run("init")["recovery_key"]
    product.configure(server.cluster.url)
    no_passphrase(product)
    key_file.write_text(foreign)
    answer = product.answer("list", **variables).expect(5)
    assert answer.error["code"] == "CS-6002"
    assert foreign not in answer.stderr
    key_file.write_text("AGE-SECRET-KEY-1NONSENSE")
    assert product.answer("list", **variables).expect(2).error["hints"]
