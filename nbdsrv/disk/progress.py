"""Tells how many bytes have moved, not too often."""

from asyncio import get_running_loop
from collections.abc import Callable
from dataclasses import dataclass

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.passthrough import Passthrough
from nbdsrv.disk.workers import Workers

__all__ = ["Moved", "Progress"]

INTERVAL_S = 0.2
"""Seconds between two calls: five times a second is what an eye follows."""


@dataclass(slots=True)
class Moved:
    """Bytes that were read and written without an error; zeroed ones count as written."""

    read: int = 0
    written: int = 0


class Progress(Passthrough):
    """Counts, and calls ``tell(moved)``: at once, then every ``interval_s`` at most, then at close.

    Attributes:
        moved: so far.
    """

    def __init__(
        self,
        workers: Workers,
        inside: Disk,
        tell: Callable[[Moved], None],
        interval_s: float = INTERVAL_S,
    ) -> None:
        """``tell`` is called on the loop, must not block, and must not keep ``moved``."""
        super().__init__(workers, inside)
        self.moved = Moved()
        self._tell = tell
        self._interval_s = interval_s
        self._due = 0.0
        self._untold = False

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """As the inner Disk does; counted."""
        await self._inside.read_into(offset, buffer)
        self.moved.read += len(buffer)
        self._count()

    async def write(self, offset: int, data: memoryview) -> None:
        """As the inner Disk does; counted."""
        await self._inside.write(offset, data)
        self.moved.written += len(data)
        self._count()

    async def zero(self, offset: int, length: int, *, punch: bool, fast: bool) -> None:
        """As the inner Disk does; counted."""
        await self._inside.zero(offset, length, punch=punch, fast=fast)
        self.moved.written += length
        self._count()

    async def close(self) -> None:
        """Tell the rest, close the inner Disk."""
        if self._untold:
            self._untold = False
            self._tell(self.moved)
        await self._inside.close()

    def _count(self) -> None:
        now = get_running_loop().time()
        self._untold = now < self._due
        if not self._untold:
            self._due = now + self._interval_s
            self._tell(self.moved)
