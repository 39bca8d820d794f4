"""Memory that requests borrow, and the budget that bounds it.

::

    idle connection    owns nothing
    batch              one receive buffer + one reply arena, shared by all connections
    payload, cold read a buffer of the next power of two, borrowed until it was sent or stored

A fresh allocation of 128 KiB or more is mapped anew by the kernel and its page faults cost more
than everything else about a read; so buffers are kept and lent again. When the budget is spent a
borrower is told to wait, which stops it from reading its socket: that is the back-pressure.
"""

import asyncio
from collections import defaultdict, deque
from collections.abc import Callable
from functools import partial

__all__ = ["DEFAULT_BUDGET", "Buffer", "Buffers"]

DEFAULT_BUDGET = 256 << 20
"""Bytes lent at any one time to all connections together: eight requests of the largest size,
thousands of usual ones."""
MIN_CLASS = 1 << 16
"""Smallest buffer, bytes; smaller needs share the size so that they are found again."""
KEPT_FREE = 32 << 20
"""Bytes kept for the next borrower; the rest goes back to the operating system."""


class Buffer:
    """A borrowed block. ``data`` is all of it; ``view(n)`` its first ``n`` bytes."""

    __slots__ = ("block", "data", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self.block = bytearray(size)
        self.data = memoryview(self.block)

    def view(self, length: int) -> memoryview:
        """The first ``length`` bytes."""
        return self.data[:length]


class Buffers:
    """The lender. Belongs to one event loop; not thread-safe."""

    def __init__(self, budget: int = DEFAULT_BUDGET) -> None:
        self.budget = budget
        self.lent = 0
        self._free: defaultdict[int, list[Buffer]] = defaultdict(list)
        self._kept = 0
        self._waiting: deque[Callable[[], None]] = deque()

    def borrow(self, length: int) -> Buffer:
        """A buffer of at least ``length`` bytes, whatever the budget says; contents undefined."""
        size = max(MIN_CLASS, 1 << (length - 1).bit_length())
        self.lent += size
        free = self._free[size]
        if free:
            self._kept -= size
            return free.pop()
        return Buffer(size)

    def affords(self, length: int) -> bool:
        """May ``length`` more bytes be lent?

        A lone borrower always may, since a budget is at least twice the largest request.
        """
        return self.lent + length <= self.budget

    @property
    def contended(self) -> bool:
        """Is somebody waiting for memory?"""
        return bool(self._waiting)

    async def afford(self, length: int) -> None:
        """Wait until ``length`` more bytes may be lent."""
        while not self.affords(length):
            ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self.when_affordable(partial(_wake, ready))
            await ready

    def when_affordable(self, resume: Callable[[], None]) -> None:
        """Call ``resume``, from within somebody's ``release``, once half of it is back."""
        self._waiting.append(resume)

    def release(self, buffer: Buffer) -> None:
        """Give back. The lender may hand it on at once: keep no view of it."""
        self.lent -= buffer.size
        if self._kept + buffer.size <= KEPT_FREE:
            self._free[buffer.size].append(buffer)
            self._kept += buffer.size
        if self._waiting and self.lent <= self.budget // 2:
            waiting, self._waiting = self._waiting, deque()
            for resume in waiting:
                resume()


def _wake(ready: "asyncio.Future[None]") -> None:
    if not ready.done():
        ready.set_result(None)
