"""Simulated histories: a thousand seeds in blocks, more on demand by `make simulate SEED=... SEEDS=...`."""

from __future__ import annotations

import pytest

from tests.simulation.histories import STEPS, play

SEEDS, BLOCK = 1000, 25


@pytest.mark.parametrize("first", range(1, SEEDS + 1, BLOCK))
def test_every_history_keeps_what_was_promised(first: int) -> None:
    steps = {line.partition(":")[0] for seed in range(first, first + BLOCK) for line in play(seed).story}
    assert len(steps) > len(STEPS) // 2, "the seeds of this block do hardly anything"


def test_a_seed_replays_exactly() -> None:
    for seed in range(1, 6):
        one, other = play(seed), play(seed)
        assert one.story == other.story
        assert one.objects.objects == other.objects.objects
