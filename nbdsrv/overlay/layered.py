"""Reading a disk that is partly its own and partly its base's.

::

    states   BASE  | DATA | BASE | ZERO | COPIED | ...        a byte per 4 KiB, in memory
    locate   base's|File  | base | Zero | File   |            data file: position = offset
             runs   Run     runs   Run    Run

Where the base is remote or a wrapper, only ``read_into`` gives what lies in it: a range that
touches it is a RemoteRun as a whole.

``qemu:dirty-bitmap:overlay`` and, over a restore point, ``nbdsrv:changed-since:`` that point tell
what is not as in the base; over a point the base's own changed-since contexts go on working, with
what is dirty here added to what they say.
"""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nbdsrv.disk.disk import Disk, read_runs
from nbdsrv.disk.residency import NEVER, Residency, inline_flags
from nbdsrv.disk.runs import FileRun, RemoteRun, Run, ZeroRun
from nbdsrv.disk.workers import Workers
from nbdsrv.errors import DiskError
from nbdsrv.overlay.block_map import BLOCK, BLOCK_BITS
from nbdsrv.overlay.states import BASE, DIRTY, IN_FILE, ZERO
from protocol.contexts import ALLOCATION, ALLOCATION_DEPTH
from protocol.extents import DATA, HOLE, ExtentList

__all__ = ["CHANGED_SINCE", "DIRTY_CONTEXT", "Layered", "clipped"]

DIRTY_CONTEXT = "qemu:dirty-bitmap:overlay"
CHANGED_SINCE = "nbdsrv:changed-since:"
"""As a restore point's Disk names its contexts: 1 where something differs from another point."""
MAX_EXTENTS = 1 << 14
"""Extents looked up in one go; an answer may stop short."""


class Layered(Disk):
    """What Overlay and Frozen have in common.

    Attributes:
        base: below; whoever opened it closes it.
        point: id of the restore point the base is, or "".
    """

    format = "overlay"

    def __init__(self, workers: Workers, base: Disk, name: str, point: str) -> None:
        super().__init__(workers)
        self.base = self.backing = base
        self.name = name
        self.size = base.size
        self.point = point
        self.contexts = (ALLOCATION, ALLOCATION_DEPTH, DIRTY_CONTEXT)
        since = CHANGED_SINCE + point
        if point:
            self.contexts += (since,)
        for each in base.contexts:
            if each.startswith(CHANGED_SINCE) and each != since:
                self.contexts += (each,)
        self._data_fd = -1
        self._residency = Residency(NEVER)
        self._closed = False

    @property
    def facts(self) -> Mapping[str, object]:
        """The base's, which are what the disk was."""
        return {"base": {"name": self.base.name, **self.base.facts}}

    def _use_data(self, fd: int) -> None:
        self._data_fd = fd
        self._residency = Residency(inline_flags(fd))

    @abstractmethod
    def _stretch(self, block: int, end: int) -> tuple[int, int]:
        """State of ``block``, and up to which block at or before ``end`` it goes on."""

    def _stretches(self, offset: int, length: int) -> Iterator[tuple[int, int, int]]:
        """(offset, end, state) in bytes, ascending, within the range; blocks are cut to it."""
        at, end = offset, offset + length
        last = (end - 1 >> BLOCK_BITS) + 1
        while at < end:
            state, stop = self._stretch(at >> BLOCK_BITS, last)
            upto = min(stop << BLOCK_BITS, end)
            yield at, upto, state
            at = upto

    # --- reading -------------------------------------------------------------------------------

    def locate(self, offset: int, length: int) -> Sequence[Run] | None:
        """From the states in memory, and what the base knows."""
        end = offset + length
        if self._closed or end > self.size:
            return None  # ``load`` says why
        ceiling = -(-self.size >> BLOCK_BITS)
        state, stop = self._stretch(offset >> BLOCK_BITS, ceiling)
        upto = min(stop << BLOCK_BITS, self.size)
        if upto >= end:
            if state == BASE:
                runs = self.base.locate(offset, length)
                return runs if runs is None else clipped(runs, offset, upto)
            if state == ZERO:
                return (ZeroRun(upto - offset),)
            return (FileRun(self._data_fd, offset, upto - offset, self._residency),)
        found: list[Run] = []
        at = offset
        while at < end:
            if state == BASE:
                runs = self.base.locate(at, min(upto, end) - at)
                if runs is None:
                    return None
                if runs and isinstance(runs[0], RemoteRun):
                    return (RemoteRun(length),)
                found += clipped(runs, at, upto)
            elif state == ZERO:
                found.append(ZeroRun(upto - at))
            else:
                found.append(FileRun(self._data_fd, at, upto - at, self._residency))
            at = upto
            if at < end:
                state, stop = self._stretch(at >> BLOCK_BITS, ceiling)
                upto = min(stop << BLOCK_BITS, self.size)
        return found

    async def load(self, offset: int, length: int) -> None:
        """What the base needs to locate what is still its own."""
        self._check(offset, length)
        self._check_open()
        for at, end, state in list(self._stretches(offset, length)):
            if state == BASE:
                await self.base.load(at, end - at)

    async def read_into(self, offset: int, buffer: memoryview) -> None:
        """From both; what only the base can give, by its own ``read_into``."""
        length = len(buffer)
        if not length:
            return
        self._check(offset, length)
        self._check_open()
        runs = await self.runs(offset, length)
        if not isinstance(runs[0], RemoteRun):
            await self.workers.run(read_runs, self.name, offset, runs, buffer)
            return
        for at, end, state in list(self._stretches(offset, length)):
            part = buffer[at - offset : end - offset]
            if state == BASE:
                await self.base.read_into(at, part)
            elif state == ZERO:
                part[:] = bytes(end - at)
            else:
                run = FileRun(self._data_fd, at, end - at, self._residency)
                await self.workers.run(read_runs, self.name, at, (run,), part)

    async def cache(self, offset: int, length: int) -> None:
        """Of the base, what is still its own."""
        self._check(offset, length)
        for at, end, state in list(self._stretches(offset, length)):
            if state == BASE:
                await self.base.cache(at, end - at)

    # --- block status --------------------------------------------------------------------------

    async def extents(self, offset: int, length: int) -> ExtentList:
        """Ours from the states, the rest as the base says."""
        return await self.status(ALLOCATION, offset, length)

    async def status(self, context: str, offset: int, length: int) -> ExtentList:
        """Allocation, its depth (1: here or below), and what has changed."""
        self._check(offset, length)
        self._check_open()
        if not length:
            raise DiskError(f"{self.name}: nothing lies at {offset}, its end")
        if context not in self.contexts and not self._answers(context):
            raise self._no_context(context)
        if context in {DIRTY_CONTEXT, CHANGED_SINCE + self.point}:
            return self._dirty(offset, length)
        found: list[tuple[int, int]] = []
        at = offset
        while at < offset + length and len(found) < MAX_EXTENTS:
            at, end, state = next(self._stretches(at, offset + length - at))
            told = self._told(context, state)
            if told is None:
                below = await self._base_status(context, at, end - at)
                found += [(each.length, each.flags) for each in below]
                if at + below.length < end:
                    break
            else:
                found.append((end - at, told))
            at = end
        return ExtentList(offset, found)

    def _answers(self, context: str) -> bool:
        """Restore points answer for more points than they announce."""
        return bool(self.point) and context.startswith(CHANGED_SINCE)

    def _told(self, context: str, state: int) -> int | None:
        """What a block's own state says in a context; None where the base must be asked."""
        if context.startswith(CHANGED_SINCE):
            return 1 if state in DIRTY else None
        if state == BASE:
            return None
        if context == ALLOCATION:
            return DATA if state in IN_FILE else HOLE
        return 1 if state in IN_FILE else 0

    async def _base_status(self, context: str, offset: int, length: int) -> ExtentList:
        if context == ALLOCATION_DEPTH:
            found = await self.base.extents(offset, length)
            return ExtentList(offset, [(e.length, 0 if e.flags & 1 else 1) for e in found])
        if context == ALLOCATION:
            return await self.base.extents(offset, length)
        return await self.base.status(context, offset, length)

    def _dirty(self, offset: int, length: int) -> ExtentList:
        found: list[tuple[int, int]] = []
        before = -1
        for at, end, state in self._stretches(offset, length):
            flags = int(state in DIRTY)
            if flags != before and len(found) >= MAX_EXTENTS:
                break
            found.append((end - at, flags))
            before = flags
        return ExtentList(offset, found)

    def _check_open(self) -> None:
        if self._closed:
            raise DiskError(f"{self.name} is closed")

    def _blocks_of(self, offset: int, length: int) -> tuple[int, int]:
        """The blocks that are touched, first and end."""
        return offset >> BLOCK_BITS, (offset + length + BLOCK - 1) >> BLOCK_BITS


def clipped(runs: Sequence[Run], offset: int, end: int) -> Sequence[Run]:
    """``runs`` from ``offset`` on, none beyond ``end``."""
    if len(runs) == 1:
        run: Any = runs[0]
        return runs if run.length <= end - offset else (run._replace(length=end - offset),)
    found: list[Run] = []
    for run in runs:
        if offset >= end:
            break
        found.append(run if run.length <= end - offset else run._replace(length=end - offset))
        offset += run.length
    return found
