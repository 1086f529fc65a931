"""
Are pages of InnoDB whole: their checksums, and whether begin and end are of one version. C, with a twin.

Integers are big-endian. LSN = u64 at 16; flags of the tablespace = u32 at 54 of its first page.

    crc32        u32 at 0 = crc32c(page[4:26]) xor crc32c(page[38:-8]); the last 4 bytes = the LSN's low half
    full_crc32   the last u32 = crc32c(page[:-4]); the 4 bytes before it = the LSN's low half

Pages of zeros are right: they were made and not written yet. Tables that are compressed, by page or by row
format, and such as MySQL encrypts, have other sums, which are not known here.
Source: MariaDB storage/innobase/include/fsp0types.h (flags); the formulas were measured on both servers.
"""

from __future__ import annotations

import struct
from enum import IntEnum

import numpy as np

from cloudsave.kernels.checksums import crc32c
from cloudsave.kernels.native import NativeKernels, native
from cloudsave.kernels.pages import PageStatus

FLAGS_OFFSET = 54
_FULL_CRC32 = 1 << 4
_FULL_COMPRESSION_BITS = 7 << 5
_ROW_COMPRESSED_BITS = 15 << 1
_PAGE_COMPRESSED = 1 << 16
_ENCRYPTED = 1 << 13
_U32 = struct.Struct(">I")


class PageForm(IntEnum):
    """Which checksum the pages of a tablespace have."""

    CRC32 = 0
    FULL_CRC32 = 1


def page_form(first_page: bytes | bytearray | memoryview) -> PageForm | None:
    """The form of a tablespace, by its first page; None where its pages cannot be checked."""
    (flags,) = _U32.unpack_from(first_page, FLAGS_OFFSET)
    if flags & _FULL_CRC32:
        return None if flags & _FULL_COMPRESSION_BITS else PageForm.FULL_CRC32
    return None if flags & (_ROW_COMPRESSED_BITS | _PAGE_COMPRESSED | _ENCRYPTED) else PageForm.CRC32


def bad_pages(
    pages: bytes | bytearray | memoryview,
    *,
    page_bytes: int,
    form: PageForm,
    kernels: NativeKernels | None = native,
) -> list[int]:
    """
    Which of some whole pages are not right, counted from the first. `page_bytes`: a multiple of 1024;
    `kernels` None: the Python twin.
    """
    count, rest = divmod(len(pages), page_bytes)
    if rest or page_bytes % 1024:
        raise ValueError(f"{len(pages)} bytes are not pages of {page_bytes}")
    octets = np.frombuffer(pages, np.uint8)
    status = np.empty(count, np.uint8)
    if kernels is not None:
        kernels.innodb_check(octets.ctypes.data, count, page_bytes, int(form), status.ctypes.data)
    else:
        view = memoryview(pages)
        for number in range(count):
            page = view[number * page_bytes : (number + 1) * page_bytes]
            status[number] = _status_twin(page, form)
    found: list[int] = np.flatnonzero(status == PageStatus.CHECKSUM).tolist()
    return found


def _status_twin(page: memoryview, form: PageForm) -> PageStatus:
    if form is PageForm.FULL_CRC32:
        stored, computed, lsn_end = page[-4:], crc32c(page[:-4], kernels=None), page[-8:-4]
    else:
        computed = crc32c(page[4:26], kernels=None) ^ crc32c(page[38:-8], kernels=None)
        stored, lsn_end = page[:4], page[-4:]
    if _U32.unpack(stored)[0] == computed and lsn_end == page[20:24]:
        return PageStatus.OK
    return PageStatus.CHECKSUM if any(page) else PageStatus.NEW
