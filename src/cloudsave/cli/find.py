"""`cloudsave find`: which transaction did it, and the restore that stops just before it."""

from __future__ import annotations

import difflib
import shlex
from dataclasses import replace
from typing import Any

import click

from cloudsave import assembly
from cloudsave.cli.formats import format_size, printable
from cloudsave.cli.frame import Command, CommandContext, source_argument, with_context
from cloudsave.cli.times import parse_instant
from cloudsave.engines.registry import dialect, log_search
from cloudsave.errors import ExitCode, UnknownRelation, UsageError
from cloudsave.model.found import DESTRUCTIVE, ChangeKind, SearchQuery, TransactionEnd
from cloudsave.model.log import instant_from_us, us_from_instant
from cloudsave.model.position import Position
from cloudsave.recovery.find import (
    LAST_US,
    Filters,
    FindContext,
    Hit,
    SearchResult,
)
from cloudsave.recovery.find import find as search_log
from cloudsave.recovery.history import History, IndexReader, read_history
from cloudsave.recovery.past_damage import notes_of, past_damage

ROWS_MIN = 1000
"""Fewer rows of one relation are nobody's accident; --rows-at-least says otherwise."""
NAMES_LISTED_MAX = 5
CHANGES_SHOWN_MAX = 20
"""Limit: changes of one transaction that are printed for people."""
_KINDS = ", ".join(ChangeKind)


@click.command("find", cls=Command, exit_codes=(ExitCode.FINDINGS, ExitCode.UNREACHABLE, ExitCode.INTEGRITY))
@source_argument
@click.option("--from", "first", metavar="TIME", help="Begin of the span.  [default: the oldest stored log]")
@click.option("--to", "last", metavar="TIME", help="End of the span.  [default: the end of the stored log]")
@click.option(
    "--kind",
    "kinds",
    metavar="KINDS",
    help=f"What to find, with commas: {_KINDS}.  [default: drop,truncate,alter,delete]",
)
@click.option("--relation", metavar="NAME", help="Table or other relation, with its schema or without.")
@click.option("--relation-file", metavar="NUMBERS", help="The same by its file: 1663/16384/16385, or 16385.")
@click.option("--database", metavar="NAME", help="Database of the relation.")
@click.option("--transaction", type=click.IntRange(min=1), metavar="XID", help="That transaction alone.")
@click.option(
    "--rows-at-least",
    "rows_min",
    type=click.IntRange(min=1),
    metavar="N",
    help=f"Rows of one relation that count as deleted, updated or inserted.  [default: {ROWS_MIN}]",
)
@click.option("--aborted", is_flag=True, help="Show also what was rolled back.")
@click.option("--branch", metavar="BRANCH", help="Timeline to follow.  [default: the newest]")
@with_context
def find(context: CommandContext, /, name: str, **given: Any) -> ExitCode:
    """
    Find in the stored log of NAME what transactions did, and where a restore must stop just before it.

    Finds what dropped, emptied or altered relations, or changed many rows. Names come from the log itself
    and from base backups; no server is asked. With exit code 3 a part of the span could not be searched, so
    that what is not shown may still have happened.
    """
    query = _query(context, given)
    repository = assembly.open_repository(context.config, context.secrets(), clock=context.clock)
    lineage = assembly.lineage_of(repository, name)
    engine = lineage.id.partition("-")[0]
    history = read_history(lineage, dialect(engine))
    newest = history.backups[-1]
    found = FindContext(
        lineage=lineage,
        search=log_search(engine, server_version=newest.server_version, log_file_bytes=newest.log_file_bytes),
        history=history,
        indexes=IndexReader(lineage, dialect(engine), log_file_bytes=newest.log_file_bytes),
        progress=context.progress,
        workers=context.config.workers,
    )
    filters = Filters(given["relation"] or "", given["relation_file"] or "", given["database"] or "")
    result, left_out = past_damage(
        lambda seen: search_log(query, given["branch"], filters, replace(found, history=seen)),
        history,
        found.indexes,
        may_end_earlier=False,
    )
    for note in notes_of(left_out):
        context.output.note(f"note: {note}")
    _refuse_unknown_relation(filters, result)
    shown = _Shown(context, name, history, result, given["branch"])
    context.output.emit(shown.facts(), shown.human)
    return ExitCode.DONE if result.whole else ExitCode.FINDINGS


def _query(context: CommandContext, given: dict[str, Any]) -> SearchQuery:
    first_us, last_us = (
        us_from_instant(parse_instant(given[flag], zone_name=context.zone_name)) if given[flag] else default
        for flag, default in (("first", 0), ("last", LAST_US))
    )
    if first_us > last_us:
        raise UsageError("--from is later than --to", hints=["are both times of the same zone?"])
    one = given["transaction"]
    kinds = _kinds(given["kinds"]) if given["kinds"] else frozenset(ChangeKind) if one else DESTRUCTIVE
    rows_min = given["rows_min"] or (1 if one else ROWS_MIN)
    return SearchQuery(first_us, last_us, kinds, rows_min, one, given["aborted"])


def _kinds(text: str) -> frozenset[ChangeKind]:
    words = [word.strip().lower() for word in text.split(",") if word.strip()]
    unknown = [word for word in words if word not in set(ChangeKind)]
    if unknown or not words:
        raise UsageError(
            f"cannot find {unknown[0]!r}" if unknown else "--kind names nothing",
            hints=[f"kinds are {_KINDS}"],
        )
    return frozenset(ChangeKind(word) for word in words)


def _refuse_unknown_relation(filters: Filters, result: SearchResult) -> None:
    """Nothing found of a relation that nothing knows is a typing error before it is an answer."""
    if not filters.relation or result.hits or result.under_way:
        return
    if any(filters.names(one) for one in result.names):
        return
    known = sorted({one.name for one in result.names if one.schema != "pg_catalog"})
    close = difflib.get_close_matches(filters.relation.rpartition(".")[2], known, n=NAMES_LISTED_MAX)
    raise UnknownRelation(
        f"unknown relation {filters.relation!r}",
        detail="Neither the searched log nor a base backup near it names it.",
        hints=[
            *([f"did you mean {', '.join(close)}?"] if close else []),
            "without --relation all relations are shown, those by number too whose names are unknown",
        ],
    )


class _Shown:
    """A result as it is printed."""

    def __init__(
        self, context: CommandContext, source: str, history: History, result: SearchResult, branch: str | None
    ) -> None:
        self._context = context
        self._source = source
        self._history = history
        self._result = result
        branches = {segment.branch for segment in history.segments}
        self._branch = result.branch if branch or len(branches) > 1 else ""

    def facts(self) -> dict[str, object]:
        """For `--json`."""
        result = self._result
        return {
            "branch": result.branch,
            "complete": result.whole,
            "hits": [self._hit(hit) for hit in result.hits],
            "under_way": [self._hit(hit) for hit in result.under_way],
            "unsearched": [
                {
                    "branch": one.branch,
                    "first": self._position(one.branch, one.first),
                    "last": None if one.last is None else self._position(one.branch, one.last),
                    "text": one.text,
                }
                for one in result.unsearched
            ],
            "notes": list(result.shortcomings),
            "log_bytes": result.log_bytes,
        }

    def _position(self, branch: str, offset: int) -> str:
        return self._history.position_text(Position(branch, offset))

    def _hit(self, hit: Hit) -> dict[str, object]:
        one = hit.found
        command = self._command(hit)
        return {
            "transaction": one.transaction,
            "end": one.end,
            "instant": instant_from_us(one.instant_us) if one.instant_us else None,
            "branch": hit.branch,
            "position": self._position(hit.branch, one.offset),
            "stop_position": self._position(hit.branch, one.stop_offset),
            "changes": list(one.changes),
            "notes": list(one.notes),
            "restorable": hit.reachable,
            "restore": [*command, "--into", "DIR"] if command else None,
        }

    def _command(self, hit: Hit) -> list[str]:
        """The restore to just before a hit, but for its directory; nothing where none is possible."""
        if not hit.reachable or hit.found.end is not TransactionEnd.COMMITTED:
            return []
        words = ["cloudsave"]
        if self._context.explicit_file is not None:
            words += ["--config", str(self._context.explicit_file)]
        override = self._context.invocation.overrides.get("repository.url")
        words += ["--repository", override] if override else []
        stop = self._position(hit.branch, hit.found.stop_offset)
        words += ["restore", self._source, "--position", stop, "--exclusive"]
        return words + (["--branch", self._branch] if self._branch else [])

    # ---- for people

    def human(self) -> None:
        """Print."""
        output, result = self._context.output, self._result
        for hit in result.hits:
            self._print(hit)
        for hit in result.under_way:
            self._print(hit)
        if not result.hits:
            output.line("nothing found" if result.whole else "nothing found in what could be searched")
        for one in result.unsearched:
            output.line(f"NOT SEARCHED: {one.text}")
        for text in result.shortcomings:
            output.line(f"note: {text}")
        output.note(f"searched {format_size(result.log_bytes)} of log on branch {result.branch}")

    def _print(self, hit: Hit) -> None:
        output, one = self._context.output, hit.found
        at = self._position(hit.branch, one.offset)
        when = output.instant(instant_from_us(one.instant_us)) if one.instant_us else "not ended"
        how = "" if one.end is TransactionEnd.COMMITTED else f", {one.end.value}"
        output.line(f"{when}  transaction {one.transaction} at {at}{how}")
        for change in one.changes[:CHANGES_SHOWN_MAX]:
            output.line(f"    {printable(change.text)}")
        if (more := len(one.changes) - CHANGES_SHOWN_MAX) > 0:
            output.line(f"    and {more} more, which --json shows")
        for note in one.notes:
            output.line(f"    note: {note}")
        command = self._command(hit)
        if command:
            output.line(f"    just before it: {shlex.join(command)} --into DIR")
        elif one.end is TransactionEnd.COMMITTED:
            output.line(f"    the state before it cannot be restored; see: cloudsave ranges {self._source}")
