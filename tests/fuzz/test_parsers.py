"""
Parsers against mutated bytes, each for a time budget: an error of ours, or a value, and never anything else.

`make fuzz SECONDS=600` gives each parser ten minutes; CLOUDSAVE_FUZZ_SEED repeats a run.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable

import pytest

from cloudsave.errors import CloudsaveError
from tests.fuzz.parsers import PARSERS

SECONDS = float(os.environ.get("CLOUDSAVE_FUZZ_SECONDS", "0.7"))
SEED = int(os.environ.get("CLOUDSAVE_FUZZ_SEED", "20261126"))
CASE_SECONDS_MAX = 20.0
"""Limit: no input keeps a parser busy for longer, on a busy machine."""
EDGES = (
    0,
    1,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0xFFFF,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    (1 << 63) - 1,
    (1 << 64) - 1,
)
SHOWN_BYTES = 400


def mutated(chance: random.Random, sample: bytes) -> bytes:
    """The sample with a few changes: bits, numbers at their edges, pieces cut, doubled, moved, swapped."""
    content = bytearray(sample)
    for _ in range(chance.choice((1, 1, 1, 2, 3, 8))):
        at = chance.randrange(len(content) + 1)
        length = chance.choice((1, 2, 4, 8, chance.randrange(1, 64)))
        kind = chance.randrange(7)
        if kind == 0 and content:
            content[at % len(content)] ^= 1 << chance.randrange(8)
        elif kind == 1:
            edge = chance.choice(EDGES).to_bytes(8, chance.choice(("little", "big")))
            content[at : at + length] = edge[:length] if length < 8 else edge
        elif kind == 2:
            del content[at:]
        elif kind == 3:
            del content[at : at + length]
        elif kind == 4:
            content[at:at] = content[at : at + length] * chance.choice((1, 2, 50))
        elif kind == 5:
            content[at:at] = chance.randbytes(length)
        else:
            digits = chance.choice(
                (b"null", b"-1", b"1e999", b"[" * 50, b'"', b"{}", b"99999999999999999999")
            )
            content[at : at + length] = digits
    return bytes(content)


def try_one(parse: Callable[[bytes], object], content: bytes) -> bool:
    """Whether the parser takes it. Raises: AssertionError for whatever is no error of ours."""
    begun = time.monotonic()
    try:
        parse(content)
    except CloudsaveError:
        return False
    except Exception as error:
        shown = content[:SHOWN_BYTES].hex()
        raise AssertionError(f"{type(error).__name__}: {error}; {len(content)} bytes: {shown}") from error
    finally:
        taken = time.monotonic() - begun
        assert taken < CASE_SECONDS_MAX, f"{taken:.1f} s for {content[:SHOWN_BYTES].hex()}"
    return True


@pytest.mark.parametrize("name", PARSERS)
def test_mutated_bytes_are_parsed_or_refused(name: str) -> None:
    parser = PARSERS[name]
    chance = random.Random(f"{SEED} {name}")
    for sample in parser.samples:
        assert try_one(parser.parse, sample), "control: the sample itself is taken"
    until = time.monotonic() + SECONDS
    tried = 0
    while time.monotonic() < until:
        try_one(parser.parse, mutated(chance, chance.choice(parser.samples)))
        tried += 1
    assert tried > 0


def test_a_parser_that_fails_otherwise_is_found_out() -> None:
    """Control."""

    def careless(content: bytes) -> object:
        return {}[content] if len(content) > 3 else content

    with pytest.raises(AssertionError, match="KeyError"):
        try_one(careless, b"abcdef")
