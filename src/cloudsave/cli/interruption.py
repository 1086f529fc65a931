"""Ctrl-C, SIGTERM and a closed terminal end a command the same way: as KeyboardInterrupt, which unwinds."""

from __future__ import annotations

import atexit
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from cloudsave.clock import Clock

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
REPEAT_SECONDS = 2.0
"""A signal this soon after the first is its echo: terminals and supervisors often send more than one."""


@contextmanager
def signals_interrupt(clock: Clock) -> Iterator[None]:
    """
    Within the context each of SIGNALS raises KeyboardInterrupt in the main thread.

    One that is ignored, as `nohup` arranges, stays ignored. A signal that comes later than REPEAT_SECONDS
    interrupts again, for clean-up that hangs.

    After an interruption the process is about to end: the handlers stay until the interpreter has waited for
    its threads, and then the signals are ignored, so that no echo turns the exit code into a death by signal.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    last: float | None = None

    def interrupt(_: int, __: FrameType | None) -> None:
        nonlocal last
        now = clock.monotonic()
        if last is None or now - last >= REPEAT_SECONDS:
            last = now
            raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in SIGNALS}
    taken = [number for number in SIGNALS if before[number] is not signal.SIG_IGN]
    for number in taken:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        if last is None:
            for number in taken:
                signal.signal(number, before[number] or signal.SIG_DFL)
        else:
            atexit.register(_ignore_signals)


def _ignore_signals() -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
