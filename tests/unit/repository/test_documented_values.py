"""The worked example of docs/repository_format.md is what the code makes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cloudsave.kernels.pages import FingerprintKey, fingerprints
from cloudsave.repository.container import Kind, read_frames
from cloudsave.repository.crypto import LineageKeys
from cloudsave.repository.keys import key_id
from tests.unit.repository.samples import LINEAGE, REPOSITORY_KEY

DOCUMENT = (Path(__file__).parents[3] / "docs" / "repository_format.md").read_text()
EXAMPLE = DOCUMENT.partition("## 12. Worked example")[2]
KEYS = LineageKeys.derive(REPOSITORY_KEY, LINEAGE)


def test_derivations_are_documented() -> None:
    name = f"lineages/{LINEAGE}/packs/00000001-00000000"
    values = [
        key_id(REPOSITORY_KEY),
        KEYS.lineage_key.hex(),
        KEYS.object_key(name, bytes(range(24))).hex(),
        KEYS.public_key().hex(),
    ]
    assert all(f"`{value}`" in EXAMPLE for value in values)


def test_the_fingerprint_is_documented() -> None:
    key = FingerprintKey.from_bytes(KEYS.fingerprint_seed(), page_bytes=8192)
    found = np.empty(1, np.uint64)
    fingerprints(bytes(i % 251 for i in range(8192)), page_bytes=8192, key=key, out=found)
    assert f"`{int(found[0]):016x}`" in EXAMPLE


def test_the_documented_record_opens() -> None:
    """Its bytes are taken from the document and read."""
    block = EXAMPLE.partition("```\n")[2].partition("```")[0].replace("00 (64 times)", "00" * 64)
    digits = "".join(
        word
        for line in block.splitlines()
        for word in line.partition("   ")[0].split()
        if word.strip("0123456789abcdef") == ""
    )
    content = bytes.fromhex(digits)
    assert len(content) == 225
    (plain,) = read_frames(KEYS, f"lineages/{LINEAGE}/logs/00000002/history", Kind.RECORD, content)
    assert plain == b"1\t0/3000000\tno recovery target specified\n"
