"""Which kernels are used, and how they are built."""

from __future__ import annotations

from pathlib import Path

import pytest
from tools import build_kernels

from cloudsave.kernels import native
from cloudsave.kernels.native import ABI, NativeKernels
from tests.unit.kernels.built import built_kernels


def test_built_library_has_the_expected_abi() -> None:
    assert ABI == 5
    assert built_kernels().crc32c(0, None, 0) == 0


def test_library_of_another_abi_is_refused(tmp_path: Path) -> None:
    library = build_kernels.build(tmp_path / "libcloudsave_kernels.so", extra_options=["-DCS_ABI=99"])
    with pytest.raises(OSError, match="has ABI 99"):
        NativeKernels(library)


def test_twins_serve_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.CHOICE_VARIABLE, "python")
    assert native.load() is None


def test_library_that_cannot_be_loaded_leaves_the_twins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(native.CHOICE_VARIABLE, raising=False)
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    (tmp_path / "libcloudsave_kernels.so").write_bytes(b"not a library")
    assert native.load() is None
    build_kernels.build(tmp_path / "libcloudsave_kernels.so")
    assert isinstance(native.load(), NativeKernels)


@pytest.mark.parametrize("compiler", ["/nonexistent/cc", "false"])
def test_failed_build_says_why_and_leaves_nothing(
    compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", compiler)
    with pytest.raises(build_kernels.NotBuilt, match=compiler):
        build_kernels.build(tmp_path / "libcloudsave_kernels.so")
    assert list(tmp_path.iterdir()) == []


def test_missing_compiler_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(build_kernels.NotBuilt, match="no C compiler"):
        build_kernels.build(tmp_path / "libcloudsave_kernels.so")
