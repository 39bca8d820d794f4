"""A disk whose index is a file: what Proxmox Backup Server's and casync's have in common.

::

    this point's index ── pages, blocks ──> PagedDisk          a tool's part
                  └────── ``_changes`` ───┐
    other points' indexes, few open ──────┴──> ``nbdsrv:changed-since:POINT``
"""

import asyncio
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from typing import Generic, Protocol, TypeVar

from nbdsrv.disk.workers import Workers
from nbdsrv.errors import DiskError
from nbdsrv.formats.paged import PagedDisk
from nbdsrv.repository.comparing import MAX_OTHERS, announced
from nbdsrv.repository.repository import CHANGED_SINCE
from protocol.extents import ExtentList

__all__ = ["IndexedDisk"]


class _Index(Protocol):
    """An open index file."""

    @property
    def size(self) -> int: ...

    def close(self) -> None: ...


I = TypeVar("I", bound=_Index)  # noqa: E741 - an index


class IndexedDisk(PagedDisk, Generic[I]):
    """A disk of a point, read-only. Subclasses set ``page_span``.

    Attributes:
        index: of this point.
    """

    def __init__(
        self,
        workers: Workers,
        name: str,
        index: I,
        others: Mapping[str, Callable[[], I]],
        facts: Mapping[str, object],
        release: Callable[[], Awaitable[None]],
    ) -> None:
        """Becomes the owner of ``index``.

        Args:
            workers: for everything that blocks.
            name: for messages.
            index: open.
            others: what ``changed-since`` can compare with by point, from old to new; blocking.
            facts: for ``info``.
            release: called once, when it is closed.
        """
        super().__init__(workers, name)
        self.index = index
        self.size = index.size
        self.contexts = announced(others)
        self._others = others
        self._opened: OrderedDict[str, I] = OrderedDict()
        self._comparing = asyncio.Lock()
        self._facts = facts
        self._release = release

    @abstractmethod
    def _changes(self, theirs: I, offset: int, length: int) -> list[tuple[int, int]]:
        """(length, flags) from ``offset`` on: at least one, at most ``length`` bytes. Blocking.

        Raises:
            DiskError: an index cannot be read.
        """

    async def status(self, context: str, offset: int, length: int) -> ExtentList:
        """Allocation, its depth, and what has changed since other points."""
        name = context.removeprefix(CHANGED_SINCE)
        opener = self._others.get(name)
        if opener is None or not context.startswith(CHANGED_SINCE):
            return await super().status(context, offset, length)
        self._check(offset, length)
        async with self._comparing:  # an index that is compared is not closed meanwhile
            if self._closed:
                raise DiskError(f"{self.name} is closed")
            if name not in self._opened:
                await self.workers.run(self._open_other, name, opener)
            self._opened.move_to_end(name)
            theirs = self._opened[name]
            while len(self._opened) > MAX_OTHERS:
                self._opened.popitem(last=False)[1].close()
            found = await self.workers.look_up(self._changes, theirs, offset, length)
        return ExtentList(offset, found)

    def _open_other(self, name: str, opener: Callable[[], I]) -> None:
        """In a thread: whoever waits for it may be cancelled, and it is ours all the same."""
        self._opened[name] = opener()

    async def close(self) -> None:
        """Close the indexes, then let go of the point. Idempotent."""
        if self._closed:
            return
        try:
            await super().close()
            async with self._comparing:
                await self.workers.look_up(self._close_others)
        finally:
            await self._release()

    def _close_files(self) -> None:
        self.index.close()

    def _close_others(self) -> None:
        while self._opened:
            self._opened.popitem()[1].close()
