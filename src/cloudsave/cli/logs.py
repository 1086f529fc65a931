"""`cloudsave logs`: capture of the log, its ledger, and the two ends of the engine's own archiving."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from cloudsave import assembly
from cloudsave.cli import render
from cloudsave.cli.formats import format_duration, format_size
from cloudsave.cli.frame import Command, CommandContext, Group, source_argument, with_context
from cloudsave.cli.invocation import invocation_of
from cloudsave.cli.live_limits import followed
from cloudsave.cli.log_purge import purge
from cloudsave.cli.output import Column
from cloudsave.cli.watching import watched
from cloudsave.engines.dialect_api import Dialect
from cloudsave.engines.registry import dialect
from cloudsave.errors import ExitCode, IntegrityError, LogNotInArchive, UsageError
from cloudsave.logs.archive import fetch as fetch_file
from cloudsave.logs.archive import push as push_file
from cloudsave.logs.background import BackgroundCapture
from cloudsave.logs.ledger import unrecorded_gaps
from cloudsave.logs.status import CaptureOptions, CaptureStatus
from cloudsave.model.ledger import Ledger
from cloudsave.model.log import LogSegment, instant_from_us
from cloudsave.model.position import Position
from cloudsave.repository.lineage import Lineage

WATCH_SECONDS = 0.5
"""How often the main thread, which receives the signals, looks after capture."""
REPORT_SECONDS = 60.0
"""How often capture says how it is when nothing has changed."""
OBJECT_BYTES_MAX = 256 << 20
"""Limit: no object holds more log (option log_object_bytes_max); one that spans more ends in padding."""
FETCH_TROUBLE = 255
"""
Exit code of `logs fetch` for all trouble: the server takes codes up to 125 for "there is no such file", that
is for the end of the log, and would open a truncated database without a word; above, it stops.
"""


@click.group("logs", cls=Group)
def logs() -> None:
    """The log of a source: its capture, what is durable of it, archive hooks."""


logs.add_command(purge)


@logs.command("capture", cls=Command, exit_codes=(ExitCode.INTEGRITY, ExitCode.BUSY))
@source_argument
@click.option("--synchronous", is_flag=True, help="Commits wait until their log is stored.")
@click.option("--metrics", metavar="HOST:PORT", help="Serve metrics for Prometheus there.")
@click.option(
    "--metrics-file",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write them to a .prom file for node_exporter.",
)
@with_context
def capture(
    context: CommandContext, name: str, synchronous: bool, metrics: str | None, metrics_file: Path | None
) -> None:
    """
    Capture the log of source NAME until stopped by Ctrl-C or SIGTERM, which store what is at hand first.

    PostgreSQL keeps a replication slot that holds exactly what is not durable yet; MySQL and MariaDB keep
    their binlog for as long as they are set to. With --synchronous the log is stored at once, however little
    it is, for servers that wait for it: by synchronous_standby_names, or by semi-synchronous replication.
    Interruptions of the server or the store are waited out. Small commits of ours are awaited in the
    repository: log that does not arrive there is an alarm, told on stdout and to all that [notify] names.
    With exit code 5 a person must decide, for example because another server answered; with 6 a capture of
    this source runs already.
    """
    config, clock = context.config, context.clock
    source = context.source(name)
    engine = assembly.engine(source)
    limits = assembly.Limits(config, clock=clock)
    repository = assembly.open_repository(config, context.secrets(), clock=clock, limits=limits)
    lineage = assembly.lineage_for(repository, engine.identify(), source=name)
    options = CaptureOptions(
        object_age_seconds=source.rpo_seconds,
        object_bytes_max=config.log_object_bytes_max,
        synchronous=synchronous,
    )
    reporter = _Reporter(context, name, engine.dialect)
    with watched(context, source, lineage, metrics=metrics, metrics_file=metrics_file) as watcher:

        def observe(status: CaptureStatus) -> None:
            watcher.observe(status)
            reporter(status)

        running = BackgroundCapture(
            engine.log_source(slot=source.slot, temporary=False, synchronous=synchronous),
            lineage,
            engine.dialect,
            options,
            clock=clock,
            observer=observe,
        )
        running.begin()
        try:
            with followed(limits, config.files, context.load_config, context.output.note):
                while not running.ended(wait_seconds=WATCH_SECONDS):
                    pass
        except KeyboardInterrupt:
            context.output.note("stopping: what has been received is being stored")
        finally:
            running.leave()
        running.stop()


class _Reporter:
    """Says on stdout what has changed; called by the capturing thread."""

    def __init__(self, context: CommandContext, name: str, formats: Dialect) -> None:
        self._output = context.output
        self._name = name
        self._clock = context.clock
        self._formats = formats
        self._said: tuple[object, ...] = ()
        self._said_at = 0.0

    def __call__(self, status: CaptureStatus) -> None:
        now = self._clock.monotonic()
        worth = (status.state, status.branch, status.alarm, status.rpo_breached, status.last_error)
        if worth == self._said and now - self._said_at < REPORT_SECONDS:
            return
        alarm = status.alarm if self._said and self._said[2] != status.alarm else ""
        self._said, self._said_at = worth, now
        self._output.emit(
            {"source": self._name, "at": self._clock.now(), **asdict(status)},
            lambda: self._print(status, alarm),
        )

    def _print(self, status: CaptureStatus, alarm: str) -> None:
        parts = [f"{self._name}: {status.state}"]
        if status.branch:
            durable = self._formats.format_position(Position(status.branch, status.durable))
            parts.append(f"branch {status.branch}, durable up to {durable}")
            parts.append(
                f"{format_size(status.bytes_behind)}, {format_duration(status.seconds_behind)} behind"
            )
        if status.rpo_breached:
            parts.append("RECOVERY POINT OBJECTIVE MISSED")
        if status.last_error:
            parts.append(f"last trouble: {status.last_error}")
        self._output.line("; ".join(parts))
        if alarm:
            self._output.line(f"ALARM: {alarm}")


@logs.command("status", cls=Command, exit_codes=(ExitCode.FINDINGS,))
@source_argument
@click.option(
    "--max-age",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="Ends with 3 when the newest durable commit is older: the archiver may be silent.",
)
@with_context
def status(context: CommandContext, name: str, max_age: float | None) -> ExitCode:
    """
    Show which log of source NAME is durable, per branch, and the holes. Needs the repository only.

    With exit code 3 there are holes, or log is missing that no record explains, or what is durable is older
    than --max-age allows. Log that was removed by the retention rules is shown and is no hole. A capture
    commits a canary each 15 seconds, so that an idle source has no age.
    """
    repository = assembly.open_repository(context.config, context.secrets(), clock=context.clock)
    lineage = assembly.lineage_of(repository, name)
    segments, holes = lineage.logs(), lineage.holes()
    ledger = Ledger(segments)
    formats = dialect(lineage.id.partition("-")[0])

    def text(branch: str, offset: int) -> str:
        return formats.format_position(Position(branch, offset))

    ranges = []
    for branch in ledger.branches():
        for first, last in ledger.ranges(branch):
            inside = [s for s in segments if s.branch == branch and first <= s.first < last]
            newest_us = max(max(s.commit_first_us, s.commit_last_us) for s in inside)
            ranges.append(
                {
                    "branch": branch,
                    "begin": text(branch, first),
                    "end": text(branch, last),
                    "bytes": last - first - _padding_bytes(lineage, inside),
                    "objects": len(inside),
                    "stored_bytes": sum(s.size_bytes for s in inside),
                    "last_commit": instant_from_us(newest_us) if newest_us else None,
                }
            )
    lost = [
        {
            "branch": h.branch,
            "begin": text(h.branch, h.first),
            "end": text(h.branch, h.last),
            "cause": h.cause,
            "expired": h.expired,
        }
        for h in holes
    ]
    lost += [
        {
            "branch": branch,
            "begin": text(branch, first),
            "end": text(branch, last),
            "cause": "not recorded",
            "expired": False,
        }
        for branch in ledger.branches()
        for first, last in unrecorded_gaps(ledger, holes, branch)
    ]
    newest_us = max((max(one.commit_first_us, one.commit_last_us) for one in segments), default=0)
    age = (context.clock.now() - instant_from_us(newest_us)).total_seconds() if newest_us else None
    silent = max_age is not None and (age is None or age > max_age)
    _show_status(context, lineage, ranges, lost, age=age, silent=silent)
    return ExitCode.FINDINGS if silent or any(not one["expired"] for one in lost) else ExitCode.DONE


def _padding_bytes(lineage: Lineage, segments: Sequence[LogSegment]) -> int:
    """How many bytes of touching segments are not there, since log files ended before they were full."""
    wide = [one for one in segments if one.last - one.first > OBJECT_BYTES_MAX]
    return sum({one.last: lineage.log_index(one).padding_bytes for one in wide}.values())


def _show_status(
    context: CommandContext,
    lineage: Lineage,
    ranges: list[dict[str, Any]],
    lost: list[dict[str, Any]],
    *,
    age: float | None,
    silent: bool,
) -> None:
    output = context.output

    def human() -> None:
        if not ranges:
            output.line("no log is stored")
        else:
            sizes = [Column("LOG", right=True), Column("STORED", right=True)]
            rows = [
                [
                    one["branch"],
                    one["begin"],
                    one["end"],
                    format_size(one["bytes"]),
                    format_size(one["stored_bytes"]),
                    output.instant(one["last_commit"]),
                ]
                for one in ranges
            ]
            output.table(["BRANCH", "BEGIN", "END", *sizes, "LAST COMMIT"], rows)
        for one in lost:
            word = "expired" if one["expired"] else "HOLE"
            span = f"from {one['begin']} to {one['end']}"
            output.line(f"{word} on branch {one['branch']} {span}: {one['cause']}")

        if silent:
            shown = format_duration(age) if age is not None else "of unknown age"
            output.line(f"SILENT: the newest durable commit is {shown} old")

    facts = {"lineage": lineage.id, "ranges": ranges, "holes": lost, "age_seconds": age, "silent": silent}
    output.emit(facts, human)


@logs.command("push", cls=Command, exit_codes=(ExitCode.INTEGRITY,))
@source_argument
@click.argument("path", type=click.Path(path_type=Path))
@with_context
def push(context: CommandContext, name: str, path: Path) -> None:
    """
    Store the archive file PATH; for archive_command: 'cloudsave logs push NAME "%p"'.

    Ends with 0 only when the file is durable in the repository, or was already with the same content.
    """
    repository = assembly.open_repository(context.config, context.secrets(), clock=context.clock)
    lineage = assembly.lineage_of(repository, name)
    said = push_file(lineage, dialect(lineage.id.partition("-")[0]), path)
    context.output.emit({"file": path.name, "result": said}, lambda: context.output.line(said))


class FetchCommand(Command):
    """
    Ends with 1 for a file that is proved not to be in the archive, and with FETCH_TROUBLE for everything else
    that goes wrong, wrong arguments and our own bugs included.
    """

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """As for any command."""
        try:
            return super().make_context(info_name, args, parent, **extra)
        except click.exceptions.Exit:
            raise
        except BaseException as error:
            raise _fetch_trouble(error, args) from error

    def invoke(self, ctx: click.Context) -> Any:
        """As for any command."""
        try:
            return super().invoke(ctx)
        except (click.exceptions.Exit, LogNotInArchive):
            raise
        except BaseException as error:
            wanted = ["--json"] if invocation_of(ctx).json_wanted else []
            raise _fetch_trouble(error, wanted) from error


def _fetch_trouble(error: BaseException, arguments: Sequence[str]) -> click.exceptions.Exit:
    known = render.as_cloudsave_error(error)
    text = render.error_json(known) if "--json" in arguments else render.error_text(known)
    with suppress(OSError, ValueError):
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
    return click.exceptions.Exit(FETCH_TROUBLE)


@logs.command("fetch", cls=FetchCommand)
@source_argument
@click.argument("file")
@click.argument("destination", type=click.Path(path_type=Path))
@with_context
def fetch(context: CommandContext, name: str, file: str, destination: Path) -> None:
    """
    Write the archive file FILE to DESTINATION; for restore_command: 'cloudsave logs fetch NAME "%f" "%p"'.

    Ends with 1 only where the file is proved to lie beyond the end of the archive, and with 255, on which
    the server stops, for a hole in the log, a store that cannot be reached and every other trouble.
    """
    repository = assembly.open_repository(context.config, context.secrets(), clock=context.clock)
    lineage = assembly.lineage_of(repository, name)
    fetch_file(
        lineage,
        dialect(lineage.id.partition("-")[0]),
        file,
        destination,
        log_file_bytes=_log_file_bytes(lineage),
    )


def _log_file_bytes(lineage: Lineage) -> int:
    """The size of the source's log files, which every manifest tells. Raises: UsageError, IntegrityError."""
    damage: IntegrityError | None = None
    for backup_id in reversed(lineage.backup_ids()):
        try:
            return lineage.manifest(backup_id).log_file_bytes
        except IntegrityError as error:
            damage = error
    raise damage or UsageError(
        "cannot tell the size of the source's log files",
        detail=f"Lineage {lineage.id!r} has no backup, and log without one restores nothing.",
    )
