"""A map that names other blocks than those of its file is found when all is read."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.unit.repository.samples import BLOCK, lineage_on, noise, write_backup

from cloudsave.engines.postgresql.dialect import PostgresDialect
from cloudsave.recovery.verify import VerifyRequest, verify_lineage
from cloudsave.repository.lineage import Lineage
from cloudsave.store.memory import MemoryStore

FIRST, SECOND = "20260101T000000Z-0001", "20260102T000000Z-0002"


def stray(lineage: Lineage, *, read_all: bool) -> list[str]:
    findings = verify_lineage(lineage, PostgresDialect(), VerifyRequest(None, read_all))
    return [one.subject for one in findings if "other blocks" in one.fact]


@pytest.mark.parametrize("read_all", [True, False])
def test_files_whose_maps_were_exchanged_are_found_when_all_is_read(read_all: bool) -> None:
    lineage = lineage_on(MemoryStore())
    files = {"base/1": noise(1, 20 * BLOCK), "base/2": noise(2, 20 * BLOCK), "base/3": bytes(20 * BLOCK)}
    good = write_backup(lineage, FIRST, files)
    assert stray(lineage, read_all=read_all) == []
    ordinals = {entry.path: entry.map_ordinal for entry in good.files}
    exchanged = {**ordinals, "base/1": ordinals["base/2"], "base/2": ordinals["base/1"]}
    entries = tuple(replace(entry, map_ordinal=exchanged[entry.path]) for entry in good.files)
    lineage.put_manifest(replace(good, backup_id=SECOND, files=entries))
    assert stray(lineage, read_all=read_all) == ([f"backup {SECOND}"] if read_all else [])
