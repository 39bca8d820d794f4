"""A block cache in front of a slow Disk.

::

    read          |----------------|
    blocks   |  0  |  1  |  2  |  3  |     missing neighbours are fetched with one read
"""

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.shelf import Shelved
from nbdsrv.disk.workers import Workers

__all__ = ["Cached"]

BLOCK = 64 << 10
"""Bytes fetched for a read of 4 KiB: costs a distant server hardly more, and is soon wanted."""
LIMIT = 64 << 20
"""Bytes kept: what a guest reads while it boots."""
LARGEST = 1 << 20
"""Bytes of a read; what is longer is a copy of the disk, which would wash everything out."""


class Cached(Shelved):
    """The most recently used blocks. All changes must come through it."""

    def __init__(
        self, workers: Workers, inside: Disk, *, block: int = BLOCK, limit: int = LIMIT
    ) -> None:
        """``limit``: bytes; at least one block is kept."""
        super().__init__(workers, inside, block, max(limit // block, 1))

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """From the cache; what is missing comes into it."""
        self._check(offset, len(buffer))
        if buffer and len(buffer) <= LARGEST:
            self._fetch_missing(offset, len(buffer))
        await self._shelf.read(offset, buffer)

    def _fetch_missing(self, offset: int, length: int) -> None:
        shelf = self._shelf
        first, last = offset // shelf.block, (offset + length - 1) // shelf.block
        at = first
        while at <= last:
            end = at
            while end <= last and end not in shelf:
                end += 1
            shelf.fetch(at, end - at)
            at = end + 1
