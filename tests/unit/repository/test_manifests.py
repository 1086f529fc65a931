"""Manifests are read back as they were written, whatever is in them."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloudsave.errors import FormatUnsupported, IntegrityError, UnknownBackup
from cloudsave.model.item import CorruptPage, ItemKind
from cloudsave.model.manifest import BackupStatistics, ChangeDetection, FileEntry, Manifest, Rung
from cloudsave.model.position import Position
from cloudsave.repository.manifests import decode_manifest, encode_manifest
from cloudsave.store.memory import MemoryStore
from tests.unit.repository.samples import draft_manifest, lineage_on

text = st.text(st.characters(codec="utf-8"), max_size=20)
paths = st.binary(min_size=1, max_size=20).map(lambda raw: raw.decode("utf-8", "surrogateescape"))
numbers = st.integers(0, (1 << 62))
entries = st.builds(
    FileEntry,
    path=paths,
    kind=st.sampled_from(ItemKind),
    mode=st.integers(0, 0o7777),
    size_bytes=numbers,
    modified_us=numbers,
    page_bytes=numbers,
    link_target=paths,
    outside=st.booleans(),
    map_index=st.integers(-1, 9),
    map_ordinal=st.integers(-1, 9),
)
positions = st.builds(Position, st.from_regex(r"[0-9A-F]{8}", fullmatch=True), numbers)
NOT_IN_THE_FIRST_FORM = {"notes", "detection", "complete_until_us"}
"""Fields that older manifests lack."""
manifests = st.builds(
    Manifest,
    backup_id=text,
    lineage=text,
    source=text,
    engine=text,
    server_version=text,
    kind=st.sampled_from(["full", "incremental"]),
    parent=text,
    method=text,
    tool_version=text,
    started_us=numbers,
    finished_us=numbers,
    start=positions,
    stop=positions,
    log_file_bytes=numbers,
    page_bytes=numbers,
    page_checksums=st.booleans(),
    tablespaces=st.dictionaries(text, paths, max_size=3),
    settings=st.dictionaries(text, text, max_size=3),
    packs=st.lists(text, max_size=3).map(tuple),
    maps=st.lists(text, max_size=3).map(tuple),
    files=st.lists(entries, max_size=4).map(tuple),
    corrupt_pages=st.lists(st.builds(CorruptPage, paths, numbers, text), max_size=2).map(tuple),
    statistics=st.builds(
        BackupStatistics, numbers, numbers, numbers, numbers, numbers, numbers, st.floats(0, 1e9)
    ),
    notes=st.lists(text, max_size=2).map(tuple),
    complete_until_us=numbers,
)


@settings(max_examples=100, deadline=None)
@given(manifest=manifests)
def test_manifests_are_read_back(manifest: Manifest) -> None:
    content = encode_manifest(manifest)
    assert content.isascii()
    assert decode_manifest(content, "a manifest") == manifest


def fields_of(manifest: Manifest) -> dict[str, Any]:
    """The JSON object."""
    return dict(json.loads(encode_manifest(manifest)))


def test_a_newer_manifest_is_named_as_such() -> None:
    fields = {**fields_of(draft_manifest("a")), "format": 2}
    with pytest.raises(FormatUnsupported):
        decode_manifest(json.dumps(fields).encode(), "a manifest")


def test_columns_may_stand_in_any_order() -> None:
    entry = FileEntry("base/1", ItemKind.FILE, 0o600, size_bytes=5, map_index=0, map_ordinal=0)
    manifest = draft_manifest("a")
    fields = fields_of(manifest)
    columns = list(reversed(fields["file_columns"]))
    fields["file_columns"] = columns
    fields["files"] = [[getattr(entry, column) for column in columns]]
    assert decode_manifest(json.dumps(fields).encode(), "a manifest").files == (entry,)


@pytest.mark.parametrize("name", sorted(fields_of(draft_manifest("a")).keys() - NOT_IN_THE_FIRST_FORM))
def test_a_manifest_without_one_of_its_fields_is_refused(name: str) -> None:
    fields = fields_of(draft_manifest("a"))
    del fields[name]
    with pytest.raises(IntegrityError, match="cannot be read"):
        decode_manifest(json.dumps(fields).encode(), "a manifest")


def test_manifests_of_before_do_not_tell_how_changes_were_detected() -> None:
    fields = fields_of(draft_manifest("a"))
    del fields["detection"]
    assert decode_manifest(json.dumps(fields).encode(), "a manifest").detection == ChangeDetection()


def test_how_changes_were_detected_is_read_back() -> None:
    detection = ChangeDetection(Rung.LOG, "", ("base/5/16384",), 7, 8, True)
    manifest = replace(draft_manifest("a"), detection=detection)
    assert decode_manifest(encode_manifest(manifest), "a manifest") == manifest


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'{"format": 1}', b"\xff"])
def test_what_is_no_manifest_is_refused(content: bytes) -> None:
    with pytest.raises(IntegrityError):
        decode_manifest(content, "a manifest")


def test_an_unknown_field_is_refused() -> None:
    """It may change what is to be restored; see the versioning rules of the format."""
    fields = {**fields_of(draft_manifest("a")), "deltas": []}
    with pytest.raises(IntegrityError):
        decode_manifest(json.dumps(fields).encode(), "a manifest")


def test_a_backup_that_is_not_there_is_unknown() -> None:
    with pytest.raises(UnknownBackup):
        lineage_on(MemoryStore()).manifest("20260101T000000Z-0001")
