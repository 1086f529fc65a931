"""What changed during a clone is read back in order, and never by half."""

from __future__ import annotations

import io

import pytest

from cloudsave.engines.mysql.format_changes import (
    MAGIC,
    Change,
    encode_end,
    encode_size,
    encode_write,
    read_changes,
)
from cloudsave.errors import IntegrityError

WHOLE = MAGIC + encode_write("d/t.ibd", 16384, b"page") + encode_size("undo_001", 1 << 24) + encode_end()


def test_changes_are_read_back_in_order() -> None:
    found = list(read_changes(io.BytesIO(WHOLE)))
    assert found == [Change("d/t.ibd", 16384, b"page"), Change("undo_001", 1 << 24, None)]


@pytest.mark.parametrize("missing", range(1, len(WHOLE)))
def test_a_part_of_them_is_refused(missing: int) -> None:
    with pytest.raises(IntegrityError):
        list(read_changes(io.BytesIO(WHOLE[:-missing])))


@pytest.mark.parametrize("path", ["../up", "/etc/passwd", "d/../../up", ""])
def test_a_path_that_leads_outside_is_refused(path: str) -> None:
    content = MAGIC + encode_write(path, 0, b"x") + encode_end()
    with pytest.raises(IntegrityError, match="damaged"):
        list(read_changes(io.BytesIO(content)))
