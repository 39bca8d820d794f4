"""How many bytes are kept in flight: twice what fits between asking and being answered.

::

    bytes in flight                        rate x delay = what the way holds
      |            ____________ 2 x
      |      _____/                        4 MiB     this machine, a LAN
      |  ___/       grows as long as       2 x 16    320 MB/s at 50 ms
      |_/           the rate does
      +------------------------- time

*Rate* is the highest at which answers have come lately, *delay* the shortest time one took. The
bytes in flight are twice their product: while more of them bring a higher rate they double, and
once they only queue up (the delay grows, the rate does not) they stay. The shortest delay is
forgotten after some seconds, and measured anew with fewer bytes in flight.

Requests of up to ``SMALL`` bytes never wait: somebody is likely to wait for them.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

__all__ = ["Depth"]

LEAST = 4 << 20
"""Bytes: four pieces, so that a server has the next one while an answer is on its way."""
MOST = 64 << 20
"""Bytes: 1.3 GB/s at 50 ms, and still no burden to a process with several disks."""
SMALL = 1 << 16
GAIN = 2
RATE_S = 1.0
"""Seconds a rate is remembered at least; and ten delays, if that is longer."""
DELAY_S = 10.0
"""Seconds a delay is remembered."""


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
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._delivered = 0
        self._rate, self._rate_before, self._rate_since = 0.0, 0.0, 0.0
        self._delay, self._delay_since = 0.0, 0.0
        self._probing = False

    @asynccontextmanager
    async def sent(self, length: int) -> AsyncIterator[None]:
        """Wait until ``length`` bytes may be asked for; the block ends with the answer.

        An error in the block counts for nothing. May be cancelled.
        """
        while length > SMALL and self.in_flight and self.in_flight + length > self.bytes:
            await self._room()
        self.in_flight += length
        begun, before = self._loop.time(), self._delivered
        try:
            yield
            self._answered(length, begun, before)
        finally:
            self.in_flight -= length
            self._wake()

    async def _room(self) -> None:
        ready = self._loop.create_future()
        self._waiting.append(ready)
        try:
            await ready
        except asyncio.CancelledError:
            if ready.done() and not ready.cancelled():
                self._wake()  # it was meant for somebody who can use it
            raise

    def _wake(self) -> None:
        """One at a time, in order: whoever does not fit after all waits on."""
        while self._waiting and self.in_flight < self.bytes:
            ready = self._waiting.popleft()
            if not ready.done():
                ready.set_result(None)
                return

    def _answered(self, length: int, begun: float, before: int) -> None:
        now = self._loop.time()
        delay = max(now - begun, 1e-6)
        self._delivered += length
        # All that has been answered while this was under way: what the way has carried.
        rate = (self._delivered - before) / delay
        if length > SMALL:
            self._remember(now, rate, delay)

    def _remember(self, now: float, rate: float, delay: float) -> None:
        if now - self._rate_since > max(RATE_S, 10 * self._delay):
            self._rate_before, self._rate, self._rate_since = self._rate, 0.0, now
        self._rate = max(self._rate, rate)
        if self._probing and now - self._delay_since > 2 * delay:
            self._probing = False
        if not self._delay or delay < self._delay:
            self._delay = delay
            self._delay_since = now
        elif now - self._delay_since > DELAY_S:
            # Answers to what is asked from here on, with half as much ahead of it, will tell.
            self._delay, self._delay_since, self._probing = delay, now, True
        wanted = int(GAIN * max(self._rate, self._rate_before) * self._delay)
        if self._probing:
            wanted = min(wanted, self.bytes, int(self._rate_before * self._delay / GAIN))
        self.bytes = min(max(wanted, self._least), self._most)
        self._wake()
