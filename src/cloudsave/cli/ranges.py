"""`cloudsave ranges`: to which states a restore is possible."""

from __future__ import annotations

import itertools
from datetime import datetime
from functools import partial

import click

from cloudsave import assembly
from cloudsave.cli.frame import Command, CommandContext, source_argument, with_context
from cloudsave.engines.registry import dialect
from cloudsave.errors import ExitCode, IntegrityError, TargetUnreachable
from cloudsave.model.log import instant_from_us
from cloudsave.model.position import Position
from cloudsave.model.ranges import RecoverableRange
from cloudsave.model.target import Target, TargetKind
from cloudsave.recovery.history import History, IndexReader, read_history
from cloudsave.recovery.past_damage import notes_of, past_damage
from cloudsave.recovery.reach import Reach, instant_text
from cloudsave.recovery.readings import steps_back


@click.command("ranges", cls=Command, exit_codes=(ExitCode.FINDINGS,))
@source_argument
@with_context
def ranges(context: CommandContext, name: str) -> ExitCode:
    """
    Show the spans of positions and times to which source NAME can be restored, and the holes between.

    They are the planner's own: each state inside is accepted by `cloudsave restore`, each outside refused.
    An instant that exists twice, since the source's clock was set back, is refused too: notes tell of it.
    With exit code 3 log is missing between backups, but for log that was removed by the retention rules, or
    something stored cannot be read.
    """
    repository = assembly.open_repository(context.config, context.secrets(), clock=context.clock)
    lineage = assembly.lineage_of(repository, name)
    formats = dialect(lineage.id.partition("-")[0])
    history = read_history(lineage, formats)
    indexes = IndexReader(lineage, formats, log_file_bytes=history.backups[-1].log_file_bytes)
    found, refused, damage = _all_ranges(history, indexes)
    output = context.output

    def human() -> None:
        columns = ["BRANCH", "FROM", "TO", "FROM POSITION", "TO POSITION", "BACKUPS"]
        rows = [
            [
                one.branch,
                output.instant(_instant(one.begin_us)),
                output.instant(_instant(one.end_us)),
                history.position_text(one.begin),
                history.position_text(one.end),
                str(len(one.backups)),
            ]
            for one in found
        ]
        if rows:
            output.table(columns, rows)
        else:
            output.line("nothing can be restored")
        for hole in history.holes:
            first, last = (Position(hole.branch, offset) for offset in (hole.first, hole.last))
            span = f"{history.position_text(first)} to {history.position_text(last)}"
            word = "expired" if hole.expired else "HOLE"
            output.line(f"{word} on branch {hole.branch} from {span}: {hole.cause}")
        for text in (*refused, *damage):
            output.line(f"note: {text}")

    output.emit(
        {
            "ranges": [_facts(history, one) for one in found],
            "holes": list(history.holes),
            "notes": [*refused, *damage],
        },
        human,
    )
    broken = any(
        earlier.branch == later.branch and not _is_expired(history, earlier, later)
        for earlier, later in itertools.pairwise(found)
    )
    lost = any(not hole.expired for hole in history.holes)
    return ExitCode.FINDINGS if broken or lost or damage or not found else ExitCode.DONE


def _is_expired(history: History, earlier: RecoverableRange, later: RecoverableRange) -> bool:
    """Whether the log between two ranges of a branch was removed on purpose."""
    return any(
        hole.expired and hole.last > earlier.end.offset and hole.first < later.begin.offset
        for hole in history.holes
    )


def _all_ranges(
    history: History, indexes: IndexReader
) -> tuple[list[RecoverableRange], list[str], list[str]]:
    """The ranges of all branches, why some branches have none, and what could not be read."""
    branches = {segment.branch for segment in history.segments} | {one.stop.branch for one in history.backups}
    found: list[RecoverableRange] = []
    refused = []
    damage: set[str] = set()
    for branch in sorted(branches):
        try:
            work = partial(_ranges_of, branch, indexes)
            (ranges_of, steps), left_out = past_damage(work, history, indexes, may_end_earlier=True)
            found.extend(ranges_of)
            refused.extend(steps)
            damage.update(notes_of(left_out))
        except TargetUnreachable as why:
            refused.append(f"branch {branch}: {why.message}")
        except IntegrityError as why:
            damage.add(f"branch {branch}: {why.message}")
    damage.update(f"branch {one}: its history is damaged" for one in history.unreadable_branches)
    return found, refused, sorted(damage)


def _ranges_of(
    branch: str, indexes: IndexReader, history: History
) -> tuple[tuple[RecoverableRange, ...], list[str]]:
    """The ranges of a branch, and what is to be known of its clock."""
    reach = Reach(Target(TargetKind.LATEST, branch=branch), history, indexes)
    steps = [
        f"branch {branch}: the clock was set back at about {reach.text(offset)}: instants from"
        f" {instant_text(first_us)} to {instant_text(last_us)} exist twice, and are to be named by position"
        for offset, first_us, last_us in steps_back(reach)
    ]
    return reach.ranges(), steps


def _instant(instant_us: int) -> datetime | None:
    """None where the log does not say yet up to which instant it is complete."""
    return instant_from_us(instant_us) if instant_us else None


def _facts(history: History, one: RecoverableRange) -> dict[str, object]:
    return {
        "branch": one.branch,
        "begin": _instant(one.begin_us),
        "end": _instant(one.end_us),
        "begin_branch": one.begin.branch,
        "begin_position": history.position_text(one.begin),
        "end_position": history.position_text(one.end),
        "backups": list(one.backups),
    }
