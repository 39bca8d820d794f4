"""No more than so many bytes a second, for one Disk or for several together.

::

    Throttle A ──┐
    Throttle B ──┼── Rate       whoever comes when the rate is used up waits for its turn
    Throttle C ──┘
"""

import asyncio

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.passthrough import Passthrough
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import ConfigError

__all__ = ["Rate", "Throttle"]

PIECE = 1 << 20
"""Bytes moved between two looks at the rate, so that a long read does not shut out the others."""
BURST_S = 0.1
"""Seconds' worth of bytes that may be saved up while nothing moves."""


class Rate:
    """``bytes_per_s``, shared by whoever holds it. Belongs to one event loop.

    First come, first served; each waits until what was granted before it has been paid for.
    """

    def __init__(self, bytes_per_s: float) -> None:
        """Raises ConfigError unless the rate is positive."""
        if not bytes_per_s > 0:
            raise ConfigError(f"a rate of {bytes_per_s} bytes/s moves nothing")
        self.bytes_per_s = bytes_per_s
        self._paid_until = 0.0

    async def take(self, count: int) -> None:
        """Return when ``count`` bytes may move. Who is cancelled meanwhile takes nothing."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        start = max(self._paid_until, now - BURST_S)
        cost = count / self.bytes_per_s
        self._paid_until = start + cost
        # A debt is paid before, but for what was saved up: the first byte of an idle hour is free.
        wait = self._paid_until - now
        if wait <= 0:
            return
        try:
            await asyncio.sleep(wait)
        except BaseException:
            self._paid_until -= cost
            raise


class Throttle(Passthrough):
    """Reads and writes at the pace of ``rate``; what moves no bytes is not held up."""

    def __init__(self, workers: Workers, inside: Disk, rate: Rate) -> None:
        """``rate`` may be shared."""
        super().__init__(workers, inside)
        self._rate = rate

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """As the inner Disk does, in pieces."""
        self._check(offset, len(buffer))
        for at in range(0, len(buffer), PIECE):
            part = buffer[at : at + PIECE]
            await self._rate.take(len(part))
            await self._inside.read_into(offset + at, part)

    async def write(self, offset: int, data: memoryview) -> None:
        """As the inner Disk does, in pieces."""
        self._check_change(offset, len(data))
        for at in range(0, len(data), PIECE):
            part = data[at : at + PIECE]
            await self._rate.take(len(part))
            await self._inside.write(offset + at, part)
