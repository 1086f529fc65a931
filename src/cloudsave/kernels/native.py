"""Finds and loads the compiled kernels; `native` is None where there are none, and the Python twins serve."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Final

ABI = 5
"""Version of the functions' signatures and structures, the same as CS_ABI in kernels.c."""
LIBRARY_PATTERN = "libcloudsave_kernels*.so"
CHOICE_VARIABLE = "CLOUDSAVE_KERNELS"
"""Set to "python" it keeps the compiled kernels from being used."""

_U32, _U64, _SIZE, _POINTER = ctypes.c_uint32, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p


class WalState(ctypes.Structure):
    """Mirror of cs_wal_state; kernels.c says what each field is."""

    _fields_ = (
        *(
            (name, _U64)
            for name in (
                "position",
                "segment_bytes",
                "system_identifier",
                "record_start",
                "record_first",
                "record_last",
                "complete_start",
                "complete_previous",
                "records_end",
                "record_count",
                "overwritten",
                "consumed",
                "stop_position",
                "seen_from",
            )
        ),
        *(
            (name, _U32)
            for name in (
                "timeline_max",
                "timeline",
                "magic",
                "check_crc",
                "mode",
                "began",
                "page_have",
                "record_have",
                "record_total",
                "record_length",
                "interesting",
                "crc",
                "stop_reason",
                "gather_need",
                "changes_used",
                "changes_lost",
            )
        ),
        ("page_head", ctypes.c_uint8 * 40),
        ("head", ctypes.c_uint8 * 24),
        ("name", ctypes.c_uint8 * 64),
        ("headers", ctypes.c_uint8 * 1024),
    )


class BinlogState(ctypes.Structure):
    """Mirror of cs_binlog_state; binlog.c says what each field is."""

    _fields_ = (
        *(
            (name, _U64)
            for name in (
                "offset",
                "begin",
                "records_end",
                "first",
                "last",
                "number",
                "instant_us",
                "length",
            )
        ),
        ("open", _U32),
        ("standalone", _U32),
    )


_SIGNATURES: Final = {
    "cs_crc32c": (_U32, [_U32, _POINTER, _SIZE]),
    "cs_crc32c_by_table": (_U32, [_U32, _POINTER, _SIZE]),
    "cs_pg_page_check": (None, [_POINTER, _SIZE, _SIZE, _U32, _U32, _POINTER, _POINTER]),
    "cs_innodb_check": (None, [_POINTER, _SIZE, _SIZE, _U32, _POINTER]),
    "cs_fingerprint": (None, [_POINTER, _SIZE, _SIZE, _POINTER, _POINTER, _POINTER, _POINTER]),
    "cs_fingerprint_plain": (None, [_POINTER, _SIZE, _SIZE, _POINTER, _POINTER, _POINTER, _POINTER]),
    "cs_wal_walk": (
        ctypes.c_int32,
        [
            ctypes.POINTER(WalState),
            _POINTER,
            _SIZE,
            _POINTER,
            _SIZE,
            _POINTER,
            _SIZE,
            ctypes.POINTER(_SIZE),
            _POINTER,
            _SIZE,
        ],
    ),
    "cs_binlog_packets": (_SIZE, [_POINTER, _SIZE, _SIZE, _POINTER, ctypes.POINTER(_SIZE)]),
    "cs_binlog_walk": (
        _SIZE,
        [ctypes.POINTER(BinlogState), _POINTER, _SIZE, _POINTER, _SIZE, ctypes.POINTER(_SIZE)],
    ),
    "cs_wal_facts": (
        ctypes.c_int32,
        [
            _POINTER,
            _POINTER,
            _SIZE,
            _POINTER,
            _SIZE,
            _POINTER,
            _SIZE,
            ctypes.POINTER(_SIZE),
            _POINTER,
            _SIZE,
            ctypes.POINTER(_SIZE),
        ],
    ),
}


class NativeKernels:
    """The functions of one loaded library; arguments are addresses and sizes, and nothing is checked."""

    def __init__(self, path: Path) -> None:
        """Raises: OSError where the library cannot be loaded or has another ABI."""
        library = ctypes.CDLL(str(path))
        library.cs_abi.restype = _U32
        library.cs_abi.argtypes = []
        found = library.cs_abi()
        if found != ABI:
            raise OSError(f"{path} has ABI {found}, wanted {ABI}")
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        self.path = path
        self.crc32c = library.cs_crc32c
        self.crc32c_by_table = library.cs_crc32c_by_table
        self.pg_page_check = library.cs_pg_page_check
        self.innodb_check = library.cs_innodb_check
        self.fingerprint = library.cs_fingerprint
        self.fingerprint_plain = library.cs_fingerprint_plain
        self.wal_walk = library.cs_wal_walk
        self.binlog_packets = library.cs_binlog_packets
        self.binlog_walk = library.cs_binlog_walk
        self.wal_facts = library.cs_wal_facts


def load() -> NativeKernels | None:
    """The kernels beside this file, unless there are none that fit or CLOUDSAVE_KERNELS is "python"."""
    if os.environ.get(CHOICE_VARIABLE) == "python":
        return None
    for path in sorted(Path(__file__).parent.glob(LIBRARY_PATTERN)):
        try:
            return NativeKernels(path)
        except (OSError, AttributeError):
            continue  # Built for another machine or by another release: the twins give the same results.
    return None


native: Final = load()
