"""Data files that are open, each once, however many disks are made of it.

::

    disk A ──┐
    disk B ──┼──> OpenFile ── ImageFile, Index, Lz4Frames      closed behind the last disk
    disk C ──┘
                  Index ── kept beyond that, within a bound    a walk through a large file is long
"""

import asyncio
from collections import OrderedDict
from dataclasses import dataclass, field

from nbdsrv.disk.workers import Workers
from nbdsrv.errors import DiskError, RepositoryError
from nbdsrv.formats.image_file import ImageFile
from nbdsrv.formats.turns import in_turns
from nbdsrv.repository.virtnbdbackup.data_file import DataFile, open_data
from nbdsrv.repository.virtnbdbackup.index import Index, index_of, whole
from nbdsrv.repository.virtnbdbackup.lz4_frame import Lz4Frames, Seeds
from nbdsrv.repository.virtnbdbackup.stream import read_meta
from nbdsrv.store.tree import Node, Tree

__all__ = ["OpenFile", "OpenFiles"]

MAX_KEPT = 2 << 20
"""Entries of indexes kept for files that are not open: 56 MiB."""
MAX_IN_USE = 6 << 20
"""Entries of those that are: 168 MiB."""


@dataclass(slots=True)
class OpenFile:
    """A data file, open.

    Attributes:
        data: what is known of it.
        file: itself.
        frames: its LZ4 frames.
        index: None until ``OpenFiles.indexed``.
        users: disks that are made of it.
    """

    data: DataFile
    file: ImageFile
    frames: Lz4Frames
    index: Index | None = None
    users: int = 0
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)


class OpenFiles:
    """For one event loop."""

    def __init__(self, tree: Tree, workers: Workers) -> None:
        self._tree = tree
        self._workers = workers
        self._open: dict[tuple[str, Node], OpenFile] = {}
        self._kept: OrderedDict[tuple[str, Node], Index] = OrderedDict()
        self._seeds = Seeds()
        self._turn = asyncio.Lock()

    async def acquire(self, data: DataFile) -> OpenFile:
        """The file, open; give it back by ``release``.

        Raises:
            DiskError: it cannot be opened, or is not what it was when it was listed.
        """
        key = (data.path, data.node)
        async with self._turn:
            found = self._open.get(key)
            if found is None:
                opened: list[ImageFile] = []
                try:
                    await self._workers.look_up(_open, self._tree, data, opened)
                except BaseException:  # cancelled: it has been opened all the same
                    for file in opened:
                        file.close()
                    raise
                (file,) = opened
                found = OpenFile(data, file, Lz4Frames(file, self._seeds), self._kept.get(key))
                self._open[key] = found
            found.users += 1
        return found

    async def release(self, used: OpenFile) -> None:
        """One user less; behind the last one the file is closed."""
        used.users -= 1
        if used.users:
            return
        key = (used.data.path, used.data.node)
        if self._open.get(key) is used:
            del self._open[key]
        if used.index is not None and used.index.fault is None:
            self._kept[key] = used.index
            self._kept.move_to_end(key)
            while sum(map(len, self._kept.values())) > MAX_KEPT:
                self._kept.popitem(last=False)
        used.frames.close()
        await self._workers.look_up(used.file.close)

    async def indexed(self, used: OpenFile) -> Index:
        """Where its extents are: a walk through the file, when it is first asked for.

        Raises:
            DiskError: the file cannot be read, or there are too many extents in all.
        """
        async with used.turn:
            if used.index is None:
                meta = used.data.meta
                if meta is None:
                    used.index = whole(used.file.size)
                else:
                    used.index = await in_turns(self._workers, index_of(used.file, meta))
                entries = sum(len(each.index) for each in self._open.values() if each.index)
                if entries > MAX_IN_USE:
                    used.index = None
                    text = f"{used.file.path}: more than {MAX_IN_USE} extents are in use"
                    raise RepositoryError(f"{text}; read fewer disks at a time")
            return used.index


def _open(tree: Tree, data: DataFile, opened: list[ImageFile]) -> None:
    file = open_data(tree, data.path)
    opened.append(file)
    if file.size != data.node.size or (data.meta is not None and read_meta(file) != data.meta):
        raise DiskError(f"{file.path}: has just become another file; list the points anew")
