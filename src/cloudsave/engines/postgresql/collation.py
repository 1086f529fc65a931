"""
Which sort orders of a restored server differ from those that its indexes were built with.

Since version 15 a database records the version of its default sort order; collations have always done so. In
14 the default is known only by the version that the backup recorded of the source's libraries.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import psycopg
from psycopg import sql

from cloudsave.engines.postgresql.connection import connect, translate
from cloudsave.model.collation import CollationChange

APPLICATION = "cloudsave restore"
LIBRARIES_SETTING = "cloudsave.collation_libraries"
"""Among the settings of a manifest: versions such as "c=2.36 i=72.1"."""
FIRST_SERVER_WITH_DATABASE_VERSIONS = 150000

LIBRARIES = """
select coalesce(string_agg(provider || '=' || version, ' ' order by provider), '')
from (select collprovider::text as provider, max(pg_collation_actual_version(oid)) as version
      from pg_collation where collprovider in ('c', 'i') group by 1) found where version is not null
"""
_DATABASES = "select datname from pg_database where datallowconn order by datname"
_DEFAULT = """
select datcollversion, pg_database_collation_actual_version(oid) from pg_database
where datname = current_database()
"""
_DEFAULT_14 = "select datcollate not in ('C', 'POSIX') from pg_database where datname = current_database()"
_COLLATIONS = """
select c.oid, n.nspname, c.collname, c.collversion, pg_collation_actual_version(c.oid)
from pg_collation c join pg_namespace n on n.oid = c.collnamespace
where c.collversion is distinct from pg_collation_actual_version(c.oid) and c.collversion is not null
  and exists (select from pg_depend d where d.refclassid = 3456 and d.refobjid = c.oid and d.classid = 1259)
"""
_INDEXES = """
select distinct n.nspname, i.relname
from pg_index x join pg_class i on i.oid = x.indexrelid join pg_namespace n on n.oid = i.relnamespace
where exists (select from unnest(x.indcollation::oid[]) one where one = %s)
   or exists (select from pg_depend d where d.classid = 1259 and d.objid = i.oid
              and d.refclassid = 3456 and d.refobjid = %s)
order by 1, 2
"""


class PostgresCollationInspector:
    """`CollationInspector` of PostgreSQL."""

    def changes(self, url: str, recorded: Mapping[str, str]) -> Sequence[CollationChange]:
        """See `CollationInspector.changes`."""
        found: list[CollationChange] = []
        try:
            with connect(url, application_name=APPLICATION) as session:
                names = [str(row[0]) for row in session.execute(_DATABASES).fetchall()]
            for name in names:
                with connect(url, application_name=APPLICATION, dbname=name) as session:
                    found += _default_order(session, name, recorded)
                    found += _named_orders(session, name)
        except psycopg.Error as error:
            raise translate(error, "compare sort orders") from None
        return found


def _default_order(
    session: psycopg.Connection[Any], database: str, recorded: Mapping[str, str]
) -> Iterator[CollationChange]:
    again = _text(session, "REINDEX DATABASE {}", database)
    if session.info.server_version >= FIRST_SERVER_WITH_DATABASE_VERSIONS:
        row = session.execute(_DEFAULT).fetchone()
        if row is not None and row[0] is not None and row[0] != row[1]:
            refresh = _text(session, "ALTER DATABASE {} REFRESH COLLATION VERSION", database)
            # A server refuses to record that a library tells no version.
            yield CollationChange(database, "", row[0], row[1] or "", (again, refresh)[: 1 + bool(row[1])])
        return
    row = session.execute(_DEFAULT_14).fetchone()
    then = _versions(recorded.get(LIBRARIES_SETTING, "")).get("c", "")
    libraries = session.execute(LIBRARIES).fetchone()
    now = _versions(str(libraries[0]) if libraries else "").get("c", "")
    if row is not None and row[0] and then and now and then != now:
        yield CollationChange(database, "", then, now, (again,))


def _named_orders(session: psycopg.Connection[Any], database: str) -> Iterator[CollationChange]:
    for oid, schema, name, version, actual in session.execute(_COLLATIONS).fetchall():
        indexes = session.execute(_INDEXES, (oid, oid)).fetchall()
        statements = [_text(session, "REINDEX INDEX {}.{}", *index) for index in indexes]
        refresh = _text(session, "ALTER COLLATION {}.{} REFRESH VERSION", schema, name)
        yield CollationChange(database, f"{schema}.{name}", version, actual or "", (*statements, refresh))


def _versions(text: str) -> dict[str, str]:
    return {key: value for key, _, value in (part.partition("=") for part in text.split())}


def _text(session: psycopg.Connection[Any], statement: str, *names: str) -> str:
    return sql.SQL(statement).format(*map(sql.Identifier, names)).as_string(session) + ";"
