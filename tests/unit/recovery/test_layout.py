"""Whatever paths a manifest names, a restore writes into its own places or nowhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.repository.samples import draft_manifest

from cloudsave.errors import IntegrityError
from cloudsave.model.item import ItemKind
from cloudsave.model.manifest import FileEntry, Manifest
from cloudsave.recovery.layout import plan_layout

TARGET = Path("/srv/restored")
SPACE = Path("/srv/space")
parts = st.sampled_from(
    ["..", ".", "", "a", "pg_tblspc", "16384", "PG_18_1", "PG_", "etc", "base", "\0", "~", "-rf"]
)
paths = st.builds(
    lambda root, found: root + "/".join(found), st.sampled_from(["", "/", "//"]), st.lists(parts, max_size=6)
)


def entry(path: str, kind: ItemKind = ItemKind.FILE, *, outside: bool = False) -> FileEntry:
    return FileEntry(path, kind, mode=0o600, size_bytes=0, modified_us=0, link_target="/etc", outside=outside)


def manifest_of(*entries: FileEntry) -> Manifest:
    draft = draft_manifest("20260101T000000Z-0001")
    return replace(draft, files=entries, tablespaces={"16384": str(SPACE)})


def allowed(place: Path) -> bool:
    """Whether a file there is in a place of this restore."""
    config = TARGET.with_name(TARGET.name + ".config")
    in_space = SPACE in place.parents and place.relative_to(SPACE).parts[0].startswith("PG_")
    return place in (TARGET, SPACE) or TARGET in place.parents or config in place.parents or in_space


@settings(max_examples=600, deadline=None)
@given(paths, st.sampled_from(list(ItemKind)), st.booleans())
def test_no_path_leads_out(path: str, kind: ItemKind, outside: bool) -> None:
    manifest = manifest_of(entry(path, kind, outside=outside))
    try:
        layout = plan_layout(manifest, TARGET, {})
    except IntegrityError:
        return
    place = layout.place(manifest.files[0])
    assert allowed(place), place
    assert ".." not in place.parts
    if kind is ItemKind.LINK:
        assert path == "pg_tblspc/16384"


def test_honest_paths_are_placed() -> None:
    """Control."""
    honest = {
        "base/1/2": TARGET / "base/1/2",
        "pg_tblspc/16384/PG_18_1/5/7": SPACE / "PG_18_1/5/7",
        "pg_tblspc/16384": SPACE,
    }
    manifest = manifest_of(*(entry(path) for path in honest))
    layout = plan_layout(manifest, TARGET, {})
    assert [layout.place(one) for one in manifest.files] == list(honest.values())


@pytest.mark.parametrize(
    "path",
    ["../x", "/etc/passwd", "base/../../x", "", "a//b", "a/./b", "pg_tblspc/16384/authorized_keys", "a\0b"],
)
def test_what_leads_out_is_refused_before_anything_is_written(path: str) -> None:
    with pytest.raises(IntegrityError, match="manifest"):
        plan_layout(manifest_of(entry(path)), TARGET, {})


def test_a_tablespace_with_a_name_that_is_no_number_is_refused() -> None:
    manifest = replace(manifest_of(), tablespaces={"../x": "/etc"})
    with pytest.raises(IntegrityError, match="tablespace"):
        plan_layout(manifest, TARGET, {})
