"""The requests of one connection of ours that await answers: how many, and for how long.

::

    room() ── waits while full ──> add ── by cookie, in the order they were made ──> done | lose
                                              └─ the oldest is overdue: ``on_overdue``

Nothing here knows the wire. Belongs to one event loop.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterator

from nbdsrv.net.client_pending import Pending

__all__ = ["MAX_IN_FLIGHT", "InFlight"]

MAX_IN_FLIGHT = 64
"""Requests of one connection that await answers; more wait here. Servers work on 16 or so."""
MAX_IN_FLIGHT_BYTES = 32 << 20
"""Bytes they move, likewise; a single larger one is let through alone."""
BULKY = 1 << 15
"""Bytes of a read from which on its data is received in place."""


class InFlight:
    """Requests without an answer.

    Attributes:
        load: how many.
        bulky: reads among them whose data is received in place.
    """

    def __init__(self, patience_s: float, on_overdue: Callable[[Pending], None]) -> None:
        """``on_overdue`` is called with the oldest one after ``patience_s`` seconds."""
        self.load = 0
        self.bulky = 0
        self._loop = asyncio.get_running_loop()
        self._patience_s = patience_s
        self._on_overdue = on_overdue
        self._pending: dict[int, Pending] = {}
        self._bytes = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._empty = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None

    def __getitem__(self, cookie: int) -> Pending:
        return self._pending[cookie]

    def __iter__(self) -> Iterator[Pending]:
        return iter(self._pending.values())

    def __bool__(self) -> bool:
        return bool(self._pending)

    # --- coming and going ----------------------------------------------------------------

    def add(self, cookie: int, pending: Pending, moved: int) -> None:
        """It has been asked; ``moved`` bytes count for it. Ask ``is_full`` before."""
        self._pending[cookie] = pending
        pending.moved = moved
        self._bytes += moved
        self.load += 1
        if moved >= BULKY and pending.buffer is not None:
            self.bulky += 1
        pending.expires = self._loop.time() + self._patience_s
        if self._timer is None:
            self._timer = self._loop.call_later(self._patience_s, self._look_at_clock)

    def done(self, cookie: int) -> Pending:
        """Its answer is complete."""
        pending = self._pending.pop(cookie)
        self._gone(pending)
        if not self._pending:
            self._empty.set()
        return pending

    def lose(self, text: str, errno: int) -> None:
        """None will ever be answered; nor does anybody wait for room any more."""
        for pending in self._pending.values():
            self._gone(pending)
            pending.lose(text, errno)
        self._pending.clear()
        self._empty.set()
        self.wake_all()
        if self._timer is not None:
            self._timer.cancel()

    def _gone(self, pending: Pending) -> None:
        self.load -= 1
        self._bytes -= pending.moved
        if pending.moved >= BULKY and pending.data is None:
            self.bulky -= 1
        if self._waiting:
            self._wake()

    # --- room for more -------------------------------------------------------------------

    def is_full(self, moved: int) -> bool:
        """Would a request that moves so many bytes be one too many?"""
        if self.load < MAX_IN_FLIGHT and self._bytes + moved <= MAX_IN_FLIGHT_BYTES:
            return False
        return bool(self.load)

    async def room(self) -> None:
        """Wait until something has been answered, or never will be."""
        ready = self._loop.create_future()
        self._waiting.append(ready)
        try:
            await ready
        except asyncio.CancelledError:
            if ready.done() and not ready.cancelled():
                self._wake()  # it was meant for somebody who can use it
            raise

    def wake_all(self) -> None:
        """Whoever waits for room is to look again."""
        while self._waiting:
            self._wake()

    def _wake(self) -> None:
        while self._waiting:
            ready = self._waiting.popleft()
            if not ready.done():
                ready.set_result(None)
                return

    async def answered(self) -> None:
        """Wait until there is none: all have been answered or lost."""
        if self._pending:
            self._empty.clear()
            await self._empty.wait()

    async def finish(self) -> None:
        """The same, those who wait for room included."""
        while self._pending or self._waiting:
            self._empty.clear()
            await self._empty.wait()

    # --- the clock -----------------------------------------------------------------------

    def _look_at_clock(self) -> None:
        """Requests expire in the order they were made."""
        self._timer = None
        oldest = next(iter(self._pending.values()), None)
        if oldest is None:
            return
        left = oldest.expires - self._loop.time()
        if left > 0:
            self._timer = self._loop.call_later(left, self._look_at_clock)
        else:
            self._on_overdue(oldest)
