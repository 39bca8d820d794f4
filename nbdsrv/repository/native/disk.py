"""A disk of a restore point, as every other Disk.

::

    guest    |  zeroes  | chunk 5 | chunk 6 | zeroes | chunk 9 | ...
    slots    |  0  |  0 |   id    |   id    |   0    |   id    |      ``pages``, in memory
    runs     | ZeroRun  |BlockRun 5|BlockRun 6| ...                   ``locate``
                             |        or one frame of it
             chunk_reader: read, decrypted, unpacked, proven          threads, once

Damage spoils its own range: a chunk that is not what its id says is EIO for its bytes, a page of
the map that cannot be read for those it stands for; everything else is served.

``nbdsrv:changed-since:POINT`` tells what differs from another point of the group, newer or older,
by comparing maps.
"""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence

from nbdsrv.disk.blocks import Blocks
from nbdsrv.disk.disk import Disk
from nbdsrv.disk.residency import Stored
from nbdsrv.disk.runs import BlockRun, Run, ZeroRun
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import CorruptImage, DiskError
from nbdsrv.repository.comparing import CHANGED, MAX_OTHERS, announced
from nbdsrv.repository.native.boot_trace import load_trace, put_trace
from nbdsrv.repository.native.changes import changes
from nbdsrv.repository.native.chunk_reader import ChunkReader
from nbdsrv.repository.native.entry import Kind
from nbdsrv.repository.native.frames import FRAME
from nbdsrv.repository.native.hashing import ZERO_ID
from nbdsrv.repository.native.pages import Pages
from nbdsrv.repository.native.point import DiskRecord, PointRecord
from nbdsrv.repository.native.slots import Root
from nbdsrv.repository.native.spans import SpanStore, Sweeps, spans_of
from nbdsrv.repository.native.vault import Vault
from nbdsrv.repository.repository import stamp_of
from protocol.contexts import ALLOCATION, ALLOCATION_DEPTH
from protocol.extents import DATA, HOLE, ExtentList

__all__ = ["CHANGED_SINCE", "SMALL_MAP", "PointDisk"]

log = logging.getLogger(__name__)

CHANGED_SINCE = "nbdsrv:changed-since:"
"""A meta context for each other point: 1 where the disk differs from what it was there, else 0."""
MAX_EXTENTS = 1 << 16
"""Extents looked up in one go; an answer may stop short."""
MAX_LOADS = 64
"""Pages read for one answer: some ten milliseconds."""
AHEAD = 16
"""Pages read along with one that is wanted by who reads on; 2 GiB of the disk."""
SMALL_MAP = 64
"""Pages of a map that is read when the disk is opened, some 5 ms: 8 GiB of data. Whoever boots
from it reads here and there, and would wait for each of them."""
TURNS = 16
"""Pages read at a time."""
OTHERS_BYTES = 4 << 20
"""Bytes of pages kept of each of them."""
MAX_WARMED = 64 << 20
"""Bytes decoded ahead on one request to cache."""


class PointDisk(Disk):
    """A disk of a restore point, read-only.

    Attributes:
        record: of the disk.
        point: of the point.
        pages: its map.
    """

    format = "repo"

    def __init__(
        self,
        workers: Workers,
        vault: Vault,
        point: PointRecord,
        record: DiskRecord,
        root: Root,
        others: Mapping[str, DiskRecord],
        release: Callable[[], Awaitable[None]],
    ) -> None:
        """Use ``NativeRepository.open_disk``.

        Args:
            workers: for everything that blocks.
            vault: stays open until ``release``.
            point: whose disk it is.
            record: of the disk.
            root: of its map.
            others: point to disk: what ``changed-since`` can compare with, from old to new.
            release: called once, when it is closed.
        """
        super().__init__(workers)
        self.name = f"{vault.name}#{point.group}/{record.name}@{point.id}"
        self.size = root.size
        self.point = point
        self.record = record
        self.contexts = announced(others)
        self.pages = Pages(vault, root)
        self._vault = vault
        self._root = root
        self._chunk = root.chunk_size
        self._slots = root.page_slots
        # Of each chunk: itself, and its frames.
        self._stride = 1 + -(-root.chunk_size // FRAME)
        self._reader = ChunkReader(vault)
        self._blocks = Blocks(workers.cache, self._decode, self._stored)
        self._distant = vault.store if isinstance(vault.store, SpanStore) else None
        self._sweeps = Sweeps(self.pages, self._distant) if self._distant else None
        self._others = others
        self._compared: OrderedDict[str, Pages | None] = OrderedDict()
        self._release = release
        self._turns = tuple(asyncio.Lock() for _ in range(TURNS))
        self._next_page = -1
        self._closed = False

    @property
    def facts(self) -> Mapping[str, object]:
        """What the point says."""
        point, record = self.point, self.record
        return {
            "group": point.group,
            "disk": record.name,
            "point": point.id,
            "created": stamp_of(point.created),
            "parent": point.parent,
            "mode": record.mode,
            "reason": record.reason,
            "consistency": point.consistency,
            "image_id": record.image_id,
            "chunk_size": self._chunk,
            "new_bytes": record.new_bytes,
        }

    async def prepare(self) -> None:
        """Read the map and open the packs if they are few and near, so that nobody has to wait
        for that later.
        """
        if self._distant is None:
            await self.workers.run(self._prepare)

    def _prepare(self) -> None:
        self.pages.load_small(SMALL_MAP)
        self._reader.prepare(self.pages.packs())

    # --- addresses -----------------------------------------------------------------------------

    def locate(self, offset: int, length: int) -> Sequence[Run] | None:
        """From pages in memory: zeroes, and chunks to be decoded."""
        if self._closed or offset + length > self.size:
            return None  # ``load`` says why
        chunk = self._chunk
        key, skip = divmod(offset, chunk)
        if skip + length > chunk:
            return self._locate(offset, length)
        page = self.pages.peek(key // self._slots)
        if page is None:
            return None
        if page.zeroes[key % self._slots]:
            return (ZeroRun(length),)
        frame, inside = divmod(skip, FRAME)
        key *= self._stride
        if inside + length > FRAME or self._stride == 2 or key in self._blocks.held:
            return self._runs(key, skip, length)
        return (BlockRun(self._blocks, key + 1 + frame, inside, length),)

    def _runs(self, key: int, skip: int, length: int) -> list[Run]:
        """Of the chunk of that key: its frames, or all of it if half is wanted, or it is there."""
        blocks = self._blocks
        if self._stride == 2 or 2 * length > self._chunk or key in blocks.held:
            return [BlockRun(blocks, key, skip, length)]
        runs: list[Run] = []
        while length:
            frame, inside = divmod(skip, FRAME)
            part = min(FRAME - inside, length)
            runs.append(BlockRun(blocks, key + 1 + frame, inside, part))
            skip += part
            length -= part
        return runs

    def _locate(self, offset: int, length: int) -> Sequence[Run] | None:
        runs: list[Run] = []
        chunk, slots, peek = self._chunk, self._slots, self.pages.peek
        at, end = offset, offset + length
        zeroes = 0
        while at < end:
            key, skip = divmod(at, chunk)
            page = peek(key // slots)
            if page is None:
                return None
            part = min(chunk - skip, end - at)
            if page.zeroes[key % slots]:
                zeroes += part
            else:
                if zeroes:
                    runs.append(ZeroRun(zeroes))
                    zeroes = 0
                runs += self._runs(key * self._stride, skip, part)
            at += part
        if zeroes:
            runs.append(ZeroRun(zeroes))
        return runs

    async def load(self, offset: int, length: int) -> None:
        """Read the pages of this range. One that cannot be read is no error yet."""
        self._check(offset, length)
        span = self._root.page_span
        for number in range(offset // span, (offset + length - 1) // span + 1):
            await self._load(number)

    async def _load(self, number: int) -> None:
        self._check_open()
        if self.pages.peek(number) is not None:
            return
        async with self._turns[number % TURNS]:
            self._check_open()
            if self.pages.peek(number) is not None:
                return
            ahead = AHEAD if number == self._next_page else 0
            self._next_page = number + ahead + 1
            if self._distant is None:
                await self.workers.look_up(self.pages.load, number, ahead)
                return
            # Not on the few threads that others' look-ups need. Neighbours come in one call.
            upto = min(number + 1 + ahead, len(self._root))
            pages = [n for n in range(number, upto) if self.pages.peek(n) is None]
            for span in spans_of(Kind.PAGE, map(self._root.pages.place, pages)):
                self._distant.announce(*span)
            await self.workers.run(self.pages.load, number, ahead)

    def _decode(self, key: int) -> bytes:
        """A chunk or one of its frames, in a thread."""
        chunk, part = divmod(key, self._stride)
        number, index = divmod(chunk, self._slots)
        page = self.pages.get(number)
        length = min(self._chunk, self._root.size - chunk * self._chunk)
        id_ = page.id(index)
        if id_ == ZERO_ID:  # its page was lost when it was located
            return bytes(length if not part else min(FRAME, length - (part - 1) * FRAME))
        if self._sweeps is not None:
            self._sweeps.before(chunk)
        if not part:
            return self._reader.chunk(id_, page.place(index), length)
        return self._reader.frame(id_, page.place(index), length, part - 1)

    def _stored(self, key: int) -> Stored | None:
        """Where a frame lies, if its page is in memory and its pack is open."""
        chunk, part = divmod(key, self._stride)
        number, index = divmod(chunk, self._slots)
        held = self.pages.peek(number)
        if not part or held is None or held.page is None or held.zeroes[index]:
            return None
        length = min(self._chunk, self._root.size - chunk * self._chunk)
        return self._reader.stored(held.page.place(index), length, part - 1)

    async def cache(self, offset: int, length: int) -> None:
        """Decode the chunks of the range, so that they are in memory."""
        self._check(offset, length)
        if not length:
            return
        runs = await self.runs(offset, min(length, MAX_WARMED))
        keys = [run.key for run in runs if isinstance(run, BlockRun)]
        await self.workers.run(self._warm, keys)

    def _warm(self, keys: Sequence[int]) -> None:
        for key in keys:
            if self._blocks.peek(key) is None:
                self._blocks.get(key, 0)

    async def boot_trace(self) -> bytes | None:
        """What was kept of the last boot off any point of this disk, or None.

        Raises:
            CorruptImage: it is damaged.
            StoreError: the store does not answer.
        """
        group, name = self.point.group, self.record.name
        return await self.workers.run(load_trace, self._vault, group, name)

    async def keep_boot_trace(self, content: bytes) -> None:
        """Keep it for the next.

        Raises:
            StoreError: the repository cannot be written.
        """
        group, name = self.point.group, self.record.name
        await self.workers.run(put_trace, self._vault, group, name, content)

    # --- block status --------------------------------------------------------------------------

    async def extents(self, offset: int, length: int) -> ExtentList:
        """Zeroes are holes: nothing is stored for them."""
        return await self.status(ALLOCATION, offset, length)

    async def status(self, context: str, offset: int, length: int) -> ExtentList:
        """Allocation, its depth (1: stored, 0: not), and what has changed since other points."""
        self._check(offset, length)
        if not length:
            raise DiskError(f"{self.name}: nothing lies at {offset}, its end")
        self._check_open()
        if context == ALLOCATION:
            found = await self._allocation(offset, length, (DATA, HOLE))
        elif context == ALLOCATION_DEPTH:
            found = await self._allocation(offset, length, (1, 0))
        elif (other := self._others.get(context.removeprefix(CHANGED_SINCE))) is not None and (
            context.startswith(CHANGED_SINCE)
        ):
            theirs = await self._compared_with(other)
            if theirs is None:
                found = [(length, CHANGED)]
            else:
                found = await self.workers.run(changes, self.pages, theirs, offset, length)
        else:
            raise self._no_context(context)
        return ExtentList(offset, found)

    async def _allocation(
        self, offset: int, length: int, flags: tuple[int, int]
    ) -> list[tuple[int, int]]:
        """With ``flags`` for data and for zeroes."""
        chunk, slots, span = self._chunk, self._slots, self._root.page_span
        found: list[tuple[int, int]] = []
        at, end, loads = offset, offset + length, 0
        while at < end and len(found) < MAX_EXTENTS:
            number = at // span
            stop = min(self.pages.first_not_zero(number) * span, end)
            if stop > at:
                found.append((stop - at, flags[1]))
                at = stop
                continue
            page = self.pages.peek(number)
            if page is None:
                if loads == MAX_LOADS and found:
                    break
                loads += 1
                await self._load(number)
                continue
            first, zeroes = number * slots, page.zeroes
            limit = min(-(-end // chunk) - first, len(zeroes))
            index = at // chunk - first
            while index < limit:
                state = zeroes[index]
                index = zeroes.find(1 - state, index, limit)
                if index < 0:
                    index = limit
                stop = min((first + index) * chunk, end)
                found.append((stop - at, flags[state]))
                at = stop
        return found

    async def _compared_with(self, other: DiskRecord) -> Pages | None:
        """The map of another point, for comparing; None if it is gone.

        That point may have been pruned since this disk was opened. As with a page that cannot be
        read everything counts as changed then, and what else is asked along is answered.
        """
        key = other.root.id
        if key not in self._compared:
            pages = None
            try:
                root = await self.workers.run(self._vault.root, other.root)
                pages = Pages(self._vault, root, OTHERS_BYTES)
            except CorruptImage as error:
                log.warning("changes.unknown disk=%r all=changed reason=%s", self.name, error)
            self._compared.setdefault(key, pages)
            while len(self._compared) > MAX_OTHERS:
                self._compared.popitem(last=False)
        return self._compared[key]

    # --- life ----------------------------------------------------------------------------------

    async def close(self) -> None:
        """Give memory and lease back."""
        if self._closed:
            return
        self._closed = True
        self._blocks.close()
        self._reader.close()
        self.pages.clear()
        self._compared.clear()
        await self._release()

    def _check_open(self) -> None:
        if self._closed:
            raise DiskError(f"{self.name} is closed")
