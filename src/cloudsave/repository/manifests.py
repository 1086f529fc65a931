"""
Manifests as bytes: one JSON object, ASCII, keys sorted, as the plain text of a sealed and signed container.

Fields are those of `model.manifest.Manifest`; `files` is a list of rows in the order of FILE_COLUMNS,
`corrupt_pages` of [path, block, reason]. Paths that are not UTF-8 appear with surrogate escapes.
Source: docs/repository_format.md.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from cloudsave.errors import FormatUnsupported, IntegrityError
from cloudsave.model.item import CorruptPage, ItemKind
from cloudsave.model.manifest import BackupStatistics, ChangeDetection, FileEntry, Manifest, Rung
from cloudsave.model.position import Position

MANIFEST_FORMAT = 1
FILE_COLUMNS = tuple(field.name for field in dataclasses.fields(FileEntry))


def encode_manifest(manifest: Manifest) -> bytes:
    """The manifest's plain text."""
    fields: dict[str, Any] = {
        field.name: getattr(manifest, field.name) for field in dataclasses.fields(Manifest)
    }
    fields["start"] = [manifest.start.branch, manifest.start.offset]
    fields["stop"] = [manifest.stop.branch, manifest.stop.offset]
    fields["tablespaces"] = dict(manifest.tablespaces)
    fields["settings"] = dict(manifest.settings)
    fields["files"] = [[getattr(entry, name) for name in FILE_COLUMNS] for entry in manifest.files]
    fields["corrupt_pages"] = [[page.path, page.block, page.reason] for page in manifest.corrupt_pages]
    fields["statistics"] = dataclasses.asdict(manifest.statistics)
    fields["detection"] = dataclasses.asdict(manifest.detection)
    return json.dumps(
        {"format": MANIFEST_FORMAT, "file_columns": FILE_COLUMNS, **fields},
        sort_keys=True,
        separators=(",", ":"),
    ).encode("ascii")


def decode_manifest(content: bytes, what: str) -> Manifest:
    """Parse a manifest. Raises: IntegrityError, FormatUnsupported."""
    try:
        fields: dict[str, Any] = json.loads(content)
        if fields.pop("format") != MANIFEST_FORMAT:
            raise _unsupported(what)
        columns = fields.pop("file_columns")
        kind_at = columns.index("kind")
        files = []
        for row in fields["files"]:
            row[kind_at] = ItemKind(row[kind_at])
            files.append(FileEntry(**dict(zip(columns, row, strict=True))))
        fields["files"] = tuple(files)
        fields["corrupt_pages"] = tuple(CorruptPage(*row) for row in fields["corrupt_pages"])
        fields["statistics"] = BackupStatistics(**fields["statistics"])
        fields["detection"] = _decode_detection(fields.get("detection", {}))
        for name in ("start", "stop"):
            fields[name] = Position(*fields[name])
        for name in ("packs", "maps", "notes"):
            fields[name] = tuple(fields[name])
        return Manifest(**fields)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(f"{what} cannot be read", detail=f"It is malformed: {error}.") from error


def decode_references(content: bytes, what: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The packs and maps that a manifest names. Raises: IntegrityError, FormatUnsupported."""
    try:
        fields: dict[str, Any] = json.loads(content)
        if fields["format"] != MANIFEST_FORMAT:
            raise _unsupported(what)
        return tuple(map(str, fields["packs"])), tuple(map(str, fields["maps"]))
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{what} cannot be read", detail=f"It is malformed: {error}.") from error


def _unsupported(what: str) -> FormatUnsupported:
    return FormatUnsupported(
        f"cannot read {what}: a newer format", hints=["use a newer release of cloudsave"]
    )


def _decode_detection(fields: dict[str, Any]) -> ChangeDetection:
    """Absent in manifests of the first releases."""
    if not fields:
        return ChangeDetection()
    whole_files = tuple(fields.pop("whole_files"))
    return ChangeDetection(rung=Rung(fields.pop("rung")), whole_files=whole_files, **fields)
