"""What a running capture asks a server with a binlog beside the log."""

from __future__ import annotations

from cloudsave.engines.binlog.connection import Session, connect
from cloudsave.errors import EngineError


class BinlogWatch:
    """See `engines.watch_api.SourceWatch`."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._session: Session | None = None

    def beat(self) -> int | None:
        """See `SourceWatch.beat`: only whether it answers; the account of capture may write nothing."""
        if self._session is None:
            self._session = connect(self._url)
        try:
            self._session.row("SELECT 1", doing="ask the server for a sign of life")
        except EngineError:
            self.close()
            raise
        return None

    def retained_bytes(self, slot: str) -> int | None:  # noqa: ARG002
        """See `SourceWatch.retained_bytes`: servers keep no log for a reader."""
        return None

    def close(self) -> None:
        """See `SourceWatch.close`."""
        session, self._session = self._session, None
        if session is not None:
            session.close()
