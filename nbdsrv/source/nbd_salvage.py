"""Reading what can be read around what cannot.

::

    range    |......................X.................|     one read: an error, or a dead session
    steps    |..ok..|..ok..|..ok..|..X..|                   each alone, on a connection of its own
    halves                        |ok|X.|  |X|              where exactly

A server that meets a bad sector answers with an error for the whole request, or it drops the
connection (qemu-nbd 7.2 and 10.0 in a structured READ, xapi-nbd always). Here everything is asked
again with simple replies, in which an error is only an error, on a connection that no other
read shares.
"""

import asyncio
import errno as os_errno
from collections.abc import Awaitable, Callable

from nbdsrv.errors import DiskError
from nbdsrv.net.client import Client, ConnectionLost
from nbdsrv.source.nbd_links import Incidents

__all__ = ["Salvage"]

STEP = 64 << 10
"""Bytes of a read that is likely to succeed elsewhere than at the bad place itself."""


class Salvage:
    """One read after the other, in steps."""

    def __init__(
        self, dial: Callable[[], Awaitable[Client]], granule: int, incidents: Incidents
    ) -> None:
        """``dial`` opens a connection without chunks; ``granule``: bytes of the smallest read."""
        self._dial = dial
        self._granule = granule
        self._incidents = incidents
        self._lock = asyncio.Lock()
        self._queue = 0
        self._client: Client | None = None

    async def read(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer``; offset and length are multiples of the granule, or end at the disk's.

        Raises:
            DiskError: its offset is the first bad byte, to the granule.
        """
        self._incidents.salvaged += 1
        self._queue += 1
        try:
            async with self._lock:
                await self._read(offset, buffer)
        finally:
            self._queue -= 1
            if not self._queue:
                await self._hang_up()

    async def _read(self, offset: int, buffer: memoryview) -> None:
        done = 0
        while done < len(buffer):
            part = buffer[done : done + STEP]
            if await self._attempt(offset + done, part) is None:
                done += len(part)
            else:
                done += await self._narrow(offset + done, part)

    async def _narrow(self, offset: int, buffer: memoryview) -> int:
        """Halve what fails until it is a granule; the bytes read if even that can be read now."""
        low, high = 0, len(buffer)
        while high - low > self._granule:
            half = max((high - low) // 2 // self._granule, 1) * self._granule
            if await self._attempt(offset + low, buffer[low : low + half]) is None:
                low += half
            else:
                high = low + half
        error = await self._attempt(offset + low, buffer[low:high])
        if error is not None:
            at, length = offset + low, high - low
            self._incidents.add_bad(at, length)
            raise DiskError(f"{error} (bad: {length} bytes at {at})", error.errno, at) from error
        return high

    async def _attempt(self, offset: int, part: memoryview) -> DiskError | None:
        """One read; what it failed with.

        Raises:
            DiskError: there is no connection to try it on, or the server has fallen silent.
        """
        if self._client is None or not self._client.usable:
            await self._hang_up()
            self._client = await self._connect(offset)
        try:
            await self._client.read(offset, part)
        except ConnectionLost as error:
            if error.errno == os_errno.ETIMEDOUT:
                raise
            return DiskError(str(error), offset=offset)
        except DiskError as error:
            return error
        return None

    async def _connect(self, offset: int) -> Client:
        try:
            return await self._dial()
        except DiskError as error:
            raise DiskError(str(error), error.errno, offset) from error

    async def _hang_up(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            await client.close()

    async def close(self) -> None:
        """Close the connection, if there is one. Idempotent."""
        await self._hang_up()
