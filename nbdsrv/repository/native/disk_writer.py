"""One disk of a point being written: from bytes to slots.

::

    data ── thread ── chunk by chunk: zero? ── id ── as in the parent? ── stored? ── compress
                                        |             |                    |           |
            then, in the order          zero slot     nothing to do        slot      open pack
            of the calls                                                           full: put

Rule: what a thread has found out about a piece becomes part of packs and map in the order in which
pieces were given, so that neighbours on the disk are neighbours in a pack.
"""

import asyncio
import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from nbdsrv.copying.survey import DataMap
from nbdsrv.copying.zeroes import is_zero
from nbdsrv.errors import DiskError
from nbdsrv.repository.native.frames import Framed, encode_frames
from nbdsrv.repository.native.hashing import ID_SIZE
from nbdsrv.repository.native.map_writer import MapWriter
from nbdsrv.repository.native.pack_writer import Filled, PackWriter
from nbdsrv.repository.native.sealing import Codec
from nbdsrv.repository.native.stock import Stock
from nbdsrv.repository.repository import DiskWriter, WriteSummary

__all__ = ["NativeDiskWriter"]


class _Fresh(NamedTuple):
    """A chunk that is not as in the parent; ``body`` is None where it is stored already."""

    chunk: int
    id: bytes
    length: int
    body: Framed | None = None


class _Findings(NamedTuple):
    """What a thread has found out about a piece."""

    zeroes: list[int]
    fresh: list[_Fresh]
    length: int
    zero_bytes: int
    unchanged_bytes: int


class NativeDiskWriter(DiskWriter):
    """One disk of a point in a native repository. Made by ``NativePointWriter.disk``.

    Attributes:
        facts: of the disk, as they go into the point; may be changed until it is committed.
        told_bytes: of the disk, in all calls so far.
        map: of the disk.
        expected_image_id: what the disk's must be, or None; otherwise nothing is committed.
        has_parent: is there a disk in the parent point that this one is told in terms of?
    """

    def __init__(self, stock: Stock, name: str, map_: MapWriter, facts: Mapping[str, Any]) -> None:
        self.name = name
        self.size = map_.size
        self.granularity = stock.vault.config.chunk_size
        self.summary = WriteSummary()
        self.facts = dict(facts)
        self.has_parent = map_.parent is not None
        self.told_bytes = 0
        self.map = map_
        self.expected_image_id: str | None = None
        self._stock = stock
        self._last: asyncio.Future[None] | None = None

    # --- telling -------------------------------------------------------------------------------

    async def data(self, offset: int, buffer: bytearray, length: int) -> None:
        """As promised. Packs that it fills are put before it returns, so a slow store slows it."""
        self._check(offset, length)
        turn = asyncio.get_running_loop().create_future()
        before, self._last = self._last, turn
        try:
            found = await self._stock.workers.run(self._look, offset, buffer, length)
            if before is not None:
                await asyncio.shield(before)
            await self._stock.room()
            filled = await self._stock.workers.run(self._keep, found)
        except BaseException as error:
            self._fail(error)
            raise
        finally:
            turn.set_result(None)
        await self._stock.put(filled)

    async def zero(self, offset: int, length: int) -> None:
        """As promised."""
        self._check(offset, length)
        try:
            await self._stock.room()
            filled = await self._stock.workers.run(self._keep_zeroes, offset, length)
        except BaseException as error:
            self._fail(error)
            raise
        await self._stock.put(filled)

    async def adopt(self, chunks: Sequence[tuple[int, bytes]]) -> list[int]:
        """Tell chunks by their ids alone, each (number, id), not zeroes.

        Returns:
            Those whose content is not stored here: they have not been told.
        """
        self._stock.check()
        try:
            missing, filled = await self._stock.workers.run(self._adopt, chunks)
        except BaseException as error:
            self._fail(error)
            raise
        await self._stock.put(filled)
        return missing

    def _adopt(
        self, chunks: Sequence[tuple[int, bytes]]
    ) -> tuple[list[int], list[tuple[PackWriter, Filled]]]:
        stock, parent, unit = self._stock, self.map.parent, self.granularity
        same = {n for n, id_ in chunks if parent is not None and parent.same(n, id_)}
        fresh = [(n, id_) for n, id_ in chunks if n not in same]
        missing = [
            n for n, id_ in fresh if not stock.find(id_)
        ]  # loads the index, without the lock
        missing_too = set(missing)
        with stock.lock:
            for chunk, id_ in chunks:
                length = min(unit, self.size - chunk * unit)
                if chunk in same:
                    self.summary.unchanged_bytes += length
                elif chunk in missing_too:
                    continue
                else:
                    slot = stock.slot(id_)
                    assert slot is not None, "what was stored stays so"
                    self.summary.duplicate_bytes += length
                    self.map.set(chunk, slot)
                self.told_bytes += length
            self.map.relieve()
            return missing, stock.full()

    def _check(self, offset: int, length: int) -> None:
        self._stock.check()
        unit, end = self.granularity, offset + length
        if offset % unit or (end % unit and end != self.size) or not 0 <= offset <= end:
            raise DiskError(f"{self.name}: {length} bytes at {offset} are no whole chunks")
        if end > self.size:
            raise DiskError(f"{self.name}: {length} bytes at {offset} end beyond {self.size}")

    def _fail(self, error: BaseException) -> None:
        self._stock.failure = self._stock.failure or error

    def _look(self, offset: int, buffer: bytearray, length: int) -> _Findings:
        """Find out what is in a piece. In a thread, beside others."""
        stock, parent = self._stock, self.map.parent
        id_of, unit = stock.vault.hashing.id_of, self.granularity
        zeroes: list[int] = []
        fresh: list[_Fresh] = []
        zero_bytes = unchanged_bytes = 0
        chunk = offset // unit
        with memoryview(buffer) as view:
            for start in range(0, length, unit):
                end = min(start + unit, length)
                if is_zero(buffer, start, end):
                    zeroes.append(chunk)
                    zero_bytes += end - start
                else:
                    part = view[start:end]
                    id_ = id_of(part)
                    if parent is not None and parent.same(chunk, id_):
                        unchanged_bytes += end - start
                    elif stock.find(id_):
                        fresh.append(_Fresh(chunk, id_, end - start))
                    else:
                        body = encode_frames(part, id_, stock.level)
                        fresh.append(_Fresh(chunk, id_, end - start, body))
                    part.release()
                chunk += 1
        return _Findings(zeroes, fresh, length, zero_bytes, unchanged_bytes)

    def _keep(self, found: _Findings) -> list[tuple[PackWriter, Filled]]:
        """Make it part of packs and map. In a thread; full packs are the caller's to put."""
        stock, summary = self._stock, self.summary
        full: list[tuple[PackWriter, Filled]] = []
        with stock.lock:
            self.told_bytes += found.length
            summary.zero_bytes += found.zero_bytes
            summary.unchanged_bytes += found.unchanged_bytes
            for chunk in found.zeroes:
                self.map.zero(chunk, chunk + 1)
            for chunk, id_, length, body in found.fresh:
                slot = stock.slot(id_)
                if slot is not None:
                    summary.duplicate_bytes += length
                else:
                    assert body is not None, "what was stored stays so"
                    before = stock.chunks.new_bytes
                    slot = stock.add(id_, Codec.FRAMES, length, body)
                    summary.new_bytes += stock.chunks.new_bytes - before
                    full += stock.full()
                self.map.set(chunk, slot)
            self.map.relieve()
            full += stock.full()
        return full

    def _keep_zeroes(self, offset: int, length: int) -> list[tuple[PackWriter, Filled]]:
        with self._stock.lock:
            self.told_bytes += length
            self.summary.zero_bytes += length
            self.map.zero(offset // self.granularity, -(-(offset + length) // self.granularity))
            self.map.relieve()
            return self._stock.full()

    # --- what the parent is good for -----------------------------------------------------------

    async def wanted(self) -> list[tuple[int, int]]:
        """(offset, length) of what must be told although nothing says that it has changed.

        Beyond the end of a parent that was shorter; what lies in packs that are about to be
        deleted; what shares a damaged page of the map with what has been told. Ask again until
        there is nothing left: without it nothing can be committed.
        """
        return await self._stock.workers.run(self._wanted)

    def _wanted(self) -> list[tuple[int, int]]:
        with self._stock.lock:
            return list(self.map.wanted())

    async def recheck(self, offset: int, buffer: bytearray, length: int) -> int:
        """Bytes of chunks that are not as in the parent. Tells the point nothing.

        Raises:
            DiskError: the parent's map cannot be read.
        """
        return await self._stock.workers.run(self._recheck, offset, buffer, length)

    def _recheck(self, offset: int, buffer: bytearray, length: int) -> int:
        parent, id_of, unit = self.map.parent, self._stock.vault.hashing.id_of, self.granularity
        assert parent is not None
        different = 0
        with memoryview(buffer) as view:
            for start in range(0, length, unit):
                end = min(start + unit, length)
                zero = is_zero(buffer, start, end)
                id_ = bytes(ID_SIZE) if zero else id_of(view[start:end])
                if not parent.holds((offset + start) // unit, id_):
                    different += end - start
        return different

    async def sample(
        self, percent: float, changed: DataMap, data: DataMap | None = None
    ) -> list[tuple[int, int]]:
        """As promised."""
        return await self._stock.workers.run(self._sample, percent, changed, data)

    def _sample(
        self, percent: float, changed: DataMap, data: DataMap | None
    ) -> list[tuple[int, int]]:
        parent, unit = self.map.parent, self.granularity
        if parent is None or percent <= 0:
            return []
        chosen: list[int] = []
        spare: list[int] = []
        for page in range(min(len(parent.root), -(-parent.covered // parent.root.page_slots))):
            first = page * parent.root.page_slots
            end = min(first + parent.root.page_slots, parent.covered)
            now = set(data.units(unit, first, end)) if data is not None else set()
            if parent.is_zero(page):
                there = now
            elif parent.page(page).page is None:
                continue  # damaged: nobody knows what it held
            else:
                there = now.union(first + index for index in parent.page(page).data())
            found = [
                chunk
                for chunk in sorted(there)
                if chunk < end and not changed.data_until(chunk * unit)[0]
            ]
            count = min(len(found), int(len(found) * percent / 100 + random.random()))  # noqa: S311
            chosen += random.sample(found, count)
            if not spare:
                spare = found
        if not chosen and spare:
            chosen = [random.choice(spare)]  # noqa: S311
        chosen.sort()
        return [(chunk * unit, min(unit, self.size - chunk * unit)) for chunk in chosen]
