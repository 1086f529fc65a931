"""The control file's reader on made-up and damaged files; real ones are read in the integration tests."""

from __future__ import annotations

import struct
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudsave.engines.postgresql.format_control import ServerRunState, parse_control
from cloudsave.errors import IntegrityError, UnsupportedVersion
from cloudsave.kernels.checksums import crc32c


def control_file(version: int = 1800, *, state: int = 6, sample: float = 1234567.0) -> bytes:
    """A control file with a CRC that fits."""
    content = bytearray(8192)
    for layout, offset, value in (
        ("<Q", 0, 7_123_456_789_012_345_678),
        ("<I", 8, version),
        ("<I", 12, 202_506_291),
        ("<I", 16, state),
        ("<q", 24, 1_700_000_000),
        ("<Q", 32, 0x3000100),
        ("<Q", 40, 0x3000028),
        ("<I", 48, 5),
        ("<I", 52, 4),
        ("<d", 208, sample),
        ("<I", 216, 8192),
        ("<I", 220, 131_072),
        ("<I", 224, 8192),
        ("<I", 228, 16 << 20),
        ("<I", 252, 1),
    ):
        struct.pack_into(layout, content, offset, value)
    crc_at = 292 if version == 1800 else 288
    struct.pack_into("<I", content, crc_at, crc32c(content[:crc_at]))
    return bytes(content)


@pytest.mark.parametrize("version", [1300, 1700, 1800])
def test_fields_are_read(version: int) -> None:
    control = parse_control(control_file(version))
    assert control.system_identifier == 7_123_456_789_012_345_678
    assert control.state is ServerRunState.IN_PRODUCTION
    assert not control.was_shut_down
    assert control.changed == datetime(2023, 11, 14, 22, 13, 20, tzinfo=UTC)
    assert (control.checkpoint, control.redo) == (0x3000100, 0x3000028)
    assert (control.timeline, control.previous_timeline) == (5, 4)
    assert control.wal_segment_bytes == 16 << 20
    assert control.has_page_checksums


@given(st.integers(0, 295 * 8 + 7))
def test_any_flipped_bit_is_refused(bit: int) -> None:
    content = bytearray(control_file())
    content[bit // 8] ^= 1 << bit % 8
    with pytest.raises((IntegrityError, UnsupportedVersion)):
        parse_control(bytes(content))


@given(st.binary(max_size=600))
def test_random_bytes_are_refused(content: bytes) -> None:
    with pytest.raises((IntegrityError, UnsupportedVersion)):
        parse_control(content)


@pytest.mark.parametrize("length", [0, 15, 16, 200, 295])
def test_a_short_file_is_damaged(length: int) -> None:
    with pytest.raises(IntegrityError, match="damaged"):
        parse_control(control_file()[:length])


@pytest.mark.parametrize("version", [0, 1201, 1900])
def test_other_formats_are_named(version: int) -> None:
    with pytest.raises(UnsupportedVersion, match=f"format {version}"):
        parse_control(control_file(version))


def test_a_file_of_another_machine_is_refused() -> None:
    with pytest.raises(IntegrityError):
        parse_control(control_file(sample=1.0))
    with pytest.raises(IntegrityError):
        parse_control(control_file(state=7))
