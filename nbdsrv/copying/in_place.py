"""Writing onto a disk that is there already: an NBD export, a block device.

::

    before   |old old old old old old old old old|
    after    |== data ==|0000|== data ==|00000000|old|     beyond the source nothing is touched

What the disk held is gone as soon as it is begun: a copy that fails leaves it half overwritten.
"""

import errno as os_errno

from nbdsrv.disk.disk import Ability, Disk
from nbdsrv.errors import DiskError
from nbdsrv.formats.writer import ImageWriter, Plan

__all__ = ["DiskWriter"]


class DiskWriter(ImageWriter):
    """Writes onto a Disk, which stays open. Several ranges at a time."""

    ordered = False
    fresh = False

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._size = 0
        self._fast = Ability.FAST_ZERO in disk.abilities
        self.granularity = disk.block_sizes.minimum

    @property
    def depth(self) -> int:
        """The disk's."""
        return self._disk.depth

    async def open(self, size: int) -> None:
        """Refuses a disk that is too small or read-only."""
        disk = self._disk
        if Ability.WRITE not in disk.abilities:
            raise DiskError(f"{disk.name} is read-only", os_errno.EROFS)
        if disk.size < size:
            raise DiskError(
                f"{disk.name} has {disk.size} bytes, fewer than the source's {size}",
                os_errno.ENOSPC,
            )

    async def begin(self, plan: Plan) -> None:
        """It is there already."""
        self._size = plan.size

    async def data(self, offset: int, data: memoryview) -> None:
        """Written; a last block that is not whole is filled up with zeroes."""
        missing = -len(data) % self.granularity
        if missing and offset + len(data) + missing <= self._disk.size:
            whole = len(data) - len(data) % self.granularity
            await self._write(offset, data[:whole])
            offset, data = offset + whole, memoryview(bytes(data[whole:]) + bytes(missing))
        await self._write(offset, data)

    async def _write(self, offset: int, data: memoryview) -> None:
        if data:
            await self._disk.write(offset, data)

    async def zero(self, offset: int, length: int) -> None:
        """The fast way as long as the disk has one."""
        if offset + length == self._size:  # a last block that is not whole
            padded = length + -length % self.granularity
            length = padded if offset + padded <= self._disk.size else length
        if self._fast:
            try:
                await self._disk.zero(offset, length, punch=True, fast=True)
                return
            except DiskError as error:
                if error.errno != os_errno.EOPNOTSUPP:
                    raise
                self._fast = False
        await self._disk.zero(offset, length, punch=True, fast=False)

    async def finish(self) -> None:
        """Durable, where the disk can say so."""
        if Ability.FLUSH in self._disk.abilities:
            await self._disk.flush()

    async def abort(self) -> None:
        """Nothing brings back what was there."""
