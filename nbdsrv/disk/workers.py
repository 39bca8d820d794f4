"""The threads on which blocking work is done, and the way its results come back.

::

    event loop                         threads
    submit(work, done) --- queue --->  work()        (``crew``)
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
from collections.abc import Callable
from typing import Any, TypeVar, TypeVarTuple

from nbdsrv.disk.blocks import BlockCache
from nbdsrv.disk.crew import Crew, Done, Results
from nbdsrv.disk.insist import insist

__all__ = ["COMPUTERS", "Workers"]

log = logging.getLogger(__name__)

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

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
        self.outstanding = 0
        self._results = Results()
        self._crew = Crew("nbdsrv-work", threads, self._results)
        self._scouts = Crew("nbdsrv-look", LOOK_UP_THREADS, self._results)
        self._computers = Crew("nbdsrv-cpu", COMPUTERS, self._results)

    def muster(self) -> None:
        """Start most threads now: a burst of cold reads would wait for them, a tenth of a
        millisecond for each. For servers.
        """
        self._crew.muster(MUSTERED)

    def fileno(self) -> int:
        """Readable when ``complete`` has something to do."""
        return self._results.eventfd

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

    async def _run(self, crew: Crew, work: Callable[..., T], args: tuple[Any, ...]) -> T:
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
        results = self._results
        results.begin()
        while (finished := results.take()) is not None:
            crew, done, result, error = finished
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
        self._results.close()
