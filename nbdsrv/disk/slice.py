"""A range of a Disk as a Disk of its own: a partition.

::

    inside   |------|============ Slice ============|---------|
                    ^ base                          ^ base + size
                    0          offsets              size
"""

import errno as os_errno
from collections.abc import Awaitable, Sequence
from typing import TypeVar

from nbdsrv.disk.disk import Disk
from nbdsrv.disk.passthrough import Passthrough
from nbdsrv.disk.runs import FileRun, Run
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import DiskError
from protocol.extents import ExtentList

__all__ = ["Slice"]

T = TypeVar("T")


class Slice(Passthrough):
    """``size`` bytes from ``base`` on; nothing outside of it can be reached."""

    def __init__(
        self, workers: Workers, inside: Disk, base: int, size: int, name: str = ""
    ) -> None:
        """Becomes the owner of ``inside``, but not if it raises.

        Raises:
            DiskError: the range is not within the Disk.
        """
        super().__init__(workers, inside)
        if base < 0 or size < 0 or base + size > inside.size:
            text = f"{inside.name}: {size} bytes at {base} reach beyond its end at {inside.size}"
            raise DiskError(text, os_errno.EINVAL)
        self._base = base
        self.size = size
        self.name = name or inside.name

    @property
    def epoch(self) -> int:  # type: ignore[override]
        """The inner Disk's."""
        return self._inside.epoch

    def locate(self, offset: int, length: int) -> Sequence[Run] | None:
        """The inner Disk's runs, as far as the slice goes."""
        runs = self._inside.locate(self._base + offset, length)
        if runs is None:
            return None
        clipped: list[Run] = []
        left = self.size - offset
        for run in runs:
            if left <= 0:
                break
            clipped.append(run if run.length <= left else run._replace(length=left))
            left -= run.length
        return clipped

    def place(self, offset: int, length: int) -> FileRun | None:
        """The inner Disk's."""
        run = self._inside.place(self._base + offset, length)
        left = self.size - offset
        if run is None or run.length <= left:
            return run
        return run._replace(length=left)

    async def load(self, offset: int, length: int) -> None:
        """As the inner Disk does."""
        self._check(offset, length)
        await self._moved(self._inside.load(self._base + offset, length))

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """As the inner Disk does."""
        self._check(offset, len(buffer))
        await self._moved(self._inside.read_into(self._base + offset, buffer))

    async def extents(self, offset: int, length: int) -> ExtentList:
        """The inner Disk's."""
        self._check(offset, length)
        found = await self._moved(self._inside.extents(self._base + offset, length))
        return ExtentList(offset, [(extent.length, extent.flags) for extent in found])

    async def status(self, context: str, offset: int, length: int) -> ExtentList:
        """The inner Disk's."""
        self._check(offset, length)
        found = await self._moved(self._inside.status(context, self._base + offset, length))
        return ExtentList(offset, [(extent.length, extent.flags) for extent in found])

    async def write(self, offset: int, data: memoryview) -> None:
        """As the inner Disk does."""
        self._check_change(offset, len(data))
        await self._moved(self._inside.write(self._base + offset, data))

    async def zero(self, offset: int, length: int, *, punch: bool, fast: bool) -> None:
        """As the inner Disk does."""
        self._check_change(offset, length)
        work = self._inside.zero(self._base + offset, length, punch=punch, fast=fast)
        await self._moved(work)

    async def trim(self, offset: int, length: int) -> None:
        """As the inner Disk does."""
        self._check_change(offset, length)
        await self._moved(self._inside.trim(self._base + offset, length))

    async def cache(self, offset: int, length: int) -> None:
        """As the inner Disk does."""
        self._check(offset, length)
        await self._moved(self._inside.cache(self._base + offset, length))

    async def _moved(self, work: Awaitable[T]) -> T:
        """Await; an error's offset becomes ours."""
        try:
            return await work
        except DiskError as error:
            if error.offset is None:
                raise
            at = max(error.offset - self._base, 0)
            raise type(error)(str(error), error.errno, at) from error
