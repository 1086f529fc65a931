"""
The backup manifest that BASE_BACKUP sends, and its comparison with what arrived.

A JSON object of these keys, the last on its own line:

| key                              | value                                                            |
|----------------------------------|------------------------------------------------------------------|
| PostgreSQL-Backup-Manifest-Version | 1; 2 since PostgreSQL 17                                       |
| System-Identifier                | number (version 2)                                               |
| Files                            | list of Path or Encoded-Path (hex), Size, Checksum-Algorithm, Checksum |
| WAL-Ranges                       | list of Timeline, Start-LSN, End-LSN                             |
| Manifest-Checksum                | SHA-256 (hex) of all bytes before the line that holds it         |

A CRC32C checksum is the hex form of the four bytes of the value, little-endian.
Source: PostgreSQL src/backend/backup/backup_manifest.c; manual, Backup Manifest Format.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

from cloudsave.errors import IntegrityError

VERSIONS = (1, 2)
ALGORITHM = "CRC32C"
_NAMES_SHOWN_MAX = 5
"""Limit: file names in one error."""
_CHECKSUM_LINE = b'\n"Manifest-Checksum"'


@dataclass(frozen=True, slots=True)
class FileDigest:
    """Size and CRC-32C of a file's contents."""

    size_bytes: int
    crc32c: int


@dataclass(frozen=True, slots=True)
class BackupManifest:
    """What the server says that it has sent."""

    files: Mapping[str, FileDigest]
    system_identifier: str
    """"" before PostgreSQL 17."""


def parse_manifest(content: bytes) -> BackupManifest:
    """A manifest whose own checksum fits. Raises: IntegrityError."""
    line_begin = content.rfind(_CHECKSUM_LINE) + 1
    if line_begin <= 0:
        raise _damaged("it has no checksum")
    try:
        document = json.loads(content)
        if hashlib.sha256(content[:line_begin]).hexdigest() != document["Manifest-Checksum"]:
            raise _damaged("its own checksum does not fit")
        if document["PostgreSQL-Backup-Manifest-Version"] not in VERSIONS:
            raise _damaged(f"it has version {document['PostgreSQL-Backup-Manifest-Version']!r}")
        files = dict(_file(entry) for entry in document["Files"])
        return BackupManifest(files, str(document.get("System-Identifier", "")))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(f"it cannot be read ({type(error).__name__})") from None


def compare(manifest: BackupManifest, received: Mapping[str, FileDigest]) -> None:
    """Hold what arrived against the manifest. Raises: IntegrityError naming the files."""
    missing = sorted(manifest.files.keys() - received.keys())
    surplus = sorted(received.keys() - manifest.files.keys())
    different = sorted(
        path for path, digest in received.items() if manifest.files.get(path, digest) != digest
    )
    parts = [
        f"{len(paths)} {what}: {', '.join(map(repr, paths[:_NAMES_SHOWN_MAX]))}"
        for what, paths in (("missing", missing), ("unannounced", surplus), ("different", different))
        if paths
    ]
    if parts:
        raise IntegrityError(
            "base backup is not what the server says it has sent",
            detail=f"Files by the server's manifest: {'; '.join(parts)}.",
            hints=["does the network path or a proxy damage data? run the backup again"],
        )


def _file(entry: Mapping[str, object]) -> tuple[str, FileDigest]:
    if "Encoded-Path" in entry:
        path = bytes.fromhex(str(entry["Encoded-Path"])).decode("utf-8", "surrogateescape")
    else:
        path = str(entry["Path"])
    if entry["Checksum-Algorithm"] != ALGORITHM:
        raise _damaged(f"file {path!r} has a checksum of the kind {entry['Checksum-Algorithm']!r}")
    checksum = bytes.fromhex(str(entry["Checksum"]))
    size = entry["Size"]
    if len(checksum) != 4 or not isinstance(size, int):
        raise _damaged(f"the entry of file {path!r} is malformed")
    return path, FileDigest(size, int.from_bytes(checksum, "little"))


def _damaged(what: str) -> IntegrityError:
    return IntegrityError("backup manifest of the server is damaged", detail=f"Of the manifest: {what}.")
