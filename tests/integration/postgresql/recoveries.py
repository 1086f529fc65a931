"""Whole recoveries for tests: capture and backup of a real server, and restores to judge."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import psycopg

from cloudsave.backup.plan import BackupRequest, plan_backup
from cloudsave.backup.run import BackupContext, run_backup
from cloudsave.clock import SYSTEM_CLOCK
from cloudsave.engines.api import BackupSource
from cloudsave.engines.postgresql.dialect import PostgresDialect
from cloudsave.engines.postgresql.engine import PostgresEngine
from cloudsave.engines.postgresql.log import parse_lsn
from cloudsave.engines.postgresql.target import PostgresTarget
from cloudsave.logs.background import BackgroundCapture, BackupLogCover
from cloudsave.logs.status import CaptureOptions
from cloudsave.model.engine_facts import SlotState
from cloudsave.model.manifest import Manifest
from cloudsave.model.position import Position
from cloudsave.model.target import Target
from cloudsave.recovery.bring_up import BringUpContext, BringUpOptions, BroughtUp, bring_up, recovery_digest
from cloudsave.recovery.history import IndexReader, read_history
from cloudsave.recovery.plan import RecoveryPlan, plan_recovery
from cloudsave.recovery.restore import RestoreRequest, restore_files
from cloudsave.repository.lineage import Lineage
from cloudsave.repository.reader import BackupReader
from cloudsave.repository.repository import Repository
from cloudsave.store.api import ObjectStore
from cloudsave.store.memory import MemoryStore
from cloudsave.telemetry import NoProgress
from tests.integration.postgresql.cluster import Cluster

DIALECT = PostgresDialect()
DURABLE_SECONDS = 60.0
_NUMBERS = itertools.count(1)


@dataclass
class Protected:
    """A server under capture, its repository in memory."""

    cluster: Cluster
    store: ObjectStore
    engine: PostgresEngine
    lineage: Lineage

    @classmethod
    def begin(
        cls, cluster: Cluster, store: ObjectStore | None = None, *, passphrase: str | None = None
    ) -> Protected:
        """A server and an empty repository, in memory where nothing else is said."""
        store = store or MemoryStore()
        created = Repository.create(store, passphrase=passphrase, clock=SYSTEM_CLOCK)
        engine = PostgresEngine(cluster.url)
        return cls(cluster, store, engine, created.repository.lineage(engine.identify().lineage))

    @property
    def objects(self) -> dict[str, tuple[bytes, datetime]]:
        """What is stored in memory, to be damaged."""
        assert isinstance(self.store, MemoryStore)
        return self.store.objects

    def succeeded_by(self, cluster: Cluster) -> Protected:
        """The same repository, the server that took over."""
        return Protected(cluster, self.store, PostgresEngine(cluster.url), self.lineage)

    @contextmanager
    def captured(self, *, object_age_seconds: float = 1.0) -> Iterator[BackgroundCapture]:
        """Capture the server's log."""
        source = self.engine.log_source(slot="cloudsave", temporary=False)
        options = CaptureOptions(object_age_seconds=object_age_seconds, running_patience_seconds=15.0)
        with BackgroundCapture(source, self.lineage, DIALECT, options, clock=SYSTEM_CLOCK) as capture:
            yield capture

    def catch_up(self, capture: BackgroundCapture, cluster: Cluster | None = None) -> None:
        """Wait until all log that the server has now is durable."""
        server = cluster or self.cluster
        flushed = parse_lsn(server.psql("SELECT pg_current_wal_flush_lsn()"))
        capture.await_durable(Position(f"{server.timeline():08X}", flushed), timeout_seconds=DURABLE_SECONDS)

    def back_up(self, *, mode: str = "remote", prove_all: bool = False) -> Manifest:
        """Take a base backup while capture runs."""
        identity = self.engine.identify()
        request = BackupRequest("db", mode=mode, fast_checkpoint=True, workers=2, prove_all=prove_all)
        plan = plan_backup(request, identity, self.lineage.backup_ids())
        cover = BackupLogCover(
            lambda: SlotState.ACTIVE,
            lambda _: self.engine.log_source(slot="unused", temporary=True),
            self.lineage,
            DIALECT,
            clock=SYSTEM_CLOCK,
        )

        def open_source() -> BackupSource:
            return self.engine.backup_source(mode=mode, fast=True, label="test")

        return run_backup(
            plan, BackupContext(self.lineage, open_source, cover, DIALECT, SYSTEM_CLOCK, NoProgress())
        )

    def plan(self, target: Target) -> RecoveryPlan:
        """Plan a recovery from what is stored."""
        indexes = IndexReader(self.lineage, DIALECT, log_file_bytes=16 << 20)
        return plan_recovery(target, read_history(self.lineage, DIALECT), indexes)

    def restore_files(self, plan: RecoveryPlan, *, tablespaces: Mapping[str, str] | None = None) -> Path:
        """The files of a plan in a new directory."""
        directory = self.cluster.factory.folder() / f"restored-{next(_NUMBERS)}"
        reader = self.reader(plan)
        request = RestoreRequest(
            directory, tablespaces=tablespaces or {}, recovery_digest=recovery_digest(plan)
        )
        restore_files(reader, request)
        return directory

    def reader(self, plan: RecoveryPlan) -> BackupReader:
        """A reader of the plan's backup."""
        return BackupReader(self.lineage, self.lineage.manifest(plan.backup.backup_id))


@dataclass
class Restored:
    """A restored server that runs."""

    plan: RecoveryPlan
    directory: Path
    server: PostgresTarget
    state: BroughtUp

    def connect(self) -> psycopg.Connection[Any]:
        """A connection to it."""
        return psycopg.connect(self.server.connection_url(), autocommit=True)


@contextmanager
def restored(
    protected: Protected, target: Target, *, look: bool = False, tablespaces: Mapping[str, str] | None = None
) -> Iterator[Restored]:
    """Restore to `target`, start, and stop at the end."""
    plan = protected.plan(target)
    directory = protected.restore_files(plan, tablespaces=tablespaces)
    server = PostgresTarget()
    context = BringUpContext(protected.lineage, DIALECT, server, SYSTEM_CLOCK, NoProgress())
    options = BringUpOptions(
        bin_directory=protected.cluster.bindir, look=look, settings={"fsync": "off"}, later_command="false"
    )
    state = bring_up(plan, directory, context, options)
    try:
        yield Restored(plan, directory, server, state)
    finally:
        server.stop()
