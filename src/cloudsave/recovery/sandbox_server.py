"""Servers on restored files that run as long as something is taken out of them."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

from cloudsave.engines.apply_api import LogApplier
from cloudsave.engines.dialect_api import Dialect
from cloudsave.recovery.apply import ApplyContext, apply_log, held
from cloudsave.recovery.bring_up import BringUpContext, BringUpOptions, bring_up
from cloudsave.recovery.plan import RecoveryPlan
from cloudsave.repository.lineage import Lineage
from cloudsave.telemetry import Progress


class SandboxServer(Protocol):
    """Order: start, stop; stop at any time."""

    def start(self, data: Path) -> str:
        """
        Bring the restored files in `data` to the end of the plan; the URL of the server, which runs.

        Raises: RecoveryMismatch, RecoveryError, ServerDidNotStart, ServerToolsMissing, IntegrityError,
        StoreError.
        """

    def stop(self) -> None:
        """End the server. Never raises."""


class FetchingServer:
    """
    One that fetches its log itself. It is opened: one that waits at the target holds the locks of
    transactions that were under way there, above all of the one that drops the very table.
    """

    def __init__(self, plan: RecoveryPlan, context: BringUpContext, options: BringUpOptions) -> None:
        self._plan = plan
        self._context = context
        self._options = options

    def start(self, data: Path) -> str:
        """See `SandboxServer.start`."""
        return bring_up(self._plan, data, self._context, self._options).connection_url

    def stop(self) -> None:
        """See `SandboxServer.stop`."""
        self._context.target.stop()


class ApplyingServer:
    """One whose log is applied by an applier of its engine. It is read-only."""

    def __init__(
        self,
        plan: RecoveryPlan,
        lineage: Lineage,
        parts: tuple[Dialect, LogApplier],
        options: BringUpOptions,
        progress: Progress,
    ) -> None:
        """`options`: it is looked at."""
        self._plan = plan
        self._lineage = lineage
        self._parts = parts
        self._options = options
        self._progress = progress
        self._held = ExitStack()

    def start(self, data: Path) -> str:
        """See `SandboxServer.start`."""
        journal = self._held.enter_context(held(data))
        context = ApplyContext(self._lineage, *self._parts, self._progress, journal)
        return apply_log(self._plan, data, context, self._options).url

    def stop(self) -> None:
        """See `SandboxServer.stop`."""
        _, applier = self._parts
        applier.stop()
        self._held.close()
