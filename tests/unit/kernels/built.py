"""The kernels, compiled from the source as it is now; without a compiler a test that wants them fails."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

from tools import build_kernels

from cloudsave.kernels.native import NativeKernels


@functools.cache
def built_kernels() -> NativeKernels:
    """The library, from a folder of its own, once per process. Raises: build_kernels.NotBuilt."""
    with tempfile.TemporaryDirectory(prefix="cloudsave-kernels-") as folder:
        return NativeKernels(build_kernels.build(Path(folder) / "libcloudsave_kernels.so"))
