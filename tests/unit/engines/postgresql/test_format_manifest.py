"""The server's manifest is believed only where its own checksum fits, and then to the last file."""

from __future__ import annotations

import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudsave.engines.postgresql.format_manifest import FileDigest, compare, parse_manifest
from cloudsave.errors import IntegrityError

RECEIVED = {
    "PG_VERSION": FileDigest(3, 0x12345678),
    "base/5/1": FileDigest(8192, 7),
    "b\udce4d": FileDigest(0, 0),
}


def manifest_text(files: dict[str, FileDigest], *, version: int = 2, algorithm: str = "CRC32C") -> bytes:
    """A manifest in the server's layout."""
    entries = []
    for path, digest in files.items():
        raw = path.encode("utf-8", "surrogateescape")
        plain = raw.isascii()
        key, name = ("Path", path) if plain else ("Encoded-Path", raw.hex())
        entries.append(
            {
                key: name,
                "Size": digest.size_bytes,
                "Last-Modified": "2026-01-01 00:00:00 GMT",
                "Checksum-Algorithm": algorithm,
                "Checksum": digest.crc32c.to_bytes(4, "little").hex(),
            }
        )
    head = f'{{ "PostgreSQL-Backup-Manifest-Version": {version},\n"System-Identifier": 7561,\n"Files": '
    text = (head + json.dumps(entries) + ',\n"WAL-Ranges": [],\n').encode()
    return text + f'"Manifest-Checksum": "{hashlib.sha256(text).hexdigest()}"}}\n'.encode()


def test_manifest_that_fits_passes() -> None:
    manifest = parse_manifest(manifest_text(RECEIVED))
    assert manifest.system_identifier == "7561"
    assert dict(manifest.files) == RECEIVED
    compare(manifest, RECEIVED)


def test_missing_file_is_named() -> None:
    manifest = parse_manifest(manifest_text(RECEIVED))
    with pytest.raises(IntegrityError, match="not what the server says") as caught:
        compare(manifest, {path: digest for path, digest in RECEIVED.items() if path != "base/5/1"})
    assert "1 missing: 'base/5/1'" in caught.value.detail


def test_surplus_and_different_files_are_named() -> None:
    manifest = parse_manifest(manifest_text(RECEIVED))
    changed = {**RECEIVED, "new": FileDigest(1, 1), "PG_VERSION": FileDigest(3, 0x12345679)}
    with pytest.raises(IntegrityError) as caught:
        compare(manifest, changed)
    assert "1 unannounced: 'new'" in caught.value.detail
    assert "1 different: 'PG_VERSION'" in caught.value.detail


@given(st.data())
def test_any_changed_byte_that_the_checksum_covers_is_refused(data: st.DataObject) -> None:
    text = bytearray(manifest_text(RECEIVED))
    place = data.draw(st.integers(0, text.rindex(b'"Manifest-Checksum"') - 1))
    text[place] ^= data.draw(st.integers(1, 255))
    with pytest.raises(IntegrityError):
        parse_manifest(bytes(text))


@pytest.mark.parametrize("cut", [3, 20, 90, 200])
def test_truncated_manifest_is_refused(cut: int) -> None:
    with pytest.raises(IntegrityError):
        parse_manifest(manifest_text(RECEIVED)[:-cut])


def test_other_checksums_and_versions_are_refused() -> None:
    with pytest.raises(IntegrityError, match="damaged"):
        parse_manifest(manifest_text(RECEIVED, algorithm="SHA256"))
    with pytest.raises(IntegrityError, match="damaged"):
        parse_manifest(manifest_text(RECEIVED, version=3))
    with pytest.raises(IntegrityError, match="damaged"):
        parse_manifest(b"{}")
