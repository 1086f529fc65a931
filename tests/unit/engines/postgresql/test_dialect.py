"""The texts of PostgreSQL's positions, file names and histories."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudsave.engines.postgresql.dialect import PostgresDialect, followed_branch
from cloudsave.errors import IntegrityError, UsageError
from cloudsave.model.history import BranchPoint
from cloudsave.model.position import Position

DIALECT = PostgresDialect()
SEGMENT = 16 << 20
SEGMENTS = st.sampled_from([1 << shift for shift in range(20, 31)])


@given(st.integers(0, (1 << 64) - 1))
def test_positions_survive_their_text(offset: int) -> None:
    text = DIALECT.format_position(Position("00000001", offset))
    assert DIALECT.parse_position(f" {text.lower()} ", branch="00000001") == offset


@pytest.mark.parametrize("text", ["", "16", "16/", "/1", "16/123456789", "x/1", "16/B374D848/1", "-1/0"])
def test_other_texts_are_refused_with_an_example(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        DIALECT.parse_position(text, branch="00000001")
    assert "16/B374D848" in caught.value.hints[0]


@given(st.integers(1, (1 << 32) - 1), st.integers(0, (1 << 63) - 1), SEGMENTS)
def test_file_names_lead_back_to_the_begin_of_the_file(timeline: int, offset: int, segment: int) -> None:
    branch = f"{timeline:08X}"
    name = DIALECT.log_file_name(branch, offset, log_file_bytes=segment)
    begin = offset // segment * segment
    assert DIALECT.parse_log_file_name(name, log_file_bytes=segment) == Position(branch, begin)


def test_file_name_as_the_server_prints_it() -> None:
    assert (
        DIALECT.log_file_name("0000000A", 0x16B374D848, log_file_bytes=SEGMENT) == "0000000A00000016000000B3"
    )


@pytest.mark.parametrize(
    "name",
    [
        "00000002.history",
        "000000010000000000000001.partial",
        "000000010000000000000001.00000028.backup",
        "00000001000000000000000",
        "000000010000000000000100",
        "00000001000000000000000g",
    ],
)
def test_other_names_are_no_log_files(name: str) -> None:
    assert DIALECT.parse_log_file_name(name, log_file_bytes=SEGMENT) is None


def test_history_as_the_server_writes_it() -> None:
    content = b"# comment\n1\t0/3000148\tno recovery target specified\n\n2\t0/A0000D8\tbefore 2026-01-01\n"
    assert DIALECT.parse_history(content) == (
        BranchPoint("00000001", 0x3000148),
        BranchPoint("00000002", 0xA0000D8),
    )


def test_a_branch_that_ended_before_it_began_gave_nothing() -> None:
    """As PostgreSQL writes it after a recovery that followed 2 and stopped on 1 before 2 began."""
    assert DIALECT.parse_history(b"1\t0/3000\tpromoted\n2\t0/2000\tbefore a time\n") == (
        BranchPoint("00000001", 0x2000),
    )
    three = b"1\t0/1000\tx\n2\t0/3000\tx\n3\t0/2000\tx\n"
    assert DIALECT.parse_history(three) == (BranchPoint("00000001", 0x1000), BranchPoint("00000002", 0x2000))
    assert followed_branch(three) == "00000003"


@pytest.mark.parametrize("content", [b"1\n", b"x 0/1\n", b"2\t0/1\tx\n1\t0/2\tx\n", b"1 0-1"])
def test_damaged_history_is_refused(content: bytes) -> None:
    with pytest.raises(IntegrityError):
        DIALECT.parse_history(content)
