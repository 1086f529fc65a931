"""What a server holds of its own log, and who reads it there."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class HeldFile:
    """One log file on the server: its name, its size, and its place in the log, [first, last)."""

    name: str
    first: int
    last: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class NamedReader:
    """A replica that we were told of. It needs the log from `needs_from` on; None: it may need all of it."""

    name: str
    needs_from: int | None
    trouble: str = ""
    """Why that is not known."""


@dataclass(frozen=True, slots=True)
class HeldLog:
    """The log files of one server at one moment, oldest first; the last one is being written."""

    branch: str
    files: tuple[HeldFile, ...]
    clock_us: int
    """The server's clock, microseconds since 1970."""
    captured: bool
    """Whether a capture of ours runs: it has compared the server's log with what is stored."""
    readers: tuple[NamedReader, ...]
    strangers: tuple[str, ...]
    """Who reads the log, is not our capture, and may be none of `readers`; none where all can be them."""
    free_bytes: int | None
    """On the file system of the files; None where it cannot be seen from here."""
