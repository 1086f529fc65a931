"""
Single databases and tables, as they were: a restore in a sandbox, and from there into a file or another
server.

What can be known to fail is found before the restore: the destination, the file. The destination is written
after everything has been read, in one transaction where the engine can.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from cloudsave.engines.extract_api import Extractor
from cloudsave.errors import DestinationUnfit, UsageError
from cloudsave.model.extract import DumpFormat, FoundObjects, Selection
from cloudsave.recovery.bring_up import recovery_digest
from cloudsave.recovery.durable import sync_directory
from cloudsave.recovery.plan import RecoveryPlan
from cloudsave.recovery.reaper import DATA_NAME
from cloudsave.recovery.restore import SERVER_ACCOUNT, RestoreRequest, choose_owner, restore_files
from cloudsave.recovery.sandbox import sandbox
from cloudsave.recovery.sandbox_server import SandboxServer
from cloudsave.repository.reader import BackupReader
from cloudsave.telemetry import Progress

PARTIAL_SUFFIX = ".partial"


@dataclass(frozen=True, slots=True)
class ExtractRequest:
    """What to take out, and where to."""

    selection: Selection
    sandbox_root: Path
    """The sandbox is made, and removed, in this directory."""
    output: Path | None = None
    form: DumpFormat = DumpFormat.SQL
    to_url: str = ""
    """The server that gets the objects; "": they go to `output`."""
    replace: bool = False
    """Whether objects that are there may be dropped."""
    owner: str | None = None
    server_account: str = SERVER_ACCOUNT
    """Who gets the files where `owner` is not given and cloudsave is root."""
    workers: int = 0


@dataclass(frozen=True, slots=True)
class Extracted:
    """What was taken out."""

    found: FoundObjects
    dump_bytes: int


def extract(
    plan: RecoveryPlan,
    reader: BackupReader,
    server: SandboxServer,
    extractor: Extractor,
    request: ExtractRequest,
    progress: Progress,
) -> Extracted:
    """
    Restore to the plan's end in a sandbox, and take the objects out.

    Raises: DestinationUnfit, ObjectsNotFound, ExtractionFailed, and what `restore_files` and
    `SandboxServer.start` raise. Whatever happens the sandbox is gone then, and the destination is as it was.
    """
    if request.to_url:
        extractor.check_destination(request.to_url, request.selection, replace=request.replace)
    if request.output is not None:
        _check_output(request.output)
    with sandbox(request.sandbox_root, reader.manifest.engine) as place:
        data = _restore(plan, reader, request, place, progress)
        dump = place / "dump" if request.output is None else _partial(request.output)
        dump.unlink(missing_ok=True)
        try:
            url = server.start(data)
            found = extractor.find(url, request.selection)
            extractor.dump(
                url,
                found,
                dump,
                form=request.form,
                replace=request.replace,
                into=request.to_url,
            )
            server.stop()
            size = dump.stat().st_size
            if request.output is None:
                extractor.load(request.to_url, dump, form=request.form, replace=request.replace)
            else:
                _publish(dump, request.output)
        finally:
            server.stop()
            dump.unlink(missing_ok=True)
    return Extracted(found, size)


def _restore(
    plan: RecoveryPlan, reader: BackupReader, request: ExtractRequest, place: Path, progress: Progress
) -> Path:
    owner = choose_owner(request.owner, place, request.server_account)
    if owner is not None:
        os.chown(place, owner.uid, owner.gid)
    files = RestoreRequest(
        directory=place / DATA_NAME,
        tablespaces={oid: str(place / f"space-{oid}") for oid in reader.manifest.tablespaces},
        owner=owner.name if owner else None,
        workers=request.workers,
        recovery_digest=recovery_digest(plan),
    )
    return restore_files(reader, files, progress=progress).directory


def _check_output(output: Path) -> None:
    if output.exists():
        raise DestinationUnfit(
            f"file exists already: {output}", hints=["name another file, or remove that one first"]
        )
    parent = output.absolute().parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UsageError(f"cannot write a file into {parent}", hints=["does the directory exist?"])


def _partial(output: Path) -> Path:
    absolute = output.absolute()
    return absolute.with_name(absolute.name + PARTIAL_SUFFIX)


def _publish(partial: Path, output: Path) -> None:
    """The file appears whole, on stable storage, and over no other one."""
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    try:
        os.link(partial, output.absolute())
    except FileExistsError as error:
        raise DestinationUnfit(f"file exists already: {output}") from error
    sync_directory(output.absolute().parent)
