"""
The command line that kills itself at one moment of a restore, as no signal from outside could time it.

    python -m tests.faults.restore_until_killed MOMENT ARGUMENT...

The moments: `promoting`, the server at its target was told to open; `opened`, it said that it has;
`forgetting`, half of the journal is gone.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from cloudsave.cli.main import run
from cloudsave.engines.postgresql import target
from cloudsave.recovery import bring_up
from cloudsave.recovery.journal import Journal


def die(*_: Any, **__: Any) -> NoReturn:
    """As a power failure: nothing of ours runs any more."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("still alive")


def after(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, and death at its end."""

    def wrapped(*arguments: Any, **named: Any) -> NoReturn:
        function(*arguments, **named)
        die()

    return wrapped


MOMENTS = {
    "promoting": (target, "run_program", after(target.run_program)),
    "opened": (bring_up, "finish_restore", die),
    "forgetting": (Journal, "_unlink", after(Journal._unlink)),
}


if __name__ == "__main__":
    place, name, instead = MOMENTS[sys.argv[1]]
    if sys.argv[1] == "forgetting":
        # The journal is begun with an unlink as well; what counts is the one at the end.
        finish = Journal.finish

        def forget(journal: Journal) -> None:
            setattr(place, name, instead)
            finish(journal)

        Journal.finish = forget  # type: ignore[method-assign]
    else:
        setattr(place, name, instead)
    sys.exit(run(sys.argv[2:]))
