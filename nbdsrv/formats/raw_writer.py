"""Raw images being written: data where it belongs, holes where there is none.

::

    a file    |== data ==|  (never written)  |== data ==|   (the size alone makes it)  |
    a pipe    |== data ==|00000000000000000000|== data ==|00000000000000000000000000000|
"""

from nbdsrv.disk.workers import Workers
from nbdsrv.formats.target_file import TargetFile
from nbdsrv.formats.writer import ImageWriter, Plan

__all__ = ["RawWriter"]

_ZEROES = bytes(1 << 20)


class RawWriter(ImageWriter):
    """A raw image, sparse where the target is a file."""

    def __init__(self, workers: Workers, target: TargetFile) -> None:
        """Becomes the owner of ``target``, which is not open yet."""
        self._workers = workers
        self._target = target
        self._size = 0
        self.seekable = target.seekable
        self.ordered = not target.seekable
        self.threaded = target.seekable

    async def open(self, size: int) -> None:
        """A file gets its size, and nothing is allocated ahead of the data."""
        self._size = size
        await self._workers.run(self._open)

    def _open(self) -> None:
        self._target.open()
        if self.seekable:
            self._target.resize(self._size)

    async def begin(self, plan: Plan) -> None:
        """There is nothing but data."""

    async def data(self, offset: int, data: memoryview) -> None:
        """To its place."""
        work = self.store if self.seekable else self._append
        await self._workers.run(work, offset, data)

    def store(self, offset: int, data: memoryview) -> None:
        """To its place in the file."""
        self._target.store(offset, data)

    async def zero(self, offset: int, length: int) -> None:
        """A hole, which is there already; a pipe gets it together with what follows."""

    async def finish(self) -> None:
        """Durable, and under its name."""
        if not self.seekable:
            await self._workers.run(self._append, self._size, b"")
        await self._workers.run(self._target.publish)

    async def abort(self) -> None:
        """Remove it."""
        await self._workers.run(self._target.discard)

    def _append(self, offset: int, data: memoryview | bytes) -> None:
        """Zeroes up to ``offset``, then ``data``."""
        target = self._target
        while target.position < offset:
            gap = min(offset - target.position, len(_ZEROES))
            target.append(memoryview(_ZEROES)[:gap])
        target.append(data)
