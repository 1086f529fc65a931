"""A binlog file ends where replay is to end, never within a transaction."""

from __future__ import annotations

import struct

import pytest

from cloudsave.engines.binlog.cut import MARIADB_GTID_LIST, cut_mariadb
from tests.unit.engines.binlog.synthetic import File


def file() -> File:
    made = File()
    made.add(MARIADB_GTID_LIST, struct.pack("<I", 2) + struct.pack("<IIQIIQ", 0, 9, 4, 3, 5, 77))
    made.mariadb(5)
    made.mariadb(6, standalone=True)
    made.mariadb(7)
    return made


@pytest.mark.parametrize("number", [5, 6, 7])
@pytest.mark.parametrize("inclusive", [True, False])
def test_a_transaction_is_in_it_or_not(number: int, *, inclusive: bool) -> None:
    made = file()
    begin, end, _ = made.transactions[number - 5]
    cut = cut_mariadb(bytes(made.content), stop=begin, inclusive=inclusive)
    last = number if inclusive else number - 1
    assert cut.place == (end if inclusive else begin)
    assert cut.transactions == last - 4
    assert cut.executed == {0: f"0-{9 if last == 4 else 11}-{last}", 3: "3-5-77"}


def test_a_place_within_a_transaction_takes_it_whole() -> None:
    made = file()
    begin, end, _ = made.transactions[1]
    assert cut_mariadb(bytes(made.content), stop=begin + 10, inclusive=False).place == end


def test_a_transaction_that_is_cut_off_is_left_out() -> None:
    made = file()
    begin, _, _ = made.transactions[-1]
    for missing in (1, 20, 60):
        cut = cut_mariadb(bytes(made.content[:-missing]), stop=1 << 32, inclusive=False)
        assert (cut.place, cut.executed[0]) == (begin, "0-11-6")
