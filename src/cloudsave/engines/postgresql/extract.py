"""
Single databases and tables out of a restored server, by the server's own programs.

pg_dump writes a table without the types, functions and sequences that it refers to. What a table needs is
asked from the catalogue, and cut by its oids out of an archive of the whole schema, so that the SQL comes
from the server's own program. Everything is loaded in one transaction: a failure leaves no trace.
"""

from __future__ import annotations

import difflib
import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import psycopg

from cloudsave.engines.postgresql.connection import connect, conninfo, translate
from cloudsave.engines.postgresql.extract_queries import EXISTS, NEEDS, PARTITIONS, TABLES
from cloudsave.engines.postgresql.programs import find_programs
from cloudsave.errors import (
    DestinationUnfit,
    ExtractionFailed,
    ObjectsNotFound,
    ServerToolsMissing,
)
from cloudsave.model.extract import DumpFormat, FoundObjects, NeededObject, Selection

APPLICATION = "cloudsave extract"
PROGRAMS = ("pg_dump", "pg_restore", "psql")
NEAR_NAMES_MAX = 5
LOCK_WAIT_MS = 60_000
"""Limit: a transaction that was prepared for a two-phase commit may hold a table for ever."""
TOLD_CHARACTERS_MAX = 2000
_TOC_LINE = re.compile(r"\d+; (\d+) (\d+) ")
_KEPT_VARIABLES = ("PATH", "HOME", "PGPASSWORD", "PGPASSFILE", "PGSERVICEFILE", "PGSSLROOTCERT", "PGSSLMODE")
"""What libpq's programs may know of the caller: how to log in, and nothing else."""


class PostgresExtractor:
    """`Extractor` of PostgreSQL."""

    forms: tuple[DumpFormat, ...] = tuple(DumpFormat)

    def __init__(self, major: int, bin_directory: Path | None) -> None:
        """Raises: ServerToolsMissing."""
        self._programs = find_programs(major, bin_directory)
        absent = [name for name in PROGRAMS if not (self._programs / name).exists()]
        if absent:
            raise ServerToolsMissing(
                f"could not find {', '.join(absent)} of PostgreSQL {major}",
                detail=f"Looked in {self._programs}.",
                hints=[f"install postgresql-client-{major}, or name its directory with --bin-dir"],
            )

    def check_destination(self, url: str, selection: Selection, *, replace: bool) -> None:
        """See `Extractor.check_destination`."""
        with connect(url, application_name=APPLICATION) as session:
            if replace:
                return
            there = [one for one in _tables(session) if one.is_called_any(selection.tables)]
            if there:
                raise DestinationUnfit(
                    f"table is in the destination already: {there[0].identity}",
                    detail="Nothing was restored, and nothing there was changed.",
                    hints=[
                        "--replace drops it and puts the restored one in its place",
                        "or name another database",
                    ],
                )

    def find(self, url: str, selection: Selection) -> FoundObjects:
        """See `Extractor.find`."""
        with _session_of(url, selection) as session:
            if not selection.tables:
                return FoundObjects(selection)
            tables = _tables(session)
            oids = [_one(tables, name).oid for name in selection.tables]
            rows = session.execute(PARTITIONS, [oids]).fetchall()
            needs = session.execute(NEEDS, {"tables": [row[2] for row in rows]}).fetchall()
        return FoundObjects(
            selection,
            tuple((str(schema), str(name)) for schema, name, *_ in rows),
            tuple(
                NeededObject(str(kind), str(identity), int(catalogue), int(number))
                for catalogue, number, kind, identity, is_member in needs
                if not is_member
            ),
            tuple(str(row[3]) for row in rows),
        )

    def dump(
        self, url: str, found: FoundObjects, file: Path, *, form: DumpFormat, replace: bool, into: str = ""
    ) -> None:
        """See `Extractor.dump`."""
        needs = found.needs
        if into:
            needs = tuple(_absent(needs, into))
        target = conninfo(url, dbname=found.selection.database)
        options = [] if found.selection.keep_owners else ["--no-owner", "--no-privileges"]
        command = ["pg_dump", "--no-unlogged-table-data", f"--lock-wait-timeout={LOCK_WAIT_MS}"]
        command += [f"--dbname={target}", *options]
        names = [*found.tables]
        patterns = [f"--table={_pattern(schema)}.{_pattern(name)}" for schema, name in names]
        patterns += [f"--table={one.identity}" for one in needs if one.kind == "sequence"]
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            if form is DumpFormat.ARCHIVE:
                self._run([*command, "--format=custom", f"--file={file}", *patterns])
                return
            if replace and found.tables:
                # Not by --clean: it alters a table before it drops it, and another one may be there.
                os.write(descriptor, "\n".join([*found.removals, ""]).encode())
            self._write_needs(command, needs, file, descriptor)
            clean = ["--clean", "--if-exists"] if replace and not found.tables else []
            self._run([*command, *clean, *patterns], stdout=descriptor)
        finally:
            os.close(descriptor)

    def _write_needs(
        self, command: Sequence[str], needs: Sequence[NeededObject], file: Path, out: int
    ) -> None:
        """The definitions of what is needed, in the order in which they can be made."""
        wanted = {(str(one.catalogue), str(one.number)) for one in needs if one.kind != "sequence"}
        if not wanted:
            return
        archive, list_file = file.with_name(f"{file.name}.schema"), file.with_name(f"{file.name}.list")
        try:
            self._run([*command, "--schema-only", "--format=custom", f"--file={archive}"])
            listing = self._run(["pg_restore", "--list", str(archive)])
            chosen = [
                line
                for line in listing.splitlines()
                if (entry := _TOC_LINE.match(line)) and entry.groups() in wanted
            ]
            list_file.write_text("\n".join(chosen) + "\n")
            self._run(["pg_restore", f"--use-list={list_file}", "--file=-", str(archive)], stdout=out)
        finally:
            archive.unlink(missing_ok=True)
            list_file.unlink(missing_ok=True)

    def load(self, url: str, file: Path, *, form: DumpFormat, replace: bool) -> None:
        """See `Extractor.load`."""
        target = f"--dbname={conninfo(url)}"
        if form is DumpFormat.ARCHIVE:
            clean = ["--clean", "--if-exists"] if replace else []
            self._run(["pg_restore", "--single-transaction", "--exit-on-error", target, *clean, str(file)])
        else:
            stop = ["--no-psqlrc", "--quiet", "--single-transaction", "--set=ON_ERROR_STOP=1"]
            self._run(["psql", *stop, target, f"--file={file}"])

    def _run(self, command: Sequence[str], *, stdout: int = subprocess.PIPE) -> str:
        """Run a program to its end; what it printed. Raises: ExtractionFailed."""
        kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
        done = subprocess.run(
            [str(self._programs / command[0]), *command[1:]],
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=subprocess.PIPE,
            check=False,
            cwd="/",
            env={**kept, "LC_ALL": "C"},
        )
        if done.returncode:
            said = " ".join(done.stderr.decode(errors="replace").split())
            raise ExtractionFailed(
                f"the program {command[0]!r} failed",
                detail=f"It said: {said[-TOLD_CHARACTERS_MAX:]}",
                hints=_hints(said),
            )
        return (done.stdout or b"").decode(errors="surrogateescape")


class _Table:
    """A table of the catalogue."""

    def __init__(self, row: Sequence[object]) -> None:
        self.schema, self.name, self.oid, _, self.identity, self.is_visible = row

    def is_called(self, text: str) -> bool:
        """Whether a person may mean it by `text`: its name, with its schema or without, quoted or not."""
        return text in (self.name, f"{self.schema}.{self.name}", self.identity)

    def is_called_any(self, texts: Sequence[str]) -> bool:
        """Whether one of `texts` means it."""
        return any(self.is_called(text) for text in texts)


def _tables(session: psycopg.Connection) -> list[_Table]:
    return [_Table(row) for row in session.execute(TABLES).fetchall()]


def _one(tables: Sequence[_Table], text: str) -> _Table:
    """The table that is called so. Raises: ObjectsNotFound where there is none, or more than one."""
    found = [one for one in tables if one.is_called(text)]
    if len(found) > 1:
        found = [one for one in found if text == one.identity] or found
    if len(found) == 1:
        return found[0]
    if found:
        raise ObjectsNotFound(
            f"name of a table means several: {text!r}",
            detail=f"There are {', '.join(sorted(str(one.identity) for one in found))}.",
            hints=["name the schema too: --table SCHEMA.TABLE"],
        )
    names = {str(one.name): one for one in tables} | {f"{one.schema}.{one.name}": one for one in tables}
    near = difflib.get_close_matches(text, names, n=2 * NEAR_NAMES_MAX, cutoff=0.5)
    shown = dict.fromkeys(str(names[name].identity) for name in near)
    raise ObjectsNotFound(
        f"table is not in the restored database: {text!r}",
        detail=f"It has {len(tables)} tables at that moment."
        + (f" Near names: {', '.join(list(shown)[:NEAR_NAMES_MAX])}." if shown else ""),
        hints=["was it made later, or dropped before? another --time may have it"],
    )


def _session_of(url: str, selection: Selection) -> psycopg.Connection:
    """A session in the database. Raises: ObjectsNotFound where there is none of that name."""
    with connect(url, application_name=APPLICATION) as session:
        rows = session.execute("select datname from pg_database where not datistemplate").fetchall()
    names = sorted(str(row[0]) for row in rows)
    if selection.database not in names:
        near = difflib.get_close_matches(selection.database, names, n=NEAR_NAMES_MAX, cutoff=0.5)
        raise ObjectsNotFound(
            f"database is not in the restored server: {selection.database!r}",
            detail=f"It has: {', '.join(near or names[:NEAR_NAMES_MAX])}.",
            hints=["was it made later, or dropped before? another --time may have it"],
        )
    return connect(url, application_name=APPLICATION, dbname=selection.database)


def _absent(needs: Sequence[NeededObject], url: str) -> Iterator[NeededObject]:
    """What the server at `url` does not have yet."""
    with connect(url, application_name=APPLICATION) as session:
        for one in needs:
            try:
                row = session.execute(EXISTS, {"kind": one.kind, "identity": one.identity}).fetchone()
            except psycopg.Error as error:
                raise translate(error, f"look for {one.kind} {one.identity}") from None
            if row is None or not row[0]:
                yield one


def _pattern(name: str) -> str:
    """A name as pg_dump's patterns take it literally."""
    doubled = name.replace('"', '""')
    return f'"{doubled}"'


def _hints(said: str) -> list[str]:
    hints = []
    if re.search(r'role "[^"]*" does not exist', said):
        hints.append("--no-owner leaves owners and rights out")
    if "already exists" in said:
        hints.append("--replace drops what is there; or choose an empty database")
    return [*hints, "the destination is as it was"]
