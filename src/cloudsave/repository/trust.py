"""What a writer may be told of a source's blocks, so that it need not read them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt

from cloudsave.model.item import Item

Flags = npt.NDArray[np.bool_]


class Trust(Protocol):
    """What is known of the files of a source beside their bytes. Called from several threads."""

    def unchanged(self, item: Item, blocks: int) -> Flags | None:
        """
        Which of the first `blocks` blocks the parent backup has in a version that serves as well as the
        present one; None where nothing is known of this file.
        """

    def proved(self, item: Item, blocks: int) -> Flags:
        """Which of these blocks are to be read all the same, to see whether they are unchanged."""

    def differs(self, item: Item, block: int, found: bytes, stored: Callable[[], bytes]) -> None:
        """
        A block that was to be unchanged is not what is stored (which is read when asked for). It is kept as
        it was found. Raises: what makes the backup fail where that must not be.
        """
