"""
Ctrl-C, SIGTERM and a closed terminal end a command the same way: as KeyboardInterrupt, which unwinds.

Invariant: the exception is never raised where it would leave a lock of Python's own behind. A Condition of
`threading`, and with it `Event` and `Queue`, takes and gives back its lock in functions written in Python. An
exception on the way in or out leaves the lock taken, and every thread that meets it later waits for ever, the
one that cleans up included; a bare lock in a `with` statement is safe. Exceptions in finalizers and in
callbacks of weak references are lost. A signal that comes at one of these moments is kept, and looked at
again a little later.

Source: CPython 3.11, Lib/threading.py; bpo-29988 (signals and `with` statements).
"""

from __future__ import annotations

import _weakrefset
import atexit
import contextlib
import logging
import queue
import signal
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from cloudsave.clock import Clock

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
REPEAT_SECONDS = 2.0
"""A signal this soon after the first is its echo: terminals and supervisors often send more than one."""
LOOK_AGAIN_SECONDS = 0.0001
"""How much later a signal that came at a bad moment is looked at again: shorter than any wait."""

_DELICATE_FILES = frozenset(
    module.__file__ for module in (contextlib, logging, queue, threading, weakref, _weakrefset)
) | {"<frozen importlib._bootstrap>", __file__}
"""With this file: a signal that comes while another is looked at came at a moment as bad as that one."""
_FINALIZER = "__del__"


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
    interrupter = _Interrupter(clock)
    before = {number: signal.getsignal(number) for number in (*SIGNALS, signal.SIGALRM)}
    taken = [number for number in SIGNALS if before[number] is not signal.SIG_IGN]
    signal.signal(signal.SIGALRM, interrupter.look_again)
    for number in taken:
        signal.signal(number, interrupter.signalled)
    try:
        yield
    finally:
        if interrupter.interrupted:
            atexit.register(_ignore_signals)
        else:
            for number in (*taken, signal.SIGALRM):
                signal.signal(number, before[number] or signal.SIG_DFL)


class _Interrupter:
    """Handles the signals: raises KeyboardInterrupt, at once or at the next good moment."""

    def __init__(self, clock: Clock) -> None:
        self.interrupted = False
        """Whether a signal was received."""
        self._clock = clock
        self._received_at = 0.0
        self._wanted = False
        """Whether a signal is kept."""
        self._delicate: tuple[FrameType, int] | None = None
        """The frame and its instruction at which it was kept."""

    def signalled(self, _: int, frame: FrameType | None) -> None:
        """Handler of SIGNALS. Raises: KeyboardInterrupt."""
        now = self._clock.monotonic()
        if not self.interrupted or now - self._received_at >= REPEAT_SECONDS:
            self.interrupted, self._received_at, self._wanted = True, now, True
            self._raise_where_safe(frame)

    def look_again(self, _: int, frame: FrameType | None) -> None:
        """Handler of SIGALRM, which only we ask for. Raises: KeyboardInterrupt."""
        if self._wanted:
            self._raise_where_safe(frame)

    def _raise_where_safe(self, frame: FrameType | None) -> None:
        """
        A thread that is met twice at one instruction is waiting there, in a call that can be left: code that
        runs gets at least to the next instruction between two signals.
        """
        if frame is not None and _is_delicate(frame):
            met = self._delicate
            if met is None or met[0] is not frame or met[1] != frame.f_lasti:
                self._delicate = (frame, frame.f_lasti)
                signal.setitimer(signal.ITIMER_REAL, LOOK_AGAIN_SECONDS)
                return
        self._wanted, self._delicate = False, None
        raise KeyboardInterrupt


def _is_delicate(frame: FrameType) -> bool:
    """Whether an exception in `frame` may leave a lock behind or be lost."""
    if frame.f_code.co_filename in _DELICATE_FILES:
        return True
    caller: FrameType | None = frame
    while caller is not None:
        if caller.f_code.co_name == _FINALIZER:
            return True
        caller = caller.f_back
    return False


def _ignore_signals() -> None:
    for number in (*SIGNALS, signal.SIGALRM):
        signal.signal(number, signal.SIG_IGN)
