"""How many bytes are kept in flight: more as long as that brings more.

::

    bytes in flight                            rate x delay = what the way there holds
      |                 64 MiB tried: no faster
      |             ____  |
      |         ___|    |_|_______________     32 MiB    640 MB/s at 50 ms
      |     ___|                                4 MiB    a server on this machine
      |  __|   each step: two fills of the way
      +------------------------------------ time

Twice as many are tried as long as they are answered at a rate that is a quarter higher; half as
many now and then, and kept to if the rate stays. So a long way is filled within a dozen round
trips, on a short one nothing queues up and all buffers fit into a processor's cache, which is
worth more than any number of requests in advance.

Requests of up to ``SMALL`` bytes never wait: somebody is likely to wait for them.
"""

import asyncio
from collections import deque

__all__ = ["Depth"]

LEAST = 4 << 20
"""Bytes: four pieces, so that a server has the next ones while an answer is on its way."""
MOST = 64 << 20
"""Bytes: 1.3 GB/s at 50 ms, and still no burden to a process with several disks."""
SMALL = 1 << 16

BETTER = 1.25
"""Times the rate from which on twice the bytes are worth it."""
AS_GOOD = 0.9
"""Times the rate at which half of the bytes will do."""
FILLS = 2
"""Times the bytes in flight must be answered for their rate to mean something: the first of them
were asked for under the old regime and count for nothing."""
TRIAL_S = 0.02
"""The least duration of such a measurement: below, it is the scheduler that is measured."""
FIRST_CALM_S = 0.5
LAST_CALM_S = 8.0
"""Seconds until something else is tried again; twice as many after each trial in vain."""


class Depth:
    """Of one disk. Belongs to one event loop.

    Attributes:
        bytes: to be kept in flight.
        in_flight: bytes that are.
    """

    def __init__(self, least: int = LEAST, most: int = MOST) -> None:
        self.bytes = least
        self.in_flight = 0
        self._least = least
        self._most = most
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._best = least
        self._rate = 0.0
        self._step = 1  # the direction of the trial under way, or of the next one
        self._trying = False
        self._calm_until, self._calm_s = 0.0, FIRST_CALM_S
        self._filling, self._since = True, 0.0
        self._delivered, self._idle = 0, 0

    def enter_now(self, length: int) -> bool:
        """May ``length`` bytes be asked for without waiting? Then ``leave`` must follow."""
        if length <= SMALL or (not self._waiting and self._fits(length)):
            self.in_flight += length
            return True
        return False

    async def enter(self, length: int) -> None:
        """Wait until ``length`` bytes may be asked for; then ``leave`` must follow.

        First come, first served. Cancellation leaves the queue.
        """
        if self.enter_now(length):
            return
        ready = self._loop.create_future()
        self._waiting.append((length, ready))
        try:
            await ready
        except asyncio.CancelledError:
            if ready.done() and not ready.cancelled():
                self.in_flight -= length  # it had been let in
                self._admit()
            raise

    def answered(self, length: int) -> None:
        """A request has been answered well; call ``leave`` too."""
        if length <= SMALL:
            return
        self._delivered += length
        if self.in_flight * 2 < self.bytes:
            self._idle += length  # whoever asks wants no more than that
        if self._filling:
            if self._delivered >= self.bytes:
                self._filling, self._delivered, self._idle = False, 0, 0
                self._since = self._loop.time()
        elif self._delivered >= (FILLS - 1) * self.bytes:
            took = self._loop.time() - self._since
            if took >= TRIAL_S:
                self._judge(self._delivered / took)

    def leave(self, length: int) -> None:
        """A request has come to its end."""
        self.in_flight -= length
        if self._waiting:
            self._admit()

    def _fits(self, length: int) -> bool:
        return not self.in_flight or self.in_flight + length <= self.bytes

    def _admit(self) -> None:
        while self._waiting and self._fits(self._waiting[0][0]):
            length, ready = self._waiting.popleft()
            if not ready.done():
                self.in_flight += length
                ready.set_result(None)

    def _begin(self) -> None:
        """Measure what comes of ``bytes``."""
        self._filling = True
        self._delivered, self._idle = 0, 0

    def _judge(self, rate: float) -> None:
        """``bytes`` are answered at this rate; go on with which?"""
        if self._idle * 2 > self._delivered:
            self._return()  # nothing was tried in earnest
        elif not self._trying:
            self._rate = rate
            if self._loop.time() < self._calm_until:
                self._begin()
            else:
                self._try()
        elif rate > self._rate * (BETTER if self._step > 0 else AS_GOOD):
            self._best, self._rate, self._calm_s = self.bytes, rate, FIRST_CALM_S
            self._try()
        else:
            self._turn()

    def _try(self) -> None:
        wanted = self._best * 2 if self._step > 0 else self._best // 2
        self.bytes = min(max(wanted, self._least), self._most)
        self._trying = self.bytes != self._best
        if self._trying:
            self._begin()
        else:
            self._turn()

    def _turn(self) -> None:
        """That way there is nothing to be had; some time later the other one is tried."""
        self._step = -self._step
        self._calm_until = self._loop.time() + self._calm_s
        self._calm_s = min(2 * self._calm_s, LAST_CALM_S)
        self._return()

    def _return(self) -> None:
        self.bytes = self._best
        self._trying = False
        self._begin()
