"""
Positions in a binlog: the number of the file in the upper bits of the offset, the place in it in the lower.

A file is taken for one of 4 GiB of which only the beginning is written, as servers cannot name a place beyond
that. So offsets need no table of files, ascend along the log, and mean the same to everybody who reads the
same server. The base name of the files is no part of it: it is a setting, and may change.
Source: decision 0028.
"""

from __future__ import annotations

import re

FILE_BITS = 32
LOG_FILE_BYTES = 1 << FILE_BITS
FILE_NUMBER_MAX = (1 << 31) - 1
"""Source: MAX_LOG_UNIQUE_FN_EXT of the servers, sql/binlog.h (sql/log.h)."""
_FORM = re.compile(r"(?:.*[./])?(\d{1,10}):(\d{1,10})")
_FILE_NAME = re.compile(r"(.+)\.(\d{6,10})")


def offset_of(number: int, place: int) -> int:
    """The offset of a place in the file of that number."""
    return number << FILE_BITS | place


def number_of(offset: int) -> int:
    """The number of the file that holds an offset."""
    return offset >> FILE_BITS


def place_of(offset: int) -> int:
    """The place of an offset in its file."""
    return offset & (LOG_FILE_BYTES - 1)


def file_number(name: str) -> int:
    """The number in the name of a binlog file. Raises: ValueError."""
    found = _FILE_NAME.fullmatch(name)
    if found is None or not 0 < int(found[2]) <= FILE_NUMBER_MAX:
        raise ValueError(f"{name!r} is not the name of a binlog file")
    return int(found[2])


def format_offset(offset: int) -> str:
    """Text form of an offset: `000012:4711`."""
    return f"{number_of(offset):06}:{place_of(offset)}"


def parse_offset(text: str) -> int:
    """An offset from `000012:4711` or `binlog.000012:4711`. Raises: ValueError."""
    found = _FORM.fullmatch(text)
    if found is None or not 0 < int(found[1]) <= FILE_NUMBER_MAX or int(found[2]) >= LOG_FILE_BYTES:
        raise ValueError(f"{text!r} is not a position in a binlog")
    return offset_of(int(found[1]), int(found[2]))
