"""Reading what is owed: once for all branches, then for each what it has missed.

::

    owed by any   |====|.........|=========|     data is read, holes are told without
    read          [####]         [##][##][ ...   as long as the fastest branch keeps up
    branch A      [####]         [##][##]
    branch B      [####]             [##]        no room: missed, read again at its own pace

The fastest branch sets the pace, so that it is never read for twice. The others are waited for
during a twentieth of the time, which is enough for those that are nearly as fast.
"""

import asyncio
from collections.abc import Sequence
from typing import NamedTuple

from nbdsrv.backup.branch import QUEUE, Branch, Piece
from nbdsrv.backup.ranges import data_within, steps, together
from nbdsrv.copying.progress import Advance
from nbdsrv.copying.reading import PIECE, WINDOW, Lender, read_piece
from nbdsrv.disk.disk import Disk
from nbdsrv.disk.patience import set_within
from nbdsrv.disk.throttle import Rate
from nbdsrv.disk.workers import Workers

__all__ = ["Driver", "queue_size"]

AHEAD = WINDOW + 2
"""Pieces under way for the fastest branch: two may wait for their packs to be put while the others
are worked on. More would only leave the processor's cache again."""
READS = 32
"""Reads under way: scattered data comes in small pieces, of which a distant source needs many."""
SMALL = 1 << 18
"""Bytes of a piece up to which memory is made for it; to make more of it costs page faults."""
PATIENCE = 0.05
"""Of the time, what is spent waiting for branches that are not the fastest."""


def queue_size(piece: int) -> int:
    """Bytes of a branch's queue: whatever the driver has under way fits."""
    return max(QUEUE, (AHEAD + 2) * piece)


class _Means(NamedTuple):
    """How a source is read."""

    source: Disk
    workers: Workers
    buffers: Lender
    piece: int
    rate: Rate | None


class Driver:
    """Reads a frozen source for its branches. Belongs to one event loop."""

    def __init__(
        self,
        source: Disk,
        branches: Sequence[Branch],
        workers: Workers,
        *,
        rate: Rate | None = None,
        advance: Advance | None = None,
    ) -> None:
        """Read ``source`` for ``branches``.

        Args:
            source: does not change.
            branches: their ``run`` is under way.
            workers: threads.
            rate: at which it is read, at most.
            advance: called with (bytes read, bytes to read), often.
        """
        piece = max([PIECE, *(branch.chunk for branch in branches)])
        # Never waited for: what is under way and what branches hold is bounded elsewhere.
        each = AHEAD + queue_size(piece) // piece + 1
        buffers = Lender((len(branches) + 1) * each, piece)
        self._means = _Means(source, workers, buffers, piece, rate)
        self._branches = branches
        self._advance = advance

    async def run(self) -> None:
        """Read what any branch is owed; some branches may have missed some of it.

        Raises:
            DiskError: the source cannot be read; it names the offset.
        """
        if self._branches:
            await _Drive(self._means, self._branches, self._advance).run()

    async def catch_up(self, branch: Branch) -> None:
        """Read what this branch is still owed; afterwards it has all, or has failed.

        Raises:
            DiskError: the source cannot be read; it names the offset.
        """
        await branch.drained()
        while branch.alive and any(branch.owed.rest()):
            await _Drive(self._means, [branch], None).run()
            await branch.drained()


class _Drive:
    """One pass over what is owed."""

    def __init__(self, means: _Means, branches: Sequence[Branch], advance: Advance | None) -> None:
        self._means = means
        self._branches = branches
        self._advance = advance
        self._reading = 0
        self._reads = 0
        self._done = self._total = 0
        self._moved = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._began = self._loop.time()
        self._waited = 0.0

    async def run(self) -> None:
        means, branches = self._means, self._branches
        source = means.source
        unit = max(branch.chunk for branch in branches)
        owed = together(source.size, unit, [branch.owed.rest() for branch in branches])
        data = await data_within(source, owed)
        self._total = data.bytes
        for branch in branches:
            branch.moved = self._moved.set
        async with asyncio.TaskGroup() as tasks:
            for offset, length, is_data in steps(owed, data, means.piece):
                if not any(branch.alive for branch in branches):
                    return
                if not is_data:
                    for branch in branches:
                        branch.zero(offset, length)
                elif await self._turn(offset, length):
                    await self._read(tasks, offset, length)

    async def _turn(self, offset: int, length: int) -> bool:
        """Wait until these bytes should be read; False if nobody needs them any more."""
        while True:
            needing = [each for each in self._branches if each.alive and each.owes(offset, length)]
            if not needing:
                return False
            patience: float | None = None
            if self._reads < READS and self._fits(needing, length):
                coming = self._reading + length
                if all(branch.has_room(coming) for branch in needing):
                    return True
                patience = (self._loop.time() - self._began) * PATIENCE - self._waited
                if patience <= 0:
                    return True
            await self._wait(patience)

    def _fits(self, needing: Sequence[Branch], length: int) -> bool:
        """Can the fastest branch take what is being read, and these bytes too?"""
        held = min(branch.backlog for branch in needing) + self._reading
        return not held or held + length <= AHEAD * self._means.piece

    async def _wait(self, patience: float | None) -> None:
        """Until something has moved; if it is out of patience with somebody, so long at most."""
        self._moved.clear()
        if patience is None:
            await self._moved.wait()
            return
        began = self._loop.time()
        await set_within(self._moved, patience)
        self._waited += self._loop.time() - began

    async def _read(self, tasks: asyncio.TaskGroup, offset: int, length: int) -> None:
        means = self._means
        if length > SMALL:
            piece = Piece(await means.buffers.take(), means.buffers.give_back)
        else:  # holds no more memory than it fills
            piece = Piece(bytearray(length))
        self._reading += len(piece.buffer)
        self._reads += 1
        if means.rate is not None:
            await means.rate.take(length)
        tasks.create_task(self._move(offset, length, piece))

    async def _move(self, offset: int, length: int, piece: Piece) -> None:
        means = self._means
        try:
            await read_piece(means.source, means.workers, offset, piece.buffer, length, _nothing)
            view = memoryview(piece.buffer)[:length]
            for branch in self._branches:
                branch.offer(offset, view, lambda: piece)
        finally:
            self._reading -= len(piece.buffer)
            self._reads -= 1
            piece.let_go()
            self._moved.set()
        self._done += length
        if self._advance is not None:
            self._advance(self._done, self._total)


def _nothing() -> None:
    """What has been read is looked at elsewhere."""
