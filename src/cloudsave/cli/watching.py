"""What a running `logs capture` shows and tells: metrics, alarms, heartbeats."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cloudsave.cli.frame import CommandContext
from cloudsave.cli.metrics import Metrics
from cloudsave.cli.notices import Notice, Notifier
from cloudsave.config.model import SourceConfig
from cloudsave.engines.registry import source_watch
from cloudsave.errors import CloudsaveError, IntegrityError
from cloudsave.logs.watch import Facts, Sight, Watcher, WatchOptions
from cloudsave.repository.lineage import Lineage
from cloudsave.repository.verifications import last_verifications


@contextmanager
def watched(
    context: CommandContext,
    source: SourceConfig,
    lineage: Lineage,
    *,
    metrics: str | None,
    metrics_file: Path | None,
) -> Iterator[Watcher]:
    """
    Within the context a capture that reports to the watcher is watched.

    Args:
        metrics: HOST:PORT to serve metrics at.
        metrics_file: File to write them to.
    Raises: UsageError, ConfigurationError before anything is begun.
    """
    notifier = Notifier(context.config.notify, clock=context.clock)
    outlet = _Outlet(context, source.name, notifier, metrics, metrics_file)
    watcher = Watcher(
        source_watch(source.url),
        WatchOptions(source.slot, source.canary_seconds, source.rpo_seconds),
        look=outlet.take,
        facts=_Facts(context, lineage).ask,
        clock=context.clock,
    )
    watcher.begin()
    try:
        yield watcher
    except CloudsaveError as error:
        outlet.tell("ended", f"capture ended: {error.message}")
        raise
    finally:
        watcher.stop()
        notifier.close()


class _Facts:
    """The slow facts of a repository."""

    def __init__(self, context: CommandContext, lineage: Lineage) -> None:
        self._lineage = lineage
        self._place = _directory(context.repository_url())
        self._newest = ("", 0.0)

    def ask(self) -> Facts:
        """See `Watcher`. Raises: StoreError."""
        ids = self._lineage.backup_ids()
        if ids and ids[-1] != self._newest[0]:
            try:
                self._newest = (ids[-1], self._lineage.manifest(ids[-1]).finished_us / 1e6)
            except IntegrityError:
                self._newest = (ids[-1], 0.0)
        free = shutil.disk_usage(self._place).free if self._place else None
        last = last_verifications(self._lineage)
        return Facts(
            backup_at=self._newest[1] if ids else None,
            free_bytes=free,
            verified_at=last.newest_sound.at.timestamp() if last.newest_sound else None,
            unsound=not last.newest.sound if last.newest else None,
        )


def _directory(url: str) -> Path | None:
    """The directory of a repository; None for one in a bucket."""
    path = Path(url.removeprefix("file://"))
    return path if path.is_absolute() else None


class _Outlet:
    """Takes each second's sight; called by the watcher's thread."""

    def __init__(
        self,
        context: CommandContext,
        source: str,
        notifier: Notifier,
        metrics: str | None,
        metrics_file: Path | None,
    ) -> None:
        self._context = context
        self._source = source
        self._notifier = notifier
        self._metrics = Metrics(source) if metrics or metrics_file else None
        self._file = metrics_file
        self._said = ("", "")
        if self._metrics and metrics:
            self._say("metrics", f"served at http://{self._metrics.serve(metrics)}/metrics")

    def take(self, sight: Sight) -> None:
        """Show and tell what has changed."""
        if self._metrics is not None:
            self._metrics.take(sight, self._context.clock.now())
            if self._file is not None:
                self._metrics.write(self._file, self._context.clock.monotonic())
        if not sight.alarm:
            self._notifier.beat()
        if sight.events == self._said:
            return
        (alarm, word), before, self._said = sight.events, self._said, sight.events
        if alarm != before[0]:
            event = "alarm" if alarm else "cleared"
            self.tell(event, alarm or f"no longer: {before[0]}", sight)
        if word and word != before[1]:
            self.tell("notice", word, sight)

    def tell(self, event: str, text: str, sight: Sight | None = None) -> None:
        """Tell people and services."""
        rpo = sight.rpo_seconds if sight else None
        instant = self._context.clock.now().isoformat(timespec="seconds")
        self._notifier.tell(Notice(event, self._source, text, instant, rpo))
        if event != "notice":  # which the status of capture says on stdout
            self._say(event, text, sight)

    def _say(self, event: str, text: str, sight: Sight | None = None) -> None:
        """Say it on stdout."""
        output = self._context.output
        facts = {
            "source": self._source,
            "at": self._context.clock.now(),
            "event": event,
            "text": text,
            "rpo_seconds": sight.rpo_seconds if sight else None,
            "state": sight.status.state if sight and sight.status else "",
        }
        output.emit(facts, lambda: output.line(f"{self._source}: {event.upper()}: {text}"))
