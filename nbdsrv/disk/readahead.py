"""Reads on ahead of those who read one thing after the other.

::

    reads     |--1--|--2--|--3--|
    window                      |  chunk  |  chunk  |  chunk  |    in memory before it is asked for
                                 1, then 2, 4, 8 of them, the longer it goes on

Several readers at a time are told apart by where they will go on. A chunk is given away when its
reader has passed it.
"""

from collections import OrderedDict

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.shelf import Shelved
from nbdsrv.disk.workers import Workers

__all__ = ["ReadAhead"]

CHUNK = 1 << 20
"""Bytes fetched at a time."""
WINDOW = 16 << 20
"""Bytes held for all readers together."""
STREAMS = 16
"""Readers followed at a time."""
SEQUENTIAL = 2
"""Reads that each began where another ended, after which it is no coincidence."""
MAX_AHEAD = 8
"""Chunks ahead of one reader: 8 MiB are a tenth of a second at 80 MB/s."""


class ReadAhead(Shelved):
    """A window of chunks in front of sequential readers. All changes must come through it."""

    def __init__(
        self, workers: Workers, inside: Disk, *, chunk: int = CHUNK, window: int = WINDOW
    ) -> None:
        """``window``: bytes of memory; at least one chunk."""
        self._chunks = max(window // chunk, 1)
        super().__init__(workers, inside, chunk, self._chunks)
        self._streams: OrderedDict[int, int] = OrderedDict()  # where it goes on: reads so far

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """From the window as far as it goes."""
        length = len(buffer)
        self._check(offset, length)
        sequential = length > 0 and self._follow(offset, offset + length)
        await self._shelf.read(offset, buffer)
        if sequential:
            for index in range(offset // self._shelf.block, (offset + length) // self._shelf.block):
                self._shelf.drop(index)

    def _follow(self, offset: int, end: int) -> bool:
        """Whose read is it? Fetch on if it is a sequential reader's."""
        reads = self._streams.pop(offset, -1) + 1
        self._streams[end] = reads
        if len(self._streams) > STREAMS:
            self._streams.popitem(last=False)
        if reads < SEQUENTIAL:
            return False
        block, ahead = self._shelf.block, self._ahead(reads - SEQUENTIAL)
        first = -(-end // block)
        for index in range(first, min(first + ahead, -(-self.size // block))):
            if index not in self._shelf:
                self._shelf.fetch(index, 1)
        return True

    def _ahead(self, reads: int) -> int:
        """How many chunks: growing, but never what another reader is about to come to."""
        readers = sum(reads >= SEQUENTIAL for reads in self._streams.values())
        share = max(self._chunks // readers - 1, 1)  # one it is reading from
        return min(1 << min(reads, 16), MAX_AHEAD, share)
