"""Fingerprints are stored in repositories: key and values must stay what they are for ever."""

from __future__ import annotations

import hashlib

import numpy as np

from cloudsave.kernels.pages import FingerprintKey, fingerprints

SEED = bytes(range(32))
KEY_SHA256 = "739af57bc2d3e4b54ccf422a25cadf1d55f603f0250bc96624df3408e4151c71"


def test_key_expands_as_in_format_1() -> None:
    key = FingerprintKey.from_bytes(SEED, page_bytes=8192)
    content = key.nh.astype("<u4").tobytes() + key.mix.astype("<u8").tobytes()
    assert len(content) == (2048 + 4) * 4 + 80
    assert hashlib.sha256(content).hexdigest() == KEY_SHA256


def test_fingerprints_are_those_of_format_1() -> None:
    out = np.empty(2, np.uint64)
    key = FingerprintKey.from_bytes(SEED, page_bytes=8192)
    fingerprints(bytes(8192) + bytes(range(256)) * 32, page_bytes=8192, key=key, out=out)
    assert [f"{value:016x}" for value in out.tolist()] == ["c5c34581b9a80e66", "2b2d0d4d176f894d"]
