"""The copy-on-write Disk: what is written goes into the data file, the base is only read.

::

    write   see ``writing``
    zero    whole blocks          the state, then a hole in the file
    trim    likewise; what is not whole stays as it is
    flush   see ``durability``
    freeze  see ``frozen``

A hole may be punched before the state is durable. If the power fails between the two, the block
is DATA and reads as zeroes: what was asked for, only earlier than promised.
"""

import asyncio
import contextlib
import errno as os_errno
from collections.abc import Sequence
from functools import partial

from nbdsrv.errors import DiskError
from nbdsrv.overlay.block_map import BLOCK_BITS, PAGE_BLOCKS
from nbdsrv.overlay.frozen import Frozen, copy_range
from nbdsrv.overlay.states import BASE, COPIED, IN_FILE, ZERO
from nbdsrv.overlay.writing import MASK, WrittenOver, all_zero

__all__ = ["Overlay"]

YIELD_PAGES = 64
"""Pages cleared before others on the loop have their turn."""


class Overlay(WrittenOver):
    """A base and what was written over it. One for all clients, so that a flush is for all."""

    # --- zeroing -------------------------------------------------------------------------------

    async def zero(self, offset: int, length: int, *, punch: bool, fast: bool) -> None:
        """Whole blocks by their state, the rest by writing."""
        self._check_change(offset, length)
        first, last = self.whole(offset, length)
        if fast and length and first >= last:
            raise DiskError(f"{self.name}: no faster than writing", os_errno.EOPNOTSUPP)
        if not length:
            return
        if first >= last:
            await self._zero_part(offset, length)
            return
        start, stop = first << BLOCK_BITS, last << BLOCK_BITS
        await self._zero_part(offset, start - offset)
        await self._clear(first, last, punch=punch)
        await self._zero_part(stop, offset + length - stop)

    async def trim(self, offset: int, length: int) -> None:
        """Whole blocks read as zeroes; the others stay as they are."""
        self._check_change(offset, length)
        first, last = self.whole(offset, length)
        if first < last:
            await self._clear(first, last, punch=True)

    async def _zero_part(self, offset: int, length: int) -> None:
        """Zeroes in parts of one or two blocks, unless they are there anyway."""
        end = offset + length
        while offset < end:
            upto = min(((offset >> BLOCK_BITS) + 1) << BLOCK_BITS, end)
            if not all_zero(await self.runs(offset, upto - offset)):
                await self.write(offset, memoryview(bytes(upto - offset)))
            offset = upto

    async def _clear(self, first: int, last: int, *, punch: bool) -> None:
        pages = 0
        while first < last:
            stop = min(last, (first // PAGE_BLOCKS + 1) * PAGE_BLOCKS)
            await self.change(first, stop, partial(self._clear_page, first, stop, punch))
            first = stop
            pages += 1
            if pages % YIELD_PAGES == 0:
                await asyncio.sleep(0)

    async def _clear_page(self, first: int, stop: int, punch: bool) -> None:  # noqa: FBT001
        """All these blocks are claimed."""
        stretches = list(self.states.stretches(first, stop))
        await self._watch(first, stop)
        async with self.alone():  # or a write that lands meanwhile is marked before, entered behind
            self.enter(first, stop, ZERO)
            await self._run(self.mark, first, stop, ZERO)
        held = [(start, end) for start, end, state in stretches if state in IN_FILE]
        if held and punch:
            await self._run(self._punch, held)

    def _punch(self, stretches: Sequence[tuple[int, int]]) -> None:
        """Give the space back, where the file system can: in a thread."""
        for start, end in stretches:
            with contextlib.suppress(OSError):
                position = start << BLOCK_BITS
                self._files.punch(self._data_fd, position, (end - start) << BLOCK_BITS)

    # --- what was not written by the guest -------------------------------------------------------

    async def adopt(self, offset: int, buffer: memoryview) -> int:
        """Take what the base holds into the data file, where nothing else has been written.

        Changes nothing for the guest. Durable after ``flush``.

        Args:
            offset: bytes, of whole blocks.
            buffer: what the base holds there: whole blocks, or up to the disk's end.

        Returns:
            Bytes taken; the others were no longer the base's.

        Raises:
            DiskError: the disk is full, or the range is no whole blocks.
        """
        self._check_change(offset, len(buffer))
        end = offset + len(buffer)
        if offset & MASK or (end & MASK and end != self.size):
            raise DiskError(f"{self.name}: {len(buffer)} bytes at {offset} are no whole blocks")
        taken = 0
        for at, upto, state in list(self._stretches(offset, len(buffer))):
            if state == BASE:
                part = buffer[at - offset : upto - offset]
                if self._durability is None:
                    await self.make()
                first, stop = self._blocks_of(at, len(part))
                while not await self._claims.free(first, stop):
                    self._check_open()
                claim = self._claims.take(first, stop)
                try:
                    async with self.alone():
                        taken += await self._adopt(at, part)
                finally:
                    self._claims.release(claim)
        return taken

    async def _adopt(self, offset: int, buffer: memoryview) -> int:
        taken = 0
        for at, upto, state in list(self._stretches(offset, len(buffer))):
            if state == BASE:
                view = buffer[at - offset : upto - offset]
                await self._run(self._files.write, self._data_fd, [view], at)
                first, stop = self._blocks_of(at, len(view))
                assert self._durability is not None
                self._durability.note(first, stop, COPIED)
                self.states.set(first, stop, COPIED)
                taken += len(view)
        return taken

    # --- durability, freezing, life ------------------------------------------------------------

    async def flush(self) -> None:
        """Everything written before is on the disk; once that has failed it fails for good."""
        self._check_open()
        if self._durability is not None:
            self.settle()
            try:
                await self._durability.flush()
            finally:
                if self._durability.failed:
                    self.landing.epoch += 1

    async def freeze(self) -> Frozen:
        """This moment as a read-only Disk, until it is closed; writes go on.

        What is being written at this moment is in it or not; what had been answered is.

        Raises:
            DiskError: it is frozen already (EBUSY), or there is no room for a scratch file.
        """
        self._check_open()
        if self._frozen is not None or self._freezing:
            text = f"{self.name} is frozen already, for a commit that is running"
            raise DiskError(text, os_errno.EBUSY)
        self._freezing = True
        frozen = Frozen(self, self._thawed)
        try:
            await self._run(frozen.make_scratch, self._opened.path)
            self._check_open()
            self._frozen = frozen
            self.landing.epoch += 1  # nothing is placed any more
            await self.landing.landed()
            await self.changing.landed()
            self.settle()
        except BaseException:
            await frozen.close()
            raise
        finally:
            self._freezing = False
        return frozen

    def _thawed(self) -> None:
        self._frozen = None

    def copy_out(self, target: int, position: int, length: int) -> None:
        """A range of the data file into another file, at the same place. Blocking: OSError."""
        copy_range(self._data_fd, target, position, length)

    async def close(self) -> None:
        """Flush, then close the files and the base, and let go of the overlay.

        One that nobody has written to is removed.
        """
        if self._closed:
            return
        for companion in self.companions:
            await companion()
        self.settle()
        self._closed = True
        self._changes += 1
        self.landing.epoch += 1
        try:
            if self._durability is not None and not self._durability.failed:
                await self._durability.finish()
                if self._opened.recent is not None:
                    await self._run(self._opened.recent.forget)
        finally:
            if self._frozen is not None:
                await self._frozen.close()
            await self.workers.look_up(self._opened.close)
            await self.base.close()
