"""A compressed raw disk whose blocks are decoded as they are read.

::

    locate   |-- BlockRun 0 --|-- ZeroRun --|-- BlockRun 2 --|
                     |
             Blocks.get ──> BlockSource.decode       in a thread, kept in the shared cache

The whole index is in memory, so ``locate`` never has to load, and a block is wherever ``starts``
says: blocks of different length are what a MappedDisk's pages could not have.
"""

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from nbdsrv.disk.blocks import Blocks
from nbdsrv.disk.disk import Disk
from nbdsrv.disk.runs import BlockRun, Run, ZeroRun
from nbdsrv.disk.workers import Workers
from nbdsrv.formats.compressed.source import BlockSource, Room
from nbdsrv.formats.image_file import ImageFile
from protocol.extents import DATA, ZERO, ExtentList
from protocol.terms import BlockSizes

__all__ = ["CompressedDisk"]

ROOM = 128 << 20
"""Bytes being decoded at a time: two blocks of 32 MiB, or many small ones."""
MAX_EXTENTS = 1 << 16
"""Blocks looked at for one answer; it may stop short."""
MAX_PREFERRED = 1 << 20
"""Bytes; what is read in smaller pieces than a block comes from the cache."""


class CompressedDisk(Disk):
    """A raw disk behind gzip, xz or zstd."""

    def __init__(self, workers: Workers, file: ImageFile, kind: str, source: BlockSource) -> None:
        """Becomes the owner of ``file``."""
        super().__init__(workers)
        self.name = file.path
        self.size = source.size
        self.format = kind
        self.block_sizes = replace(BlockSizes(), preferred=_preferred(source))
        self._file = file
        self._source = source
        self._room = Room(ROOM)
        self._blocks = Blocks(workers.cache, self._decode)

    @property
    def facts(self) -> Mapping[str, object]:
        """How it can be read: blocks, the largest of them, and what the index is made of."""
        return self._source.facts

    def locate(self, offset: int, length: int) -> Sequence[Run]:
        """From the index; always there."""
        runs: list[Run] = []
        for number, begin, end in self._covering(offset, length):
            if not self._is_zero(number):
                skip = begin - self._source.starts[number]
                runs.append(BlockRun(self._blocks, number, skip, end - begin))
            elif runs and isinstance(runs[-1], ZeroRun):
                runs[-1] = ZeroRun(runs[-1].length + end - begin)
            else:
                runs.append(ZeroRun(end - begin))
        return runs

    def _covering(self, offset: int, length: int) -> Iterator[tuple[int, int, int]]:
        """(block, first byte, byte behind the last) of each block in a range."""
        at, limit = offset, min(offset + length, self.size)
        number = bisect_right(self._source.starts, offset) - 1
        while at < limit:
            end = min(self._source.end(number), limit)
            yield number, at, end
            at = end
            number += 1

    def _is_zero(self, number: int) -> bool:
        return bool(self._source.zero) and bool(self._source.zero[number])

    def _decode(self, number: int) -> bytes:
        with self._room.take(self._source.memory(number)):
            return self._source.decode(number)

    async def load(self, offset: int, length: int) -> None:
        """Nothing to load."""
        self._check(offset, length)

    async def extents(self, offset: int, length: int) -> ExtentList:
        """Data, but for blocks that are known to hold zeroes only."""
        self._check(offset, length)
        found = []
        for number, begin, end in self._covering(offset, length):
            found.append((end - begin, ZERO if self._is_zero(number) else DATA))
            if len(found) >= MAX_EXTENTS:
                break
        return ExtentList(offset, found)

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with the bytes at ``offset``."""
        self._check(offset, len(buffer))
        await super().read_into(offset, buffer)

    async def close(self) -> None:
        """Close the file and give the memory back."""
        self._blocks.close()
        await self.workers.look_up(self._file.close)


def _preferred(source: BlockSource) -> int:
    """The first block's length as a power of two within reason."""
    first = source.end(0) if source.starts else 1
    return max(4096, min(1 << (first - 1).bit_length(), MAX_PREFERRED))
