"""What a transaction did, told from rows of catalogues where they are known, and else from numbers alone."""

from __future__ import annotations

import pytest

from cloudsave.engines.postgresql.catalogue_history import CatalogueHistory, Operation, RowChange
from cloudsave.engines.postgresql.description import Describer
from cloudsave.engines.postgresql.format_catalogue import PG_CLASS, PG_DATABASE, NamingRow
from cloudsave.engines.postgresql.log_search import PostgresLogSearch
from cloudsave.engines.postgresql.names import BY_BACKUP, NameBook
from cloudsave.engines.postgresql.transactions import Fact, LoggedTransaction
from cloudsave.errors import UnsupportedVersion
from cloudsave.kernels.wal_facts import FactKind
from cloudsave.model.found import ChangeKind, TransactionEnd

XID = 700
ORDERS = NamingRow(PG_CLASS, 16_384, "orders", 2200, 16_384, 0, "r")
INDEX = NamingRow(PG_CLASS, 16_387, "orders_key", 2200, 16_387, 0, "i")


def fact(kind: FactKind, relation: int = 16_384, count: int = 1, *, value: int = 0, start: int = 100) -> Fact:
    return Fact(kind, start, value, 1663, 5, relation, count)


def change(
    operation: Operation, old: NamingRow | None, new: NamingRow | None, *, start: int = 50
) -> RowChange:
    row = old or new
    assert row is not None
    return RowChange(start, 5, row.catalogue, operation, old, new)


def renamed(row: NamingRow, **changed: object) -> NamingRow:
    fields = {name: getattr(row, name) for name in NamingRow.__slots__} | changed
    return NamingRow(**fields)


def told(facts: list[Fact], *changes: RowChange, rows_min: int = 10) -> list[tuple[ChangeKind, str]]:
    names = NameBook(18)
    for row in (ORDERS, INDEX):
        names.add(5, row, by=BY_BACKUP)
    history = CatalogueHistory(18, changes={XID: list(changes)})
    one = LoggedTransaction(XID, TransactionEnd.COMMITTED, 900, 1, (XID,), facts)
    described = Describer(history, names, rows_min).describe(one)
    return [(one.kind, one.text.replace(" in database 5", "")) for one in described]


def test_numbers_alone_tell_a_drop_and_a_truncation_apart() -> None:
    dropped = fact(FactKind.FILE_DROPPED)
    assert told([dropped]) == [(ChangeKind.DROP, "dropped the file of table public.orders")]
    made = fact(FactKind.FILE_MADE, 20_000)
    assert told([dropped, made, fact(FactKind.UPDATE, PG_CLASS)]) == [
        (ChangeKind.TRUNCATE, "truncated table public.orders (or built it anew)")
    ]
    assert told([dropped, made, fact(FactKind.INSERT, PG_CLASS), fact(FactKind.DELETE, PG_CLASS)]) == [
        (ChangeKind.ALTER, "replaced the file of table public.orders (dropped or rewritten)")
    ]
    assert told([fact(FactKind.FILE_DROPPED, 16_387), fact(FactKind.FILE_MADE, 20_000)]) == [
        (ChangeKind.ALTER, "built anew index public.orders_key")
    ]
    unknown = told([fact(FactKind.FILE_DROPPED, 17_000)])
    assert unknown == [
        (ChangeKind.DROP, "dropped the file of relation with file 1663/5/17000 (name unknown)")
    ]


def test_a_file_that_came_and_went_is_nothing() -> None:
    assert told([fact(FactKind.FILE_DROPPED, 20_000), fact(FactKind.FILE_MADE, 20_000)]) == []


def test_what_was_emptied_by_its_own_maker_is_told() -> None:
    cut = fact(FactKind.FILE_CUT, 16_384)
    assert told([cut]) == [], "the end of a file that VACUUM gave back"
    assert told([cut, fact(FactKind.FILE_MADE)])[0][0] is ChangeKind.TRUNCATE


def test_rows_of_pg_class_tell_what_was_done() -> None:
    moved = renamed(ORDERS, file=20_000)
    assert told([], change(Operation.UPDATE, ORDERS, moved)) == [
        (ChangeKind.TRUNCATE, "truncated table public.orders")
    ]
    transient = renamed(ORDERS, oid=20_000, name="pg_temp_16384", file=20_000)
    swapped = renamed(transient, file=16_384)
    rewrite = (
        change(Operation.INSERT, None, transient),
        change(Operation.UPDATE, ORDERS, moved, start=60),
        change(Operation.UPDATE, transient, swapped, start=61),
        change(Operation.DELETE, swapped, None, start=62),
    )
    copied = fact(FactKind.INSERT, 20_000, 500)
    assert told([fact(FactKind.FILE_DROPPED), fact(FactKind.FILE_MADE, 20_000), copied], *rewrite) == [
        (ChangeKind.ALTER, "rewrote (ALTER TABLE, VACUUM FULL, CLUSTER or REFRESH) table public.orders")
    ]
    elsewhere = renamed(ORDERS, file=20_000, tablespace=17_000)
    assert told([], change(Operation.UPDATE, ORDERS, elsewhere))[0][1].startswith(
        "moved to another tablespace"
    )
    other = renamed(ORDERS, schema=17_001)
    assert told([], change(Operation.UPDATE, ORDERS, other))[0][1].startswith("moved to another schema")
    assert told([], change(Operation.INSERT, None, ORDERS), change(Operation.DELETE, ORDERS, None)) == []
    assert told([], change(Operation.DELETE, renamed(ORDERS, temporary=True), None)) == []


def test_a_truncation_that_is_logged_twice_is_told_once() -> None:
    again = fact(FactKind.TRUNCATE, 16_384)
    assert len(told([again], change(Operation.UPDATE, ORDERS, renamed(ORDERS, file=20_000)))) == 1
    assert told([again]) == [(ChangeKind.TRUNCATE, "truncated table public.orders")]


def test_other_definitions_are_told_by_their_catalogues() -> None:
    assert told([fact(FactKind.DELETE, 1255, 2)]) == [
        (ChangeKind.DROP, "dropped 2 functions (rows of pg_proc -2)")
    ]
    assert told([fact(FactKind.UPDATE, 1255), fact(FactKind.INSERT, 1247, 2)]) == [
        (ChangeKind.ALTER, "changed definitions: rows of pg_proc ~1, pg_type +2")
    ]
    with_table = told(
        [fact(FactKind.DELETE, 1247), fact(FactKind.DELETE, 1255)], change(Operation.DELETE, ORDERS, None)
    )
    assert [kind for kind, _ in with_table] == [ChangeKind.DROP, ChangeKind.DROP]


def test_rows_of_data_are_told_where_they_are_enough() -> None:
    facts = [fact(FactKind.DELETE, count=10), fact(FactKind.UPDATE, count=9), fact(FactKind.DELETE, 2613, 12)]
    assert told(facts) == [
        (ChangeKind.DELETE, "12 rows deleted from catalogue pg_catalog.pg_largeobject"),
        (ChangeKind.DELETE, "10 rows deleted from table public.orders"),
    ]


def test_a_dropped_database_is_stopped_before_its_mark() -> None:
    mark = NamingRow(PG_DATABASE, 5, "shop", being_dropped=True)
    history = CatalogueHistory(18)
    dropped = fact(FactKind.DATABASE_DROPPED, 0, start=400)
    one = LoggedTransaction(XID, TransactionEnd.COMMITTED, 900, 1, (XID,), [dropped])
    describer = Describer(history, NameBook(18), 10)
    assert describer.stop_of(one)[0] == 400
    other = renamed(mark, oid=6)
    for start, row in ((200, mark), (300, other), (350, renamed(mark, being_dropped=False))):
        history.changes.setdefault(0, []).append(
            RowChange(start, 0, PG_DATABASE, Operation.IN_PLACE, None, row)
        )
    assert describer.stop_of(one)[0] == 200


def test_a_version_whose_log_nobody_knows_is_refused() -> None:
    for version in ("13.4", "99beta1", ""):
        with pytest.raises(UnsupportedVersion):
            PostgresLogSearch(version, log_file_bytes=1 << 24)
    PostgresLogSearch("18rc1", log_file_bytes=1 << 24)
