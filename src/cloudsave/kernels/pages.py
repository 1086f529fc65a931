"""
The per-page pass over data files: PostgreSQL's page check, and keyed fingerprints of any pages.

A fingerprint is 8 bytes of a universal hash under a secret key. Two different pages of the same size, chosen
without knowledge of the key, have the same one with a probability of at most 2^-63:

    NH1 = sum over even i of (a[i] + k[i] mod 2^32) * (a[i+1] + k[i+1] mod 2^32)  mod 2^64
          over the page's 32-bit words a; NH2 the same with the key shifted by 4 words (Toeplitz). Both
          agree with a probability of at most 2^-64. Source: Black, Halevi, Krawczyk, Krovetz, Rogaway,
          "UMAC: fast and secure message authentication", CRYPTO 1999.
    H1  = m[0] + x0 m[1] + x1 m[2] + x2 m[3] + x3 m[4] mod 2^64, over the four 32-bit words x of NH1 and
          NH2, low one first; H2 likewise with m[5] to m[9]; the fingerprint is (H1 >> 32) << 32 |
          (H2 >> 32). Each half agrees with a probability of at most 2^-32. Source: Lemire, Kaser,
          "Strongly universal string hashing is fast", 2012 (multilinear hashing).

Buffers are used where they are, without a copy; the native kernels run without the interpreter lock.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Self

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from cloudsave.kernels.native import NativeKernels, native

Pages = bytes | bytearray | memoryview | npt.NDArray[np.uint8]
Flags = npt.NDArray[np.uint8]
Numbers = npt.NDArray[np.uint64]

PG_PAGE_BYTES = 8192
SEED_BYTES = 32
KEY_CONTEXT = "cloudsave v1 page fingerprint key"
_TOEPLITZ_WORDS = 4
_MIX_WORDS = 10
_TWIN_PAGES = 64
"""Pages that a twin takes at once, so that its intermediates stay in the cache."""
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


# ---- fingerprints


@dataclass(frozen=True, slots=True, repr=False)
class FingerprintKey:
    """The key of fingerprints for one page size: `nh` has page_bytes / 4 + 4 words, `mix` 10. Secret."""

    page_bytes: int
    nh: npt.NDArray[np.uint32]
    mix: Numbers

    @classmethod
    def from_bytes(cls, seed: bytes, *, page_bytes: int) -> Self:
        """
        Expand a seed of 32 bytes: BLAKE3 in key derivation mode, its output read as the u32 words of `nh` and
        then the u64 words of `mix`, little-endian. `page_bytes` is a multiple of 32.
        """
        if len(seed) != SEED_BYTES or page_bytes <= 0 or page_bytes % 32:
            raise ValueError(f"cannot make a key from {len(seed)} bytes for pages of {page_bytes}")
        words = page_bytes // 4 + _TOEPLITZ_WORDS
        stream = blake3(seed, derive_key_context=KEY_CONTEXT).digest(length=words * 4 + _MIX_WORDS * 8)
        nh = np.frombuffer(stream, "<u4", words).astype(np.uint32)
        mix = np.frombuffer(stream, "<u8", _MIX_WORDS, words * 4).astype(np.uint64)
        return cls(page_bytes, nh, mix)


def fingerprints(
    pages: Pages,
    *,
    page_bytes: int,
    key: FingerprintKey,
    out: Numbers,
    kernels: NativeKernels | None = native,
) -> npt.NDArray[np.bool_]:
    """
    Write the fingerprint of each page into `out`, and say which pages are all zero bytes.

    `pages` is a whole number of pages: a short last page is padded with zeros by the caller. `kernels` None:
    the Python twin.
    """
    octets, count = _page_array(pages, page_bytes)
    if key.page_bytes != page_bytes or out.shape != (count,) or out.dtype != np.uint64:
        raise ValueError("the key is for another page size, or `out` is not one u64 per page")
    if not out.flags.c_contiguous:
        raise ValueError("`out` is not contiguous")
    zero = np.empty(count, np.uint8)
    if kernels is not None:
        kernels.fingerprint(
            octets.ctypes.data,
            count,
            page_bytes,
            key.nh.ctypes.data,
            key.mix.ctypes.data,
            out.ctypes.data,
            zero.ctypes.data,
        )
    else:
        for part in _parts(count):
            _fingerprint_twin(octets[part], key, out[part], zero[part])
    return zero.view(np.bool_)


def _fingerprint_twin(octets: Flags, key: FingerprintKey, out: Numbers, zero: Flags) -> None:
    words = octets.view("<u4")
    zero[:] = ~words.any(axis=1)
    count = words.shape[1]
    parts: list[Numbers] = []
    for shift in (0, _TOEPLITZ_WORDS):
        keyed = words + key.nh[shift : shift + count]
        total = np.einsum("ij,ij->i", keyed[:, 0::2], keyed[:, 1::2], dtype=np.uint64, casting="unsafe")
        parts += [total & _LOW, total >> _HALF]
    high, low = (
        sum((x * m for x, m in zip(parts, mix[1:], strict=True)), np.full(len(words), mix[0]))
        for mix in (key.mix[:5], key.mix[5:])
    )
    out[:] = (high >> _HALF) << _HALF | (low >> _HALF)


# ---- PostgreSQL's page check


class PageStatus(IntEnum):
    """What the check of one page found."""

    OK = 0
    CHECKSUM = 1
    """The checksum does not fit content and block number."""
    NEW = 2
    """All bytes are zero: never written."""
    HEADER = 3
    """No header that a server would accept."""


def pg_page_check(
    pages: Pages,
    *,
    first_block: int,
    checksums: bool,
    lsn_limit: int | None = None,
    page_bytes: int = PG_PAGE_BYTES,
) -> list[int]:
    """
    Indexes of the pages that look damaged; arguments as in `pg_page_status`.

    With `lsn_limit` a page whose LSN is not below it is left out when just its checksum is wrong: it may have
    been read while it was written, and replay from `lsn_limit` on makes it whole.
    """
    lsns = np.empty(_page_array(pages, page_bytes)[1], np.uint64)
    status = pg_page_status(
        pages, first_block=first_block, checksums=checksums, page_bytes=page_bytes, lsn_out=lsns
    )
    torn = status == PageStatus.CHECKSUM
    if lsn_limit is not None:
        torn &= lsns < np.uint64(lsn_limit)
    found: list[int] = np.flatnonzero(torn | (status == PageStatus.HEADER)).tolist()
    return found


def pg_page_status(
    pages: Pages,
    *,
    first_block: int,
    checksums: bool,
    page_bytes: int = PG_PAGE_BYTES,
    lsn_out: Numbers | None = None,
    kernels: NativeKernels | None = native,
) -> Flags:
    """
    The `PageStatus` of each page.

    Args:
        pages: A whole number of pages.
        first_block: Number of the first page, counted within the whole relation.
        checksums: The cluster has page checksums; without them only headers are looked at.
        lsn_out: Takes the LSN of each page.
        kernels: None: the Python twin.
    Source:  PostgreSQL src/include/storage/checksum_impl.h; PageIsVerified() in bufpage.c.
    """
    octets, count = _page_array(pages, page_bytes)
    if page_bytes % 128:
        raise ValueError(f"pages of {page_bytes} bytes have no checksum")
    if lsn_out is not None and (lsn_out.shape != (count,) or lsn_out.dtype != np.uint64):
        raise ValueError("`lsn_out` is not one u64 per page")
    status = np.empty(count, np.uint8)
    if kernels is not None:
        lsn_address = None if lsn_out is None else lsn_out.ctypes.data
        kernels.pg_page_check(
            octets.ctypes.data,
            count,
            page_bytes,
            first_block,
            int(checksums),
            lsn_address,
            status.ctypes.data,
        )
        return status
    for part in _parts(count):
        status[part] = _status_twin(octets[part], first_block + part.start, checksums=checksums)
    if lsn_out is not None:
        halves = octets[:, :8].copy().view("<u4").astype(np.uint64)
        lsn_out[:] = halves[:, 0] << _HALF | halves[:, 1]
    return status


def _status_twin(octets: Flags, first_block: int, *, checksums: bool) -> Flags:
    page_bytes = octets.shape[1]
    header = octets[:, :20].copy().view("<u2").astype(np.uint32)
    checksum, flags, lower, upper, special, size_version = (header[:, n] for n in range(4, 10))
    plausible = (
        (flags & ~np.uint32(7) == 0)
        & (lower >= 24)
        & (lower <= upper)
        & (upper <= special)
        & (special <= page_bytes)
        & (special % 8 == 0)
        & (size_version == (page_bytes | 4))
    )
    status = np.where(plausible, PageStatus.OK, PageStatus.HEADER).astype(np.uint8)
    if checksums:
        status[_checksums_twin(octets, first_block) != checksum] = PageStatus.CHECKSUM
    unused = upper == 0
    status[unused] = PageStatus.HEADER
    status[unused & ~octets.any(axis=1)] = PageStatus.NEW
    return status


def _checksums_twin(octets: Flags, first_block: int) -> npt.NDArray[np.uint32]:
    count = len(octets)
    rows = octets.view("<u4").reshape(count, -1, len(_LANE_SEEDS))
    sums = np.repeat(_LANE_SEEDS[np.newaxis, :], count, axis=0)
    first = rows[:, 0].copy()
    first[:, 2] &= 0xFFFF0000
    zeros = np.zeros_like(first)
    for row in (first, *(rows[:, n] for n in range(1, rows.shape[1])), zeros, zeros):
        mixed = sums ^ row
        sums = (mixed * _FNV_PRIME) ^ (mixed >> np.uint32(17))
    blocks = (np.arange(count, dtype=np.uint64) + np.uint64(first_block)).astype(np.uint32)
    folded: npt.NDArray[np.uint32] = np.bitwise_xor.reduce(sums, axis=1) ^ blocks
    return folded % np.uint32(65535) + np.uint32(1)


_FNV_PRIME = np.uint32(16777619)
_LANE_SEEDS = np.frombuffer(
    bytes.fromhex(
        "5B1F36E9 B8525960 02AB50AA 1DE66D2A 79FF467A 9BB9F8A3 217E7CD2 83E13D2C"
        "F8D4474F E39EB970 42C6AE16 993216FA 7B093B5D 98DAFF3C F718902A 0B1C9CDB"
        "E58F764B 187636BC 5D7B3BB1 E73DE7DE 92BEC979 CCA6C0B2 304A0979 85AA43D4"
        "783125BB 6CA8EAA2 E407EAC6 4B5CFC3E 9FBF8C76 15CA20BE F2CA9FD3 959BD756"
    ),
    ">u4",
).astype(np.uint32)


# ---- both


def _page_array(pages: Pages, page_bytes: int) -> tuple[Flags, int]:
    """The pages as rows, without a copy, and their number. Raises: ValueError for a part of a page."""
    octets = np.frombuffer(pages, np.uint8)
    count, surplus = divmod(len(octets), page_bytes)
    if surplus:
        raise ValueError(f"{len(octets)} bytes are not a whole number of pages of {page_bytes}")
    return octets.reshape(count, page_bytes), count


def _parts(count: int) -> Iterator[slice]:
    for first in range(0, count, _TWIN_PAGES):
        yield slice(first, min(first + _TWIN_PAGES, count))
