"""Changes that are under way: who must have a disk to itself waits for those that began before.

::

    time ────────────────────────────────────────>
    write 1   |-------------|
    write 2        |---------------|
    landed()            |==========|              waits for 1 and 2, and not for
    write 3                |-------------|        what begins meanwhile

``Landing`` is for a Disk that lets writes of whole blocks go straight into a file although it has
to know of each: a copy-on-write overlay, where a block changes its state by being written.
"""

import asyncio
from collections import deque
from collections.abc import Sequence

from nbdsrv.disk.runs import FileRun

__all__ = ["Flights", "Landing"]


class Flights:
    """Changes of one disk. Belongs to the loop."""

    def __init__(self) -> None:
        self._next = 0
        self._flying: dict[int, None] = {}
        self._waiting: list[tuple[int, asyncio.Event]] = []

    def begin(self) -> int:
        """One takes off; its ticket."""
        self._next += 1
        self._flying[self._next] = None
        return self._next

    def end(self, ticket: int) -> None:
        """It has landed."""
        del self._flying[ticket]
        if self._waiting:
            oldest = next(iter(self._flying), self._next + 1)
            for last, event in self._waiting:
                if last < oldest:
                    event.set()

    async def landed(self) -> None:
        """Return when all that are under way now have landed."""
        if not self._flying:
            return
        waiting = (self._next, asyncio.Event())
        self._waiting.append(waiting)
        try:
            await waiting[1].wait()
        finally:
            self._waiting.remove(waiting)


class Landing(Flights):
    """Where writes land that a thread carries out without asking the Disk about each.

    The loop asks ``place`` and brackets the thread's work by ``begin`` and ``end``. The thread
    looks at ``epoch`` before each batch, and hands (offset, length) of each write it has carried
    out to ``land`` before it answers it.

    Attributes:
        epoch: changes when something ``place`` (here or of the Disk) has answered no longer holds.
        unit: bytes; offset and length of a write are multiples of it.
        stored: what has been written, for the Disk to take note of.
    """

    def __init__(self, unit: int) -> None:
        super().__init__()
        self.epoch = 0
        self.unit = unit
        self.stored: deque[tuple[int, int]] = deque()

    def land(self, done: Sequence[tuple[int, int]]) -> None:
        """These have been carried out; before they are answered. The thread calls it.

        Raises:
            OSError: they must not be answered as done.
        """
        self.stored.extend(done)

    def place(self, offset: int, length: int) -> tuple[int, FileRun] | None:
        """Where such a write may go, as ``Disk.place``; and the offset that the run begins at."""
        del offset, length
        return None
