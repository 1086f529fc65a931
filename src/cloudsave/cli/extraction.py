"""What `cloudsave restore --database` does: single databases and tables instead of a whole server."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cloudsave.cli.formats import format_size
from cloudsave.cli.frame import CommandContext
from cloudsave.config.redact import holds_secret
from cloudsave.engines.dialect_api import Dialect
from cloudsave.engines.registry import extractor, log_applier, restore_target, server_account
from cloudsave.errors import SecretInline, UsageError
from cloudsave.model.extract import DumpFormat, Selection
from cloudsave.recovery.bring_up import BringUpContext, BringUpOptions
from cloudsave.recovery.extract import Extracted, ExtractRequest, extract
from cloudsave.recovery.plan import RecoveryPlan
from cloudsave.recovery.sandbox_server import ApplyingServer, FetchingServer, SandboxServer
from cloudsave.repository.lineage import Lineage
from cloudsave.repository.reader import BackupReader

FORMATS = [one.value for one in DumpFormat]
SQL_SUFFIX = ".sql"
ALONE = ("table", "output", "to_url", "replace", "no_owner", "format")
"""Options that mean something with --database only."""
NEVER = ("start", "look", "delta", "port", "tablespace")


def is_extraction(given: Mapping[str, Any]) -> bool:
    """Whether single objects are asked for. Raises: UsageError where the options do not go together."""
    if given["database"] is None:
        stray = [name for name in ALONE if given[name]]
        if stray:
            raise UsageError(
                f"{_flag(stray[0])} goes with --database",
                hints=["--database NAME says which database to look in"],
            )
        return False
    stray = [name for name in NEVER if given[name]]
    if stray:
        raise UsageError(
            f"cannot use {_flag(stray[0])} with --database",
            detail="The restored server lives in a sandbox, only as long as it is needed.",
        )
    if not given["dry_run"] and (given["output"] is None) == (given["to_url"] is None):
        raise UsageError(
            "--database needs a place to go to",
            hints=["--output FILE writes a dump", "--to-url URL loads it into another server"],
        )
    if given["to_url"] is not None:
        if holds_secret(given["to_url"]):
            raise SecretInline(
                "a URL with a password cannot be given on the command line",
                detail="Command lines can be read by every user of this machine.",
                hints=["PostgreSQL: put it into ~/.pgpass; MySQL, MariaDB: into [client] of ~/.my.cnf"],
            )
        if given["format"]:
            raise UsageError("--format goes with --output")
    return True


def run_extraction(
    context: CommandContext,
    lineage: Lineage,
    dialect: Dialect,
    plan: RecoveryPlan,
    given: Mapping[str, Any],
    settings: Mapping[str, str],
) -> None:
    """Take out and say what was taken out."""
    reader = BackupReader(lineage, lineage.manifest(plan.backup.backup_id))
    engine = reader.manifest.engine
    bins = given["bin_dir"] or context.config.bin_directory_of(engine)
    taker = extractor(engine, version=reader.manifest.server_version, bin_directory=bins)
    applier = log_applier(engine)
    options = BringUpOptions(bin_directory=bins, settings=settings, look=applier is not None)
    server: SandboxServer
    if applier is None:
        work = BringUpContext(lineage, dialect, restore_target(engine), context.clock, context.progress)
        server = FetchingServer(plan, work, options)
    else:
        server = ApplyingServer(plan, lineage, (dialect, applier), options, context.progress)
    request = ExtractRequest(
        selection=Selection(given["database"], given["table"], keep_owners=not given["no_owner"]),
        sandbox_root=given["into"] or context.config.spool_directory or Path(tempfile.gettempdir()),
        output=given["output"],
        form=_form(given, taker.forms),
        to_url=given["to_url"] or "",
        replace=given["replace"],
        owner=given["owner"],
        server_account=server_account(engine),
        workers=context.config.workers,
    )
    _show(context, plan, request, extract(plan, reader, server, taker, request, context.progress))


def _form(given: Mapping[str, Any], forms: Sequence[DumpFormat]) -> DumpFormat:
    """As asked for; tables for a server as SQL, in which what they need fits; else by the file's name."""
    if given["format"]:
        wanted = DumpFormat(given["format"])
        if wanted not in forms:
            raise UsageError(
                f"cannot write an {wanted.value} of this engine", hints=[f"--format {forms[0].value}"]
            )
        return wanted
    if len(forms) == 1:
        return forms[0]
    if given["to_url"] is not None:
        return DumpFormat.SQL if given["table"] else DumpFormat.ARCHIVE
    is_sql = given["output"] is None or given["output"].suffix == SQL_SUFFIX
    return DumpFormat.SQL if is_sql else DumpFormat.ARCHIVE


def _show(context: CommandContext, plan: RecoveryPlan, request: ExtractRequest, done: Extracted) -> None:
    tables = [f"{schema}.{name}" for schema, name in done.found.tables]
    needs = [f"{one.kind} {one.identity}" for one in done.found.needs]
    facts = {
        "database": request.selection.database,
        "tables": tables,
        "needs": needs,
        "output": request.output,
        "to_url": request.to_url or None,
        "format": request.form.value,
        "dump_bytes": done.dump_bytes,
        "plan": plan.as_dict(),
    }

    def human() -> None:
        what = f"{len(tables)} tables of " if tables else ""
        where = request.output or request.to_url
        context.output.line(f"{what}database {request.selection.database!r} -> {where}")
        context.output.line(f"{format_size(done.dump_bytes)}, as of {plan.position_text}")
        if needs and request.form is DumpFormat.ARCHIVE:
            context.output.line(f"not in the archive, but needed by it: {', '.join(needs)}")

    context.output.emit(facts, human)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
