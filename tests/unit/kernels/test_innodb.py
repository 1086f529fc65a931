"""Pages of InnoDB: what is right, what is not, and that both kernels agree."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloudsave.kernels.checksums import crc32c
from cloudsave.kernels.innodb import FLAGS_OFFSET, PageForm, bad_pages, page_form
from cloudsave.kernels.native import NativeKernels
from tests.unit.kernels.built import built_kernels

PAGE = 4096


def page(form: PageForm, content: bytes, lsn: int = 0x1122334455667788) -> bytes:
    """A page by the definition."""
    made = bytearray(content.ljust(PAGE, b"\x17")[:PAGE])
    made[16:24] = struct.pack(">Q", lsn)
    low = made[20:24]
    if form is PageForm.FULL_CRC32:
        made[-8:-4] = low
        made[-4:] = struct.pack(">I", crc32c(bytes(made[:-4])))
    else:
        made[-4:] = low
        made[:4] = struct.pack(">I", crc32c(bytes(made[4:26])) ^ crc32c(bytes(made[38:-8])))
    return bytes(made)


@pytest.fixture(params=["native", "twin"])
def kernels(request: pytest.FixtureRequest) -> NativeKernels | None:
    return built_kernels() if request.param == "native" else None


@pytest.mark.parametrize("form", list(PageForm))
def test_right_pages_and_pages_of_zeros_are_right(form: PageForm, kernels: NativeKernels | None) -> None:
    pages = page(form, b"one") + bytes(PAGE) + page(form, b"two")
    assert bad_pages(pages, page_bytes=PAGE, form=form, kernels=kernels) == []


@pytest.mark.parametrize("form", list(PageForm))
@pytest.mark.parametrize("place", [0, 5, 20, 23, 40, 2000, PAGE - 9, PAGE - 7, PAGE - 1])
def test_a_changed_bit_is_seen(form: PageForm, place: int, kernels: NativeKernels | None) -> None:
    pages = bytearray(page(form, b"one") + page(form, b"two"))
    covered = form is PageForm.FULL_CRC32 or not (26 <= place < 38 or PAGE - 8 <= place < PAGE - 4)
    pages[PAGE + place] ^= 4
    assert bad_pages(pages, page_bytes=PAGE, form=form, kernels=kernels) == ([1] if covered else [])


@settings(max_examples=100, deadline=None)
@given(content=st.binary(max_size=3 * 1024), form=st.sampled_from(PageForm))
def test_both_kernels_agree(content: bytes, form: PageForm) -> None:
    pages = content.ljust(3 * 1024, b"\0")
    native, twin = (bad_pages(pages, page_bytes=1024, form=form, kernels=k) for k in (built_kernels(), None))
    assert native == twin


@pytest.mark.parametrize(
    ("flags", "form"),
    [
        (0x15, PageForm.FULL_CRC32),
        (0x15 | 2 << 5, None),
        (0, PageForm.CRC32),
        (0x21, PageForm.CRC32),
        (4 << 1 | 1, None),
        (1 << 16, None),
    ],
)
def test_the_form_is_told_by_the_first_page(flags: int, form: PageForm | None) -> None:
    first = bytes(FLAGS_OFFSET) + struct.pack(">I", flags) + bytes(1024)
    assert page_form(first) is form
