"""Files with secrets, which only their owner may read."""

from __future__ import annotations

import os
from pathlib import Path

from cloudsave.errors import CloudsaveError


def write_private_file(path: Path, text: str) -> None:
    """
    A new file of mode 0600, on stable storage. Raises: CloudsaveError where it exists or cannot be written.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise CloudsaveError(f"could not create file {str(path)!r}", detail=f"{error.strerror}.") from error
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
