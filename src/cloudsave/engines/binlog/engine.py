"""One server with a binlog, connected to on demand: what MySQL and MariaDB do alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from cloudsave.clock import SYSTEM_CLOCK, Clock
from cloudsave.engines.api import LogSource
from cloudsave.engines.binlog.address import Address
from cloudsave.engines.binlog.connection import Session, connect
from cloudsave.engines.binlog.dialect import BinlogDialect
from cloudsave.engines.binlog.findings import Rules, gather_findings
from cloudsave.engines.binlog.log import BinlogLogSource, Flavour, ask_clock, ask_end
from cloudsave.engines.binlog.server_settings import restore_settings
from cloudsave.errors import UsageError
from cloudsave.model.engine_facts import SlotState
from cloudsave.model.finding import Finding
from cloudsave.model.identity import SourceIdentity


@dataclass(frozen=True, slots=True)
class Product:
    """What makes an engine of this library."""

    name: str
    flavour: Flavour
    rules: Rules
    identity: Callable[[Session], SourceIdentity]


@dataclass(frozen=True, slots=True)
class ServerMoment:
    """What a server says of itself at one moment: for base backups."""

    log_end: int
    clock_us: int
    settings: Mapping[str, str]


class BinlogEngine:
    """`Engine` of a MySQL or MariaDB server, by its source URL, but for base backups."""

    def __init__(self, url: str, product: Product, *, clock: Clock = SYSTEM_CLOCK) -> None:
        self._address = Address.of(url)
        self._url = url
        self._product = product
        self._clock = clock
        self.dialect = BinlogDialect(product.name)

    def identify(self) -> SourceIdentity:
        """See `Engine.identify`."""
        with connect(self._url) as session:
            return self._product.identity(session)

    def findings(self) -> Sequence[Finding]:
        """See `Engine.findings`."""
        with connect(self._url) as session:
            return gather_findings(session, self._product.identity(session), self._product.rules)

    def moment(self) -> ServerMoment:
        """Ask now, the clock after the end of the binlog. Raises: EngineError, UnsuitableSettings."""
        with connect(self._url) as session:
            end = ask_end(session, self._product.flavour.status_statement)
            return ServerMoment(end, ask_clock(session), restore_settings(session))

    def log_source(
        self,
        *,
        slot: str,
        temporary: bool,  # noqa: ARG002
        synchronous: bool = False,
    ) -> LogSource:
        """See `Engine.log_source`. Raises: UsageError where commits cannot be made to wait."""
        if synchronous and not self._product.flavour.semi_sync_variable:
            raise UsageError(
                f"cannot capture {self._product.name} with --synchronous",
                detail="While a commit waits for an answer, such a server tells nobody where its binlog ends."
                " A capture that begins then would wait for ever, and all commits with it.",
                hints=["capture without --synchronous: log is durable after rpo_seconds"],
            )
        return self._log_source(slot, synchronous=synchronous)

    def slot_state(self, slot: str) -> SlotState:
        """See `Engine.slot_state`."""
        return self._log_source(slot, synchronous=False).slot_state()

    def _log_source(self, slot: str, *, synchronous: bool) -> BinlogLogSource:
        return BinlogLogSource(
            self._url,
            self._product.flavour,
            slot=slot,
            synchronous=synchronous,
            identify=self.identify,
            clock=self._clock,
        )
