"""A way to an NBD server that takes its time: a relay between two Unix sockets.

::

    client ── LISTEN ──> [ half the delay ] ──> UPSTREAM ── server
           <──────────── [ half the delay ] <──

    python -m conformance.delay LISTEN UPSTREAM MILLISECONDS

Nothing is slowed down but by the delay: as many bytes as anybody likes are under way (up to
``UNDER_WAY``). The kernel's netem would do the same, where it is there.
"""

import asyncio
import contextlib
import signal
import sys
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

__all__ = ["delaying"]

CHUNK = 1 << 18
UNDER_WAY = 256 << 20
"""Bytes in each direction of a connection: 5 GB/s at 50 ms."""


@asynccontextmanager
async def delaying(listen: str, upstream: str, delay_s: float) -> AsyncIterator[None]:
    """Relay until the end of the block; a question and its answer take ``delay_s`` longer."""
    relays: set[asyncio.Task[None]] = set()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(_relay(reader, writer, upstream, delay_s / 2))
        relays.add(task)
        task.add_done_callback(relays.discard)

    server = await asyncio.start_unix_server(accept, listen, limit=2 * CHUNK)
    try:
        yield
    finally:
        server.close()
        for task in relays:
            task.cancel()
        await asyncio.gather(*relays, return_exceptions=True)


async def _relay(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, upstream: str, delay_s: float
) -> None:
    try:
        there = await asyncio.open_unix_connection(upstream, limit=2 * CHUNK)
    except OSError:
        writer.close()
        return
    try:
        await asyncio.gather(
            _Way(delay_s).run(reader, there[1]), _Way(delay_s).run(there[0], writer)
        )
    finally:
        for end in (writer, there[1]):
            end.close()
            with contextlib.suppress(OSError):
                await end.wait_closed()


class _Way:
    """One direction."""

    def __init__(self, delay_s: float) -> None:
        self._delay_s = delay_s
        self._chunks: deque[tuple[float, bytes]] = deque()
        self._bytes = 0
        self._changed = asyncio.Event()

    async def run(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.gather(self._take(reader), self._give(writer))

    async def _take(self, reader: asyncio.StreamReader) -> None:
        loop = asyncio.get_running_loop()
        data = b"?"
        while data:
            try:
                data = await reader.read(CHUNK)
            except OSError:
                data = b""
            self._chunks.append((loop.time() + self._delay_s, data))
            self._bytes += len(data)
            self._changed.set()
            while self._bytes > UNDER_WAY:
                self._changed.clear()
                await self._changed.wait()

    async def _give(self, writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        while True:
            while not self._chunks:
                self._changed.clear()
                await self._changed.wait()
            due, data = self._chunks.popleft()
            if due > loop.time():
                await asyncio.sleep(due - loop.time())
            if not data:
                break
            writer.write(data)
            with contextlib.suppress(OSError):
                await writer.drain()
            self._bytes -= len(data)
            self._changed.set()
        with contextlib.suppress(OSError):
            writer.write_eof()


async def _main(listen: str, upstream: str, delay_s: float) -> None:
    ended = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    async with delaying(listen, upstream, delay_s):
        await ended.wait()


if __name__ == "__main__":
    import uvloop

    uvloop.run(_main(sys.argv[1], sys.argv[2], float(sys.argv[3]) / 1000))
