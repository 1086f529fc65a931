"""What tables need, as the catalogue tells: the queries behind `extract.py`."""

from __future__ import annotations

TABLES = """
select n.nspname, c.relname, c.oid, c.relkind::text,
       quote_ident(n.nspname) || '.' || quote_ident(c.relname), pg_table_is_visible(c.oid)
from pg_class c join pg_namespace n on n.oid = c.relnamespace
where c.relkind in ('r', 'p', 'm', 'v', 'f') and n.nspname !~ '^pg_' and n.nspname <> 'information_schema'
"""
"""All tables that can be named; psycopg gives them in no order."""

PARTITIONS = """
with recursive below as (
    select unnest(%s::oid[]) as oid
    union select i.inhrelid from pg_inherits i join below b on b.oid = i.inhparent
          join pg_class c on c.oid = i.inhparent and c.relkind = 'p'
)
select n.nspname, c.relname, c.oid,
       format('DROP %%s IF EXISTS %%I.%%I;', case c.relkind when 'v' then 'VIEW'
              when 'm' then 'MATERIALIZED VIEW' when 'f' then 'FOREIGN TABLE' else 'TABLE' end,
              n.nspname, c.relname)
from below b join pg_class c on c.oid = b.oid join pg_namespace n on n.oid = c.relnamespace order by 1, 2
"""

NEEDS = """
with recursive parts as (
    select 1259::oid as classid, oid as objid from unnest(%(tables)s::oid[]) as oid
    union select d.classid, d.objid from pg_depend d
          where d.refclassid = 1259 and d.refobjid = any(%(tables)s::oid[]) and d.deptype in ('a', 'i')
            and not (d.classid = 1259
                     and exists (select from pg_class c where c.oid = d.objid and c.relkind in ('r', 'p')))
), needed as (
    select classid, objid from parts
    union select d.refclassid, d.refobjid from pg_depend d
          join needed n on n.classid = d.classid and n.objid = d.objid
          where d.refobjid >= 16384 and d.deptype in ('n', 'a', 'i', 'e')
            and (d.refclassid <> 1259
                 or exists (select from pg_class c where c.oid = d.refobjid and c.relkind in ('S', 'c')))
)
select distinct n.classid, n.objid, i.type, i.identity,
       exists (select from pg_depend d where d.classid = n.classid and d.objid = n.objid and d.deptype = 'e')
from needed n, pg_identify_object(n.classid, n.objid, 0) i
where (n.classid, n.objid) not in (select classid, objid from parts)
  and n.classid in (1247, 1255, 1259, 2615, 3079) and n.objid >= 16384
  and not (n.classid = 1247 and exists (select from pg_type t where t.oid = n.objid and t.typelem <> 0
                                         and t.typsubscript = 'array_subscript_handler'::regproc))
  and not (n.classid = 1247 and exists (select from pg_type t join pg_class c on c.oid = t.typrelid
                                         where t.oid = n.objid and c.relkind <> 'c'))
order by n.classid, n.objid
"""
"""
Types, functions, sequences, schemas and extensions that tables refer to, directly or through others, but for
what comes with the tables themselves, row types of tables, and arrays, which come with their elements.
Members of an extension are marked: they come with it.
"""

EXISTS = """
select case %(kind)s
    when 'schema' then to_regnamespace(%(identity)s) is not null
    when 'sequence' then to_regclass(%(identity)s) is not null
    when 'composite type' then to_regtype(%(identity)s) is not null
    when 'type' then to_regtype(%(identity)s) is not null
    when 'extension' then exists (select from pg_extension where quote_ident(extname) = %(identity)s)
    else to_regprocedure(%(identity)s) is not null end
"""
