"""One long request as several short ones, some of them in flight at a time."""

import asyncio
from collections.abc import Awaitable, Callable

from nbdsrv.errors import DiskError

__all__ = ["in_pieces"]

DEPTH = 16
"""Pieces of one call in flight at least; what a server works on at a time."""


async def in_pieces(
    offset: int,
    length: int,
    step: int,
    work: Callable[[int, int], Awaitable[None]],
    depth: int = DEPTH,
) -> None:
    """``work(offset, length)`` for each piece in ascending order, ``depth`` at a time.

    They are cut at multiples of ``step``, so that all but the first and last are whole blocks.

    Raises:
        DiskError: of the lowest piece that failed; all below it have been done, some above it too.
    """
    if not length:
        return
    end = offset + length
    first = offset - offset % step
    if end <= first + step:
        await work(offset, length)
        return
    pieces = iter(range(first, end, step))
    failed: list[tuple[int, DiskError]] = []

    async def worker() -> None:
        for begin in pieces:
            if failed:
                return
            at = max(begin, offset)
            try:
                await work(at, min(begin + step, end) - at)
            except DiskError as error:
                failed.append((at, error))

    count = -(-(end - first) // step)
    await asyncio.gather(*(worker() for _ in range(min(max(depth, DEPTH), count))))
    if failed:
        raise min(failed, key=lambda pair: pair[0])[1]
