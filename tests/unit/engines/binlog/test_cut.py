"""A binlog file ends where replay is to end, never within a transaction."""

from __future__ import annotations

import struct

import pytest

from cloudsave.engines.binlog.cut import MARIADB_GTID_LIST, GtidSet, cut_mariadb, cut_mysql
from cloudsave.engines.binlog.format_event import MYSQL_ANONYMOUS
from cloudsave.errors import UnsuitableSettings
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


UUID_TEXT = "a43a2c1b-e94e-11f1-a479-02fc00000001"


def mysql_file() -> File:
    made = File()
    for number in (5, 6, 8):
        made.mysql(number, instant_us=number)
    return made


@pytest.mark.parametrize(
    ("index", "inclusive", "gtids"), [(0, False, ""), (1, False, ":5-5"), (2, True, ":5-6:8-8")]
)
def test_a_transaction_of_mysql_is_in_it_or_not(index: int, gtids: str, *, inclusive: bool) -> None:
    made, found = mysql_file(), GtidSet()
    begin, end, _ = made.transactions[index]
    place = cut_mysql(bytes(made.content), found, stop=begin, inclusive=inclusive)
    assert place == (end if inclusive else begin)
    assert str(found) == (UUID_TEXT + gtids if gtids else "")


def test_a_transaction_of_mysql_that_is_cut_off_is_left_out() -> None:
    made, found = mysql_file(), GtidSet()
    assert (
        cut_mysql(bytes(made.content[:-1]), found, stop=1 << 32, inclusive=False) == made.transactions[-1][0]
    )
    assert str(found) == f"{UUID_TEXT}:5-6"


def test_a_transaction_without_a_gtid_is_refused() -> None:
    made = File()
    made.add(MYSQL_ANONYMOUS, bytes(60))
    with pytest.raises(UnsuitableSettings, match="without a GTID"):
        cut_mysql(bytes(made.content), GtidSet(), stop=1 << 32, inclusive=False)
