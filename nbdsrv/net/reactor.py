"""One epoll for all clients in transmission, inside the event loop.

::

    uvloop ── add_reader ──> epoll ──┬── client 1      on_events()
                                     ├── client 2      on_events()
                                     ├── a server that a proxied export comes from (``tend``)
                                     ├── a ring        Ring.complete()
                                     └── eventfd       Workers.complete()

Why not one ``add_reader`` per client: at low queue depth a server spends its time waking up, not
working. With every descriptor in one epoll the reactor can, after it has served somebody, look
again for a few microseconds, see *all* clients while it does, and so delay none. It looks only
while requests come in quick succession, and never when a thread holds work it waits for (the
thread needs the interpreter).

Rule: handlers run on the loop, never block, and bound the work of one call.
"""

import asyncio
import logging
import select
from collections import deque
from collections.abc import Callable
from time import perf_counter
from typing import TypeVar
from weakref import WeakKeyDictionary, WeakSet

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.ring import Ring
from nbdsrv.disk.watch import Handler, LoopWatch
from nbdsrv.disk.workers import Workers
from nbdsrv.net.buffers import Buffers
from nbdsrv.net.windows import Windows

__all__ = ["ARENA_SIZE", "RECEIVE_SIZE", "Handler", "Reactor"]

log = logging.getLogger(__name__)

T = TypeVar("T")

RECEIVE_SIZE = 1 << 19
"""Bytes taken from one client at a time: three writes of 256 KiB and most of the next."""
ARENA_SIZE = 1 << 20
"""Bytes of replies built before they are sent."""
WASTE_SIZE = 1 << 16
"""Bytes of an unwanted payload thrown away at a time."""

TURN = 0.001
"""Seconds the reactor keeps the loop while there is work; then everyone else gets a turn."""
SPIN = 0.00005
"""Seconds to look for the next request after a batch."""
MAX_CREDIT = 64
MISS_COST = 4
"""Looking must succeed at least once in five times, or it stops until traffic is lively again."""


class Reactor:
    """Serves the transmission phase of all clients of one event loop.

    Attributes:
        alone: has only one client asked for anything in this turn?
        afar: reads under way that other servers answer.
        calm: is there to be no looking in this turn? Set by whoever serves what other servers
            answer: on two processors, of which one is theirs, looking takes the client's.
    """

    def __init__(self, workers: Workers, buffers: Buffers) -> None:
        self.workers = workers
        self.buffers = buffers
        self.receive = buffers.borrow(RECEIVE_SIZE)
        self.arena = buffers.borrow(ARENA_SIZE)
        self.waste = memoryview(bytearray(WASTE_SIZE))
        self.alone = True
        self.afar = 0
        self.calm = False
        self._loop = asyncio.get_running_loop()
        self._epoll = select.epoll()
        self._handlers: dict[int, Handler] = {}
        self._again: deque[Handler] = deque()
        self._again_soon = False
        self._due: list[Callable[[], None]] = []
        self._serving = False
        self._tended: WeakSet[Disk] = WeakSet()
        self._windows: WeakKeyDictionary[Disk, Windows] = WeakKeyDictionary()
        self._closed = False
        self._credit = MAX_CREDIT
        self._epoll.register(workers.fileno(), select.EPOLLIN)
        self._ring = Ring.make()
        if self._ring is not None:
            self._epoll.register(self._ring.fileno(), select.EPOLLIN)
        self._loop.add_reader(self._epoll.fileno(), self._wake)

    def add(self, fd: int, handler: Handler, events: int) -> None:
        """Serve ``fd`` from now on."""
        self._handlers[fd] = handler
        self._epoll.register(fd, events)

    def modify(self, fd: int, events: int) -> None:
        """Change what ``fd`` is watched for."""
        self._epoll.modify(fd, events)

    def remove(self, fd: int) -> None:
        """Serve ``fd`` no more; call before closing it."""
        if self._handlers.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def again(self, handler: Handler) -> None:
        """Call ``handler.resume()`` once the other clients have had their turn."""
        self._again.append(handler)
        self._wake_soon()

    def soon(self, call: Callable[[], None]) -> None:
        """Call ``call`` once all who are ready now have been served. Must not raise."""
        if not self._due and not self._serving:
            self._loop.call_soon(self._end_pass)
        self._due.append(call)

    @property
    def brings(self) -> bool:
        """Is there a kernel that ``bring`` may ever ask?"""
        return self._ring is not None

    def bring(
        self, fd: int, position: int, length: int, done: Callable[[T, int], None], what: T
    ) -> bool:
        """Have the kernel bring a range of a file into memory; as ``Ring.bring``."""
        ring = self._ring
        if ring is None or not ring.bring(fd, position, length, done, what):
            return False
        if ring.queued == 1:
            self.soon(ring.submit)
        return True

    def windows(self, disk: Disk) -> Windows:
        """What all its clients remember of where its bytes lie, as long as it is open."""
        found = self._windows.get(disk)
        if found is None:
            found = self._windows[disk] = Windows()
        return found

    def tend(self, disk: Disk) -> None:
        """See to the connections that ``disk`` reads from, if it has any, until the end."""
        self._tended.add(disk)
        disk.attend(self)

    def renew_receive(self) -> None:
        """Somebody keeps the receive buffer (and releases it one day): take another."""
        self.receive = self.buffers.borrow(RECEIVE_SIZE)

    def close(self) -> None:
        """Serve nobody any more. Descriptors stay their owners'."""
        for disk in tuple(self._tended):
            disk.attend(LoopWatch())
        self._closed = True
        self._loop.remove_reader(self._epoll.fileno())
        self._epoll.close()
        ring, self._ring = self._ring, None
        if ring is not None:
            ring.close()
        self.buffers.release(self.receive)
        self.buffers.release(self.arena)

    def _wake(self) -> None:
        self._again_soon = self.calm = False
        if self._closed:
            return
        poll, again = self._epoll.poll, self._again
        events = poll(0)
        turn_ends = perf_counter() + TURN
        while True:
            self._serving = True
            if events:
                self._serve(events)
            if again:
                for _ in range(len(again)):
                    again.popleft().resume()
            if self._due:
                self._end_pass()
            self._serving = False
            now = perf_counter()
            if self._closed:
                return
            if now > turn_ends:
                # Not back to sleep: whoever has just been served is likely to ask again.
                self._wake_soon()
                return
            if again:
                events = poll(0)
                continue
            if self.calm or self.afar:
                return
            if self._credit <= 0 or self.workers.outstanding:
                self._credit += 1
                return
            spin_ends = now + SPIN
            while not (events := poll(0)):
                if perf_counter() > spin_ends:
                    self._credit -= MISS_COST
                    return
            if self._credit < MAX_CREDIT:
                self._credit += 1

    def _wake_soon(self) -> None:
        if not self._again_soon:
            self._again_soon = True
            self._loop.call_soon(self._wake)

    def _end_pass(self) -> None:
        while self._due:
            due, self._due = self._due, []
            for call in due:
                try:
                    call()
                except Exception:
                    log.exception("reactor.bug")

    def _serve(self, events: list[tuple[int, int]]) -> None:
        handlers = self._handlers
        self.alone = len(events) == 1
        for fd, mask in events:
            handler = handlers.get(fd)
            if handler is not None:
                handler.on_events(mask)
            elif fd == self.workers.fileno():
                self.workers.complete()
            elif self._ring is not None:
                self._ring.complete()
