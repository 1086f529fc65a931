"""From any exception to what the user reads and the exit code."""

from __future__ import annotations

import errno
import json
import re
import traceback
from datetime import datetime

import click

from cloudsave.cli.formats import format_utc
from cloudsave.config.redact import redact
from cloudsave.errors import (
    Cancelled,
    CloudsaveError,
    LocalDiskFull,
    OutOfMemory,
    ReachablePoint,
    TargetUnreachable,
    UsageError,
)

_GUESS = re.compile(r"\.? ?\(?Did you mean (.*?)\)?$")
_DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


def as_cloudsave_error(error: BaseException) -> CloudsaveError:
    """The error to report for whatever ended a command."""
    if isinstance(error, CloudsaveError):
        return error
    if isinstance(error, KeyboardInterrupt | click.Abort | EOFError):
        return Cancelled("cancelled", detail="What was reported as stored stays stored.")
    if isinstance(error, click.ClickException):
        return _usage_error(error)
    if isinstance(error, MemoryError):
        return OutOfMemory(
            "could not get memory",
            hints=[
                "use fewer workers: --workers or CLOUDSAVE_WORKERS",
                "is a memory limit set for this process?",
            ],
        )
    if isinstance(error, OSError) and error.errno in _DISK_FULL:
        place = f' for "{error.filename}"' if error.filename else ""
        return LocalDiskFull(
            f"no space is left on this machine{place}",
            detail=f"{error.strerror}.",
            hints=["df -h and df -i show what is full"],
        )
    return CloudsaveError(
        "internal error",
        detail=f"{type(error).__name__}: {error}",
        hints=["please report this with the output of the same command and --verbose"],
    )


def _usage_error(error: click.ClickException) -> UsageError:
    """A message of click in the form of ours."""
    message = error.format_message().strip().removesuffix(".")
    guess = _GUESS.search(message)
    first, _, rest = _GUESS.sub("", message).partition("\n")
    hints = [" ".join(rest.split())] if rest.strip() else []
    hints += ["did you mean " + guess[1]] if guess else []
    context = error.ctx if isinstance(error, click.UsageError) else None
    if context is not None:
        hints.append(f"{context.command_path} --help")
    return UsageError(first[:1].lower() + first[1:], hints=hints)


def error_text(error: CloudsaveError) -> str:
    """For people; secrets are taken out."""
    return redact(str(error))


def error_json(error: CloudsaveError) -> str:
    """For programs: `{"error": {...}}` on one line; secrets are taken out."""
    facts: dict[str, object] = {
        "code": error.code,
        "message": redact(error.message),
        "detail": redact(error.detail),
        "hints": [redact(hint) for hint in error.hints],
        "exit_code": int(error.exit_code),
        "retryable": error.retryable,
    }
    if isinstance(error, TargetUnreachable):
        facts |= {"before": _point(error.before), "after": _point(error.after)}
    return json.dumps({"error": facts}, ensure_ascii=False)


def _point(point: ReachablePoint | None) -> dict[str, str | None] | None:
    if point is None:
        return None
    return {"position": point.position, "instant": _instant(point.instant)}


def _instant(instant: datetime | None) -> str | None:
    return None if instant is None else format_utc(instant)


def traceback_text(error: BaseException) -> str:
    """Where an unexpected error arose; secrets are taken out."""
    return redact("".join(traceback.format_exception(error)).rstrip())
