"""A bounded queue of tasks and the threads that do them; the first error ends it all."""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

POLL_SECONDS = 0.2
TASKS_PER_WORKER = 2
"""Limit: tasks that wait for each thread."""
T = TypeVar("T")


def run_all(tasks: Iterator[T], work: Callable[[T], None], *, workers: int) -> None:
    """
    Do `work` for each task, in `workers` threads, in about the order of the tasks.

    Raises: the first error of a thread or of `tasks`; what is under way is finished then, the rest is not
    begun.
    """
    _Run(work).execute(tasks, workers)


class _Run(Generic[T]):
    def __init__(self, work: Callable[[T], None]) -> None:
        self._work = work
        self._error: BaseException | None = None

    def execute(self, tasks: Iterator[T], workers: int) -> None:
        waiting: queue.Queue[T | None] = queue.Queue(TASKS_PER_WORKER * workers)
        threads = [threading.Thread(target=self._serve, args=(waiting,), daemon=True) for _ in range(workers)]
        for thread in threads:
            thread.start()
        try:
            for task in itertools.chain(tasks, itertools.repeat(None, workers)):
                self._submit(waiting, task)
        except BaseException as error:
            self._error = self._error or error
            raise
        finally:
            for thread in threads:
                thread.join()
        if self._error is not None:
            raise self._error

    def _submit(self, waiting: queue.Queue[T | None], task: T | None) -> None:
        while True:
            if self._error is not None:
                raise self._error
            try:
                waiting.put(task, timeout=POLL_SECONDS)
            except queue.Full:
                continue
            return

    def _serve(self, waiting: queue.Queue[T | None]) -> None:
        try:
            while self._error is None:
                try:
                    task = waiting.get(timeout=POLL_SECONDS)
                except queue.Empty:
                    continue
                if task is None:
                    return
                self._work(task)
        except BaseException as error:  # noqa: BLE001 - carried to the thread that waits
            self._error = self._error or error
