"""A recovery within this process, so that its parts can be timed and its server be watched."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from cloudsave.clock import SYSTEM_CLOCK
from cloudsave.engines.postgresql.dialect import PostgresDialect
from cloudsave.engines.postgresql.target import PostgresTarget
from cloudsave.model.target import Target, TargetKind
from cloudsave.recovery.bring_up import BringUpContext, BringUpOptions, bring_up, recovery_digest
from cloudsave.recovery.history import IndexReader, read_history
from cloudsave.recovery.plan import RecoveryPlan, plan_recovery
from cloudsave.recovery.restore import RestoreRequest, restore_files
from cloudsave.repository.keys import Secret
from cloudsave.repository.reader import BackupReader
from cloudsave.repository.repository import Repository
from cloudsave.store.api import ObjectStore
from cloudsave.telemetry import NoProgress


class Recovery:
    """To the latest state; the steps in order, each of which may be timed by the caller."""

    def __init__(self, store: ObjectStore, passphrase: str, directory: Path, programs: Path) -> None:
        self._store = store
        self._passphrase = passphrase
        self._directory = directory
        self._programs = programs
        self.seconds: dict[str, float] = {}
        self.plan: RecoveryPlan | None = None
        self.files = 0

    def run(
        self,
        *,
        done: Callable[[str], None] = print,
        watched: Callable[[PostgresTarget], Callable[[], None]] | None = None,
    ) -> None:
        """
        All of it; `done` is told of each part. `watched` begins to watch the server during replay and returns
        what ends that.
        """
        mark = time.perf_counter()

        def note(name: str) -> None:
            nonlocal mark
            now = time.perf_counter()
            self.seconds[name] = round(now - mark, 3)
            mark = now
            done(name)

        secret = Secret(passphrase=self._passphrase)
        repository = Repository.open(self._store, secret=secret, clock=SYSTEM_CLOCK)
        (lineage_id,) = repository.lineage_ids()
        lineage, dialect = repository.lineage(lineage_id), PostgresDialect()
        history = read_history(lineage, dialect)
        note("read history")
        indexes = IndexReader(lineage, dialect, log_file_bytes=history.backups[-1].log_file_bytes)
        plan = self.plan = plan_recovery(Target(TargetKind.LATEST), history, indexes)
        note("plan")
        reader = BackupReader(lineage, lineage.manifest(plan.backup.backup_id))
        self.files = len(reader.manifest.files)
        restore_files(reader, RestoreRequest(self._directory, recovery_digest=recovery_digest(plan)))
        note("restore files")
        target = PostgresTarget()
        context = BringUpContext(lineage, dialect, target, SYSTEM_CLOCK, NoProgress())
        finish = watched(target) if watched else lambda: None
        try:
            bring_up(plan, self._directory, context, BringUpOptions(bin_directory=self._programs))
            note("replay and open")
        finally:
            finish()
            target.stop()
