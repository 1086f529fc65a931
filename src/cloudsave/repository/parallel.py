"""Bounded work in threads: tasks from a queue, and results made ahead; the first error ends it all."""

from __future__ import annotations

import itertools
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

from cloudsave.store.api import ObjectStore

POLL_SECONDS = 0.2
TASKS_PER_WORKER = 2
"""Limit: tasks that wait for each thread."""
SMALL_READS_IN_FLIGHT = 16
"""Limit: small objects that are read from a distant store, or deleted in it, at the same time."""
T = TypeVar("T")
R = TypeVar("R")


def run_all(
    tasks: Iterator[T], work: Callable[[T], None], *, workers: int, waiting_max: int | None = None
) -> None:
    """
    Do `work` for each task, in `workers` threads, in about the order of the tasks. `waiting_max`: tasks that
    are taken from `tasks` ahead of the threads; None: TASKS_PER_WORKER for each.

    Raises: the first error of a thread or of `tasks`; what is under way is finished then, the rest is not
    begun.
    """
    _Run(work).execute(tasks, workers, waiting_max or TASKS_PER_WORKER * workers)


def map_ahead(work: Callable[[T], R], items: Iterable[T], *, in_flight: int) -> Iterator[R]:
    """
    The results of `work` in the order of `items`, up to `in_flight` of them under way at once. Raises: what
    `work` raises, when its result's turn comes.
    """
    if in_flight == 1:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(in_flight) as pool:
        waiting: deque[Future[R]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) >= in_flight:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def reads_in_flight(store: ObjectStore) -> int:
    """How many small objects to read at once: where a read takes no round trip a thread is dearer."""
    return SMALL_READS_IN_FLIGHT if store.capabilities.distant else 1


class _Run(Generic[T]):
    def __init__(self, work: Callable[[T], None]) -> None:
        self._work = work
        self._error: BaseException | None = None

    def execute(self, tasks: Iterator[T], workers: int, waiting_max: int) -> None:
        waiting: queue.Queue[T | None] = queue.Queue(waiting_max)
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
