"""
Bounded work in threads: one thing beside another, tasks from a queue, and results made ahead; the first error
ends it all.
"""

from __future__ import annotations

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


def begin(work: Callable[[], R], name: str) -> Callable[[], R]:
    """
    Do `work` in a thread beside what the caller does next. What is returned waits for its end: it gives the
    result, or raises what `work` raised; one that is never called keeps nobody from leaving.
    """
    future: Future[R] = Future()

    def carry_out() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 - carried to the thread that waits
            future.set_exception(error)

    threading.Thread(target=carry_out, name=name, daemon=True).start()
    return future.result


def run_all(
    tasks: Iterator[T],
    work: Callable[[T], None],
    *,
    workers: Callable[[], int],
    waiting_max: int | None = None,
) -> None:
    """
    Do `work` for each task, in `workers()` threads, in about the order of the tasks. `waiting_max`: tasks
    that are taken from `tasks` ahead of the threads; None: TASKS_PER_WORKER for each.

    `workers` is asked between tasks: threads that are too many rest until all tasks are handed out, and more
    are started.

    Raises: the first error of a thread or of `tasks`; what is under way is finished then, the rest is not
    begun.
    """
    _Run(work, workers).execute(tasks, waiting_max or TASKS_PER_WORKER * workers())


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
    def __init__(self, work: Callable[[T], None], workers: Callable[[], int]) -> None:
        self._work = work
        self._workers = workers
        self._threads: list[threading.Thread] = []
        self._handed_out = threading.Event()
        self._error: BaseException | None = None

    def execute(self, tasks: Iterator[T], waiting_max: int) -> None:
        waiting: queue.Queue[T | None] = queue.Queue(waiting_max)
        try:
            for task in tasks:
                self._start_workers(waiting)
                self._submit(waiting, task)
            self._handed_out.set()
            for _ in self._threads:
                self._submit(waiting, None)
        except BaseException as error:
            self._error = self._error or error
            raise
        finally:
            self._handed_out.set()
            for thread in self._threads:
                thread.join()
        if self._error is not None:
            raise self._error

    def _start_workers(self, waiting: queue.Queue[T | None]) -> None:
        for number in range(len(self._threads), self._workers()):
            thread = threading.Thread(target=self._serve, args=(number, waiting), daemon=True)
            thread.start()
            self._threads.append(thread)

    def _submit(self, waiting: queue.Queue[T | None], task: T | None) -> None:
        while True:
            if self._error is not None:
                raise self._error
            try:
                waiting.put(task, timeout=POLL_SECONDS)
            except queue.Full:
                continue
            return

    def _serve(self, number: int, waiting: queue.Queue[T | None]) -> None:
        try:
            while self._error is None:
                if number >= self._workers() and not self._handed_out.wait(POLL_SECONDS):
                    continue
                try:
                    task = waiting.get(timeout=POLL_SECONDS)
                except queue.Empty:
                    continue
                if task is None:
                    return
                self._work(task)
        except BaseException as error:  # noqa: BLE001 - carried to the thread that waits
            self._error = self._error or error
