"""
Changed blocks by the server's own summaries of its log: 17 and later, with `summarize_wal`.

A summary covers [start, end) of one timeline, from redo point to redo point, and names of each relation fork
its changed blocks and a limit: from there on it was made anew or cut off. Relation 0 stands for a database
that was made or dropped as a whole.

A standby that summarised log ahead of its promotion may have left out blocks, and what it wrote survives the
update of the server that mends this. So only summaries that begin after their timeline did are believed.
Source: PostgreSQL src/backend/postmaster/walsummarizer.c; manual, WAL Summarization Functions; commits
ec756e59 (17) and 5787f878 (18).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

import numpy as np
import numpy.typing as npt
import psycopg

from cloudsave.clock import Clock
from cloudsave.engines.postgresql.backup_session import BackupSession
from cloudsave.engines.postgresql.connection import translate
from cloudsave.engines.postgresql.format_wal import format_lsn, parse_lsn
from cloudsave.errors import EngineError
from cloudsave.model.changes import ANY, CHANGE_BLOCK, CHANGE_FROM, CHANGE_TYPE, sorted_changes
from cloudsave.model.position import Position

FIRST_SERVER = 170000
ROWS_MAX = 4_000_000
"""Limit: changed blocks (32 GB) beyond which reading everything is no slower than asking."""
SUMMARIZED_SECONDS_MAX = 30.0
"""Limit: so long the server's summarizer is waited for; it is woken by the checkpoint of a backup."""
_POLL_SECONDS = 0.1
_DOING = "ask the server for summaries of its log"

_STATE = """
SELECT current_setting('summarize_wal')::bool, summarized_tli::int, summarized_lsn::text
FROM pg_get_wal_summarizer_state()
"""
_AVAILABLE = """
SELECT s.start_lsn::text, s.end_lsn::text FROM pg_available_wal_summaries() s
WHERE s.tli = %s AND s.end_lsn > %s::pg_lsn AND s.start_lsn < %s::pg_lsn ORDER BY s.start_lsn, s.end_lsn DESC
"""
_CONTENTS = """
SELECT count(*), string_agg(oidsend(reltablespace) || oidsend(reldatabase) || oidsend(relfilenode)
                            || int8send(relblocknumber) || boolsend(is_limit_block), ''::bytea)
FROM pg_wal_summary_contents(%s, %s::pg_lsn, %s::pg_lsn) WHERE relforknumber = 0
"""
_SENT = np.dtype(
    [("space", ">u4"), ("database", ">u4"), ("object", ">u4"), ("block", ">i8"), ("limit", "u1")]
)


def summarizes(session: BackupSession) -> bool:
    """Whether the server makes summaries, and the role may ask for them."""
    if session.connection.info.server_version < FIRST_SERVER:
        return False
    with suppress(EngineError):
        return bool(session.row(_STATE, doing=_DOING)[0])
    return False


def changes_by_summaries(
    session: BackupSession, first: Position, last: Position, *, branch_begin: int, clock: Clock
) -> Iterator[npt.NDArray[np.void]]:
    """
    The changes of [first, last) of one branch, which began at `branch_begin`, in parts of sorted CHANGE_TYPE
    rows. Raises: EngineError where the summaries do not tell.
    """
    _await_summarizer(session, last, clock)
    timeline, rows = int(first.branch, 16), 0
    for begin, end in _covering(session, first, last, branch_begin):
        parameters = (timeline, begin, end)
        try:
            found = session.connection.execute(_CONTENTS.encode(), parameters, binary=True).fetchone()
        except psycopg.Error as error:
            raise translate(error, _DOING) from None
        assert found is not None
        rows += found[0]
        if rows > ROWS_MAX:
            raise EngineError("too much has changed to ask for single blocks")
        if found[0]:
            yield sorted_changes(_changes(np.frombuffer(found[1], _SENT)))


def _await_summarizer(session: BackupSession, last: Position, clock: Clock) -> None:
    deadline = clock.monotonic() + SUMMARIZED_SECONDS_MAX
    while True:
        enabled, timeline, position = session.row(_STATE, doing=_DOING)
        if not enabled:
            raise EngineError("the server does not summarize its log")
        if f"{timeline:08X}" == last.branch and parse_lsn(position) >= last.offset:
            return
        if clock.monotonic() > deadline:
            raise EngineError(
                f"the server has summarized its log up to {position} only,"
                f" not up to {format_lsn(last.offset)}"
            )
        clock.sleep(_POLL_SECONDS)


def _covering(
    session: BackupSession, first: Position, last: Position, branch_begin: int
) -> list[tuple[str, str]]:
    """Summaries that leave out nothing of [first, last). Raises: EngineError where there are none."""
    bounds = (int(first.branch, 16), format_lsn(first.offset), format_lsn(last.offset))
    try:
        found = session.connection.execute(_AVAILABLE.encode(), bounds).fetchall()
    except psycopg.Error as error:
        raise translate(error, _DOING) from None
    reached = first.offset
    for begin, end in found:
        if parse_lsn(begin) > reached:
            break
        if parse_lsn(begin) <= branch_begin:
            raise EngineError(f"the server's summary from {begin} on may be from before its promotion")
        reached = max(reached, parse_lsn(end))
    if reached < last.offset:
        raise EngineError(f"the server has no summary of its log from {format_lsn(reached)} on")
    return found


def _changes(sent: npt.NDArray[np.void]) -> npt.NDArray[np.void]:
    """The server's rows as changes."""
    rows = np.empty(len(sent), CHANGE_TYPE)
    for name in ("space", "database", "object", "block"):
        rows[name] = sent[name]
    rows["kind"] = np.where(sent["limit"] != 0, CHANGE_FROM, CHANGE_BLOCK)
    whole = sent["object"] == 0
    rows["object"][whole], rows["block"][whole], rows["kind"][whole] = ANY, 0, CHANGE_FROM
    return rows
