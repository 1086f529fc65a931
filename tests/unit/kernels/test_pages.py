"""The per-page pass: C and Python agree, and both agree with the definitions written out plainly."""

from __future__ import annotations

import random
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloudsave.kernels.native import NativeKernels
from cloudsave.kernels.pages import FingerprintKey, PageStatus, fingerprints, pg_page_check, pg_page_status
from tests.unit.kernels.built import built_kernels

PAGE = 8192
KEY = FingerprintKey.from_bytes(bytes(range(32)), page_bytes=PAGE)


@pytest.fixture(params=["native", "twin"])
def kernels(request: pytest.FixtureRequest) -> NativeKernels | None:
    return built_kernels() if request.param == "native" else None


def plain_fingerprint(page: bytes, key: FingerprintKey) -> int:
    """The definition, in plain numbers."""
    words = struct.unpack(f"<{len(page) // 4}I", page)
    nh, mix = [int(word) for word in key.nh], [int(word) for word in key.mix]
    sums = []
    for shift in (0, 4):
        total = 0
        for i in range(0, len(words), 2):
            even = (words[i] + nh[i + shift]) & 0xFFFFFFFF
            odd = (words[i + 1] + nh[i + 1 + shift]) & 0xFFFFFFFF
            total += even * odd
        sums.append(total & (1 << 64) - 1)
    x = [sums[0] & 0xFFFFFFFF, sums[0] >> 32, sums[1] & 0xFFFFFFFF, sums[1] >> 32]
    halves = [
        (m[0] + sum(a * b for a, b in zip(x, m[1:], strict=True)) & (1 << 64) - 1) >> 32
        for m in (mix[:5], mix[5:])
    ]
    return halves[0] << 32 | halves[1]


def server_page(content: bytes, block: int) -> bytes:
    """A page with a plausible header and its checksum, by the definition in plain numbers."""
    page = bytearray(struct.pack("<IIHHHHHHI", 1, 99, 0, 0, 28, 8000, 8192, PAGE | 4, 0))
    page += content.ljust(PAGE - 24, b"\x5a")[: PAGE - 24]
    seeds = (
        0x5B1F36E9, 0xB8525960, 0x02AB50AA, 0x1DE66D2A, 0x79FF467A, 0x9BB9F8A3, 0x217E7CD2, 0x83E13D2C,
        0xF8D4474F, 0xE39EB970, 0x42C6AE16, 0x993216FA, 0x7B093B5D, 0x98DAFF3C, 0xF718902A, 0x0B1C9CDB,
        0xE58F764B, 0x187636BC, 0x5D7B3BB1, 0xE73DE7DE, 0x92BEC979, 0xCCA6C0B2, 0x304A0979, 0x85AA43D4,
        0x783125BB, 0x6CA8EAA2, 0xE407EAC6, 0x4B5CFC3E, 0x9FBF8C76, 0x15CA20BE, 0xF2CA9FD3, 0x959BD756,
    )  # fmt: skip
    words = [*struct.unpack(f"<{PAGE // 4}I", page), *[0] * 64]
    result = block
    for lane, seed in enumerate(seeds):
        state = seed
        for word in words[lane::32]:
            mixed = state ^ word
            state = (mixed * 16777619 & 0xFFFFFFFF) ^ mixed >> 17
        result ^= state
    page[8:10] = struct.pack("<H", result % 65535 + 1)
    return bytes(page)


def random_pages(seed: int, count: int) -> bytes:
    """Pages of which some are zero, some nearly."""
    chosen = random.Random(seed)
    parts = []
    for _ in range(count):
        kind = chosen.randrange(4)
        page = bytearray(PAGE) if kind < 2 else bytearray(chosen.randbytes(PAGE))
        if kind == 1:
            page[chosen.randrange(PAGE)] = 1 << chosen.randrange(8)
        parts.append(bytes(page))
    return b"".join(parts)


def test_fingerprint_is_the_one_defined(kernels: NativeKernels | None) -> None:
    pages = bytes(PAGE) + random.Random(1).randbytes(PAGE * 2)
    out = np.empty(3, np.uint64)
    zero = fingerprints(pages, page_bytes=PAGE, key=KEY, out=out, kernels=kernels)
    assert out.tolist() == [plain_fingerprint(pages[n * PAGE : (n + 1) * PAGE], KEY) for n in range(3)]
    assert zero.tolist() == [True, False, False]


@settings(max_examples=30, deadline=None)
@given(st.integers(), st.integers(0, 80), st.integers(0, 7))
def test_twins_agree_on_pages_at_any_address(seed: int, count: int, shift: int) -> None:
    pages = memoryview(bytes(shift) + random_pages(seed, count))[shift:]
    results = []
    for kernels in (built_kernels(), None):
        out, lsns = np.empty(count, np.uint64), np.empty(count, np.uint64)
        zero = fingerprints(pages, page_bytes=PAGE, key=KEY, out=out, kernels=kernels)
        status = [
            pg_page_status(pages, first_block=first, checksums=True, lsn_out=lsns, kernels=kernels).tolist()
            for first in (0, 0xFFFFFFF0)
        ]
        headers = pg_page_status(pages, first_block=0, checksums=False, kernels=kernels).tolist()
        results.append((out.tolist(), zero.tolist(), status, headers, lsns.tolist()))
    assert results[0] == results[1]
    assert results[0][1] == [not any(pages[n * PAGE : (n + 1) * PAGE]) for n in range(count)]


@pytest.mark.parametrize("page_bytes", [32, 512, 4096, 16384, 32768])
def test_twins_agree_on_other_page_sizes(page_bytes: int) -> None:
    key = FingerprintKey.from_bytes(bytes(32), page_bytes=page_bytes)
    pages = random.Random(page_bytes).randbytes(page_bytes * 5)
    first, second = np.empty(5, np.uint64), np.empty(5, np.uint64)
    fingerprints(pages, page_bytes=page_bytes, key=key, out=first, kernels=built_kernels())
    fingerprints(pages, page_bytes=page_bytes, key=key, out=second, kernels=None)
    assert first.tolist() == second.tolist()
    assert int(first[0]) == plain_fingerprint(pages[:page_bytes], key)


@settings(max_examples=30, deadline=None)
@given(st.integers(), st.integers(1, 20))
def test_machines_without_wide_instructions_get_the_same_fingerprints(seed: int, count: int) -> None:
    pages = np.frombuffer(random_pages(seed, count), np.uint8)
    wide, plain = np.empty(count, np.uint64), np.empty(count, np.uint64)
    zero = np.empty(count, np.uint8)
    native = built_kernels()
    wide_zero = fingerprints(pages, page_bytes=PAGE, key=KEY, out=wide, kernels=native)
    arrays = (KEY.nh, KEY.mix, plain, zero)
    native.fingerprint_plain(pages.ctypes.data, count, PAGE, *(array.ctypes.data for array in arrays))
    assert wide.tolist() == plain.tolist()
    assert wide_zero.tolist() == zero.astype(bool).tolist()


@pytest.mark.parametrize(
    ("offset", "value"),
    [(10, 8), (12, 23), (12, 8001), (14, 8193), (16, 8191), (16, 8196), (16, 0), (18, 0x2005), (18, 0x4004)],
)
def test_headers_that_no_server_writes_are_found(
    offset: int, value: int, kernels: NativeKernels | None
) -> None:
    page = bytearray(server_page(b"", 0))
    assert pg_page_status(page, first_block=0, checksums=False, kernels=kernels).tolist() == [0]
    page[offset : offset + 2] = struct.pack("<H", value)
    found = pg_page_status(page, first_block=0, checksums=False, kernels=kernels)
    assert found.tolist() == [PageStatus.HEADER]


def test_every_flipped_bit_and_every_swap_changes_the_fingerprint(kernels: NativeKernels | None) -> None:
    page = bytearray(random.Random(2).randbytes(PAGE))
    variants = [bytes(page)]
    for bit in range(0, PAGE * 8, 97):
        page[bit // 8] ^= 1 << bit % 8
        variants.append(bytes(page))
        page[bit // 8] ^= 1 << bit % 8
    variants.append(bytes(page[8:16] + page[:8] + page[16:]))
    variants.append(bytes(page[4:8] + page[:4] + page[8:]))
    out = np.empty(len(variants), np.uint64)
    fingerprints(b"".join(variants), page_bytes=PAGE, key=KEY, out=out, kernels=kernels)
    assert len(set(out.tolist())) == len(variants)


def test_page_check_is_the_one_defined(kernels: NativeKernels | None) -> None:
    good = [server_page(bytes([n]) * 100, 131_070 + n) for n in range(3)]
    header = bytearray(server_page(b"", 5))
    header[14:16] = struct.pack("<H", 9000)
    pages = b"".join([*good, bytes(PAGE), bytes(PAGE - 1) + b"\1", bytes(header)])
    lsns = np.empty(6, np.uint64)
    status = pg_page_status(pages, first_block=131_070, checksums=True, lsn_out=lsns, kernels=kernels)
    wanted = [PageStatus.OK] * 3 + [PageStatus.NEW, PageStatus.HEADER, PageStatus.CHECKSUM]
    assert status.tolist() == wanted
    assert lsns.tolist() == [(1 << 32) + 99] * 3 + [0, 0, (1 << 32) + 99]
    plain = pg_page_status(pages, first_block=0, checksums=False, kernels=kernels)
    assert plain.tolist() == [0, 0, 0, PageStatus.NEW, PageStatus.HEADER, PageStatus.HEADER]


def test_wrong_checksum_counts_only_below_the_limit_and_a_wrong_header_always() -> None:
    torn = bytearray(server_page(b"", 0))
    torn[5000] ^= 1
    headless = bytearray(server_page(b"", 1))
    headless[10] = 0xFF
    pages = bytes(torn) + server_page(b"", 1)
    lsn = (1 << 32) + 99
    assert pg_page_check(pages, first_block=0, checksums=True, lsn_limit=lsn) == []
    assert pg_page_check(pages, first_block=0, checksums=True, lsn_limit=lsn + 1) == [0]
    assert pg_page_check(pages, first_block=0, checksums=True) == [0]
    assert pg_page_check(pages, first_block=0, checksums=False) == []
    assert pg_page_check(bytes(headless), first_block=1, checksums=False, lsn_limit=0) == [0]


def test_wrong_sizes_are_refused() -> None:
    out = np.empty(1, np.uint64)
    with pytest.raises(ValueError, match="whole number"):
        fingerprints(bytes(PAGE + 1), page_bytes=PAGE, key=KEY, out=out)
    with pytest.raises(ValueError, match="one u64 per page"):
        fingerprints(bytes(2 * PAGE), page_bytes=PAGE, key=KEY, out=out)
    with pytest.raises(ValueError, match="one u64 per page"):
        pg_page_status(bytes(2 * PAGE), first_block=0, checksums=True, lsn_out=out)
    with pytest.raises(ValueError, match="contiguous"):
        fingerprints(bytes(2 * PAGE), page_bytes=PAGE, key=KEY, out=np.empty(4, np.uint64)[::2])
    with pytest.raises(ValueError, match="key"):
        FingerprintKey.from_bytes(bytes(31), page_bytes=PAGE)
