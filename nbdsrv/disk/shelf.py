"""Blocks of a slow Disk in memory: fetched once, by a task of their own, and kept within a limit.

::

    disk     |  0  |  1  |  2  |  3  |  4  |  5  |
    shelf             [here] [coming ... ]          coming: one read for neighbours, all wait for it

Fetching belongs to nobody: whoever asked may be cancelled, the others still get their blocks.
What could not be fetched is not there, and is read directly by whoever wants it: that reader gets
the error, if his own bytes are concerned.

Rule: a change forgets what it touches before it begins and again when it has ended; what is being
fetched meanwhile may be either, and is not kept.
"""

import asyncio
from collections import OrderedDict
from itertools import islice

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.passthrough import Passthrough
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import DiskError

__all__ = ["Shelf", "Shelved"]


class _Block:
    __slots__ = ("arrived", "data")

    def __init__(self) -> None:
        self.arrived = asyncio.Event()
        self.data: bytes | None = None


class Shelf:
    """Up to ``limit`` blocks of ``block`` bytes. Belongs to one event loop."""

    def __init__(self, disk: Disk, block: int, limit: int) -> None:
        self.block = block
        self._disk = disk
        self._limit = limit
        self._blocks: OrderedDict[int, _Block] = OrderedDict()  # least recently used first
        self._fetching: set[asyncio.Task[None]] = set()

    def __contains__(self, index: int) -> bool:
        """Is the block here or coming?"""
        return index in self._blocks

    def __len__(self) -> int:
        return len(self._blocks)

    def fetch(self, first: int, count: int) -> None:
        """Begin to fetch blocks that are not here; as many of them as there is room for."""
        count = min(count, self._room(count))
        if count <= 0:
            return
        blocks = [_Block() for _ in range(count)]
        self._blocks.update(zip(range(first, first + count), blocks, strict=True))
        task = asyncio.get_running_loop().create_task(self._fetch(first, blocks))
        self._fetching.add(task)
        task.add_done_callback(self._fetching.discard)

    def _room(self, wanted: int) -> int:
        """Make room for ``wanted`` blocks; what is still coming cannot go."""
        excess = len(self._blocks) + wanted - self._limit
        if excess > 0:
            here = (index for index, block in self._blocks.items() if block.data is not None)
            for index in list(islice(here, excess)):
                del self._blocks[index]
        return self._limit - len(self._blocks)

    async def _fetch(self, first: int, blocks: list[_Block]) -> None:
        offset = first * self.block
        length = min(len(blocks) * self.block, self._disk.size - offset)
        buffer = memoryview(bytearray(length))
        good = 0
        try:
            await self._disk.read_into(offset, buffer)
            good = length
        except DiskError as error:
            if error.offset is not None:
                good = max(error.offset - offset, 0)
        finally:
            for at, block in enumerate(blocks):
                begin, end = at * self.block, min((at + 1) * self.block, length)
                if end <= good:
                    block.data = bytes(buffer[begin:end])
                elif self._blocks.get(first + at) is block:
                    del self._blocks[first + at]
                block.arrived.set()

    async def copy(self, index: int, skip: int, part: memoryview) -> bool:
        """Fill ``part`` from a block, waiting for it if it is coming; False if it is not here."""
        block = self._blocks.get(index)
        if block is None:
            return False
        if block.data is None:
            await block.arrived.wait()
        if block.data is None:
            return False
        if index in self._blocks:
            self._blocks.move_to_end(index)
        part[:] = memoryview(block.data)[skip : skip + len(part)]
        return True

    async def read(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from the shelf, and from the Disk what is not on it."""
        done, length = 0, len(buffer)
        while done < length:
            index, skip = divmod(offset + done, self.block)
            part = buffer[done : done + self.block - skip]
            if await self.copy(index, skip, part):
                done += len(part)
                continue
            end = done + len(part)
            while end < length and (offset + end) // self.block not in self:
                end += self.block
            await self._disk.read_into(offset + done, buffer[done:end])
            done = min(end, length)

    def drop(self, index: int) -> None:
        """The block will not be asked for again."""
        self._blocks.pop(index, None)

    def forget(self, offset: int, length: int) -> None:
        """The range changes."""
        first, end = offset // self.block, -(-(offset + length) // self.block)
        if end - first < len(self._blocks):
            indexes = [index for index in range(first, end) if index in self._blocks]
        else:
            indexes = [index for index in self._blocks if first <= index < end]
        for index in indexes:
            del self._blocks[index]

    async def close(self) -> None:
        """End all fetching; give all memory back. Idempotent."""
        tasks = list(self._fetching)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._blocks.clear()


class Shelved(Passthrough):
    """A wrapper that keeps blocks of the inner Disk. All changes must come through it."""

    def __init__(self, workers: Workers, inside: Disk, block: int, limit: int) -> None:
        super().__init__(workers, inside)
        self._shelf = Shelf(inside, block, limit)

    async def write(self, offset: int, data: memoryview) -> None:
        """As the inner Disk does."""
        self._shelf.forget(offset, len(data))
        try:
            await self._inside.write(offset, data)
        finally:
            self._shelf.forget(offset, len(data))

    async def zero(self, offset: int, length: int, *, punch: bool, fast: bool) -> None:
        """As the inner Disk does."""
        self._shelf.forget(offset, length)
        try:
            await self._inside.zero(offset, length, punch=punch, fast=fast)
        finally:
            self._shelf.forget(offset, length)

    async def trim(self, offset: int, length: int) -> None:
        """As the inner Disk does."""
        self._shelf.forget(offset, length)
        try:
            await self._inside.trim(offset, length)
        finally:
            self._shelf.forget(offset, length)

    async def close(self) -> None:
        """End what is being fetched, close the inner Disk."""
        await self._shelf.close()
        await self._inside.close()
