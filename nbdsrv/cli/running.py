"""An event loop and threads for the time of one command."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from nbdsrv.disk.blocks import BlockCache
from nbdsrv.disk.disk import Disk
from nbdsrv.disk.workers import Workers
from nbdsrv.export.grammar import Kind, parse_source
from nbdsrv.export.opener import open_source
from nbdsrv.ops.arenas import few_arenas
from protocol.contexts import ALLOCATION, ALLOCATION_DEPTH

__all__ = ["delivering", "opened", "running_workers"]

CACHE = 64 << 20
"""Decoded bytes a command keeps, a third of what a server does: it reads on and does not come
back."""


@contextmanager
def delivering(workers: Workers) -> Iterator[None]:
    """What threads have done reaches the running loop, without a server's reactor."""
    loop = asyncio.get_running_loop()
    loop.add_reader(workers.fileno(), workers.complete)
    try:
        yield
    finally:
        loop.remove_reader(workers.fileno())


@asynccontextmanager
async def running_workers() -> AsyncIterator[Workers]:
    """Threads until the end of the block."""
    few_arenas()
    workers = Workers(cache=BlockCache(CACHE))
    try:
        with delivering(workers):
            yield workers
    finally:
        workers.close()


@asynccontextmanager
async def opened(
    text: str,
    workers: Workers,
    *,
    connections: int | None = None,
    context: str | None = None,
) -> AsyncIterator[Disk]:
    """The disk a SOURCE names, until the end of the block.

    To an NBD server there are ``connections``, and it is asked for ``context`` too: it does not
    say what it has unless that is asked of it first, on a connection for just that.
    """
    source = parse_source(text)
    if (connections or context) and source.kind is Kind.NBD and source.partition is None:
        from nbdsrv.source.nbd import DEFAULT_CONNECTIONS, open_nbd

        disk: Disk = await open_nbd(
            source.location,
            workers,
            connections=connections or DEFAULT_CONNECTIONS,
            contexts=tuple(dict.fromkeys([ALLOCATION, ALLOCATION_DEPTH, context or ALLOCATION])),
        )
    else:
        disk = await open_source(source, workers)
    try:
        yield disk
    finally:
        await disk.close()
