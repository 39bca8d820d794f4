"""What the last boot has read, brought near before this one asks for it.

::

    trace   (offset, length) (offset, length) ...    in that order, a few at a time
               │
    base.cache ── decoded chunks, pages of the kernel's, whatever the base keeps

A chunk of a restore point is decoded once; a distant one is fetched while the guest still unpacks
its kernel. No more than part of the cache is filled: what lies there unread must not be what makes
room for the rest.
"""

import asyncio
from collections.abc import Iterable

from nbdsrv.disk.disk import Disk
from nbdsrv.errors import DiskError
from nbdsrv.overlay.quiet import Quiet

__all__ = ["PREFETCH_PATIENCE_S", "Prefetch"]

PREFETCH_PATIENCE_S = 0.02
"""Seconds a piece waits at most: while a machine boots it asks all the time, and what it asks for
next is just what is wanted here."""
PIECE = 256 << 10
"""Bytes asked for at a time."""
LANES = 4
"""Pieces on their way at a time."""
SHARE = 0.5
"""Of the cache."""


class Prefetch:
    """Of one base.

    Attributes:
        done: bytes that were brought near.
    """

    def __init__(self, base: Disk, quiet: Quiet) -> None:
        """``quiet``: the guests' pauses."""
        self.done = 0
        self._base = base
        self._quiet = quiet

    async def run(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Bring these near; ends early at the first that cannot be read. May be cancelled."""
        budget = int(self._base.workers.cache.limit * SHARE)
        taken = 0
        pieces = (
            (at, min(PIECE - at % PIECE, offset + length - at))
            for offset, length in ranges
            for at in _starts(offset, length)
        )

        async def lane() -> None:
            nonlocal taken
            for offset, length in pieces:
                taken += length
                if taken > budget:
                    return
                await self._quiet.pause()
                try:
                    await self._base.cache(offset, length)
                except DiskError:
                    return  # who reads it will be told
                self.done += length

        async with asyncio.TaskGroup() as lanes:
            for _ in range(LANES):
                lanes.create_task(lane())


def _starts(offset: int, length: int) -> Iterable[int]:
    """Where the pieces of a range begin: at its beginning, and at each multiple of a piece."""
    yield offset
    yield from range((offset // PIECE + 1) * PIECE, offset + length, PIECE)
