"""What all wrappers have in common: a Disk that is another Disk, but for one thing.

::

    Slice  ReadAhead  Cached  Throttle  Deadline  Progress
                         |
                    Passthrough ──> the Disk inside, owned and closed with it

Rule: every read goes through the wrapper's own ``read_into``. ``locate`` answers RemoteRun, for an
address would lead past the wrapper, and ``begin_read`` declines; ``Slice`` alone, which only moves
addresses, hands them out.
"""

import errno as os_errno
from collections.abc import Mapping, Sequence

from nbdsrv.disk.disk import Ability, Disk
from nbdsrv.disk.runs import RemoteRun, Run
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import DiskError
from protocol.extents import ExtentList

__all__ = ["Passthrough"]


class Passthrough(Disk):
    """The Disk inside. Subclasses change what they are about."""

    def __init__(self, workers: Workers, inside: Disk) -> None:
        """Becomes the owner of ``inside``."""
        super().__init__(workers)
        self._inside = inside
        self.name = inside.name
        self.size = inside.size
        self.format = inside.format
        self.abilities = inside.abilities
        self.block_sizes = inside.block_sizes
        self.contexts = inside.contexts
        self.further_files = inside.further_files
        self.backing = inside.backing

    @property
    def facts(self) -> Mapping[str, object]:
        """The inner Disk's."""
        return self._inside.facts

    @property
    def depth(self) -> int:
        """The inner Disk's."""
        return self._inside.depth

    def locate(self, offset: int, length: int) -> Sequence[Run] | None:
        """Only ``read_into`` gives these bytes."""
        del offset
        return (RemoteRun(length),)

    async def load(self, offset: int, length: int) -> None:
        """There is nothing ``locate`` would need."""

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """As the inner Disk does."""
        await self._inside.read_into(offset, buffer)

    async def extents(self, offset: int, length: int) -> ExtentList:
        """The inner Disk's."""
        return await self._inside.extents(offset, length)

    async def status(self, context: str, offset: int, length: int) -> ExtentList:
        """The inner Disk's."""
        return await self._inside.status(context, offset, length)

    async def write(self, offset: int, data: memoryview) -> None:
        """As the inner Disk does."""
        await self._inside.write(offset, data)

    async def zero(self, offset: int, length: int, *, punch: bool, fast: bool) -> None:
        """As the inner Disk does."""
        await self._inside.zero(offset, length, punch=punch, fast=fast)

    async def trim(self, offset: int, length: int) -> None:
        """As the inner Disk does."""
        await self._inside.trim(offset, length)

    async def flush(self) -> None:
        """As the inner Disk does."""
        await self._inside.flush()

    async def cache(self, offset: int, length: int) -> None:
        """As the inner Disk does."""
        await self._inside.cache(offset, length)

    async def close(self) -> None:
        """Close the inner Disk."""
        await self._inside.close()

    def _check(self, offset: int, length: int, errno: int = os_errno.EINVAL) -> None:
        """For wrappers that do not leave it to the inner Disk."""
        if offset < 0 or offset + length > self.size:
            text = f"{self.name}: {length} bytes at {offset} reach beyond its end at {self.size}"
            raise DiskError(text, errno)

    def _check_change(self, offset: int, length: int) -> None:
        if Ability.WRITE not in self.abilities:
            raise self._read_only()
        self._check(offset, length, os_errno.ENOSPC)
