"""CRC-32C: known answers, and all ways to compute it agree."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloudsave.kernels.checksums import crc32c
from cloudsave.kernels.native import NativeKernels
from tests.unit.kernels.built import built_kernels

# Source: RFC 3720, B.4.
KNOWN = [
    (bytes(32), 0x8A9136AA),
    (b"\xff" * 32, 0x62A8AB43),
    (bytes(range(32)), 0x46DD794E),
    (bytes(range(31, -1, -1)), 0x113FDB5C),
    (b"123456789", 0xE3069283),
    (b"", 0),
]


@pytest.fixture(params=["native", "twin"])
def kernels(request: pytest.FixtureRequest) -> NativeKernels | None:
    return built_kernels() if request.param == "native" else None


@pytest.mark.parametrize(("data", "crc"), KNOWN)
def test_known_answers(data: bytes, crc: int, kernels: NativeKernels | None) -> None:
    assert crc32c(data, kernels=kernels) == crc


@settings(max_examples=60, deadline=None)
@given(st.integers(), st.integers(0, 100_000), st.integers(0, 100_000), st.integers(0, 7))
def test_all_ways_agree_on_data_in_two_pieces(seed: int, size: int, cut: int, shift: int) -> None:
    data = memoryview(bytearray(random.Random(seed).randbytes(size + shift)))[shift:]
    first, second = data[:cut], data[cut:]
    native = built_kernels()
    octets = np.frombuffer(data, np.uint8)
    by_table = native.crc32c_by_table(0, octets.ctypes.data, len(octets))
    assert by_table == crc32c(data, kernels=native) == crc32c(data, kernels=None)
    assert crc32c(second, crc32c(first, kernels=None), kernels=None) == by_table
    assert crc32c(second, crc32c(first, kernels=native), kernels=native) == by_table


def test_twin_agrees_on_more_than_one_block_of_lanes() -> None:
    data = random.Random(3).randbytes((2 << 20) + 77)
    assert crc32c(data, kernels=None) == crc32c(data, kernels=built_kernels())
