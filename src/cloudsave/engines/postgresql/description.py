"""
From the facts of a transaction to what it did, in words that its author would know.

    what the server does                                   what it was
    row of pg_class deleted                                DROP; of a table pg_temp_<oid>: see below
    row of pg_class with another file, and one inserted    the relation <oid> was rewritten: ALTER TABLE,
      and deleted that is called pg_temp_<oid>             VACUUM FULL, CLUSTER, REFRESH MATERIALIZED VIEW
    row of pg_class with another file                      TRUNCATE; of an index: REINDEX; with another
                                                           tablespace: moved there
    row of pg_class changed otherwise                      ALTER, GRANT, CREATE INDEX or TRIGGER on it
    files dropped with a commit, without such rows         the same, told from the numbers alone

Source: PostgreSQL RelationSetNewRelfilenumber(), src/backend/utils/cache/relcache.c; make_new_heap(),
src/backend/commands/cluster.c.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from cloudsave.engines.postgresql.catalogue_history import CatalogueHistory, Operation
from cloudsave.engines.postgresql.format_catalogue import (
    CATALOGUES,
    LARGE_OBJECTS,
    PG_CLASS,
    PG_DATABASE,
    PG_NAMESPACE,
    TRANSIENT_PREFIX,
    NamingRow,
)
from cloudsave.engines.postgresql.names import NameBook
from cloudsave.engines.postgresql.transactions import Fact, LoggedTransaction, is_data
from cloudsave.kernels.wal_facts import FactKind
from cloudsave.model.found import Change, ChangeKind, RelationName

_TRANSIENT = re.compile(rf"{TRANSIENT_PREFIX}(\d+)")
_PARTS = frozenset({"index", "toast table"})
"""Kinds of relations that are parts of another one."""
_REWROTE = "rewrote (ALTER TABLE, VACUUM FULL, CLUSTER or REFRESH)"
_PREPARED_NOTE = (
    "it had been prepared: in the state before its commit it is still there, until ROLLBACK PREPARED ends it"
)
_ROWS = {
    FactKind.INSERT: (ChangeKind.INSERT, "inserted into"),
    FactKind.UPDATE: (ChangeKind.UPDATE, "updated in"),
    FactKind.DELETE: (ChangeKind.DELETE, "deleted from"),
}
_SIGNS = {FactKind.INSERT: "+", FactKind.UPDATE: "~", FactKind.DELETE: "-"}
_THINGS = {
    "pg_authid": "role",
    "pg_proc": "function",
    "pg_trigger": "trigger",
    "pg_policy": "policy",
    "pg_constraint": "constraint",
    "pg_extension": "extension",
    "pg_publication": "publication",
    "pg_subscription": "subscription",
    "pg_tablespace": "tablespace",
}
"""Catalogues where a row that is only deleted is a thing that was dropped."""


_OF_RELATIONS = frozenset(
    {
        "pg_class",
        "pg_attribute",
        "pg_type",
        "pg_attrdef",
        "pg_constraint",
        "pg_index",
        "pg_rewrite",
        "pg_sequence",
        "pg_namespace",
        "pg_database",
        "pg_partitioned_table",
        "pg_foreign_table",
        "pg_trigger",
        "pg_policy",
    }
)
"""Catalogues whose rows go along with those that name relations."""


@dataclass(slots=True)
class _Story:
    """The changes of one row of a naming catalogue within a transaction, as one."""

    database: int
    catalogue: int
    before: NamingRow | None
    after: NamingRow | None
    operations: list[Operation] = field(default_factory=list)
    rows: list[NamingRow] = field(default_factory=list)
    """All versions that are known."""


@dataclass(slots=True)
class Describer:
    """Describes transactions of one search."""

    history: CatalogueHistory
    names: NameBook
    rows_min: int

    def describe(self, one: LoggedTransaction) -> tuple[Change, ...]:
        """What a transaction did, the worst first."""
        return _without_parts(list(_Description(self, one).changes()))

    def stop_of(self, one: LoggedTransaction) -> tuple[int, tuple[str, ...]]:
        """
        Where replay must stop for the state just before a transaction, and what is to be said of it.

        Nearly always before its commit. DROP DATABASE is not undone by that: its files are deleted by a
        record of their own, and before it the database is marked in place as being dropped.
        Source: PostgreSQL dropdb(), src/backend/commands/dbcommands.c.
        """
        dropped = [fact for fact in one.facts if fact.kind is FactKind.DATABASE_DROPPED]
        if not dropped:
            return one.start, (_PREPARED_NOTE,) if one.prepared else ()
        stop = min(fact.start for fact in dropped)
        oids = {fact.database for fact in dropped}
        marks = [
            change.start
            for xid in (0, *one.members)
            for change in self.history.changes.get(xid, ())
            if change.operation is Operation.IN_PLACE
            and change.new is not None
            and change.catalogue == PG_DATABASE
            and change.new.oid in oids
            and change.new.being_dropped
            and change.start < stop
        ]
        note = "DROP DATABASE takes effect before its commit; commits between both are left out, too"
        return min(marks, default=stop), (note,)

    def unknown(self, one: LoggedTransaction) -> bool:
        """Whether rows of naming catalogues that it changed are unknown."""
        return any(not change.known for xid in one.members for change in self.history.changes.get(xid, ()))

    def unnamed(self, one: LoggedTransaction) -> Iterator[int]:
        """The databases of files that it names and that have no name yet."""
        for fact in one.facts:
            relevant = fact.kind is FactKind.FILE_DROPPED or (
                fact.kind in _ROWS and fact.count >= self.rows_min
            )
            if relevant and is_data(fact.relation) and not self.names.has_file(fact.database, fact.relation):
                yield fact.database
        for xid in one.members:
            for change in self.history.changes.get(xid, ()):
                row = change.old or change.new
                if row is not None and self.names.lacks_schema(change.database, row.schema):
                    yield change.database


@dataclass(slots=True)
class _Description:
    """One transaction under description."""

    by: Describer
    one: LoggedTransaction
    rewritten: set[int] = field(default_factory=set)
    """Oids of relations that were rewritten."""
    told_files: set[int] = field(default_factory=set)
    """Files that a row of pg_class accounts for."""

    def changes(self) -> Iterator[Change]:
        stories = list(self._stories())
        for story in stories:
            for row in story.rows:
                transient = _TRANSIENT.fullmatch(row.name)
                if transient and Operation.INSERT in story.operations:
                    self.rewritten.add(int(transient[1]))
                self.told_files.add(row.file)
        named = [change for story in stories for change in self._of_story(story)]
        files = [*self._of_databases(), *self._of_files()]
        yield from sorted([*named, *files], key=lambda one: _ORDER.index(one.kind))
        yield from self._of_catalogues(told=bool(stories or files))
        yield from self._of_rows()

    # ---- rows of pg_class, pg_namespace and pg_database

    def _stories(self) -> Iterator[_Story]:
        """The changes of each row, as one; those of rows that are not known are left out."""
        stories: dict[tuple[int, int, int], _Story] = {}
        changes = [c for xid in self.one.members for c in self.by.history.changes.get(xid, ())]
        for change in sorted(changes, key=lambda c: c.start):
            row = change.new or change.old
            if row is None or change.operation is Operation.IN_PLACE:
                continue
            key = (change.database, change.catalogue, row.oid)
            story = stories.setdefault(key, _Story(change.database, change.catalogue, change.old, None))
            story.after = change.new
            story.rows += [one for one in (change.old, change.new) if one is not None]
            story.operations.append(change.operation)
        yield from stories.values()

    def _of_story(self, story: _Story) -> Iterator[Change]:
        made = story.operations[0] is Operation.INSERT
        gone = story.operations[-1] is Operation.DELETE
        row = story.before if gone else story.after
        if row is None or (made and gone) or row.temporary or _TRANSIENT.fullmatch(row.name):
            return
        if story.catalogue == PG_NAMESPACE:
            kind = ChangeKind.DROP if gone else ChangeKind.CREATE if made else ChangeKind.ALTER
            verb = "dropped" if gone else "created" if made else "altered"
            yield Change(kind, f"{verb} schema {row.name} in database {self._database(story)}")
        elif story.catalogue == PG_DATABASE:
            if made or not gone:
                kind = ChangeKind.CREATE if made else ChangeKind.ALTER
                yield Change(kind, f"{'created' if made else 'altered'} database {row.name}")
        elif story.catalogue == PG_CLASS:
            yield from self._of_relation(story, row, made=made, gone=gone)

    def _database(self, story: _Story) -> str:
        return self.by.names.database(story.database)

    def _of_relation(self, story: _Story, row: NamingRow, *, made: bool, gone: bool) -> Iterator[Change]:
        name = self.by.names.by_row(story.database, row)
        if gone:
            yield Change(ChangeKind.DROP, f"dropped {name.text}", name)
        elif made:
            yield Change(ChangeKind.CREATE, f"created {name.text}", name)
        elif story.before is None:
            yield Change(ChangeKind.ALTER, f"altered {name.text}", name)
        else:
            yield self._of_update(story.before, row, name)

    def _of_update(self, before: NamingRow, after: NamingRow, name: RelationName) -> Change:
        if before.file != after.file:
            if after.oid in self.rewritten:
                return Change(ChangeKind.ALTER, f"{_REWROTE} {name.text}", name)
            if before.tablespace != after.tablespace:
                return Change(ChangeKind.ALTER, f"moved to another tablespace: {name.text}", name)
            if after.kind in "rtm":
                return Change(ChangeKind.TRUNCATE, f"truncated {name.text}", name)
            return Change(ChangeKind.ALTER, f"built anew {name.text}", name)
        if before.name != after.name:
            return Change(ChangeKind.ALTER, f"renamed {before.name} to {after.name}: {name.text}", name)
        if before.schema != after.schema:
            return Change(ChangeKind.ALTER, f"moved to another schema: {name.text}", name)
        return Change(ChangeKind.ALTER, f"altered {name.text}", name)

    # ---- numbers alone

    def _facts(self, *kinds: FactKind) -> list[Fact]:
        return [fact for fact in self.one.facts if fact.kind in kinds]

    def _of_databases(self) -> Iterator[Change]:
        for fact in self._facts(FactKind.DATABASE_DROPPED):
            name = self.by.names.database(fact.database)
            yield Change(ChangeKind.DROP, f"dropped database {name} (oid {fact.database}) with all its files")

    def _of_files(self) -> Iterator[Change]:
        """What dropped files tell where the rows of pg_class are not known."""
        dropped = [f for f in self._facts(FactKind.FILE_DROPPED) if f.relation not in self.told_files]
        made = {fact.relation for fact in self._facts(FactKind.FILE_MADE)}
        counts = self._catalogue_counts().get("pg_class", Counter())
        for fact in dropped:
            name = self.by.names.by_file(fact.tablespace, fact.database, fact.relation)
            if fact.relation in made:
                continue
            if not made:
                yield Change(ChangeKind.DROP, f"dropped the file of {name.text}", name)
            elif counts[FactKind.INSERT] or counts[FactKind.DELETE]:
                yield Change(
                    ChangeKind.ALTER, f"replaced the file of {name.text} (dropped or rewritten)", name
                )
            elif name.kind == "index":
                yield Change(ChangeKind.ALTER, f"built anew {name.text}", name)
            else:
                yield Change(ChangeKind.TRUNCATE, f"truncated {name.text} (or built it anew)", name)
        for fact in self._facts(FactKind.TRUNCATE):
            name = self.by.names.by_oid(fact.database, fact.relation)
            if not self._is_told(fact):
                yield Change(ChangeKind.TRUNCATE, f"truncated {name.text}", name)
        for fact in self._facts(FactKind.FILE_CUT):
            if fact.relation in made and fact.value == 0:
                name = self.by.names.by_file(fact.tablespace, fact.database, fact.relation)
                yield Change(ChangeKind.TRUNCATE, f"emptied {name.text}, which it had made itself", name)

    def _is_told(self, truncated: Fact) -> bool:
        """Whether a row of pg_class tells of the same truncation."""
        return any(
            story.catalogue == PG_CLASS
            and story.after is not None
            and (story.database, story.after.oid) == (truncated.database, truncated.relation)
            for story in self._stories()
        )

    def _catalogue_counts(self) -> Mapping[str, Counter[FactKind]]:
        counts: dict[str, Counter[FactKind]] = {}
        for fact in self._facts(*_ROWS):
            name = CATALOGUES.get(self.by.history.catalogue_of(fact.database, fact.relation))
            if name:
                counts.setdefault(name, Counter())[fact.kind] += fact.count
        return counts

    def _of_catalogues(self, *, told: bool) -> Iterator[Change]:
        """Rows of other catalogues: a thing that was dropped, or an alteration that nothing else tells."""
        counts = {
            name: by_kind
            for name, by_kind in self._catalogue_counts().items()
            if not told or name not in _OF_RELATIONS
        }
        if not counts:
            return
        text = ", ".join(
            f"{name} {' '.join(f'{_SIGNS[kind]}{count}' for kind, count in sorted(by_kind.items()))}"
            for name, by_kind in sorted(counts.items())
        )
        things = [
            f"{by_kind[FactKind.DELETE]} {thing}{'s' if by_kind[FactKind.DELETE] > 1 else ''}"
            for name, thing in _THINGS.items()
            if set(by_kind := counts.get(name, Counter())) == {FactKind.DELETE}
        ]
        if things:
            yield Change(ChangeKind.DROP, f"dropped {', '.join(things)} (rows of {text})")
        else:
            yield Change(ChangeKind.ALTER, f"changed definitions: rows of {text}")

    def _of_rows(self) -> Iterator[Change]:
        made = {fact.relation for fact in self._facts(FactKind.FILE_MADE)} if self.rewritten else set()
        facts = [fact for fact in self._facts(*_ROWS) if is_data(fact.relation) and fact.relation not in made]
        for fact in sorted(facts, key=lambda one: -one.count):
            catalogue = self.by.history.catalogue_of(fact.database, fact.relation)
            if fact.count < self.by.rows_min or CATALOGUES.get(catalogue):
                continue
            name = self.by.names.by_file(fact.tablespace, fact.database, fact.relation)
            inner = name.schema == "pg_catalog" and catalogue != LARGE_OBJECTS
            if name.kind == "toast table" or inner:
                continue
            kind, verb = _ROWS[fact.kind]
            rows = f"{fact.count} row{'' if fact.count == 1 else 's'}"
            yield Change(kind, f"{rows} {verb} {name.text}", name, fact.count)


_ORDER: Sequence[ChangeKind] = (
    ChangeKind.DROP,
    ChangeKind.TRUNCATE,
    ChangeKind.ALTER,
    ChangeKind.CREATE,
    ChangeKind.DELETE,
    ChangeKind.UPDATE,
    ChangeKind.INSERT,
)


def _without_parts(changes: Sequence[Change]) -> tuple[Change, ...]:
    """Changes without those of indexes and toast tables that go along with a change of a whole relation."""
    whole = {one.kind for one in changes if one.relation is not None and not _is_part(one)}
    replaced = ChangeKind.TRUNCATE in whole or any(one.text.startswith(_REWROTE) for one in changes)
    return tuple(
        one
        for one in changes
        if not _is_part(one) or not (one.kind in whole or replaced or (whole and _is_toast(one)))
    )


def _is_part(change: Change) -> bool:
    return change.relation is not None and change.relation.kind in _PARTS


def _is_toast(change: Change) -> bool:
    return change.relation is not None and change.relation.schema == "pg_toast"
