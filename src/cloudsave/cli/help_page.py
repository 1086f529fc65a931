"""What the help pages of all commands have in common."""

from __future__ import annotations

from collections.abc import Sequence

import click

from cloudsave.errors import ExitCode

EXIT_MEANINGS = {
    ExitCode.DONE: "done",
    ExitCode.FAILED: "failed, may work later",
    ExitCode.USAGE: "the command line or the configuration is wrong",
    ExitCode.FINDINGS: "done, and a problem was found",
    ExitCode.UNREACHABLE: "the target cannot be reached",
    ExitCode.INTEGRITY: "stored or received bytes are not what they must be",
    ExitCode.BUSY: "locked or busy",
    ExitCode.CANCELLED: "cancelled",
}
ALWAYS_POSSIBLE = (ExitCode.DONE, ExitCode.FAILED, ExitCode.USAGE, ExitCode.CANCELLED)


def write_epilog(
    formatter: click.HelpFormatter, more: Sequence[ExitCode], *, flags: Sequence[str] = ()
) -> None:
    """The end of a help page."""
    if flags:
        with formatter.section("Global options, see `cloudsave --help`"):
            formatter.write_text(" ".join(flags))
    with formatter.section("Exit codes"):
        codes = sorted({*ALWAYS_POSSIBLE, *more})
        formatter.write_dl([(str(int(code)), EXIT_MEANINGS[code]) for code in codes])
