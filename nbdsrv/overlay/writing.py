"""Writing over a base: into the data file, and then the state of the block.

::

    DATA blocks           over what is there            place: the fast path of net/
    others, whole         into the file, then the state    Landing: likewise
    others, in part       with the rest of the block from the base (or zeroes) around it

The data file has the disk's own addresses: a block is where the guest has it, or nowhere. What
lies in the file of a block that is not DATA or COPIED is never looked at. So a write of whole
blocks may go into the file whatever their state (``Landing``), and they become DATA when it has.

Who stores what it has read from the base around a write (or copies the base) must not do so over
such a write: it has the disk to itself, so far as these go straight into the file (``alone``).
"""

import asyncio
import errno as os_errno
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from threading import get_ident
from typing import TypeVarTuple

from nbdsrv.disk.disk import Ability, Disk, read_runs
from nbdsrv.disk.flights import Flights, Landing
from nbdsrv.disk.runs import FileRun, RemoteRun, Run, ZeroRun
from nbdsrv.errors import DiskError
from nbdsrv.overlay.block_map import BLOCK, BLOCK_BITS, PAGE_BITS, PAGE_BLOCKS, BlockMap
from nbdsrv.overlay.claims import Claims
from nbdsrv.overlay.durability import Durability
from nbdsrv.overlay.files import Files
from nbdsrv.overlay.frozen import Frozen
from nbdsrv.overlay.layered import Layered, clipped
from nbdsrv.overlay.opened import Opened
from nbdsrv.overlay.states import COPIED, DATA, DIRTY, IN_FILE, ZERO

__all__ = ["MASK", "WrittenOver", "all_zero"]

Ts = TypeVarTuple("Ts")

MASK = BLOCK - 1
PLACE_BLOCKS = 4096
"""Blocks ``place`` looks at beyond the one it was asked for."""


class WrittenOver(Layered):
    """Everything about writing; zeroes, freezing and the rest are ``Overlay``'s.

    Attributes:
        states: of all blocks.
        companions: called, in this order, before it is closed.
    """

    def __init__(self, base: Disk, opened: Opened) -> None:
        """Use ``opening.open_overlay``. Becomes the owner of both."""
        super().__init__(base.workers, base, opened.path, opened.point)
        self.abilities = (
            Ability.WRITE
            | Ability.FLUSH
            | Ability.TRIM
            | Ability.ZERO
            | Ability.FAST_ZERO
            | Ability.MULTI_CONN
        )
        self.landing: Landing = _Fresh(self)
        self.changing = Flights()
        self.states: BlockMap = opened.states
        self.companions: list[Callable[[], Awaitable[None]]] = []
        self._opened = opened
        self._files: Files = opened.files
        self._claims = Claims()
        self._making = asyncio.Lock()
        self._durability: Durability | None = None
        self._frozen: Frozen | None = None
        self._freezing = False
        self._changes = 0
        self._lonely = 0
        self._thread = get_ident()
        if opened.made:
            self._begin()

    def _begin(self) -> None:
        opened = self._opened
        self._use_data(opened.data_fd)
        self.states = opened.states
        self._durability = opened.durability(self.workers)

    @property
    def epoch(self) -> int:  # type: ignore[override]
        """Changes with ours and with the base's."""
        if self.landing.stored and get_ident() == self._thread:
            self.settle()
        return self._changes + self.base.epoch

    @property
    def facts(self) -> dict[str, object]:
        """What ``overlay info`` tells, and the base's."""
        self.settle()
        counts = self.states.counts
        return {
            **super().facts,
            "dirty_bytes": sum(counts[state] for state in DIRTY) << BLOCK_BITS,
            "copied_bytes": counts[COPIED] << BLOCK_BITS,
        }

    def locate(self, offset: int, length: int) -> Sequence[Run] | None:
        """Cut short where nothing near has been touched: the base's answer, nearly as it is."""
        if self.landing.stored:
            self.settle()
        page = offset >> PAGE_BITS
        if page in self.states or (offset + length - 1) >> PAGE_BITS != page or self._closed:
            return super().locate(offset, length)
        runs = self.base.locate(offset, length)
        if runs is None or (len(runs) == 1 and runs[0].length <= length):
            return runs
        return clipped(runs, offset, min(self.states.untouched(page) << PAGE_BITS, self.size))

    def _stretch(self, block: int, end: int) -> tuple[int, int]:
        if self.landing.stored:
            self.settle()
        return self.states.stretch(block, end)

    def settle(self) -> None:
        """Take note of what threads have written."""
        stored = self.landing.stored
        while stored:
            offset, length = stored.popleft()
            # Whole blocks only: a part went into a block that was DATA, and if it is not any more,
            # something has made it zeroes meanwhile; that must not bring back what lay around it.
            first, end = self.whole(offset, length)
            if first < end and not (end - first == 1 and self.states.get(first) == DATA):
                self.enter(first, end, DATA)

    def whole(self, offset: int, length: int) -> tuple[int, int]:
        """The blocks within the range, first and end; nothing lies beyond the disk's end."""
        end = offset + length
        last = end if end < self.size else end + MASK
        return (offset + MASK) >> BLOCK_BITS, last >> BLOCK_BITS

    def settled_states(self) -> BlockMap:
        """``states`` as they are now."""
        self.settle()
        return self.states

    # --- writing -------------------------------------------------------------------------------

    def place(self, offset: int, length: int) -> FileRun | None:
        """Blocks that are DATA; none while a frozen view needs to know of every change."""
        if not self._open_for_placing():
            return None
        self.settle()
        first = offset >> BLOCK_BITS
        end = (offset + length + MASK) >> BLOCK_BITS
        state, stop = self.states.stretch(first, end + PLACE_BLOCKS)
        if state != DATA or stop < end:
            return None
        reach = min(stop << BLOCK_BITS, self.size) - offset
        return FileRun(self._data_fd, offset, reach, self._residency)

    def place_whole(self, offset: int) -> tuple[int, FileRun] | None:
        """For ``Landing.place``: anywhere, but for blocks whose change must be told before."""
        if self._lonely or not self._open_for_placing():
            return None
        start, stop = 0, self.size & ~MASK
        if self.states.counts[COPIED]:
            self.settle()
            first = offset >> BLOCK_BITS
            end = self.states.before(first, min(first + PLACE_BLOCKS, stop >> BLOCK_BITS), COPIED)
            start, stop = offset, end << BLOCK_BITS
        if offset >= stop:
            return None
        return start, FileRun(self._data_fd, start, stop - start, self._residency)

    def _open_for_placing(self) -> bool:
        durability = self._durability
        if durability is None or durability.failed:
            return False
        return self._frozen is None and not self._closed

    async def write(self, offset: int, data: memoryview) -> None:
        """Store ``data``; durable after ``flush``. A full disk is ENOSPC for this write only."""
        self._check_change(offset, len(data))
        if not len(data):
            return
        first, end = self._blocks_of(offset, len(data))
        await self.change(first, end, partial(self._write, offset, data))

    async def _write(self, offset: int, data: memoryview) -> None:
        """All its blocks are claimed."""
        after = offset + len(data)
        first, end = self._blocks_of(offset, len(data))
        fresh = (offset & MASK and self.states.get(first) not in IN_FILE) or (
            after & MASK and after < self.size and self.states.get(end - 1) not in IN_FILE
        )
        if not fresh:
            await self._store(offset, data)
            return
        async with self.alone():
            await self._store(offset, data)

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Nothing goes straight into the file until the end of the block."""
        self._lonely += 1
        self.landing.epoch += 1
        try:
            await self.landing.landed()
            self.settle()
            yield
        finally:
            self._lonely -= 1

    async def _store(self, offset: int, data: memoryview) -> None:
        first, end = self._blocks_of(offset, len(data))
        after = offset + len(data)
        before_part = tail_part = None
        if offset & MASK:
            before_part = await self._around(first, first << BLOCK_BITS, offset)
        if after & MASK and after < self.size:
            tail_part = await self._around(end - 1, after, min(end << BLOCK_BITS, self.size))
        position = offset - (len(before_part) if before_part is not None else 0)
        views = [view for view in (before_part, data, tail_part) if view is not None]
        watched = await self._watch(first, end)
        stored = False
        try:
            await self._run(self._write_down, views, position, first, end)
            stored = True
        finally:
            if stored:
                self.enter(first, end, DATA)
            elif watched:  # they are in place: whatever arrived has changed them
                self._enter_copied(first, end)

    def _write_down(self, views: Sequence[memoryview], position: int, first: int, end: int) -> None:
        self._files.write(self._data_fd, views, position)
        self.mark(first, end, DATA)

    def mark(self, first: int, end: int, state: int) -> None:
        """For who goes on if we are killed; before the change is answered. Any thread; OSError."""
        recent = self._opened.recent
        assert recent is not None
        recent.mark(first, end, state)

    async def _around(self, block: int, offset: int, end: int) -> memoryview | None:
        """What a block holds beside what is written into it; None where that stays in place."""
        state = self.states.get(block)
        if state in IN_FILE:
            return None
        if state == ZERO:
            return memoryview(bytes(end - offset))
        buffer = memoryview(bytearray(end - offset))
        runs = await self.base.runs(offset, end - offset)
        if isinstance(runs[0], RemoteRun):
            await self.base.read_into(offset, buffer)
        elif not all_zero(runs):
            await self._run(read_runs, self.base.name, offset, runs, buffer)
        return buffer

    def enter(self, first: int, end: int, state: int) -> None:
        """Blocks have a new state from now on."""
        states, durability = self.states, self._durability
        assert durability is not None
        changed = False
        for start, stop, old in list(states.stretches(first, end)):
            if old != state:
                durability.note(start, stop, state)
                changed = True
        if changed:
            states.set(first, end, state)
            self._changes += 1
            if state != DATA:
                self.landing.epoch += 1

    def _enter_copied(self, first: int, end: int) -> None:
        for start, stop, old in list(self.states.stretches(first, end)):
            if old == COPIED:
                self.enter(start, stop, DATA)

    async def _watch(self, first: int, end: int) -> bool:
        """Before COPIED blocks change. Are there any?"""
        if not self.states.counts[COPIED]:
            return False
        pages = {
            page
            for start, stop, state in self.states.stretches(first, end)
            if state == COPIED
            for page in range(start // PAGE_BLOCKS, (stop - 1) // PAGE_BLOCKS + 1)
        }
        if pages:
            assert self._durability is not None
            await self._durability.watch(pages)
        return bool(pages)

    # --- changing, in turn ---------------------------------------------------------------------

    async def change(self, first: int, end: int, work: Callable[[], Awaitable[None]]) -> None:
        """Do ``work`` while these blocks are nobody else's, and a frozen view has its copies."""
        if self._durability is None:
            await self.make()
        while not await self._claims.free(first, end):
            self._check_open()
        claim = self._claims.take(first, end)
        ticket = self.changing.begin()
        try:
            self.settle()
            if self._frozen is not None:
                await self._frozen.keep(first, end)
            await work()
        finally:
            self.changing.end(ticket)
            self._claims.release(claim)

    async def make(self) -> None:
        """Before the first change: there is an overlay on the disk from now on."""
        async with self._making:
            if self._durability is None:
                self._check_open()
                await self._run(self._opened.make)
                self._begin()

    def _check_change(self, offset: int, length: int) -> None:
        self._check_open()
        self._check(offset, length, os_errno.ENOSPC)

    async def _run(self, work: Callable[[*Ts], object], *args: *Ts) -> None:
        try:
            await self.workers.run(work, *args)
        except OSError as error:
            raise DiskError.from_os(self.name, error) from error


class _Fresh(Landing):
    """Where whole blocks of an overlay may go."""

    def __init__(self, overlay: WrittenOver) -> None:
        super().__init__(BLOCK)
        self._overlay = overlay

    def place(self, offset: int, length: int) -> tuple[int, FileRun] | None:
        placed = self._overlay.place_whole(offset)
        if placed is None or offset + length > placed[0] + placed[1].length:
            return None
        return placed

    def land(self, done: Sequence[tuple[int, int]]) -> None:
        """Marked first: what follows may be forgotten with the process."""
        for offset, length in done:
            first, end = self._overlay.whole(offset, length)
            if first < end:
                self._overlay.mark(first, end, DATA)
        super().land(done)

    def end(self, ticket: int) -> None:
        super().end(ticket)
        self._overlay.settle()


def all_zero(runs: Sequence[Run]) -> bool:
    return all(isinstance(run, ZeroRun) for run in runs)
