"""nbdsrv as a library: another server's export as a Disk, in any asyncio program.

::

    import asyncio, nbdsrv

    async def main() -> None:
        async with nbdsrv.connect("nbd://localhost/disk") as disk:
            block = bytearray(4096)
            await disk.read_into(0, memoryview(block))
            async for offset, piece in nbdsrv.stream(disk, 0, disk.size):
                ...                                     # in order, as much in flight as it takes

    asyncio.run(main())

With asyncio's own event loop as well as with uvloop, which is about a third faster.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.workers import Workers
from nbdsrv.net.client_connect import Patience
from nbdsrv.net.client_tls import Credentials
from nbdsrv.source.nbd import DEFAULT_CONNECTIONS, NbdDisk, open_nbd
from protocol.contexts import ALLOCATION

__all__ = ["connect", "stream"]

THREADS = 4
"""They read certificates and little else."""
PIECE = 1 << 20
"""Bytes of a piece of a stream."""
LEAST_PIECES = 4


@asynccontextmanager
async def connect(
    uri: str,
    *,
    writable: bool = False,
    connections: int = DEFAULT_CONNECTIONS,
    contexts: Sequence[str] = (ALLOCATION,),
    credentials: Credentials | None = None,
    patience: Patience | None = None,
    host_connections: int = 0,
    frozen: bool = False,
) -> AsyncIterator[NbdDisk]:
    """An export of an NBD server, until the end of the block.

    Args:
        uri: ``nbd://HOST[:PORT]/EXPORT``, ``nbds://``, ``nbd+unix:///EXPORT?socket=PATH``,
            ``nbds+unix://``.
        writable: without it nothing is ever written, whatever the server allows.
        connections: to be used at most; one where the server does not say that several agree.
        contexts: meta contexts to ask for, for ``Disk.status``; ``Disk.contexts`` has those there
            are. ``Disk.extents`` needs base:allocation.
        credentials: for ``nbds``; the system's authorities without.
        patience: deadlines, in seconds.
        host_connections: of this whole process to that host at most; 0 for no limit.
        frozen: the content never changes (a snapshot): several connections are safe anyway.

    The Disk's methods may run concurrently, and may be cancelled: a read's buffer is left alone
    from then on, a write may have been carried out or not. Reads survive lost connections and go
    around bad places; a write is never sent twice. ``Disk.incidents`` tells what went wrong.

    Raises:
        ConfigError: not a URI that can be used.
        DiskError: no connection, or no such export. From the Disk's methods: with the errno, and
            for reads the offset up to which the data is good.
    """
    loop = asyncio.get_running_loop()
    workers = Workers(THREADS)
    loop.add_reader(workers.fileno(), workers.complete)
    try:
        disk = await open_nbd(
            uri,
            workers,
            writable=writable,
            connections=connections,
            contexts=contexts,
            credentials=credentials,
            patience=patience,
            host_connections=host_connections,
            frozen=frozen,
        )
        try:
            yield disk
        finally:
            await disk.close()
    finally:
        loop.remove_reader(workers.fileno())
        workers.close()


async def stream(
    disk: Disk, offset: int, length: int, piece: int = PIECE
) -> AsyncIterator[tuple[int, memoryview]]:
    """(offset, bytes) of a range in ascending order, reading ahead as far as the way there holds.

    A piece is valid until the next one is asked for. Close the iterator (``contextlib.aclosing``)
    if you leave it early: what is on its way is then cancelled.

    Raises:
        DiskError: of the first piece that cannot be read.
    """
    loop = asyncio.get_running_loop()
    under_way: deque[tuple[int, memoryview, asyncio.Task[None]]] = deque()
    free: list[memoryview] = []
    at, end = offset, offset + length
    try:
        while at < end or under_way:
            while at < end and len(under_way) < max(disk.depth // piece, LEAST_PIECES):
                count = min(piece, end - at)
                block = free.pop() if free else memoryview(bytearray(piece))
                task = loop.create_task(disk.read_into(at, block[:count]))
                under_way.append((at, block, task))
                at += count
            begin, block, task = under_way[0]
            await task
            under_way.popleft()
            yield begin, block[: min(piece, end - begin)]
            free.append(block)
    finally:
        for _, _, task in under_way:
            task.cancel()
        await asyncio.gather(*(task for _, _, task in under_way), return_exceptions=True)
