"""One disk of a point being written into a Xen Orchestra repository: from bytes to blocks.

::

    data ── thread ── block by block: zero? ── sum ── as in the parent? ── pack ── seal ── file
                                        |              |
                          in the parent: a block       nothing to do
                          of zeroes; else nothing

Rules:

* A block is told whole, so none is ever made up of new bytes and the parent's.
* What reads as zeroes now, and not in the parent, is stored as zeroes.
* What is in the parent is known by its checksums: not a byte of the parent is read.
"""

import random
import threading
from collections.abc import Iterator
from functools import cache
from uuid import UUID

from nbdsrv.copying.survey import DataMap
from nbdsrv.copying.zeroes import is_zero
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import DiskError
from nbdsrv.repository.repository import DiskWriter, WriteSummary
from nbdsrv.repository.xo.checksums import Sums, sum_of
from nbdsrv.repository.xo.writer_lineage import Member
from nbdsrv.repository.xo.writer_vessel import Vessel
from nbdsrv.repository.xo.writer_vhd import BLOCK

__all__ = ["Base", "XoDiskWriter"]


class Base:
    """What a disk is told in terms of.

    Attributes:
        member: the disk it will lie upon: the tip of the chain.
        sums: of all blocks that are not zeroes there, as the tip reads.
        stale: blocks that may differ between the point that is built upon and the tip.
        size: bytes of the disk in the point that is built upon.
    """

    def __init__(self, member: Member, sums: Sums, stale: frozenset[int], size: int) -> None:
        self.member = member
        self.sums = sums
        self.stale = stale
        self.size = size


class XoDiskWriter(DiskWriter):
    """Made by ``XoPointWriter.disk``. Belongs to one event loop.

    Attributes:
        unique_id: of the disk to be.
        vessel: what its blocks are put into.
        base: what it is told in terms of, or None.
        sums: of the blocks that are stored.
    """

    granularity = BLOCK

    def __init__(
        self,
        workers: Workers,
        name: str,
        size: int,
        unique_id: UUID,
        vessel: Vessel,
        base: Base | None,
        *,
        lost: bool,
    ) -> None:
        """``lost``: there is a parent, but none of its blocks can be used: all must be told."""
        self.name = name
        self.size = size
        self.summary = WriteSummary()
        self.facts = {}
        self.unique_id = unique_id
        self.vessel = vessel
        self.base = base
        self.sums = Sums()
        self._workers = workers
        self._blocks = -(-size // BLOCK)
        self._told = bytearray(self._blocks)
        self._told_bytes = 0
        self._lost = lost
        self._lock = threading.Lock()
        self._failure: BaseException | None = None
        self._ended = False

    # --- telling -------------------------------------------------------------------------------

    async def data(self, offset: int, buffer: bytearray, length: int) -> None:
        """As promised. Blocks are durable when it returns, so a slow disk slows it."""
        self._check(offset, length)
        try:
            await self._workers.run(self._store, offset, buffer, length)
        except BaseException as error:
            self._failure = self._failure or error
            raise
        self._tell(offset, length)

    async def zero(self, offset: int, length: int) -> None:
        """As promised."""
        self._check(offset, length)
        try:
            await self._workers.run(self._store_zeroes, offset, length)
        except BaseException as error:
            self._failure = self._failure or error
            raise
        self._tell(offset, length)

    def check(self) -> None:
        """Raises what has made it unfit to be committed, and ends it.

        Raises:
            DiskError: something could not be stored, or was not told.
        """
        self._ended = True
        if self._failure is not None:
            raise DiskError(f"{self.name}: not all of it is stored: {self._failure}")
        if missing := self._wanted():
            raise DiskError(f"{self.name}: nothing was told of {missing[0][1]} bytes it needs")

    def close(self) -> None:
        """Nothing more is stored."""
        self._ended = True

    def count_untold(self) -> None:
        """Summary of what was never told: unchanged, or zeroes."""
        untold = self.size - self._told_bytes
        if self.base is not None:
            self.summary.unchanged_bytes += untold
        else:
            self.summary.zero_bytes += untold

    def _check(self, offset: int, length: int) -> None:
        end = offset + length
        if self._ended:
            raise DiskError(f"{self.name}: this point is committed or aborted already")
        if offset % BLOCK or (end % BLOCK and end != self.size) or not 0 <= offset <= end:
            raise DiskError(f"{self.name}: {length} bytes at {offset} are no whole blocks")
        if end > self.size:
            raise DiskError(f"{self.name}: {length} bytes at {offset} end beyond {self.size}")

    def _tell(self, offset: int, length: int) -> None:
        first, stop = offset // BLOCK, -(-(offset + length) // BLOCK)
        self._told[first:stop] = b"\1" * (stop - first)
        self._told_bytes += length

    def _store(self, offset: int, buffer: bytearray, length: int) -> None:
        """In a thread, beside others."""
        with memoryview(buffer) as view:
            for start in range(0, length, BLOCK):
                end = min(start + BLOCK, length)
                block = (offset + start) // BLOCK
                if is_zero(buffer, start, end):
                    self._store_zero(block, end - start)
                    continue
                with view[start:end] as part:
                    self._store_block(block, part)

    def _store_block(self, block: int, part: memoryview) -> None:
        length = len(part)
        data = part if length == BLOCK else memoryview(bytes(part).ljust(BLOCK, b"\0"))
        value = sum_of(data)
        if self.base is not None and self.base.sums.get(block) == value:
            with self._lock:
                self.summary.unchanged_bytes += length
            return
        self._keep(block, data, value)

    def _keep(self, block: int, data: memoryview, value: bytes) -> None:
        stored = self.vessel.store(block, data)
        with self._lock:
            self.summary.new_bytes += stored
            self.sums.put(block, value)

    def _store_zeroes(self, offset: int, length: int) -> None:
        first, stop = offset // BLOCK, -(-(offset + length) // BLOCK)
        if self.base is None:
            self._count_zero(length)
            return
        covered = 0
        for block in self.base.sums.blocks(first, stop):
            size = min(BLOCK, self.size - block * BLOCK)
            self._store_zero(block, size)
            covered += size
        self._count_zero(length - covered)

    def _store_zero(self, block: int, length: int) -> None:
        self._count_zero(length)
        if self.base is not None and self.base.sums.get(block) is not None:
            self._keep(block, memoryview(_zeroes()), zero_sum())

    def _count_zero(self, length: int) -> None:
        with self._lock:
            self.summary.zero_bytes += length

    # --- what the parent is good for -----------------------------------------------------------

    async def wanted(self) -> list[tuple[int, int]]:
        """As promised: all, where the parent cannot be lain upon; what lies beyond its end; and
        what points between the parent and the tip of its chain have changed.
        """
        return self._wanted()

    def _wanted(self) -> list[tuple[int, int]]:
        if self._lost:
            blocks: Iterator[int] = iter(range(self._blocks))
        elif self.base is not None:
            blocks = self._beside_parent(self.base)
        else:
            return []
        found: list[tuple[int, int]] = []
        for block in blocks:
            if self._told[block]:
                continue
            start = block * BLOCK
            end = min(start + BLOCK, self.size)
            if found and sum(found[-1]) == start:
                found[-1] = found[-1][0], end - found[-1][0]
            else:
                found.append((start, end - start))
        return found

    def _beside_parent(self, base: Base) -> Iterator[int]:
        beyond = base.size // BLOCK  # the block it ends in has been padded by zeroes
        yield from sorted(block for block in base.stale if block < min(beyond, self._blocks))
        if base.size < self.size:
            yield from range(beyond, self._blocks)
        else:
            yield from sorted(block for block in base.stale if beyond <= block < self._blocks)

    async def recheck(self, offset: int, buffer: bytearray, length: int) -> int:
        """As promised."""
        return await self._workers.run(self._recheck, offset, buffer, length)

    def _recheck(self, offset: int, buffer: bytearray, length: int) -> int:
        assert self.base is not None
        different = 0
        for start in range(0, length, BLOCK):
            end = min(start + BLOCK, length)
            known = self.base.sums.get((offset + start) // BLOCK)
            if is_zero(buffer, start, end):
                same = known is None
            else:
                part = bytes(memoryview(buffer)[start:end]).ljust(BLOCK, b"\0")
                same = known == sum_of(part)
            different += 0 if same else end - start
        return different

    async def sample(
        self, percent: float, changed: DataMap, data: DataMap | None = None
    ) -> list[tuple[int, int]]:
        """As promised."""
        if self.base is None or percent <= 0:
            return []
        known = set(self.base.sums.blocks(0, self._blocks))
        now = set(data.units(BLOCK, 0, self._blocks)) if data is not None else set()
        there = [block for block in sorted(known | now) if not changed.data_until(block * BLOCK)[0]]
        if not there:
            return []
        count = max(1, int(len(there) * percent / 100 + random.random()))  # noqa: S311
        chosen = sorted(random.sample(there, min(count, len(there))))
        return [(each * BLOCK, min(BLOCK, self.size - each * BLOCK)) for each in chosen]


@cache
def _zeroes() -> bytes:
    return bytes(BLOCK)


@cache
def zero_sum() -> bytes:
    """Of a block of zeroes."""
    return sum_of(_zeroes())
