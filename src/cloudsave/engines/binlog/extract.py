"""
Single databases and tables out of a restored server, by the server's own programs.

Neither MySQL nor MariaDB can make tables in a transaction: what a load that failed has made is dropped again.
So nothing that is there is replaced: it would be gone before its successor is whole.
"""

from __future__ import annotations

import difflib
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

from cloudsave.engines.binlog.address import Address
from cloudsave.engines.binlog.connection import Session, connect
from cloudsave.engines.binlog.programs import find_program, parse_release
from cloudsave.errors import DestinationUnfit, ExtractionFailed, ObjectsNotFound, UsageError
from cloudsave.model.extract import DumpFormat, FoundObjects, Selection

DUMP_PROGRAMS = {"mysql": ("mysqldump",), "mariadb": ("mariadb-dump", "mysqldump")}
CLIENT_PROGRAMS = {"mysql": ("mysql",), "mariadb": ("mariadb", "mysql")}
SYSTEM_SCHEMAS = ("information_schema", "mysql", "performance_schema", "sys")
NEAR_NAMES_MAX = 5
TOLD_CHARACTERS_MAX = 2000
_DUMP_OPTIONS = (
    "--single-transaction",
    "--quick",
    "--hex-blob",
    "--skip-add-drop-table",
    "--default-character-set=utf8mb4",
    "--max-allowed-packet=1G",
    "--triggers",
)
_WHOLE_OPTIONS = ("--routines", "--events")
_KINDS = {"BASE TABLE": "TABLE", "SYSTEM VERSIONED": "TABLE", "VIEW": "VIEW", "SEQUENCE": "SEQUENCE"}
_OBJECTS = """
SELECT table_name, table_type FROM information_schema.tables WHERE table_schema = %s UNION ALL
SELECT routine_name, routine_type FROM information_schema.routines WHERE routine_schema = %s UNION ALL
SELECT event_name, 'EVENT' FROM information_schema.events WHERE event_schema = %s
"""
Named = tuple[str, str]
"""Kind of an object, as DROP calls it, and name."""


class BinlogExtractor:
    """`Extractor` of MySQL and MariaDB."""

    forms: tuple[DumpFormat, ...] = (DumpFormat.SQL,)

    def __init__(self, engine: str, version: str, bin_directory: Path | None) -> None:
        """Raises: ServerToolsMissing."""
        self._engine = engine
        series = parse_release(version)[:2]
        self._dump = find_program(DUMP_PROGRAMS[engine], series, bin_directory)
        self._client = find_program(CLIENT_PROGRAMS[engine], series, bin_directory)
        self._database = ""
        """Of the destination."""
        self._there: set[Named] = set()
        """What is in it already."""
        self._made: set[Named] = set()
        """What the dump makes."""

    def check_destination(self, url: str, selection: Selection, *, replace: bool) -> None:
        """See `Extractor.check_destination`."""
        if replace or not selection.keep_owners:
            raise UsageError(
                f"cannot use --{'replace' if replace else 'no-owner'} with {self._engine}",
                detail="A table that is loaded in place of another is half there for a while.",
                hints=["rename what is there away, or load into another database and rename tables then"],
            )
        database = self._database = unquote(urlsplit(url).path.strip("/")) or selection.database
        with connect(url) as session:
            if database not in _databases(session):
                raise DestinationUnfit(
                    f"destination has no database {database!r}",
                    hints=[
                        "create it first: CREATE DATABASE, with its character set",
                        "or name another one: mysql://user@host/database",
                    ],
                )
            self._there = _objects(session, database)
        names = {name for _, name in self._there}
        there = [one for one in _short(selection) if one in names] if selection.tables else sorted(names)
        if there:
            raise DestinationUnfit(
                f"{there[0]!r} is in the destination already",
                detail="Nothing was restored, and nothing there was changed.",
                hints=["rename it away, or name an empty database in the URL"],
            )

    def find(self, url: str, selection: Selection) -> FoundObjects:
        """See `Extractor.find`."""
        database = selection.database
        with connect(url) as session:
            databases = _databases(session)
            if database not in databases:
                raise _not_found("database", database, "server", databases)
            objects = _objects(session, database)
        tables = sorted(name for kind, name in objects if kind in _KINDS.values())
        for name in _short(selection):
            if name not in tables:
                raise _not_found("table", name, "database", tables)
        wanted = set(_short(selection)) if selection.tables else {name for _, name in objects}
        self._made = {one for one in objects if one[1] in wanted}
        return FoundObjects(selection, tuple((database, name) for name in _short(selection)))

    def dump(
        self,
        url: str,
        found: FoundObjects,
        file: Path,
        *,
        form: DumpFormat,  # noqa: ARG002
        replace: bool,  # noqa: ARG002
        into: str = "",  # noqa: ARG002
    ) -> None:
        """See `Extractor.dump`."""
        options = [*_DUMP_OPTIONS]
        if self._engine == "mysql":
            options += ["--set-gtid-purged=OFF", "--no-tablespaces"]
        if not found.tables:
            options += _WHOLE_OPTIONS
        names = [found.selection.database, *(name for _, name in found.tables)]
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            _run(self._dump, url, [*options, "--", *names], stdout=descriptor)
        finally:
            os.close(descriptor)

    def load(self, url: str, file: Path, *, form: DumpFormat, replace: bool) -> None:  # noqa: ARG002
        """See `Extractor.load`."""
        options = ["--binary-mode", "--default-character-set=utf8mb4", "--max-allowed-packet=1G"]
        try:
            with file.open("rb") as dump:
                _run(self._client, url, [*options, f"--database={self._database}"], stdin=dump.fileno())
        except BaseException:
            self._drop_made(url)
            raise

    def _drop_made(self, url: str) -> None:
        """Leave the destination as it was. Raises: ExtractionFailed where that fails too."""
        with connect(url) as session:
            present = _objects(session, self._database)
            session.rows("SET SESSION foreign_key_checks = 0", doing="drop what was loaded")
            for kind, name in sorted((self._made - self._there) & present, reverse=True):
                statement = f"DROP {kind} IF EXISTS {_quoted(self._database)}.{_quoted(name)}"
                session.rows(statement, doing="drop what was loaded")


def _run(
    program: Path,
    url: str,
    arguments: Sequence[str],
    *,
    stdin: int = subprocess.DEVNULL,
    stdout: int = subprocess.DEVNULL,
) -> None:
    """Run a program that connects to `url`, to its end. Raises: ExtractionFailed."""
    with tempfile.TemporaryDirectory(prefix="cloudsave-") as place:
        options = Path(place) / "client.cnf"
        options.touch(mode=0o600)
        options.write_text(Address.of(url).for_programs())
        done = subprocess.run(
            [str(program), f"--defaults-file={options}", *arguments],
            stdin=stdin,
            stdout=stdout,
            stderr=subprocess.PIPE,
            check=False,
            cwd="/",
            env={"PATH": os.environ.get("PATH", ""), "LC_ALL": "C"},
        )
    if done.returncode:
        said = " ".join(done.stderr.decode(errors="replace").split())
        raise ExtractionFailed(
            f"the program {program.name!r} failed",
            detail=f"It said: {said[-TOLD_CHARACTERS_MAX:]}",
            hints=["the destination is as it was"],
        )


def _databases(session: Session) -> list[str]:
    rows = session.rows("SELECT schema_name FROM information_schema.schemata", doing="list the databases")
    return [str(name) for (name,) in rows if name not in SYSTEM_SCHEMAS]


def _objects(session: Session, database: str) -> set[Named]:
    rows = session.rows(_OBJECTS, database, database, database, doing="list what is in the database")
    return {(_KINDS.get(kind, kind), str(name)) for name, kind in rows}


def _short(selection: Selection) -> list[str]:
    """The names of the tables, without their database."""
    return [one.removeprefix(f"{selection.database}.") for one in selection.tables]


def _quoted(name: str) -> str:
    return "`" + name.replace("`", "``") + "`"


def _not_found(kind: str, name: str, place: str, names: Sequence[str]) -> ObjectsNotFound:
    near = difflib.get_close_matches(name, names, n=NEAR_NAMES_MAX, cutoff=0.5)
    shown = ", ".join(near or sorted(names)[:NEAR_NAMES_MAX]) or "nothing"
    return ObjectsNotFound(
        f"{kind} is not in the restored {place}: {name!r}",
        detail=f"It has {len(names)} {kind}s at that moment, such as: {shown}.",
        hints=["was it made later, or dropped before? another --time may have it"],
    )
