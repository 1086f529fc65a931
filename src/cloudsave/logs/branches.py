"""
The branches of a connected server, against those that are stored: are they the same?

Two servers with the same system identifier may be promoted to the same branch number, even at the same
place of the log, so that number, history and place agree and yet all log differs. What tells them apart is
the first record of the branch, which holds the instant of the promotion: the branch's *origin*. It is claimed
before any log of the branch is stored, by whoever comes first; whoever comes with another one is refused.
"""

from __future__ import annotations

import logging
from contextlib import closing

from cloudsave.engines.api import LogSource
from cloudsave.engines.dialect_api import Dialect
from cloudsave.errors import EngineError, EngineUnavailable, LogRemoved
from cloudsave.logs.ledger import file_begin
from cloudsave.logs.writer import LogArchive
from cloudsave.model.engine_facts import BranchEnd, LogHead
from cloudsave.model.history import Ancestry, BranchPoint
from cloudsave.model.ledger import Ledger
from cloudsave.model.position import Position

ORIGIN_BYTES = 128
"""So much of the log from a branch's begin on holds its first record, behind the header of a page."""
LOOKS_MAX = 25
"""Limit: signs of life without log after which a server is taken to have none of the branch yet."""

_log = logging.getLogger("cloudsave.logs.branches")


class Branches:
    """What one server, for as long as it is connected, says of its branches. For the capturing thread."""

    def __init__(self, source: LogSource, archive: LogArchive, dialect: Dialect) -> None:
        self._source = source
        self._archive = archive
        self._dialect = dialect
        self._compared: set[str] = set()
        self._confirmed: set[str] = set()

    def ancestry(self, branch: str) -> Ancestry:
        """
        Store the history of the server's branch (and of its ancestors) before any log of it.

        Raises: LogConflict where another one is stored.
        """
        raw = self._archive.histories()
        parsed = {name: self._dialect.parse_history(content) for name, content in raw.items()}
        if branch not in self._compared:
            if content := self._history(branch, needed=branch not in raw):
                parsed[branch] = self._dialect.parse_history(content)
                self._archive.put_history(branch, content)
            self._compared.add(branch)
        for point in parsed.get(branch, ())[1:]:
            if point.branch not in parsed:
                self._learn_ancestor(point.branch, parsed)
        return Ancestry(parsed)

    def confirm_origins(self, head: LogHead, ancestry: Ancestry, ledger: Ledger, *, new_server: bool) -> None:
        """
        See that the branches on the server's path began as the stored ones did, the newest first, as far as
        the server has their log: surely from where its slot holds it. Of a branch of which nothing is
        stored, and on a server that is new to us, it is asked in any case.

        Raises: LogConflict, EngineUnavailable.
        """
        size = head.identity.log_file_bytes
        for branch, begin, _ in reversed(ancestry.lineage_of(head.current.branch)[1:]):
            if branch in self._confirmed:
                continue
            held = head.slot_offset is not None and begin >= file_begin(head.slot_offset, size)
            if not (held or new_server or not ledger.ranges(branch)):
                return
            try:
                origin = self._first_bytes(Position(branch, begin))
            except LogRemoved:
                return
            self._archive.claim_origin(Position(branch, begin), origin)
            self._confirmed.add(branch)

    def _history(self, branch: str, *, needed: bool) -> bytes:
        """The server's; empty where it has none (which is no fault if one is stored)."""
        try:
            return self._source.history(branch)
        except EngineUnavailable:
            raise
        except EngineError as error:
            if needed:
                raise
            _log.warning("the server has no history file of branch %s: %s", branch, error.detail)
            return b""

    def _learn_ancestor(self, branch: str, parsed: dict[str, tuple[BranchPoint, ...]]) -> None:
        """An ancestor's history, where the server still has it."""
        if content := self._history(branch, needed=False):
            parsed[branch] = self._dialect.parse_history(content)
            self._archive.put_history(branch, content)

    def _first_bytes(self, begin: Position) -> bytes:
        """The log from `begin` on, at least one record of it. Raises: LogRemoved, EngineUnavailable."""
        seen = b""
        with closing(self._source.stream(begin)) as events:
            for number, event in enumerate(events):
                if isinstance(event, BranchEnd):
                    break
                seen += event.data
                if len(seen) >= ORIGIN_BYTES or (seen and not event.data) or number >= LOOKS_MAX:
                    break
        if not seen:
            raise EngineUnavailable(
                f"could not see how branch {begin.branch} began",
                detail="The server has no log of it yet.",
            )
        return seen[:ORIGIN_BYTES]
