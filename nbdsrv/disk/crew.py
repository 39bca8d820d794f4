"""Threads that share a queue, each of which waits at a door of its own.

::

    put(job) ── jobs ──┬──────────────> a thread that has just finished takes it as it comes by
                       └─ idle.pop() ─> a thread that waits: its door is opened, and no other

A ``queue.SimpleQueue`` has one lock that all idle threads wait at, and whoever takes a job lets go
of it: that wakes one more thread, which wants the interpreter only to find nothing to do. With
sixteen threads this was twenty system calls for each cold read, and a quarter of the throughput.
The thread that fell idle last is woken first: what it uses is still in the processor's cache.

Rule: nothing here is locked. Each step is one call of a deque or list, which the interpreter does
whole; who announces itself as idle looks at the queue once more, because a job may have come
between its first look and the announcement.
"""

import os
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

__all__ = ["Crew", "Done", "Job", "Results"]

Done = Callable[[Any, BaseException | None], None]
Job = tuple[Callable[..., Any], tuple[Any, ...], Done]


class Results:
    """What threads have done and the loop has not taken yet; an eventfd tells it that there is
    something, once for all that gathers until it looks.
    """

    def __init__(self) -> None:
        self.eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._gathered: deque[tuple[Crew, Done, Any, BaseException | None]] = deque()
        self._told = False

    def add(self, crew: "Crew", done: Done, result: Any, error: BaseException | None) -> None:
        """For threads."""
        self._gathered.append((crew, done, result, error))
        if not self._told:
            self._told = True
            os.eventfd_write(self.eventfd, 1)

    def begin(self) -> None:
        """The loop looks: from here on it must be told again. What is there already, it finds."""
        with suppress(BlockingIOError):
            os.eventfd_read(self.eventfd)
        self._told = False

    def take(self) -> "tuple[Crew, Done, Any, BaseException | None] | None":
        """The next one, or None."""
        return self._gathered.popleft() if self._gathered else None

    def close(self) -> None:
        """What nobody took is lost."""
        os.close(self.eventfd)


class Crew:
    """Threads, started one by one as there is more to do. All but the threads is the loop's.

    Attributes:
        outstanding: jobs whose results the loop has not taken.
    """

    def __init__(self, name: str, limit: int, results: Results) -> None:
        """``limit`` threads at most, called ``name`` and a number."""
        self._name = name
        self._limit = limit
        self._results = results
        self._jobs: deque[Job | None] = deque()
        self._idle: list[threading.Lock] = []
        self._threads: list[threading.Thread] = []
        self.outstanding = 0

    def put(self, job: Job) -> None:
        """Have a thread do it."""
        self.outstanding += 1
        if self.outstanding > len(self._threads) < self._limit:
            self._enlist()
        self._post(job)

    def muster(self, count: int) -> None:
        """Start so many threads now."""
        while len(self._threads) < min(count, self._limit):
            self._enlist()

    def close(self) -> None:
        """Wait until the queue is empty and every thread has ended."""
        for _ in self._threads:
            self._post(None)
        for thread in self._threads:
            thread.join()
        self._threads.clear()

    def _post(self, job: Job | None) -> None:
        self._jobs.append(job)
        self._wake()

    def _wake(self) -> None:
        try:
            door = self._idle.pop()
        except IndexError:
            return  # whoever finishes next sees the job
        door.release()

    def _enlist(self) -> None:
        name = f"{self._name}-{len(self._threads)}"
        thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _next(self, door: threading.Lock) -> Job | None:
        jobs, idle = self._jobs, self._idle
        while True:
            try:
                return jobs.popleft()
            except IndexError:
                idle.append(door)
            try:
                job = jobs.popleft()
            except IndexError:
                door.acquire()  # until a job has been put for this thread, or another has taken it
                continue
            try:
                idle.remove(door)
            except ValueError:  # it is being woken, for another job than this one
                door.acquire()
                if jobs:
                    self._wake()
            return job

    def _work(self) -> None:
        add = self._results.add
        door = threading.Lock()
        door.acquire()
        while (job := self._next(door)) is not None:
            work, args, done = job
            result, error = None, None
            try:
                result = work(*args)
            except BaseException as caught:  # noqa: BLE001 - handed to the loop
                error = caught
            add(self, done, result, error)
            del job, work, args, done, result, error  # an idle thread keeps no buffer alive
