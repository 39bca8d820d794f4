"""How what was written becomes durable: the order of syncs, and who shares them.

::

    writes   --x--x-----x--x---------->      states change when the bytes are in the data file
    flush 1       |notes the changes so far; sync data; append them; sync map|
    flush 2            |waits ...........................................|, does the same, alone
    flush 3                 |waits, and returns with flush 2

Rules:

* What a frame says was true before the data was synced. A block that has changed meanwhile is told
  by the next frame, also if it says the opposite.
* A sync that has failed is never forgotten: what it was about may be lost, and no later sync will
  tell. From then on nothing is promised any more until the overlay is opened anew.
* A disk that is full is no such failure: what could not be told stays noted for the next flush.
"""

import asyncio
from collections.abc import Sequence

from nbdsrv.disk.workers import Workers
from nbdsrv.errors import DiskError
from nbdsrv.overlay.block_map import PAGE_BLOCKS, BlockMap, Page, packed
from nbdsrv.overlay.files import Files
from nbdsrv.overlay.journal import Record
from nbdsrv.overlay.map_file import MapFile
from nbdsrv.overlay.states import UNWATCH, WATCH

__all__ = ["Durability"]

MAX_NOTED = 1 << 16
"""Changes noted, some 10 MiB of memory; were there more, the next flush writes a new map, which
needs no notes."""


class Durability:
    """Of one overlay. Belongs to the loop.

    Attributes:
        failed: nothing can be promised any more.
    """

    def __init__(
        self,
        workers: Workers,
        files: Files,
        name: str,
        data_fd: int,
        map_file: MapFile,
        states: BlockMap,
        doubts: Sequence[Record],
        watched: set[int],
    ) -> None:
        """``doubts`` and ``watched``: as they were replayed."""
        self.failed = False
        self._workers = workers
        self._files = files
        self._name = name
        self._data_fd = data_fd
        self._map = map_file
        self._states = states
        self._noted: list[Record] = list(doubts)
        self._watched = watched
        self._turn = asyncio.Lock()
        self._begun = self._done = 0
        self._overflowed = False

    def note(self, first: int, end: int, state: int) -> None:
        """Blocks have got a state, and what they need for it is in the data file."""
        noted = self._noted
        if noted and noted[-1][1] == first and noted[-1][2] == state:
            noted[-1] = (noted[-1][0], end, state)
        elif len(noted) < MAX_NOTED:
            noted.append((first, end, state))
        else:
            noted.clear()
            noted.append((first, end, state))
            self._overflowed = True

    def check(self) -> None:
        """Raises DiskError if nothing can be promised any more."""
        if self.failed:
            text = "an earlier flush failed and data may be lost; restart what serves it"
            raise DiskError(f"{self._name}: {text}")

    async def flush(self) -> None:
        """Everything written before is on the disk.

        Raises:
            DiskError: it is not.
        """
        self.check()
        wanted = self._begun + 1
        async with self._turn:
            self.check()
            if self._done >= wanted:
                return
            self._begun += 1
            await self._perform(self._begun, [])

    async def finish(self) -> None:
        """The last flush of all: nothing is changing any more."""
        self.check()
        async with self._turn:
            self._begun += 1
            records = [(p * PAGE_BLOCKS, (p + 1) * PAGE_BLOCKS, UNWATCH) for p in self._watched]
            await self._perform(self._begun, records)
            self._watched.clear()

    async def _perform(self, number: int, last: list[Record]) -> None:
        taken, self._noted = self._noted, []
        whole, self._overflowed = self._overflowed, False
        pages = self._states.pages() if whole or self._map.outgrown else None
        watching = [] if last else self._watching(self._watched)
        records = None if whole else taken + last
        job = _Flush(self._files, self._data_fd, self._map, records, pages, watching)
        try:
            await self._workers.run(job.perform)
        except OSError as error:
            raise DiskError.from_os(f"flushing {self._name}", error) from error
        finally:
            if job.done:
                self._done = number
            else:
                self._put_back(taken, overflowed=whole)
            if job.lost or self._map.lost:
                self.failed = True

    def _put_back(self, taken: list[Record], *, overflowed: bool) -> None:
        """What could not be told is told by the next flush."""
        self._noted = taken + self._noted
        self._overflowed = self._overflowed or overflowed

    async def watch(self, pages: set[int]) -> None:
        """COPIED blocks of these pages may change from now on, whatever happens.

        Raises:
            DiskError: they must not.
        """
        if pages <= self._watched:
            return
        self.check()
        async with self._turn:
            self.check()
            new = pages - self._watched
            if not new:
                return
            try:
                await self._workers.run(self._map.append, self._watching(new))
            except OSError as error:
                raise DiskError.from_os(self._name, error) from error
            finally:
                if self._map.lost:
                    self.failed = True
            self._watched |= new

    def _watching(self, pages: set[int]) -> list[Record]:
        return [(p * PAGE_BLOCKS, (p + 1) * PAGE_BLOCKS, WATCH) for p in sorted(pages)]


class _Flush:
    """One flush, in a thread. How it ended is told here, for who waits may have been cancelled.

    Attributes:
        done: all of it is on the disk.
        lost: the kernel may have dropped some of the data.
    """

    def __init__(
        self,
        files: Files,
        data_fd: int,
        map_file: MapFile,
        records: Sequence[Record] | None,
        pages: list[tuple[int, Page]] | None,
        watching: Sequence[Record],
    ) -> None:
        """Tell ``records``, or if they are not known or too many, ``pages`` and ``watching``."""
        self._files = files
        self._data_fd = data_fd
        self._map = map_file
        self._records = records
        self._pages = pages
        self._watching = watching
        self.done = False
        self.lost = False

    def perform(self) -> None:
        """Raises OSError."""
        try:
            self._files.sync_data(self._data_fd)
        except OSError:
            self.lost = True
            raise
        if self._pages is not None and self._renewed(self._pages):
            self.done = True
            return
        if self._records:
            self._map.append(self._records)
        self.done = True

    def _renewed(self, pages: list[tuple[int, Page]]) -> bool:
        """Write a new map; if there is no room for it, the journal has to do."""
        try:
            self._map.renew([(number, packed(page)) for number, page in pages], self._watching)
        except OSError:
            if self._map.lost or self._records is None:
                raise
            return False
        return True
