"""Verification of a real server's repository finds every kind of damage, and nothing in a sound one."""

from __future__ import annotations

import pytest

from cloudsave.model.finding import Finding, Severity
from cloudsave.recovery.verify import VerifyRequest, has_problem, verify_lineage
from tests.integration.postgresql.cluster import Cluster
from tests.integration.postgresql.recoveries import DIALECT, Protected

pytestmark = pytest.mark.postgresql_majors("15")


@pytest.fixture
def protected(cluster: Cluster) -> Protected:
    """A backup and some log."""
    made = Protected.begin(cluster)
    with made.captured() as capture:
        made.back_up()
        for _ in range(4):
            cluster.psql(
                "CREATE TABLE IF NOT EXISTS t (i int); INSERT INTO t SELECT generate_series(1, 1000)"
            )
            made.catch_up(capture)
    return made


def verified(protected: Protected, *, read_all: bool, backup_id: str | None = None) -> list[Finding]:
    """All findings."""
    return verify_lineage(protected.lineage, DIALECT, VerifyRequest(backup_id, read_all))


def names(protected: Protected, part: str) -> list[str]:
    """Names of stored objects with `part` in them."""
    return sorted(name for name in protected.objects if part in name)


@pytest.mark.parametrize("read_all", [False, True])
def test_a_sound_repository_has_no_problem(protected: Protected, read_all: bool) -> None:
    findings = verified(protected, read_all=read_all)
    assert findings
    assert {one.severity for one in findings} == {Severity.OK}
    (backup_id,) = protected.lineage.backup_ids()
    assert not has_problem(verified(protected, read_all=read_all, backup_id=backup_id))


@pytest.mark.parametrize("part", ["/packs/", "/maps/", "/logs/00000001/", "/backups/"])
def test_a_missing_object_is_found_at_once(protected: Protected, part: str) -> None:
    found = names(protected, part)
    del protected.objects[found[len(found) // 2]]
    assert has_problem(verified(protected, read_all=False))


@pytest.mark.parametrize("part", ["/packs/", "/maps/", "/logs/00000001/", "/backups/"])
def test_truncation_is_found_at_once(protected: Protected, part: str) -> None:
    name = names(protected, part)[0]
    content, at = protected.objects[name]
    protected.objects[name] = (content[:-1000] if len(content) > 2000 else content[:-1], at)
    assert has_problem(verified(protected, read_all=part == "/logs/00000001/"))


@pytest.mark.parametrize("part", ["/packs/", "/maps/", "/logs/00000001/", "/backups/"])
def test_one_flipped_bit_is_found_when_all_is_read(protected: Protected, part: str) -> None:
    name = names(protected, part)[0]
    content, at = protected.objects[name]
    damaged = bytearray(content)
    damaged[len(damaged) // 2] ^= 1
    protected.objects[name] = (bytes(damaged), at)
    findings = verified(protected, read_all=True)
    assert has_problem(findings)
    assert all(one.hint for one in findings if one.severity is Severity.PROBLEM)
