"""Set-up of logging. Data goes to stdout by the CLI; logs go to stderr and never hold secrets."""

from __future__ import annotations

import logging
import sys
from typing import Protocol

ROOT_LOGGER = "cloudsave"


def configure_logging(*, verbose: bool = False, quiet: bool = False) -> None:
    """
    Send the logs of cloudsave to stderr: warnings by default, all with `verbose`, errors only with `quiet`.
    """
    level = logging.DEBUG if verbose else logging.ERROR if quiet else logging.WARNING
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger(ROOT_LOGGER)
    logger.handlers[:] = [handler]
    logger.setLevel(level)
    logger.propagate = False


class Progress(Protocol):
    """Receives the advance of long work; implementations must be cheap and thread-safe."""

    def begin(self, label: str, *, bytes_total: int | None) -> None:
        """A phase begins; `bytes_total` is None where the amount is unknown."""

    def advance(self, bytes_done: int) -> None:
        """`bytes_done` more bytes of the current phase are done."""

    def note(self, text: str) -> None:
        """One sentence for the person who waits."""

    def finish(self) -> None:
        """The current phase is over."""


class NoProgress:
    """Progress that nobody watches."""

    def begin(self, label: str, *, bytes_total: int | None) -> None:
        """Ignore."""

    def advance(self, bytes_done: int) -> None:
        """Ignore."""

    def note(self, text: str) -> None:
        """Ignore."""

    def finish(self) -> None:
        """Ignore."""
