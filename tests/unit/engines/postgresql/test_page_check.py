"""Which page is called damaged: one that is wrong twice, unchanged, and older than the backup."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from cloudsave.clock import Clock
from cloudsave.engines.postgresql.page_check import PageCheck

PAGE = 8192
START = 0x2000000
END = 0x3000000


def page(*, lsn: int, lower: int = 40, upper: int = 4000, checksum: int = 1) -> bytes:
    """A page with a plausible header and (but for luck) a wrong checksum."""
    header = struct.pack(
        "<IIHHHHHHI", lsn >> 32, lsn & 0xFFFFFFFF, checksum, 0, lower, upper, PAGE, PAGE | 4, 0
    )
    return header + b"\x55" * (PAGE - len(header))


class ActingClock(Clock):
    """Does something while the checker pauses."""

    def __init__(self, act: Callable[[], object]) -> None:
        self.act = act
        self.pauses = 0

    def sleep(self, seconds: float) -> None:
        self.pauses += 1
        self.act()


def check(path: Path, act: Callable[[], object], *, checksums: bool = True) -> tuple[PageCheck, bytes, int]:
    """Check a file while `act` happens; the checker, what it left in the buffer, its pauses."""
    clock = ActingClock(act)
    checker = PageCheck(start_offset=START, checksums=checksums, clock=clock)
    buffer = bytearray(path.read_bytes())
    descriptor = os.open(path, os.O_RDONLY)
    try:
        checker.check_file(
            "base/5/1.2", memoryview(buffer), first_block=262144, descriptor=descriptor, offset=0
        )
    finally:
        os.close(descriptor)
    return checker, bytes(buffer), clock.pauses


def test_page_that_stays_wrong_is_damaged(tmp_path: Path) -> None:
    file = tmp_path / "1.2"
    file.write_bytes(bytes(PAGE) + page(lsn=START - 8))
    checker, left, pauses = check(file, lambda: None)
    (found,) = checker.corrupt_pages(end_offset=END)
    assert (found.path, found.block) == ("base/5/1.2", 262145)
    assert "0/1FFFFF8" in found.reason
    assert left == file.read_bytes()
    assert pauses == 1


@pytest.mark.fault("page-torn-while-read", control="test_page_that_stays_wrong_is_damaged")
def test_page_written_meanwhile_is_taken_as_it_is_now(tmp_path: Path) -> None:
    file = tmp_path / "1.2"
    file.write_bytes(page(lsn=START - 8))
    newer = page(lsn=START - 8, upper=5000)
    checker, left, _ = check(file, lambda: file.write_bytes(newer))
    assert checker.corrupt_pages(end_offset=END) == ()
    assert left == newer


def test_page_younger_than_the_backup_is_left_to_replay(tmp_path: Path) -> None:
    file = tmp_path / "1.2"
    file.write_bytes(page(lsn=START))
    checker, _, pauses = check(file, lambda: pytest.fail("no second look is needed"))
    assert checker.corrupt_pages(end_offset=END) == ()
    assert pauses == 0


def test_page_of_garbage_is_damaged_although_its_lsn_seems_young(tmp_path: Path) -> None:
    file = tmp_path / "1.2"
    file.write_bytes(page(lsn=END) + page(lsn=END + 8) + b"\xa5" * PAGE)
    checker, _, _ = check(file, lambda: None)
    found = checker.corrupt_pages(end_offset=END)
    assert [one.block for one in found] == [262145, 262146]
    assert "0/3000008" in found[0].reason


def test_page_truncated_away_meanwhile_is_no_damage(tmp_path: Path) -> None:
    file = tmp_path / "1.2"
    file.write_bytes(page(lsn=1))
    checker, _, _ = check(file, lambda: os.truncate(file, 0))
    assert checker.corrupt_pages(end_offset=END) == ()


def test_without_checksums_a_wrong_header_is_still_found(tmp_path: Path) -> None:
    file = tmp_path / "1.2"
    file.write_bytes(page(lsn=1) + page(lsn=1, lower=9000, upper=9001))
    checker, _, _ = check(file, lambda: None, checksums=False)
    assert [found.block for found in checker.corrupt_pages(end_offset=END)] == [262145]


def test_new_pages_and_a_short_last_page_are_no_damage(tmp_path: Path) -> None:
    file = tmp_path / "1.2"
    file.write_bytes(bytes(2 * PAGE) + b"\x55" * 100)
    checker, left, _ = check(file, lambda: None)
    assert checker.corrupt_pages(end_offset=END) == ()
    assert left == file.read_bytes()
