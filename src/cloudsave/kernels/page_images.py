"""
Page images out of log records: without their hole, and compressed by what the server was set up with.

    pglz    groups of eight items behind a byte of flags, the lowest first. 0: one byte. 1: a copy of what
            came before: u8 high half the distance's upper bits, low half length - 3; u8 the distance's lower
            bits; where the length is 18, one byte more to be added to it
    lz4     sequences: u8 token (high half: literals, low half: length - 4; 15: bytes to be added follow, up
            to one below 255), the literals, u16 distance; the last sequence ends with its literals
    zstd    one frame

Few images are looked at, of catalogues; so these are in Python.
Source: PostgreSQL src/common/pg_lzcompress.c; RestoreBlockImage(), src/backend/access/transam/xlogreader.c;
the LZ4 block format.
"""

from __future__ import annotations

import zstandard

from cloudsave.kernels.wal_facts import Block

PAGE_BYTES = 8192


def page_of(block: Block) -> bytes | None:
    """The page of a block's image; None where it cannot be understood. The block has an image."""
    wanted = PAGE_BYTES - block.hole_bytes
    image = block.image
    if image is None or wanted < 0 or block.hole_begin > wanted:
        return None
    try:
        match block.compression:
            case "pglz":
                image = pglz(image, wanted)
            case "lz4":
                image = lz4(image, wanted)
            case "zstd":
                image = zstandard.ZstdDecompressor().decompress(image, max_output_size=wanted)
    except (ValueError, IndexError, zstandard.ZstdError):
        return None
    if len(image) != wanted:
        return None
    return image[: block.hole_begin] + bytes(block.hole_bytes) + image[block.hole_begin :]


def pglz(data: bytes, length: int) -> bytes:
    """The `length` bytes that were compressed to `data`. Raises: ValueError, IndexError."""
    out = bytearray()
    at = 0
    while at < len(data) and len(out) < length:
        flags, at = data[at], at + 1
        for bit in range(8):
            if at >= len(data) or len(out) >= length:
                break
            if not flags >> bit & 1:
                out.append(data[at])
                at += 1
                continue
            size, distance = (data[at] & 0x0F) + 3, (data[at] & 0xF0) << 4 | data[at + 1]
            at += 2
            if size == 18:
                size, at = size + data[at], at + 1
            _copy(out, distance, min(size, length - len(out)))
    return bytes(out)


def lz4(data: bytes, length: int) -> bytes:
    """The `length` bytes at most that were compressed to `data`. Raises: ValueError, IndexError."""
    out = bytearray()
    at = 0
    while at < len(data):
        token, at = data[at], at + 1
        literals, at = _extended(data, token >> 4, at)
        if at + literals > len(data) or len(out) + literals > length:
            raise ValueError("literals do not fit")
        out += data[at : at + literals]
        at += literals
        if at == len(data):
            break
        distance, at = data[at] | data[at + 1] << 8, at + 2
        size, at = _extended(data, token & 0x0F, at)
        if len(out) + size + 4 > length:
            raise ValueError("a copy does not fit")
        _copy(out, distance, size + 4)
    return bytes(out)


def _extended(data: bytes, number: int, at: int) -> tuple[int, int]:
    if number == 15:
        more = 255
        while more == 255:
            more, at = data[at], at + 1
            number += more
    return number, at


def _copy(out: bytearray, distance: int, size: int) -> None:
    """Append `size` bytes from `distance` before the end; what is appended may be copied again."""
    if not 0 < distance <= len(out):
        raise ValueError("a copy from before the begin")
    for _ in range(size):
        out.append(out[-distance])
