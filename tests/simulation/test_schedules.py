"""Random schedules of writers, collectors, expiry and holds lose nothing; with a step left out they do."""

from __future__ import annotations

import pytest

from tests.simulation.schedules import Ablation, Schedule, search

SCHEDULES = 1500
"""As many as continuous integration has time for; more by hand, see `schedules.py`."""
SEARCHED_MAX = 12_000


@pytest.mark.parametrize("part", range(3))
def test_no_schedule_loses_what_is_needed_or_leaves_garbage(part: int) -> None:
    begin = 1 + part * SCHEDULES // 3
    assert search(range(begin, begin + SCHEDULES // 3)) is None


@pytest.mark.parametrize("ablation", [one for one in Ablation if one is not Ablation.NOTHING])
def test_each_step_of_the_protocol_is_needed(ablation: Ablation) -> None:
    """Negative control: the search above would notice."""
    found = search(range(1, SEARCHED_MAX), ablation)
    assert found is not None
    assert "gone" in found[1].splitlines()[-1]


def test_a_seed_replays_exactly() -> None:
    traces = [Schedule(77).run().trace for _ in range(2)]
    assert traces[0] == traces[1]
    assert len(traces[0]) > 10
