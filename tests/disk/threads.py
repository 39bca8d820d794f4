"""Worker threads wired to the running event loop, as the server's reactor does it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from nbdsrv.disk.workers import Workers

__all__ = ["running_workers"]


@asynccontextmanager
async def running_workers(threads: int = 16) -> AsyncIterator[Workers]:
    """Threads until the end of the block."""
    loop = asyncio.get_running_loop()
    workers = Workers(threads)
    loop.add_reader(workers.fileno(), workers.complete)
    try:
        yield workers
    finally:
        loop.remove_reader(workers.fileno())
        workers.close()
