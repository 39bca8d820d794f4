"""The threads on which blocking work is done, and the way its results come back.

::

    event loop                         threads
    submit(work, done) --- queue --->  work()
    complete(): done() <-- deque ----  result        (an eventfd wakes the loop)

Rule: ``done`` always runs on the event loop's thread, so that everything about a connection stays
single-threaded and needs no lock. Threads touch files; sockets only when one is lent to them.

Looking something up (a file's layout, opening it) has threads of its own: it is what a client with
everything in memory may need, and must not queue behind another client's cold reads.

A ThreadPoolExecutor would do the same with a Future, two locks and a self-pipe per job; a 4 KiB
write has not that much time.
"""

import asyncio
import logging
import os
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, TypeVar, TypeVarTuple

from nbdsrv.disk.blocks import BlockCache
from nbdsrv.disk.insist import insist

__all__ = ["COMPUTERS", "Workers"]

log = logging.getLogger(__name__)

T = TypeVar("T")
Ts = TypeVarTuple("Ts")
Done = Callable[[Any, BaseException | None], None]
Job = tuple[Callable[..., Any], tuple[Any, ...], Done]

DEFAULT_THREADS = 32
"""Blocking jobs at a time: what two clients at full depth keep busy; more queue up."""
MUSTERED = 16
"""Threads of these that a server starts in advance: one client at full depth."""
LOOK_UP_THREADS = 4
"""Likewise for looking things up."""
COMPUTERS = min(2 * len(os.sched_getaffinity(0)), 8)
"""Likewise for what only needs a processor. Two for each: the loop and the client want them too
(four were a fifth faster than two on two processors, and eight no better); of the 60 µs that a
cluster takes a thread has the interpreter for 10, so that more than eight only queue for it."""


class Workers:
    """A bounded pool of daemon threads, started as they are needed.

    Not thread-safe: ``submit``, ``run``, ``complete`` and ``close`` belong to the loop.

    Attributes:
        outstanding: jobs whose results have not been delivered.
        cache: the decoded blocks that all Disks on these threads keep.
    """

    def __init__(self, threads: int = DEFAULT_THREADS, cache: BlockCache | None = None) -> None:
        self.cache = cache or BlockCache()
        self._finished: deque[Finished] = deque()
        self._eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._crew = _Crew("nbdsrv-work", threads, self._finished, self._eventfd)
        self.outstanding = 0
        self._scouts = _Crew("nbdsrv-look", LOOK_UP_THREADS, self._finished, self._eventfd)
        self._computers = _Crew("nbdsrv-cpu", COMPUTERS, self._finished, self._eventfd)

    def muster(self) -> None:
        """Start most threads now: a burst of cold reads would wait for them, a tenth of a
        millisecond for each. For servers.
        """
        self._crew.muster(MUSTERED)

    def fileno(self) -> int:
        """Readable when ``complete`` has something to do."""
        return self._eventfd

    def submit(self, work: Callable[[*Ts], object], *args: *Ts, done: Done) -> None:
        """Have a thread call ``work(*args)``, then the loop ``done(result, error)``."""
        self.outstanding += 1
        self._crew.put((work, args, done))

    def compute(self, work: Callable[[*Ts], object], *args: *Ts, done: Done) -> None:
        """As ``submit``, for work that needs a processor and no disk: threads of its own."""
        self.outstanding += 1
        self._computers.put((work, args, done))

    async def run(self, work: Callable[[*Ts], T], *args: *Ts) -> T:
        """Have a thread call ``work(*args)`` and return what it returns.

        Cancellation is delayed until the thread has finished: the work may be using a buffer or
        a descriptor that the caller is about to give away.
        """
        return await self._run(self._crew, work, args)

    async def look_up(self, work: Callable[[*Ts], T], *args: *Ts) -> T:
        """The same for short work that others wait for."""
        return await self._run(self._scouts, work, args)

    async def _run(self, crew: "_Crew", work: Callable[..., T], args: tuple[Any, ...]) -> T:
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()

        def done(result: T, error: BaseException | None) -> None:
            if error is None:
                future.set_result(result)
            elif isinstance(error, StopIteration):  # no Future takes one
                lost = RuntimeError(f"{work!r} raised StopIteration")
                lost.__cause__ = error
                future.set_exception(lost)
            else:
                future.set_exception(error)

        self.outstanding += 1
        crew.put((work, args, done))
        return await insist(future)

    def complete(self) -> None:
        """Deliver what has finished. Call when ``fileno`` is readable."""
        with suppress(BlockingIOError):
            os.eventfd_read(self._eventfd)
        finished = self._finished
        while finished:
            crew, done, result, error = finished.popleft()
            crew.outstanding -= 1
            self.outstanding -= 1
            try:
                done(result, error)
            except Exception:  # the others' results are not to be lost with it
                log.exception("workers.bug in %r", done)

    def close(self) -> None:
        """End the threads once their queues are empty. Results not yet delivered are lost."""
        self._crew.close()
        self._scouts.close()
        self._computers.close()
        os.close(self._eventfd)


class _Crew:
    """Threads that share a queue, started one by one as there is more to do."""

    def __init__(
        self,
        name: str,
        limit: int,
        finished: "deque[Finished]",
        eventfd: int,
    ) -> None:
        self._name = name
        self._limit = limit
        self._finished = finished
        self._eventfd = eventfd
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self.outstanding = 0

    def put(self, job: Job) -> None:
        self.outstanding += 1
        if self.outstanding > len(self._threads) < self._limit:
            self._enlist()
        self._jobs.put(job)

    def muster(self, count: int) -> None:
        while len(self._threads) < min(count, self._limit):
            self._enlist()

    def _enlist(self) -> None:
        name = f"{self._name}-{len(self._threads)}"
        thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def close(self) -> None:
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()
        self._threads.clear()

    def _work(self) -> None:
        get, finished, eventfd = self._jobs.get, self._finished, self._eventfd
        while (job := get()) is not None:
            work, args, done = job
            result, error = None, None
            try:
                result = work(*args)
            except BaseException as caught:  # noqa: BLE001 - handed to the loop
                error = caught
            finished.append((self, done, result, error))
            del job, work, args, done, result, error  # an idle thread keeps no buffer alive
            os.eventfd_write(eventfd, 1)


Finished = tuple[_Crew, Done, Any, BaseException | None]
