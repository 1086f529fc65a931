"""CRC-32C (Castagnoli), which guards WAL records, control files and backup manifests of PostgreSQL."""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

from cloudsave.kernels.native import NativeKernels, native

Buffer = bytes | bytearray | memoryview | npt.NDArray[np.uint8]

_POLYNOMIAL = 0x82F63B78
_LANE_BYTES = 32
_LANES_MIN = 96
"""Below so many lanes the plain loop is faster."""
_BLOCK_LANES = 1 << 15
"""Lanes taken at once: 1 MiB of data."""

_Words = npt.NDArray[np.uint32]


def crc32c(data: Buffer, crc: int = 0, *, kernels: NativeKernels | None = native) -> int:
    """CRC-32C of bytes that follow those of which `crc` is the CRC; `kernels` None: the Python twin."""
    octets = np.frombuffer(data, np.uint8)
    if kernels is not None:
        return int(kernels.crc32c(crc, octets.ctypes.data, len(octets)))
    register = crc ^ 0xFFFFFFFF
    lanes = len(octets) // _LANE_BYTES
    if lanes < _LANES_MIN:
        return _by_loop(register, octets) ^ 0xFFFFFFFF
    for first in range(0, lanes, _BLOCK_LANES):
        count = min(_BLOCK_LANES, lanes - first)
        begin = first * _LANE_BYTES
        register = _by_lanes(register, octets[begin : begin + count * _LANE_BYTES])
    return _by_loop(register, octets[lanes * _LANE_BYTES :]) ^ 0xFFFFFFFF


@functools.cache
def _byte_table() -> _Words:
    """The register after one byte, by the register's low byte xor the data's."""
    table: _Words = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.bitwise_xor(table >> 1, (table & 1) * np.uint32(_POLYNOMIAL), dtype=np.uint32)
    return table


@functools.cache
def _pair_table() -> _Words:
    """The same for two bytes at once: 65,536 entries."""
    table = _byte_table()
    pairs = np.arange(1 << 16, dtype=np.uint32)
    for _ in range(2):
        pairs = (pairs >> 8) ^ table[pairs & 0xFF]
    return pairs


@functools.cache
def _pair_list() -> list[int]:
    pairs: list[int] = _pair_table().tolist()
    return pairs


def _by_loop(register: int, octets: npt.NDArray[np.uint8]) -> int:
    table = _pair_list()
    even = len(octets) & ~1
    for pair in octets[:even].view("<u2").tolist():
        register = table[(register ^ pair) & 0xFFFF] ^ (register >> 16)
    if even != len(octets):
        register = int(_byte_table()[(register ^ int(octets[even])) & 0xFF]) ^ (register >> 8)
    return register


def _by_lanes(register: int, octets: npt.NDArray[np.uint8]) -> int:
    """
    All lanes side by side, then joined pairwise: the CRC is linear, so that the register of a lane that
    begins with 0 is carried over the bytes behind it by a linear map.
    """
    table = _pair_table()
    words = np.ascontiguousarray(octets.view("<u2").reshape(-1, _LANE_BYTES // 2).T)
    state = np.zeros(words.shape[1], np.uint32)
    state[0] = register
    for word in words:
        state = table[(state ^ word) & 0xFFFF] ^ (state >> 16)
    level = 0
    while len(state) > 1:
        if len(state) % 2:
            # Invariant: a zero register in front of the first lane's leaves the result as it is.
            state = np.concatenate((np.zeros(1, np.uint32), state))
        state = _shifted(state[0::2], _shift_tables(level)) ^ state[1::2]
        level += 1
    return int(state[0])


def _shifted(state: _Words, shift: _Words) -> _Words:
    """`state` after as many zero bytes as `shift` stands for."""
    parts: list[_Words] = [shift[n][(state >> (8 * n)) & 0xFF] for n in range(4)]
    return parts[0] ^ parts[1] ^ parts[2] ^ parts[3]


@functools.cache
def _shift_tables(level: int) -> _Words:
    """
    Four tables by byte of the register: its part in the register after 2^level lanes of zero bytes.
    """
    if level:
        half = _shift_tables(level - 1)
        return np.stack([_shifted(row, half) for row in half])
    table = _byte_table()
    rows = []
    for position in range(4):
        state = np.arange(256, dtype=np.uint32) << (8 * position)
        for _ in range(_LANE_BYTES):
            state = (state >> 8) ^ table[state & 0xFF]
        rows.append(state)
    return np.stack(rows)
