"""The threads on which blocking work is done, and the way its results come back.

::

    event loop                         threads
    submit(work, done) --- queue --->  work()
    complete(): done() <-- deque ----  result        (an eventfd wakes the loop)

Rule: threads touch files, never sockets; ``done`` always runs on the event loop's thread, so
that everything about a connection stays single-threaded and needs no lock.

A ThreadPoolExecutor would do the same with a Future, two locks and a self-pipe per job; a 4 KiB
write has not that much time.
"""

import asyncio
import os
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, TypeVar, TypeVarTuple

__all__ = ["Workers"]

T = TypeVar("T")
Ts = TypeVarTuple("Ts")
Done = Callable[[Any, BaseException | None], None]
Job = tuple[Callable[..., Any], tuple[Any, ...], Done]

DEFAULT_THREADS = 16
"""Enough reads in flight to keep one NVMe or a small array busy; more only queue below."""


class Workers:
    """A bounded pool of daemon threads, started as they are needed.

    Not thread-safe: ``submit``, ``run``, ``complete`` and ``close`` belong to the loop.
    """

    def __init__(self, threads: int = DEFAULT_THREADS) -> None:
        self._limit = threads
        self._threads: list[threading.Thread] = []
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._finished: deque[tuple[Done, Any, BaseException | None]] = deque()
        self._eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.outstanding = 0

    def fileno(self) -> int:
        """Readable when ``complete`` has something to do."""
        return self._eventfd

    def submit(self, work: Callable[[*Ts], object], *args: *Ts, done: Done) -> None:
        """Have a thread call ``work(*args)``, then the loop ``done(result, error)``."""
        self.outstanding += 1
        if self.outstanding > len(self._threads) < self._limit:
            self._start_thread()
        self._jobs.put((work, args, done))

    async def run(self, work: Callable[[*Ts], T], *args: *Ts) -> T:
        """Have a thread call ``work(*args)`` and return what it returns.

        Cancellation is delayed until the thread has finished: the work may be using a buffer or
        a descriptor that the caller is about to give away.
        """
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()

        def done(result: T, error: BaseException | None) -> None:
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)

        self.submit(work, *args, done=done)
        cancelled = None
        while not future.done():
            try:
                await asyncio.shield(future)
            except asyncio.CancelledError as error:
                if future.cancelled():
                    raise
                cancelled = error
            except BaseException:  # noqa: BLE001 - raised again by result() below
                break
        if cancelled is not None:
            future.exception()  # seen: the caller no longer wants it
            raise cancelled
        return future.result()

    def complete(self) -> None:
        """Deliver what has finished. Call when ``fileno`` is readable."""
        with suppress(BlockingIOError):
            os.eventfd_read(self._eventfd)
        finished = self._finished
        while finished:
            done, result, error = finished.popleft()
            self.outstanding -= 1
            done(result, error)

    def close(self) -> None:
        """End the threads once their queue is empty. Results not yet delivered are lost."""
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()
        self._threads.clear()
        os.close(self._eventfd)

    def _start_thread(self) -> None:
        name = f"nbdsrv-{len(self._threads)}"
        thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _work(self) -> None:
        get, finished, eventfd = self._jobs.get, self._finished, self._eventfd
        while (job := get()) is not None:
            work, args, done = job
            result, error = None, None
            try:
                result = work(*args)
            except BaseException as caught:  # noqa: BLE001 - handed to the loop
                error = caught
            finished.append((done, result, error))
            del job, work, args, done, result, error  # an idle thread keeps no buffer alive
            os.eventfd_write(eventfd, 1)
